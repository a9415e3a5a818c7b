"""Networks of torchvision and of fastai's `vision_learner` by name."""

import pytest
import timm
import torch
import torchvision
from fastai.vision.learner import create_timm_model, create_vision_model
from torch import nn

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.models import build_model, find_arch, make_recipe
from cxr_fastai.models.libraries import torchvision_names

IMAGES = torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize('name', ['resnet18', 'squeezenet1_1', 'efficientnet_b0', 'swin_t', 'shufflenet_v2_x0_5'])
def test_a_network_of_torchvision_is_a_body_and_a_head(name):
    model = build_model(f'torchvision.{name}').eval()
    assert model(IMAGES).shape == (2, 2) and model[0](IMAGES).ndim == 4
    assert [type(layer) for layer in model[1]] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in torchvision_names() if '128gf' not in name])
def test_every_network_of_torchvision_that_is_offered_can_be_built(name):
    assert build_model(f'torchvision.{name}').eval()(IMAGES).shape == (2, 2)


def test_weights_of_torchvision_start_training_by_default():
    assert find_arch('torchvision.resnet18').weights == {
        'imagenet': 'torchvision:ResNet18_Weights.IMAGENET1K_V1',
        'imagenet1k_v1': 'torchvision:ResNet18_Weights.IMAGENET1K_V1',
    }
    recipe = make_recipe('torchvision.resnet18')
    assert recipe.weights == 'imagenet' and [phase.frozen for phase in recipe.phases] == [True, False]


@pytest.mark.parametrize('arch', ['torchvision.resnet18', 'vision_learner.resnet18'])
def test_a_state_dict_of_torchvision_fills_the_body(arch, tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / 'resnet18.pth')
    body = build_model(arch, str(tmp_path / 'resnet18.pth'))[0].eval()
    expected = nn.Sequential(*list(theirs.eval().children())[:-2])
    assert torch.equal(body(IMAGES), expected(IMAGES))


def test_named_weights_come_from_the_cache_of_torchvision(tmp_path, monkeypatch):
    theirs = torchvision.models.resnet18(weights=None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / 'hub/checkpoints/resnet18-f37072fd.pth')
    monkeypatch.setattr(torch.hub, 'HASH_REGEX', None)
    ours = build_model('torchvision.resnet18', 'imagenet')
    assert torch.equal(ours[0][0].weight, theirs.conv1.weight)


def test_the_older_names_in_the_weights_of_densenet_are_understood(tmp_path):
    theirs = torchvision.models.densenet121(weights=None)
    state = {
        key.replace('.norm1.', '.norm.1.').replace('.conv1.', '.conv.1.').replace('.norm2.', '.norm.2.'): value
        for key, value in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / 'densenet.pth')
    ours = build_model('torchvision.densenet121', str(tmp_path / 'densenet.pth'))[0]
    assert all(map(torch.equal, ours.state_dict().values(), theirs.features.state_dict().values()))


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / 'resnet34.pth')
    with pytest.raises(CXRError, match='resnet34.pth: does not fit: .*is not part of the network'):
        build_model('torchvision.resnet18', str(tmp_path / 'resnet34.pth'))


@pytest.mark.parametrize(
    'name',
    [
        *('resnet18', 'densenet121', 'squeezenet1_1', 'efficientnet_b0'),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('resnet34', 'vgg11_bn', 'alexnet', 'swin_t')),
    ],
)
@pytest.mark.filterwarnings('ignore:The parameter .pretrained. is deprecated:UserWarning')  # fastai passes it
@pytest.mark.filterwarnings('ignore:Arguments other than a weight enum:UserWarning')
def test_vision_learner_networks_are_those_of_fastai(name):
    ours = build_model(f'vision_learner.{name}').eval()
    theirs = create_vision_model(getattr(torchvision.models, name), 2, pretrained=False).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize(('name', 'size'), [('resnet10t', 64), ('test_convnext', 64), ('test_vit', 160)])
def test_vision_learner_networks_of_timm_are_those_of_fastai(name, size):
    ours = build_model(f'vision_learner.timm.{name}').eval()
    theirs = create_timm_model(name, 2, pretrained=False)[0].eval()
    images = torch.randn(2, 3, size, size)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images), theirs(images))


def test_a_state_dict_of_timm_fills_the_body_of_a_vision_learner_network(tmp_path):
    theirs = timm.create_model('resnet10t')
    torch.save(theirs.state_dict(), tmp_path / 'w.pth')
    ours = build_model('vision_learner.timm.resnet10t', str(tmp_path / 'w.pth'))
    assert torch.equal(ours[0].model.conv1[0].weight, theirs.conv1[0].weight)


def test_the_initial_head_of_a_vision_learner_network_is_drawn_as_in_fastai():
    torch.manual_seed(0)
    theirs = create_vision_model(torchvision.models.resnet18, 2, pretrained=False)[1]
    ours = build_model('vision_learner.resnet18')[1]
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert mine.float().std(correction=0) == pytest.approx(other.float().std(correction=0).item(), rel=0.15)
        assert mine.float().mean() == pytest.approx(other.float().mean().item(), abs=0.02)


@pytest.mark.parametrize(
    ('arch', 'reason'),
    [
        ('torchvision.vit_b_16', 'cannot be cut into body and head'),
        ('torchvision.inception_v3', 'cannot be cut into body and head'),
        ('torchvision.resnet19', 'is unknown: choose a classifier in torchvision.models, such as resnet1'),
        ('torchvision.fcn_resnet50', 'is unknown'),
        ('vision_learner.resnet19', 'is unknown'),
        ('vision_learner.timm.resnet19x', 'is unknown'),
        ('vision_learner.mobilenet_v2', "fastai's vision_learner cannot cut this network. Use torchvision.mobile"),
    ],
)
def test_a_network_that_a_library_lacks_or_that_cannot_be_cut_is_refused(arch, reason):
    with pytest.raises(UsageError, match=rf'--arch .*{arch.split(".")[-1]}.*{reason}'):
        make_recipe(arch)

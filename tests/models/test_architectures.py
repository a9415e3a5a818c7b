"""The networks of the specification, and recipes for them."""

import pytest
import torch
import torchvision
from torch import nn

from cxr_fastai.core import environment
from cxr_fastai.core.errors import UsageError
from cxr_fastai.models.architectures import ARCHS, build_model, find_arch, make_recipe


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ('arch', 'parameters', 'head'),
    [('baseline', 422_530, 33_154), ('resnet50', 23_512_130, 4_098), ('efficientnet_lite0', 3_373_570, 2_562)],
)
def test_parameter_counts_are_those_of_the_specified_layers(arch, parameters, head):
    model = build_model(arch)
    assert (count(model), count(model[1])) == (parameters, head)
    assert ARCHS[arch].parameters == parameters


@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_is_a_body_and_a_head(arch):
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


def test_resnet50_computes_the_same_as_torchvision(torchvision_state, torchvision_file):
    plain = torchvision.models.resnet50(weights=None)
    plain.load_state_dict(torchvision_state)
    plain.fc = nn.Identity()
    ours = build_model('resnet50', str(torchvision_file))
    x = torch.randn(2, 3, 64, 64)
    ours[1][2] = nn.Identity()
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_errors_about_unknown_names_list_the_choices():
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


@pytest.mark.parametrize(('arch', 'maps'), [('resnet10t', True), ('test_convnext', True), ('test_vit', False)])
def test_every_network_of_timm_is_a_body_and_a_head(arch, maps):
    model, size = build_model(arch).eval(), find_arch(arch).size or 64
    x = torch.randn(2, 3, size, size)
    assert model(x).shape == (2, 2) and (model[0](x).ndim == 4) is maps
    assert isinstance(model[1][-1], nn.Linear)


def test_a_network_of_fixed_size_refuses_other_sizes():
    with pytest.raises(UsageError, match='--size 128, start_size 1: test_vit accepts only 160 pixels'):
        make_recipe('test_vit', weights='none', size=128)


@pytest.mark.parametrize(('arch', 'extra'), [('efficientnet_lite0', 'lite'), ('resnet18', 'timm')])
def test_a_missing_package_of_a_network_is_named_with_its_extra(monkeypatch, arch, extra):
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    with pytest.raises(UsageError, match=rf'--arch {arch}.* needs the package timm, .*cxr_fastai\[{extra}\]'):
        make_recipe(arch)


def test_tuned_is_short_and_freezes_nothing():
    for arch in ARCHS:
        recipe = make_recipe(arch, 'tuned')
        assert recipe.epochs == 6 and recipe.schedule == 'one-cycle' and not any(p.frozen for p in recipe.phases)


def test_a_network_of_fixed_size_is_tuned_at_full_size():
    assert make_recipe('test_vit', 'tuned', weights='none', size=160).start_size == 1
    with pytest.raises(UsageError, match='start_size 0.5: test_vit accepts only 160 pixels'):
        make_recipe('test_vit', 'tuned', weights='none', size=160, start_size=0.5)

"""An ensemble returns the mean logits of its members, and is built from its name."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.networks import build_network, tensor_facts
from cxr_fastai.interpretation.cam import activation_maps, find_layer, record_activations
from cxr_fastai.models.architectures import add_arch, build_model, check_recipe, find_arch, make_recipe
from cxr_fastai.models.catalog import count_parameters, describe_arch
from cxr_fastai.models.ensembles import make_ensemble, split_name

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def without_pooling() -> nn.Sequential:
    """A network whose body ends in an activation, and whose head works in place."""
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6))
    head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    return nn.Sequential(body, head)


def make_members(build, number: int) -> list[nn.Sequential]:
    torch.manual_seed(1)
    members = []
    for _ in range(number):
        member = build()
        with torch.no_grad():
            member[0].train()(torch.randn(8, 3, 64, 64))  # BatchNorm statistics, so that maps are not constant
        members.append(member.eval())
    return members


NETWORKS = {'baseline': lambda: build_model('baseline'), 'own': without_pooling}


@pytest.fixture(params=NETWORKS)
def members(request) -> list[nn.Sequential]:
    return make_members(NETWORKS[request.param], 3)


def test_the_logits_are_the_means_of_those_of_the_members(members):
    ensemble = make_ensemble(members).eval()
    with torch.no_grad():
        expected = torch.stack([member(IMAGES) for member in members]).mean(dim=0)
        assert torch.allclose(ensemble(IMAGES), expected, atol=1e-6)
        features = ensemble[0](IMAGES)
        assert torch.equal(features, torch.cat([member[0](IMAGES) for member in members], dim=1))
        kept = features.clone()
        ensemble[1](features)
        assert torch.equal(features, kept)
    assert isinstance(ensemble, nn.Sequential) and len(ensemble) == 2


def test_a_network_combined_with_itself_returns_the_same_logits(members):
    with torch.no_grad():
        assert torch.equal(make_ensemble([members[0]] * 2).eval()(IMAGES), members[0](IMAGES))


def test_the_members_are_copied(members):
    before = [parameter.clone() for member in members for parameter in member.parameters()]
    ensemble = make_ensemble(members)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.zero_()
    after = [parameter for member in members for parameter in member.parameters()]
    assert all(map(torch.equal, before, after))


def signed_map(model: nn.Module, target: int) -> torch.Tensor:
    """The map of Grad-CAM before negative values are removed."""
    with record_activations(find_layer(model)) as activations:
        logits = model(IMAGES)
    gradients = torch.autograd.grad(logits[:, target].sum(), activations[-1])[0]
    return (activations[-1] * gradients.mean(dim=(2, 3), keepdim=True)).sum(dim=1).detach()


@pytest.mark.parametrize('target', [0, 1])
def test_grad_cam_is_the_mean_of_the_maps_of_the_members_before_negative_values_are_removed(members, target):
    ensemble = make_ensemble(members).eval()
    expected = torch.stack([signed_map(member, target) for member in members]).mean(dim=0)
    assert torch.allclose(signed_map(ensemble, target), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    maps = activation_maps(ensemble, IMAGES, target)
    assert maps.shape == expected.shape and maps.max() > 0
    assert torch.allclose(maps, expected.relu(), rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_an_ensemble_is_built_from_its_name_in_a_new_process(tmp_path):
    members = make_members(NETWORKS['baseline'], 2)
    ensemble = make_ensemble(members).eval()
    torch.save((ensemble.state_dict(), IMAGES, ensemble(IMAGES).detach()), tmp_path / 'ensemble.pt')
    code = (
        'import sys, torch; from cxr_fastai.models.architectures import build_model; '
        'state, images, logits = torch.load(sys.argv[1]); model = build_model("ensemble2.baseline").eval(); '
        'model.load_state_dict(state); print(torch.equal(model(images), logits))'
    )
    command = [sys.executable, '-W', 'ignore', '-c', code, str(tmp_path / 'ensemble.pt')]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == 'True'


def test_the_facts_about_an_ensemble_follow_from_those_of_its_members():
    assert find_arch('ensemble3.baseline').parameters == count_parameters('ensemble3.baseline') == 3 * 422_530
    assert describe_arch('ensemble2.torchvision.resnet18').weights == ()
    assert describe_arch('ensemble2.torchvision.resnet18').size == 224
    assert split_name('ensemble12.torchvision.resnet18') == (12, 'torchvision.resnet18')
    assert split_name('resnet50') == (1, 'resnet50') and split_name('ensemble') == (1, 'ensemble')


@pytest.mark.parametrize(
    ('arch', 'reason'),
    [
        ('ensemble1.baseline', '1 member, but 2 to 20 are possible'),
        ('ensemble21.baseline', '21 members, but 2 to 20 are possible'),
        ('ensemble02.baseline', 'without a zero at the start'),
        ('ensemble2.ensemble2.baseline', 'an ensemble of ensembles'),
        ('ensemble2.nothing', '--arch nothing is unknown'),
        ('ensemble' + '9' * 150 + '.baseline', '2 to 20 are possible'),
    ],
)
def test_other_names_of_ensembles_are_refused(arch, reason):
    with pytest.raises(UsageError, match=reason):
        find_arch(arch)


def test_no_network_is_registered_by_the_name_of_an_ensemble():
    with pytest.raises(UsageError, match='ensemble2.mine is an architecture of this package already'):
        add_arch('ensemble2.mine', without_pooling)


def test_an_ensemble_is_not_trained():
    with pytest.raises(UsageError, match='made of trained networks. Train 2 runs with --arch baseline'):
        make_recipe('ensemble2.baseline')
    with pytest.raises(UsageError, match='made of trained networks'):
        check_recipe(replace(make_recipe('baseline'), arch='ensemble2.baseline'))
    with pytest.raises(UsageError, match='1 member,'):
        make_ensemble(make_members(without_pooling, 1))


def test_a_file_has_the_tensors_of_its_ensemble():
    config = ModelConfig('ensemble3.baseline', 48, 0.5)
    tensors = tensor_facts(build_model('ensemble2.baseline').state_dict())
    with pytest.raises(CXRError, match='not the weights of the network ensemble3.baseline'):
        build_network(config, tensors, Path('model.safetensors'))
    with pytest.raises(UsageError, match='its network cannot be built by its name'):
        build_network(ModelConfig('ensemble99.baseline', 48, 0.5), tensors, Path('model.safetensors'))

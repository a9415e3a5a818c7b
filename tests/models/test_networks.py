"""`create_network` accepts what a user may call an architecture."""

import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.models import (
    BaselineCNN,
    add_arch,
    build_model,
    create_network,
    describe_network,
    find_arch,
    make_recipe,
)

IMAGES = torch.randn(2, 3, 64, 64)


class Own(nn.Module):
    """A network of a user."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.pool(self.conv(x)).flatten(1))


def own() -> nn.Module:
    return Own(channels=6)


def needs_channels(channels):
    return Own(channels)


@pytest.mark.parametrize(
    ('arch', 'name'),
    [
        ('baseline', 'baseline'),
        ('resnet10t', 'resnet10t'),
        ('torchvision.resnet18', 'torchvision.resnet18'),
        (torchvision.models.resnet18, 'torchvision.resnet18'),
        (torchvision.models.resnet50, 'resnet50'),
        (timm.models.resnet10t, 'resnet10t'),
        (BaselineCNN, 'baseline'),
    ],
)
def test_names_and_functions_of_libraries_give_networks_that_have_a_name(arch, name):
    network = create_network(arch, pretrained=False)
    assert (network.arch, network.weights) == (name, 'none')
    assert network.model(IMAGES).shape == (2, 2)
    build_model(network.arch).load_state_dict(network.model.state_dict())


@pytest.mark.parametrize(
    ('arch', 'name', 'channels'),
    [(Own, 'Own', 4), (own, 'own', 6), (partial(Own, 7), 'Own', 7), (partial(needs_channels, 8), 'needs_channels', 8)],
)
def test_a_function_or_class_gives_a_network_that_has_its_name(arch, name, channels):
    network = create_network(arch)
    assert (network.arch, network.weights) == (name, 'own')
    assert network.model[1][-1].weight.shape == (2, channels)
    assert create_network(arch, pretrained=False).weights == 'none'


def test_a_module_keeps_its_weights():
    model = Own()
    network = create_network(model, pretrained=False)
    assert (network.arch, network.weights) == ('Own', 'own')
    assert network.model[0][0] is model.conv


@pytest.mark.parametrize(('model', 'name'), [(BaselineCNN(), 'baseline'), (BaselineCNN((3, 8)), 'BaselineCNN')])
def test_a_module_is_recognised_if_its_name_gives_the_same_network(model, name):
    network = create_network(model)
    assert network.arch == name and network.model is model


def test_a_module_is_recognised_under_the_name_of_its_class_once_this_is_registered():
    class Registered(Own):
        pass

    assert create_network(Registered(9)).arch == 'Registered'
    add_arch('Registered', partial(Registered, 9))
    assert create_network(Registered(9)).arch == create_network(partial(Registered, 9)).arch == 'Registered'
    assert create_network(Registered(8)).arch == 'own.Registered'


def test_a_network_of_a_user_never_gets_the_name_of_another():
    def resnet18():
        return Own()

    network = create_network(resnet18)
    assert network.arch == 'own.resnet18'
    with pytest.raises(UsageError, match=r'own\.resnet18 is unknown.*CXR_ARCHS=own\.resnet18='):
        find_arch(network.arch)


def test_default_weights_are_those_of_the_architecture():
    assert create_network('baseline').weights == 'none'
    lite0 = create_network('efficientnet_lite0')
    assert lite0.weights == 'imagenet'
    expected = build_model('efficientnet_lite0', 'imagenet')[0].state_dict()
    assert all(map(torch.equal, lite0.model[0].state_dict().values(), expected.values()))


@pytest.mark.parametrize('arch', ['resnet50', torchvision.models.resnet50])
@pytest.mark.parametrize('as_text', [True, False])
def test_weights_can_be_a_file(arch, as_text, torchvision_file, torchvision_state):
    network = create_network(arch, str(torchvision_file) if as_text else torchvision_file)
    assert (network.arch, network.weights) == ('resnet50', str(torchvision_file))
    assert torch.equal(network.model[0].conv1.weight, torchvision_state['conv1.weight'])


def test_weights_can_be_a_member_of_an_enumeration_of_torchvision(torchvision_file, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'hub/checkpoints/resnet50-11ad3fa6.pth').symlink_to(torchvision_file)
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    assert create_network(torchvision.models.resnet50, weights).weights == 'imagenet-v2'
    with pytest.raises(UsageError, match='neither a file nor known for resnet50'):
        create_network('resnet50', torchvision.models.ResNet18_Weights.DEFAULT)


@pytest.mark.parametrize('arch', [Own(), Own])
def test_weights_of_a_network_of_a_user_can_be_a_file(arch, tmp_path):
    model = Own()
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    network = create_network(arch, tmp_path / 'own.pth')
    assert network.weights == str(tmp_path / 'own.pth')
    assert torch.equal(network.model[0][0].weight, model.conv.weight)
    with pytest.raises(UsageError, match='--weights imagenet: neither a file nor known for Own: choose none'):
        create_network(arch, 'imagenet')


def test_losing_a_head_for_two_classes_is_a_warning():
    with pytest.warns(CXRWarning, match='DenseNet: its layers after the last pooling .*replaced by a new one'):
        create_network(torchvision.models.densenet121(num_classes=2))


@pytest.mark.parametrize(
    ('arch', 'reason'),
    [
        (needs_channels, r'needs_channels: needs the arguments channels\. .*functools.partial'),
        (lambda: 'a network', 'returned str, not a torch.nn.Module'),
        (3, r'architecture 3: a name, a function or class'),
        (torchvision.models.vit_b_16, 'torchvision.vit_b_16: cannot be cut'),
        (nn.Conv2d(3, 2, 3), r'Conv2d: none of its layers \(none\) contains pooling'),
    ],
)
def test_what_gives_no_network_is_refused(arch, reason):
    with pytest.raises(CXRError, match=reason):
        create_network(arch)


@pytest.mark.parametrize(
    ('arch', 'weights', 'origin'),
    [
        ('baseline', 'none', 'random'),
        ('baseline', '/home/me/w.pth', 'the file w.pth'),
        ('torchvision.resnet18', 'imagenet', 'torchvision:ResNet18_Weights.IMAGENET1K_V1'),
        ('Own', 'own', 'set in Python'),
        ('Own', '/home/me/w.pth', 'the file w.pth'),
    ],
)
def test_the_origin_of_the_weights_is_described(arch, weights, origin):
    recipe = make_recipe('baseline')
    object.__setattr__(recipe, 'arch', arch)
    object.__setattr__(recipe, 'weights', weights)
    assert describe_network(nn.Linear(3, 2), recipe) == {'parameters': 8, 'origin': origin}


def test_weights_that_were_set_in_python_cannot_be_trained_from_again():
    with pytest.raises(UsageError, match='--weights own: these are the weights that the network had in Python.*none'):
        make_recipe('baseline', weights='own')


def test_the_examples_of_the_page_about_own_networks_run():
    page = (Path(__file__).parents[2] / 'docs/models.md').read_text()
    names: dict = {}
    for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL):
        exec(block, names)
    assert (names['network'].arch, find_arch('mynet').default_weights) == ('MyNet', 'own')
    assert [type(layer).__name__ for layer in names['network'].model[1]] == ['AdaptiveAvgPool2d', 'Flatten', 'Linear']

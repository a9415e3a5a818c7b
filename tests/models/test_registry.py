"""Architectures of other packages are known by name in this process, by `CXR_ARCHS`, and by entry points."""

import sys
import uuid
from pathlib import Path

import pytest
import torch
from torch import nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.models import Arch, add_arch, build_model, create_network, find_arch, make_recipe
from cxr_fastai.models.registry import check_declared

SOURCE = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, channels=4):
        super().__init__(
            nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)),
        )

def tiny():
    return Tiny()

NUMBER = 1
"""


def new_name() -> str:
    """A name that no other test has registered."""
    return f'net-{uuid.uuid4().hex[:8]}'


class Uncut(nn.Module):
    """A network that is no `Sequential(body, head)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.pool(self.conv(x)).flatten(1))


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module that defines networks and that nothing has imported."""
    name = f'mynets_{uuid.uuid4().hex[:8]}'
    (tmp_path / f'{name}.py').write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_added_network_can_be_named_like_any_other():
    name = new_name()
    add_arch(name, Uncut)
    model = build_model(name)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2) and model[0][0].out_channels == 4
    assert make_recipe(name).weights == 'own' and len(make_recipe(name).phases) == 1
    assert create_network(name).arch == name


def test_whether_a_new_process_knows_a_network_can_be_checked(module, monkeypatch):
    name, declared = new_name(), new_name()
    monkeypatch.setenv('CXR_ARCHS', f'{declared}={module}:Tiny')
    add_arch(name, Uncut)
    for known in ('baseline', 'torchvision.resnet18', declared):
        check_declared(known)
    with pytest.raises(UsageError, match=f'{name}: registered by add_arch in this process only.*CXR_ARCHS={name}='):
        check_declared(name)


def test_an_added_network_with_weights_is_pretrained_and_loads_them(tmp_path):
    name, file = new_name(), tmp_path / 'uncut.pth'
    model = Uncut()
    torch.save(model.state_dict(), file)
    add_arch(name, Uncut, weights={'xrays': f'file:{file}'})
    recipe = make_recipe(name)
    assert recipe.weights == 'xrays' and [phase.frozen for phase in recipe.phases] == [True, False]
    network = build_model(name, 'xrays')
    assert torch.equal(network[0][0].weight, model.conv.weight) and network[1][-1].out_features == 2


def test_an_added_network_of_one_size_refuses_others():
    name = new_name()
    add_arch(name, Uncut, size=96)
    assert make_recipe(name, size=96).size == 96
    with pytest.raises(UsageError, match='accepts only 96 pixels'):
        make_recipe(name)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('baseline', 'baseline is an architecture of this package already'),
        ('torchvision.mine', 'torchvision.mine is an architecture of this package already'),
        ('resnet18', 'resnet18 is an architecture of timm already'),
        ('my net', "'my net' is no name of an architecture"),
        ('', "'' is no name"),
    ],
)
def test_a_name_that_means_another_network_is_refused(name, reason):
    with pytest.raises(UsageError, match=f'{reason}.*(Choose another name|Use letters)'):
        add_arch(name, Uncut)


def test_a_name_is_not_given_twice_but_a_cell_can_run_twice():
    name = new_name()

    def define() -> type:
        namespace = {'nn': nn}
        exec('class Cell(nn.Sequential): pass\nCell.__module__ = "__main__"', namespace)
        return namespace['Cell']

    add_arch(name, define())
    again = define()
    add_arch(name, again)
    with pytest.raises(UsageError, match=r'registered already, as __main__\.Cell\. Choose another name'):
        add_arch(name, Uncut)


def test_the_environment_declares_networks(module, monkeypatch):
    name, other = new_name(), new_name()
    monkeypatch.setenv('CXR_ARCHS', f'{name}={module}:Tiny, {other} = {module}:tiny,')
    assert module not in sys.modules
    assert type(build_model(name)).__name__ == 'Tiny'
    assert build_model(other)(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_a_declared_network_is_recognised_when_its_class_or_an_instance_is_passed(module, monkeypatch):
    name = new_name()
    monkeypatch.setenv('CXR_ARCHS', f'{name}={module}:Tiny')
    tiny = __import__(module).Tiny
    assert create_network(tiny).arch == name
    assert create_network(tiny()).arch == name
    assert create_network(tiny(channels=5)).arch == 'Tiny'  # another network of this class


def test_a_declared_object_can_have_all_facts(tmp_path, monkeypatch, module):
    name = new_name()
    text = 'from cxr_fastai.models import Arch\nFACTS = Arch(Tiny, {"reference": ()}, size=64)\n'
    Path(tmp_path, f'{module}.py').write_text(SOURCE + text)
    monkeypatch.setenv('CXR_ARCHS', f'{name}={module}:FACTS')
    facts = find_arch(name)
    assert isinstance(facts, Arch) and facts.size == 64 and facts.phases == {'reference': ()}


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('{name}', 'CXR_ARCHS: {name}: NAME=package.module:function is needed'),
        ('{name}={module}', 'CXR_ARCHS: {name}={module}: NAME=package.module:function is needed'),
        ('{name}=nowhere_at_all:Net', '{name}=nowhere_at_all:Net: cannot be imported .*PYTHONPATH'),
        ('{name}={module}:Nothing', '{name}={module}:Nothing: cannot be imported'),
        ('{name}={module}:NUMBER', '{name}={module}:NUMBER: this is int, not a function or class'),
        ('baseline={module}:Tiny', 'baseline={module}:Tiny: baseline is an architecture of this package already'),
        ('resnet18={module}:Tiny', r'resnet18={module}.Tiny: resnet18 is an architecture of timm already'),
    ],
)
def test_a_wrong_declaration_is_one_clear_error(module, monkeypatch, text, reason):
    name = 'baseline' if text.startswith('baseline') else 'resnet18' if text.startswith('resnet18') else new_name()
    monkeypatch.setenv('CXR_ARCHS', text.format(name=name, module=module))
    with pytest.raises(UsageError, match=reason.format(name=name, module=module)):
        find_arch(name)


def test_an_entry_point_of_an_installed_package_declares_networks(module, tmp_path):
    package = tmp_path / 'mynets-1.0.dist-info'
    package.mkdir()
    (package / 'METADATA').write_text('Metadata-Version: 2.1\nName: mynets\nVersion: 1.0\n')
    (package / 'entry_points.txt').write_text(f'[cxr_fastai.archs]\nentry-net = {module}:Tiny\n')
    assert type(build_model('entry-net')).__name__ == 'Tiny'


def test_the_error_about_an_unknown_name_says_how_to_register_a_network():
    with pytest.raises(UsageError, match=r'MyNet is unknown.*baseline.*CXR_ARCHS=MyNet=package.module:function'):
        find_arch('MyNet')

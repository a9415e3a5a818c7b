"""The list of all architectures, and the facts about each."""

import pytest
import timm
from torch import nn

from cxr_fastai.core import environment
from cxr_fastai.core.errors import UsageError
from cxr_fastai.models import ARCHS, add_arch, build_model
from cxr_fastai.models.catalog import describe_arch, list_archs


def small_net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))


def no_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3))


def test_without_a_pattern_the_list_has_own_networks():
    add_arch('catalog-net', small_net)
    names = list_archs()
    assert names[:3] == list(ARCHS) and 'catalog-net' in names


@pytest.mark.parametrize(
    ('pattern', 'included', 'excluded'),
    [
        ('resnet18', ['torchvision.resnet18', 'resnet18', 'resnet18d', 'seresnet18'], ['vision_learner.resnet18']),
        ('resnet18*', ['resnet18', 'resnet18d'], ['torchvision.resnet18', 'seresnet18']),
        ('torchvision.*', ['torchvision.vgg16'], ['torchvision.vit_b_16', 'vgg16']),
        (
            'vision_learner.*',
            ['vision_learner.vgg16', 'vision_learner.timm.vgg16'],
            ['vision_learner.mobilenet_v2', 'vgg16'],
        ),
        ('no-such-network', [], ['resnet18']),
    ],
)
def test_a_pattern_selects_names(pattern, included, excluded):
    names = list_archs(pattern)
    assert len(names) == len(set(names))
    assert [name for name in included if name not in names] == []
    assert [name for name in excluded if name in names] == []


def test_a_network_of_this_package_hides_that_of_timm_with_its_name():
    assert 'resnet50' in timm.list_models() and list_archs('resnet50').count('resnet50') == 1


def test_without_timm_its_networks_are_missing(monkeypatch):
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    assert list_archs('resnet18') == ['torchvision.resnet18']


@pytest.mark.parametrize(
    ('name', 'size', 'fixed', 'weights'),
    [
        ('baseline', 224, False, ()),
        ('resnet50', 224, False, ('imagenet', 'imagenet-v2')),
        ('resnet10t', 176, False, ('imagenet',)),
        ('test_vit', 160, True, ('imagenet',)),
        ('test_convnext', 160, False, ('imagenet',)),
        ('mobilenetv3_small_050', 224, False, ('imagenet',)),
        ('torchvision.efficientnet_b1', 240, False, ('imagenet', 'imagenet1k_v1', 'imagenet1k_v2')),
        ('torchvision.regnet_y_400mf', 224, False, ('imagenet', 'imagenet1k_v1', 'imagenet1k_v2')),
        ('vision_learner.resnet18', 224, False, ('imagenet', 'imagenet1k_v1')),
        ('vision_learner.timm.resnet10t', 176, False, ('imagenet',)),
    ],
)
def test_facts_are_those_of_the_network(name, size, fixed, weights):
    facts = describe_arch(name)
    assert (facts.size, facts.fixed_size, facts.weights, facts.problem) == (size, fixed, weights, '')
    assert facts.parameters == sum(parameter.numel() for parameter in build_model(name).parameters())


def test_a_huge_network_is_not_built_to_count_its_parameters():
    assert describe_arch('torchvision.regnet_y_128gf').parameters is None


def test_facts_about_a_registered_network_say_why_it_cannot_be_built():
    add_arch('catalog-net', small_net)
    add_arch('catalog-broken', no_net)
    assert describe_arch('catalog-net').parameters == 4 * 27 + 4 + 4 * 2 + 2
    broken = describe_arch('catalog-broken')
    assert broken.parameters is None and 'contains pooling, so there is no place to cut' in broken.problem


def test_an_unknown_network_is_an_error():
    with pytest.raises(UsageError, match='no-such-network is unknown'):
        describe_arch('no-such-network')

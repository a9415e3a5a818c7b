"""Networks are cut where fastai cuts them, and refused where the cut would change what they compute."""

import pytest
import torch
import torchvision
from fastai.vision.learner import create_body, model_meta
from torch import nn
from torch.nn import functional as F

from cxr_fastai.core.errors import UsageError
from cxr_fastai.models.bodies import cut_body, loses_head, split_network

IMAGES = torch.randn(2, 3, 64, 64)


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


class Plain(nn.Module):
    """A network as in most tutorials: stages, pooling, a linear layer."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.low = stage(3, 8)
        self.high = stage(8, 16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.pool(self.high(self.low(x))).flatten(1))


class PoolsInForward(Plain):
    def __init__(self) -> None:
        super().__init__()
        del self.pool

    def forward(self, x):
        return self.fc(self.high(self.low(x)).mean((2, 3)))


class HasCodeBetween(Plain):
    def forward(self, x):
        return self.fc(self.pool(F.avg_pool2d(self.high(self.low(x)), 3)).flatten(1))


class HasNoPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x):
        return self.net(x)


class Crashes(Plain):
    def forward(self, x):
        raise ValueError('no input of this kind')


class PoolsVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.pool = nn.AvgPool1d(4)

    def forward(self, x):
        return self.pool(self.flatten(x))


@pytest.mark.parametrize(
    'name',
    ['resnet18', 'squeezenet1_1', 'densenet121', 'alexnet', 'efficientnet_b0', 'regnet_x_400mf', 'mobilenet_v3_small'],
)
def test_torchvision_networks_are_cut_where_fastai_cuts_them(name):
    build = getattr(torchvision.models, name)
    model = build(weights=None).eval()
    cut = model_meta.get(build, {'cut': None})['cut']
    ours, theirs = cut_body(model), create_body(model, pretrained=False, cut=cut)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


def test_other_networks_are_cut_where_fastai_cuts_them():
    model = Plain(classes=1000).eval()
    ours, theirs = split_network(model, 'Plain')[0], create_body(model, pretrained=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize('cut', [1, -3, lambda model: nn.Sequential(model.low)])
def test_a_network_can_be_cut_at_a_given_layer(cut):
    model = Plain().eval()
    assert torch.equal(cut_body(model, cut)(IMAGES), model.low(IMAGES))


@pytest.mark.parametrize('name', ['mobilenet_v2', 'mnasnet0_5', 'shufflenet_v2_x0_5'])
def test_torchvision_networks_that_pool_in_forward_keep_all_their_layers(name):
    model = getattr(torchvision.models, name)(weights=None).eval()
    last = list(model.children())[-1]
    pooled = cut_body(model)(IMAGES).mean((2, 3))
    assert torch.allclose(last(pooled), model(IMAGES), atol=1e-5)


def test_a_body_with_a_head_for_two_classes_is_used_as_it_is():
    model = nn.Sequential(stage(3, 8), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    assert split_network(model, 'mine') is model


def test_a_head_for_other_classes_is_replaced():
    network = split_network(Plain(classes=1000), 'Plain')
    assert [type(layer) for layer in network[1]] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert network(IMAGES).shape == (2, 2)


@pytest.mark.parametrize('build', [Plain, lambda: torchvision.models.resnet18(num_classes=2)])
def test_a_head_for_two_classes_is_kept(build):
    model = build().eval()
    network = split_network(model, 'mine')
    assert torch.equal(network(IMAGES), model(IMAGES))
    assert network[1][-1] is model.fc and not loses_head(model, network)


def test_a_head_for_two_classes_that_needs_code_of_forward_is_lost():
    model = torchvision.models.densenet121(num_classes=2).eval()
    assert loses_head(model, split_network(model, 'mine'))


def test_layers_keep_their_mode_and_statistics():
    model = Plain(classes=3).train()
    model.low.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    split_network(model, 'Plain')
    assert model.training and model.high.training and not model.low.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.pool._forward_hooks and not model.pool._forward_pre_hooks


@pytest.mark.parametrize(
    ('model', 'reason'),
    [
        (HasNoPooling(), r'none of its layers \(conv, fc\) contains pooling'),
        (PoolsInForward(), 'high contains its last pooling layer, but returns feature maps that are pooled later'),
        (HasCodeBetween(), 'forward does more than to call the layers before pool one after the other'),
        (Wrapper(), 'its first layer net contains its last pooling'),
        (Crashes(), r'fails on a test image of shape \(1, 3, 224, 224\) \(no input of this kind\)'),
        (PoolsVectors(), r'its body returns \(1, 150528\), not feature maps'),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)), r'fails on a test image .*to have 1 channels'),
        (torchvision.models.densenet121(num_classes=2).features, 'returns feature maps that are pooled later'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_a_network_that_cannot_be_cut_is_refused_with_advice(model, reason):
    with pytest.raises(UsageError, match=rf'^(the .*)?mine.*: .*{reason}.*Pass it as nn.Sequential\(body, head\)') as e:
        split_network(model, 'mine')
    assert '\n' not in str(e.value)


class OnlySmall(Plain):
    def forward(self, x):
        if x.shape[-1] != 96:
            raise ValueError('96 pixels are needed')
        return super().forward(x)


def test_a_network_that_accepts_one_size_is_tested_with_it():
    with pytest.raises(UsageError, match='96 pixels are needed'):
        split_network(OnlySmall(), 'mine')
    assert len(split_network(OnlySmall(), 'mine', size=96)) == 2

"""The weights of a soup are means, and its BatchNorm statistics are those of images."""

import numpy as np
import pytest
import torch
from torch import nn

from cxr_fastai.models.architectures import build_model
from cxr_fastai.models.soups import average_networks, changed_layers, estimate_statistics


def make_members(number: int) -> list[nn.Sequential]:
    torch.manual_seed(0)
    members = []
    for _ in range(number):
        member = build_model('baseline')
        with torch.no_grad():
            member.train()(torch.randn(8, 3, 32, 32))
        members.append(member.eval())
    return members


def test_the_weights_are_the_means_of_those_of_the_members():
    members = make_members(3)
    averaged = average_networks(members)
    states = [member.state_dict() for member in members]
    for name, tensor in averaged.state_dict().items():
        expected = np.mean([state[name].double().numpy() for state in states], axis=0)
        assert tensor.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-7), name
        assert tensor.dtype == states[0][name].dtype


def test_equal_networks_have_exactly_their_weights_as_means():
    (member,) = make_members(1)
    averaged = average_networks([member] * 3)
    assert all(torch.equal(tensor, member.state_dict()[name]) for name, tensor in averaged.state_dict().items())
    assert changed_layers([member] * 3) == []


def test_the_statistics_are_the_means_of_those_of_batches():
    first, second = make_members(2)
    layers = changed_layers([first, second])
    assert layers == ['0.0.1', '0.1.1', '0.2.1', '0.3.1']
    model = average_networks([first, second])
    batches = [torch.randn(6, 3, 32, 32), torch.randn(5, 3, 32, 32)]
    momentum = model[0][0][1].momentum
    estimate_statistics(model, layers, batches)
    with torch.no_grad():
        activations = [model[0][0][0](batch).numpy().astype(np.float64) for batch in batches]
    mean = np.mean([values.mean(axis=(0, 2, 3)) for values in activations], axis=0)
    variance = np.mean([values.var(axis=(0, 2, 3), ddof=1) for values in activations], axis=0)
    norm = model[0][0][1]
    assert norm.running_mean.numpy() == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert norm.running_var.numpy() == pytest.approx(variance, rel=1e-4)
    assert norm.momentum == momentum and not any(layer.training for layer in model.modules())


def test_layers_that_are_not_named_keep_their_statistics():
    (model,) = make_members(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate_statistics(model, ['0.3.1'], [torch.randn(8, 3, 32, 32)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {'0.3.1.running_mean', '0.3.1.running_var'}  # one batch was counted before, too

"""Soups: networks that were trained from the same weights, averaged into one network (Wortsman et al. 2022).

The averaged network has other activations than each of its members, so the statistics of its BatchNorm layers are
estimated again on training images, as Izmailov et al. (2018) do for averages over the steps of one training.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ('running_mean', 'running_var')
"""Buffers of a BatchNorm layer that prediction uses."""


def average_networks(members: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first of the `members` with the means of all floating-point parameters and buffers.

    The means are computed in double precision. Other buffers, such as counters, are those of the first member.
    """
    states = [member.state_dict() for member in members]
    averaged = copy.deepcopy(members[0])
    means = {}
    for name, first in states[0].items():
        tensors = [state[name] for state in states]
        means[name] = _mean(tensors) if first.is_floating_point() else first
    averaged.load_state_dict(means)
    return averaged


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of `tensors` of one shape; exactly the tensor itself if they are all equal."""
    first, *others = [tensor.cpu().double() for tensor in tensors]  # not every device has double precision
    mean = first + sum((other - first for other in others), torch.zeros_like(first)) / len(tensors)
    return mean.to(tensors[0])


def changed_layers(members: Sequence[nn.Module]) -> list[str]:
    """Return the names of the BatchNorm layers whose statistics differ between the `members`.

    A frozen body keeps the statistics of its initial weights in every member; those are not estimated again.
    """
    states = [member.state_dict() for member in members]
    layers = [name for name, layer in members[0].named_modules() if _has_statistics(layer)]
    return [name for name in layers if any(_differs(states, f'{name}.{buffer}') for buffer in STATISTICS)]


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _differs(states: Sequence[dict[str, Tensor]], name: str) -> bool:
    first, *others = [state[name] for state in states]
    return not all(torch.equal(first, other) for other in others)


def estimate_statistics(model: nn.Module, layers: Collection[str], batches: Iterable[Tensor]) -> None:
    """Replace the statistics of the BatchNorm `layers` of `model` by the means of those of the `batches`.

    Each batch is network input (n, 3, h, w), and all batches count equally. As in training, the variance of a batch is
    the unbiased one, and later layers get what the statistics of the batch give. Dropout is off. On a CPU, the result
    is the same in every call.
    """
    chosen = [layer for name, layer in model.named_modules() if name in layers and isinstance(layer, _BatchNorm)]
    if not chosen:
        return
    with _training_only(model, chosen), torch.no_grad():
        for images in batches:
            model(images)


@contextmanager
def _training_only(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let the `layers` average the statistics of batches in this block, while all other layers predict."""
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()

"""Class activation maps of a network, and occlusion maps.

    cam         exact, for a head of average pooling and one linear layer (Zhou et al. 2016)
    gradcam     any head: each channel is weighted by its mean gradient (Selvaraju et al. 2017)
    gradcam++   gradients are also weighted by position (Chattopadhyay et al. 2018)
    occlusion   the drop in probability when a patch is covered (Zeiler and Fergus 2014); slow, needs no gradients

A map shows what influenced the score. It does not outline a lesion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.models.bodies import POOLINGS

PATCHES = 8
"""An occluding patch is one eighth of the side of the image."""
STRIDES = 16
"""The patch moves by one sixteenth of the side."""
MIN_DROP = 1e-6
"""A smaller drop in probability counts as rounding error."""
EPSILON = 1e-6
"""Avoids division by zero in Grad-CAM++, as in its authors' code."""
BODY = '0'
"""The name of the body in the state dict of every `Sequential(body, head)`."""


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in evaluation mode with gradients for activations only.

    Training modes, `requires_grad` and stored gradients are restored afterwards, also after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        with torch.enable_grad():
            model.eval()
            for weight, _, _ in parameters:
                weight.requires_grad_(False)
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, requires_grad, grad in parameters:
            weight.requires_grad_(requires_grad)
            weight.grad = grad


@contextmanager
def record_activations(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which each forward pass appends the output of `layer`.

    The outputs are leaves of the autograd graph, so nothing before `layer` is differentiated. The hook is removed
    afterwards, also after an exception.
    """
    activations: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        activations.append(output.detach().requires_grad_())
        return activations[-1].clone()  # the next layer may work in place

    handle = layer.register_forward_hook(keep)
    try:
        yield activations
    finally:
        handle.remove()


def has_body_and_head(model: nn.Module) -> bool:
    """Return True for a `Sequential(body, head)`."""
    return isinstance(model, nn.Sequential) and len(model) == 2


def find_layer(model: nn.Module, name: str | None = None, method: str = 'gradcam') -> nn.Module:
    """Return the layer `name` of `model`, named as in its state dict, for example `0.2`.

    Without a name this is the body. If the body ends in a pooling layer, which would reduce the resolution, it is the
    layer before that, except for the method `cam`. Raises `UsageError` for an unknown name, and without a name for a
    network that has no body.
    """
    if name is None:
        return _last_layer(model, method)
    layers = dict(model.named_modules())
    if name in layers and name:
        return layers[name]
    part = name.split('.')[0]
    similar = [other for other in layers if other.startswith(part)][1:9] or list(layers)[1:9]
    raise UsageError(f'--layer {name}: no such layer. Choose one, for example {", ".join(similar)}.')


def _last_layer(model: nn.Module, method: str) -> nn.Module:
    if not has_body_and_head(model):
        with_convolutions = [
            name
            for name, part in model.named_children()
            if any(isinstance(layer, nn.Conv2d) for layer in part.modules())
        ]
        example = f', for example {with_convolutions[-1]},' if with_convolutions else ''
        raise UsageError(
            f'--layer: the network {type(model).__name__} is not a Sequential(body, head), so its last feature maps '
            f'are not known. Name their layer{example} or choose --method occlusion.'
        )
    body = next(model.children())
    leaves = [layer for layer in body.modules() if not list(layer.children())]
    ends_in_pooling = len(leaves) > 1 and isinstance(leaves[-1], POOLINGS)
    if ends_in_pooling and method != 'cam':
        return leaves[-2]
    return body


def name_layer(model: nn.Module, layer: nn.Module) -> str:
    """Return the name of `layer` in the state dict of `model`."""
    names = {module: name for name, module in model.named_modules()}
    return names[layer]


def check_method(model: nn.Module, method: str, layer: str | None = None) -> None:
    """Raise `UsageError` if `method` or `layer` is unknown, or if they do not fit each other or the head of `model`."""
    if method not in METHODS:
        raise UsageError(f'--method {method}: choose {", ".join(METHODS)}.')
    if method == 'occlusion':
        if layer:
            raise UsageError('--layer: --method occlusion does not use a layer. Omit --layer.')
        return
    chosen = find_layer(model, layer, method)
    if method == 'cam' and not _is_pooled_linearly(model, chosen):
        raise UsageError(
            '--method cam needs a head of average pooling and one Linear, and the body as its layer. '
            'Use --method gradcam, which supports every network.'
        )


def _is_pooled_linearly(model: nn.Module, layer: nn.Module) -> bool:
    """Return True if `layer` is the body of `model`, and its head average pooling and one linear layer."""
    if not has_body_and_head(model):
        return False
    body, head = model.children()
    parts = [type(part) for part in head.modules()]
    return layer is body and parts.count(nn.Linear) == 1 and nn.AdaptiveAvgPool2d in parts


def activation_maps(
    model: nn.Module, images: Tensor, target: int = POSITIVE, method: str = 'gradcam', layer: str | None = None
) -> Tensor:
    """Return maps (n, h, w) of normalised `images` (n, 3, s, s) for the class `target`, at the resolution of `layer`.

    The values are 0 or greater and have no unit; a map of zeros means no positive evidence. Raises `UsageError` if the
    method, the layer or the head does not allow a map.
    """
    check_method(model, method, layer)
    chosen = model if method == 'occlusion' else find_layer(model, layer, method)
    with explanation_mode(model):
        return METHODS[method](model, images, target, chosen).detach()


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Return maps (n, h, w) resized to (n, size, size), bilinearly."""
    return interpolate(maps[:, None], (size, size), mode='bilinear', align_corners=False)[:, 0]


def scale(maps: Tensor) -> Tensor:
    """Return maps (n, h, w), each divided by its maximum so that it spans 0 to 1; a map of zeros stays zero."""
    maximum = maps.flatten(1).amax(dim=1)[:, None, None]
    return maps / torch.where(maximum > 0, maximum, 1)


def _cam(model: nn.Module, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    _, head = model.children()
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)][0]
    return _weighted_sum(layer(images), linear.weight[target][None, :])


def _gradcam(model: nn.Module, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    activations, gradients = _gradients(model, images, target, layer)
    return _weighted_sum(activations, gradients.mean(dim=(2, 3)))


def _gradcam_plus_plus(model: nn.Module, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    activations, gradients = _gradients(model, images, target, layer)
    denominator = 2 * gradients**2 + activations.sum(dim=(2, 3), keepdim=True) * gradients**3 + EPSILON
    alpha = torch.where(gradients != 0, gradients**2 / denominator, 0)
    return _weighted_sum(activations, (alpha * gradients.relu()).sum(dim=(2, 3)))


def _occlusion(model: nn.Module, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    """For each pixel, the mean drop in probability over the patches that cover it; a patch has the image's mean."""
    side = images.shape[-1]
    patch = max(side // PATCHES, 1)
    stride = max(side // STRIDES, 1)
    starts = sorted({*range(0, side - patch, stride), side - patch})
    drop = torch.zeros(len(images), side, side, dtype=torch.float64)
    count = torch.zeros_like(drop)
    with torch.no_grad():
        uncovered = _probability(model, images, target)
        for top in starts:
            for left in starts:
                region = (..., slice(top, top + patch), slice(left, left + patch))
                covered = images.clone()
                covered[region] = images.mean(dim=(2, 3), keepdim=True)
                drop[region] += (uncovered - _probability(model, covered, target))[:, None, None]
                count[region] += 1
    mean_drop = drop / count
    return torch.where(mean_drop > MIN_DROP, mean_drop, 0).float()


METHODS: dict[str, Callable[[nn.Module, Tensor, int, nn.Module], Tensor]] = {
    'gradcam': _gradcam,
    'gradcam++': _gradcam_plus_plus,
    'cam': _cam,
    'occlusion': _occlusion,
}
"""Name of each method -> function of a model, images, a target and a layer that returns maps (n, h, w)."""


def _gradients(model: nn.Module, images: Tensor, target: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The activations of `layer` and the gradient of the logit of `target` with respect to them, both (n, c, h, w)."""
    with record_activations(layer) as activations:
        logits = model(images)
    if not activations or activations[-1].ndim != 4:
        raise UsageError('--layer: the output of this layer is not (n, c, h, w). Choose an earlier layer.')
    gradients = torch.autograd.grad(logits[:, target].sum(), activations[-1])[0]
    return activations[-1].detach(), gradients


def _weighted_sum(activations: Tensor, weights: Tensor) -> Tensor:
    """The positive part of the sum of the channels of `activations` (n, c, h, w) with `weights` (n or 1, c)."""
    return (activations * weights[:, :, None, None]).sum(dim=1).relu()


def _probability(model: nn.Module, images: Tensor, target: int) -> Tensor:
    return model(images).double().softmax(dim=1)[:, target]  # in 32 bits, 1 - 1e-8 would be rounded to 1

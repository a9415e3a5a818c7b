"""Where in an image the evidence for a class lies: class activation maps of any `Sequential(body, head)`, and occlusion.

    cam         exact, for a head of average pooling and one Linear (Zhou et al. 2016)
    gradcam     any head: channels weighted by their mean gradient (Selvaraju et al. 2017)
    gradcam++   gradients weighted by place (Chattopadhyay et al. 2018)
    occlusion   what covering each place costs (Zeiler and Fergus 2014): slow, and needs no gradient

A map says what influenced the score. It is no outline of a lesion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import POSITIVE

PATCHES, STRIDES = 8, 16
"""An occluding square is an eighth of the side, and moves by a sixteenth."""
LEAST_LOSS = 1e-6
"""What covering a place costs in probability at least, or it is rounding."""
EPSILON = 1e-6
"""Keeps a division by nothing finite in Grad-CAM++, as in its authors' code."""
BODY = '0'
"""The body's name in the state dict of every `Sequential(body, head)`."""
POOLINGS = nn.MaxPool2d, nn.AvgPool2d


@contextmanager
def explaining(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in evaluation mode, with gradients of activations alone; modes and gradients are restored, also after an
    exception."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        with torch.enable_grad():
            model.eval()
            for weight, *_ in wanted:
                weight.requires_grad_(False)
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, wants, grad in wanted:
            weight.requires_grad_(wants)
            weight.grad = grad


@contextmanager
def watching(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what `layer` gives in each forward pass, as the start of a graph of its own, so that nothing
    before it is differentiated; the hook is removed, also after an exception."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # the next layer may work in place

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def find_layer(model: nn.Sequential, name: str | None = None, method: str = 'gradcam') -> nn.Module:
    """The layer of `model` called `name` as in its state dict, such as `0.2`; unless one is named the body, whose
    output the head pools, or where it ends in a pooling, which would cost resolution, for any `method` but cam the
    layer before. Raises `UsageError` for a name that is none."""
    if name is None:
        leaves = [layer for layer in model[0].modules() if not list(layer.children())]
        pooled = len(leaves) > 1 and isinstance(leaves[-1], POOLINGS)
        return leaves[-2] if pooled and method != 'cam' else model[0]
    layers = dict(model.named_modules())
    if name in layers and name:
        return layers[name]
    near = [known for known in layers if known.startswith(name.split('.')[0])][1:9] or list(layers)[1:9]
    raise UsageError(f'--layer {name}: no such layer: choose one such as {", ".join(near)}.')


def name_layer(model: nn.Sequential, layer: nn.Module) -> str:
    """What `layer` is called in the state dict of `model`."""
    return next(name for name, known in model.named_modules() if known is layer)


def check_method(model: nn.Sequential, method: str, layer: str | None = None) -> None:
    """Raise `UsageError` for a `method` or a `layer` that is none, or where the two or the head of `model` do not go
    together."""
    if method not in METHODS:
        raise UsageError(f'--method {method}: choose {", ".join(METHODS)}.')
    if method == 'occlusion' and layer:
        raise UsageError('--layer: --method occlusion looks at no layer.')
    place, heads = find_layer(model, layer, method), [type(part) for part in model[1].modules()]
    if method == 'cam' and not (place is model[0] and heads.count(nn.Linear) == 1 and nn.AdaptiveAvgPool2d in heads):
        raise UsageError(
            '--method cam: it needs a head of average pooling and one Linear, and the body as its layer: '
            'gradcam takes any.'
        )


def activation_maps(
    model: nn.Sequential, images: Tensor, target: int = POSITIVE, method: str = 'gradcam', layer: str | None = None
) -> Tensor:
    """Maps (n, h, w) of `images`, normalised (n, 3, s, s), for the class `target`, at the resolution of `layer`; 0 and
    above, in no unit, where 0 everywhere means no positive evidence.

    Raises `UsageError` for a method, a layer or a head that gives no map.
    """
    check_method(model, method, layer)
    place = find_layer(model, layer, method)
    with explaining(model):
        return METHODS[method](model, images, target, place).detach()


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Maps (n, h, w) as (n, size, size), bilinear."""
    return interpolate(maps[:, None], (size, size), mode='bilinear', align_corners=False)[:, 0]


def scale(maps: Tensor) -> Tensor:
    """Maps (n, h, w) each divided by its largest value, so that it spans 0 to 1; one of zeros stays so."""
    most = maps.flatten(1).amax(dim=1)[:, None, None]
    return maps / torch.where(most > 0, most, 1)


def _cam(model: nn.Sequential, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    linear = next(part for part in model[1].modules() if isinstance(part, nn.Linear))
    return _positive(layer(images), linear.weight[target][None, :])


def _gradcam(model: nn.Sequential, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    seen, gradients = _gradients(model, images, target, layer)
    return _positive(seen, gradients.mean(dim=(2, 3)))


def _gradcam_plus_plus(model: nn.Sequential, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    seen, gradients = _gradients(model, images, target, layer)
    below = 2 * gradients**2 + seen.sum(dim=(2, 3), keepdim=True) * gradients**3 + EPSILON
    place = torch.where(gradients != 0, gradients**2 / below, 0)
    return _positive(seen, (place * gradients.relu()).sum(dim=(2, 3)))


def _occlusion(model: nn.Sequential, images: Tensor, target: int, layer: nn.Module) -> Tensor:
    """The mean loss of probability over the squares that cover each place; a square has the image's mean grey."""
    side = images.shape[-1]
    patch, stride = max(side // PATCHES, 1), max(side // STRIDES, 1)
    starts = sorted({*range(0, side - patch, stride), side - patch})
    lost, times = (torch.zeros(len(images), side, side, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        whole = _probability(model, images, target)
        for top in starts:
            for left in starts:
                here = (..., slice(top, top + patch), slice(left, left + patch))
                covered = images.clone()
                covered[here] = images.mean(dim=(2, 3), keepdim=True)
                lost[here] += (whole - _probability(model, covered, target))[:, None, None]
                times[here] += 1
    return torch.where(lost / times > LEAST_LOSS, lost / times, 0).float()


METHODS: dict[str, Callable[[nn.Sequential, Tensor, int, nn.Module], Tensor]] = {
    'gradcam': _gradcam,
    'gradcam++': _gradcam_plus_plus,
    'cam': _cam,
    'occlusion': _occlusion,
}
"""Method -> what makes its maps (n, h, w) of a model, images, a target and a layer."""


def _gradients(model: nn.Sequential, images: Tensor, target: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What `layer` gives, and how the logit of `target` changes with it: both (n, c, h, w)."""
    with watching(layer) as seen:
        logits = model(images)
    if not seen or seen[-1].ndim != 4:
        raise UsageError('--layer: it gives no maps (n, c, h, w): name an earlier one.')
    return seen[-1].detach(), torch.autograd.grad(logits[:, target].sum(), seen[-1])[0]


def _positive(seen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the channels of `seen`, (n, c, h, w), by `weights`, (n or 1, c), where it is above 0."""
    return (seen * weights[:, :, None, None]).sum(dim=1).relu()


def _probability(model: nn.Sequential, images: Tensor, target: int) -> Tensor:
    return model(images).double().softmax(dim=1)[:, target]  # 32 bits would round 1 - 1e-8 to 1

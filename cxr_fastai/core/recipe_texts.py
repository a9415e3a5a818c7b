"""Recipes as text: what differs between two of them, their phases, and the command that reproduces one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import CUSTOM, RECIPES, SETTABLE, Phase, Recipe, option_name


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the fields in which two recipes differ, as texts `field: old value, now new value`.

    `workers` does not count, because it changes no batch.
    """
    texts = []
    for name in (field.name for field in fields(Recipe)):
        before = getattr(old, name)
        after = getattr(new, name)
        if name != 'workers' and before != after:
            texts.append(f'{name}: {_describe(before)}, now {_describe(after)}')
    return texts


def _describe(value: Any) -> str:
    return describe_phases(value) if isinstance(value, tuple) else repr(value)


def describe_phases(phases: Iterable[Phase]) -> str:
    """Return the `phases` as text, such as `2 epochs of frozen at learning rate 0.001 and 4 epochs of ...`."""
    return ' and '.join(map(describe_phase, phases))


def describe_phase(phase: Phase) -> str:
    """Return `phase` as text, such as `4 epochs of fine-tune at learning rate 1e-05`."""
    text = f'{counted(phase.epochs, "epoch")} of {phase.name} at learning rate {phase.lr:g}'
    return text if phase.patience is None else f'{text} with the patience {phase.patience}'


def command_line(recipe: Recipe) -> str:
    """Return the `cxr-fastai train` command that reproduces `recipe`. A file of weights is given without its folder.

    For a custom recipe it is a comment, because the command cannot repeat a training by hand. Options do not describe
    the phases of a run that was trained longer, so its command names the file `recipe.json`.
    """
    if recipe.name == CUSTOM:
        return '# trained in Python, not by a recipe: no command repeats the training'
    if recipe.extensions:
        return 'cxr-fastai train --data DIR --recipe recipe.json'
    defaults = {field.name: field.default for field in fields(Recipe)} | RECIPES[recipe.name]
    changes = {
        name: value
        for name, value in vars(recipe).items()
        if name not in EXPLICIT_OR_IRRELEVANT and value != defaults[name]
    }
    words = [
        'cxr-fastai train --data DIR',
        f'--arch {recipe.arch}',
        f'--recipe {recipe.name}',
        f'--epochs {recipe.epochs}',
        f'--lr {recipe.phases[0].lr:g}',
        f'--weights {PurePath(recipe.weights).name}',
    ]
    frozen = [phase.epochs for phase in recipe.phases if phase.frozen]
    if len(frozen) == 1:
        words.append(f'--freeze-epochs {frozen[0]}')
    for name, value in changes.items():
        if name not in SETTABLE:
            words.append(option_name(name) if value is True else f'{option_name(name)} {value}')
    for name, value in changes.items():
        if name in SETTABLE:
            words.append(f'--set {name}={str(value).lower() if isinstance(value, bool) else value}')
    return ' '.join(words)


EXPLICIT_OR_IRRELEVANT = ('arch', 'name', 'phases', 'weights', 'workers', 'threshold')
"""Fields that `command_line` always writes, or that do not change the trained network."""

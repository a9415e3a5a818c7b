"""Train a run longer: a further phase with a schedule of its own, after those that its recipe had."""

from __future__ import annotations

from dataclasses import replace
from shlex import quote
from typing import Any, NamedTuple

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import are, counted
from cxr_fastai.core.recipe import EXTENSION, Phase, Recipe
from cxr_fastai.core.recipe_texts import describe_phase, differences
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series, is_folds
from cxr_fastai.inference.config import LEARNER, WEIGHTS
from cxr_fastai.models.architectures import check_recipe
from cxr_fastai.training.checkpoint import STATE, load_state


def extend_recipe(run: Run, epochs: int, lr: float | None = None, patience: int | None = None) -> Recipe:
    """Return the recipe of `run` with a further phase, so that it has been trained for `epochs` epochs altogether.

    The phase has the learning rate `lr` and the `patience`, by default those of the last phase, and trains what that
    one trained. `train` with this recipe and `resume=True` continues the run. With as many epochs as the run has
    already, or will have when it is resumed, the recipe is that of the run.

    Raises `UsageError` if the run has more epochs than `epochs`, if it is one of the folds of a series, if it has no
    state to continue from, and for an `lr` or a `patience` that is wrong, or that there are no further epochs for.
    """
    recipe = run.recipe
    state = load_state(run)
    if state is None:
        raise UsageError(
            f'--epochs {epochs} and --resume {run.path}: it has no {STATE} to continue from. Train with another --out.'
        )
    trained, planned = count_epochs(recipe, state)
    if epochs < trained:
        raise UsageError(
            f'--epochs {epochs}: {run.path} was trained for {counted(trained, "epoch")} already, and epochs cannot be '
            f'undone. Choose more than {planned}, or train with another --out.'
        )
    if epochs < planned:
        raise UsageError(
            f'--epochs {epochs}: the schedule of {run.path} is made for {counted(planned, "epoch")}, of which '
            f'{trained} {are(trained)} trained, and cannot be shortened. Omit --epochs, or choose more than {planned}.'
        )
    if epochs > planned:
        _check_no_fold(run, epochs)
        return _add_phase(recipe, epochs - planned, lr, patience)
    if lr is not None:
        raise _no_further_epochs(f'--lr {lr:g}', 'learning rate', run, planned)
    if patience not in (None, recipe.patience_of(recipe.phases[-1])):
        raise _no_further_epochs(f'--patience {patience}', 'patience', run, planned)
    return recipe


def _check_no_fold(run: Run, epochs: int) -> None:
    """Raise `UsageError` if `run` is one of the folds of a series, whose networks have to be trained alike."""
    path = run.path.resolve()
    if not is_folds(path.parent):
        return
    series = Series.open(path.parent)
    if path.name in series.recipes:
        images = quote(str(run.images)) if run.images else 'DIR'
        raise UsageError(
            f'--epochs {epochs}: {run.path} is one of {series.number} folds, and the out-of-fold predictions have to '
            f'come from networks of the same training. Train all of them longer: `cxr-fastai train --data {images} '
            f'--recipe {quote(str(run / "recipe.json"))} --epochs {epochs} --folds {series.number} --out DIR`, or '
            'extend a copy of this run in another folder.'
        )


def _no_further_epochs(option: str, meaning: str, run: Run, planned: int) -> UsageError:
    return UsageError(
        f'{option}: with --resume it is the {meaning} of further epochs, and {run.path} has {planned} already. Choose '
        f'more --epochs than {planned}.'
    )


def describe_extension(phase: Phase) -> str:
    """Return what the further `phase` trains, as text."""
    trained = 'only the head, as before: the body stays frozen' if phase.frozen else 'the whole network'
    return f'{describe_phase(phase)}, training {trained}'


class Epochs(NamedTuple):
    """The number of epochs that were trained, and how many these will be at the end of the training."""

    trained: int
    planned: int


def count_epochs(recipe: Recipe, state: dict[str, Any] | None) -> Epochs:
    """Return the epochs of a training by `recipe` that continues from `state`, or begins without one.

    The epochs that a phase has left out, because it stopped early, are not planned any more.
    """
    if state is None:
        return Epochs(0, recipe.epochs)
    trained = len(state['history']['rows'])
    current, *later = recipe.phases[state['phase'] :]
    patience = recipe.patience_of(current)
    has_stopped = patience and state['stop_early']['worse_epochs'] >= patience
    left = 0 if has_stopped else current.epochs - state['epochs']
    return Epochs(trained, trained + left + sum(phase.epochs for phase in later))


def _add_phase(recipe: Recipe, epochs: int, lr: float | None, patience: int | None) -> Recipe:
    last = recipe.phases[-1]
    name = f'{EXTENSION}-{recipe.extensions + 1}' if recipe.extensions else EXTENSION
    phase = replace(last, name=name, epochs=epochs, lr=last.lr if lr is None else lr)
    if patience is not None:
        phase = replace(phase, patience=None if patience == recipe.patience else patience)
    extended = replace(recipe, phases=(*recipe.phases, phase))
    check_recipe(extended)
    return extended


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Return whether nothing is left to do for `run` if it is resumed by `recipe`: it has ended, with its model."""
    has_model = (run / WEIGHTS).is_file() and (run / LEARNER).is_file()
    return has_model and run.has_ended and not differences(run.recipe, recipe)

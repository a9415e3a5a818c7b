"""Train a run longer: a further phase with a schedule of its own, after those that its recipe had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import are, counted
from cxr_fastai.core.recipe import EXTENSION, Recipe, differences
from cxr_fastai.core.run import Run
from cxr_fastai.inference.config import LEARNER, WEIGHTS
from cxr_fastai.models.architectures import check_recipe
from cxr_fastai.training.checkpoint import STATE, load_state


def extend_recipe(run: Run, epochs: int, lr: float | None = None) -> Recipe:
    """Return the recipe of `run` with a further phase, so that it has been trained for `epochs` epochs altogether.

    The phase has the learning rate `lr`, by default that of the last phase, and trains what that one trained. `train`
    with this recipe and `resume=True` continues the run. With as many epochs as the run has already, or will have when
    it is resumed, the recipe is that of the run.

    Raises `UsageError` if the run has more epochs than `epochs`, or no state to continue from, and for a wrong `lr`.
    """
    recipe = run.recipe
    state = load_state(run)
    if state is None:
        raise UsageError(
            f'--epochs {epochs} and --resume {run.path}: it has no {STATE} to continue from. Train with another --out.'
        )
    trained = len(state['history']['rows'])
    planned = trained + _count_left(recipe, state)
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
        return _add_phase(recipe, epochs - planned, lr)
    if lr is not None:
        raise UsageError(
            f'--lr {lr:g}: with --resume it is the learning rate of further epochs, and {run.path} has {planned} '
            f'already. Choose more --epochs than {planned}.'
        )
    return recipe


def _count_left(recipe: Recipe, state: dict[str, Any]) -> int:
    """Return the number of epochs that are left after `state`; those of a phase that has stopped early do not count."""
    current, *later = recipe.phases[state['phase'] :]
    has_stopped = recipe.patience and state['stop_early']['worse_epochs'] >= recipe.patience
    left = 0 if has_stopped else current.epochs - state['epochs']
    return left + sum(phase.epochs for phase in later)


def _add_phase(recipe: Recipe, epochs: int, lr: float | None) -> Recipe:
    last = recipe.phases[-1]
    name = f'{EXTENSION}-{recipe.extensions + 1}' if recipe.extensions else EXTENSION
    phase = replace(last, name=name, epochs=epochs, lr=last.lr if lr is None else lr)
    extended = replace(recipe, phases=(*recipe.phases, phase))
    check_recipe(extended)
    return extended


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Return whether nothing is left to do for `run` if it is resumed by `recipe`: it has ended, with its model."""
    has_model = (run / WEIGHTS).is_file() and (run / LEARNER).is_file()
    return has_model and run.has_ended and not differences(run.recipe, recipe)

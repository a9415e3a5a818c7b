"""`train` turns a recipe and images into a run folder: it makes a learner, fits it by the recipe, and saves it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import pandas as pd
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401  (adds `Learner.no_bar`)
from fastai.torch_core import set_seed

from cxr_fastai.core.environment import is_main_process, process_count
from cxr_fastai.core.errors import CXRWarning, ImageError, Stopped
from cxr_fastai.core.files import check_new, write_json
from cxr_fastai.core.progress import are, counted
from cxr_fastai.core.recipe import SHIFT, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import describe_items, image_root, read_recipe_items
from cxr_fastai.data.loaders import CXRDataLoaders, describe_unreadable, find_unreadable
from cxr_fastai.data.splits import check_leakage, check_trainable, describe_validation, validation_warning
from cxr_fastai.images.cache import ImageCache, find_cache
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, save_weights
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.models.architectures import describe_network
from cxr_fastai.models.devices import choose_device
from cxr_fastai.training.checkpoint import (
    PREVIOUS_STATE,
    Checkpoint,
    StopOnSignal,
    identify,
    load_matching_state,
)
from cxr_fastai.training.checks import check_place, check_space
from cxr_fastai.training.distributed import call_once, check_batch_size, share_batches, training_processes
from cxr_fastai.training.extending import count_epochs, describe_extension, is_finished
from cxr_fastai.training.hardware import CompileSteps, can_compile, check_compile, describe_environment, has_compiler
from cxr_fastai.training.learner import CXRLearner, Diverged, recipe_learner
from cxr_fastai.training.precision import AUTO, check_precision, choose_precision
from cxr_fastai.training.showing import DrawBatch, ShowEpochs
from cxr_fastai.training.tracking import check_tracker, tracking

FAILURE = 'failure.json'
FIRST_BATCH = 'figures/train_batch.png'

log = logging.getLogger(__name__)


@training_processes()
def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    resume: bool = False,
    compile: str = 'off',
    track: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    items: pd.DataFrame | None = None,
) -> Run:
    """Train by `recipe` on the images of `data` and return the run in the new folder `out`.

    The run contains the network of the best epoch as `learner.pkl` and `model.safetensors`. On the CPU, two calls with
    the same recipe give the same weights. If `resume` is True, `out` is an interrupted run that is continued, and the
    weights are those of an uninterrupted run. A run with further phases (see `extend_recipe`) is continued by these;
    without any, a finished run is left as it is. `compile` is one of `hardware.COMPILE` and `track` one of
    `tracking.TRACKERS`. The network is trained on `device` (see `models.devices`; default: the GPU if there is one,
    and in several processes one for each). The `precision` `auto` replaces that of the recipe by the fastest one; see
    `precision.choose_precision`. `items` is what `read_recipe_items` returns for `data` and `recipe`, if it was read
    before. Several processes train one network, and only the first of them writes.

    Raises `CXRError`. Everything that can be checked is checked before the folder is made.
    """
    data, out = Path(data), Path(out)
    run = Run.open(out) if resume else Run(out)
    if resume and is_finished(run, recipe):
        log.info('%s: trained already, nothing is left to do', out)
        return run
    if not resume:
        check_new(out)
    check_place(out)
    check_compile(compile)
    check_precision(precision or recipe.precision)
    check_tracker(track)
    check_batch_size(recipe.batch_size)
    with ExitStack() as stack:
        if resume:
            stack.enter_context(run.locked())
        if items is None:
            # One process measures which images are held out, so that all hold out the same.
            read = partial(call_once, read_recipe_items) if recipe.shift_pct else read_recipe_items
            items = read(data, recipe)
        state = load_matching_state(run, recipe, items) if resume else None
        _check_items(items, recipe)
        cache, unreadable = _check_images(items, image_root(data), recipe)
        if resume:
            unreadable = sorted({*unreadable, *run.unreadable})  # train on the same images as before
        readable = items[~items.path.isin(unreadable)]
        facts: dict[str, Any] = {}
        if precision == AUTO and not resume:
            facts['precision_trial'] = _measure_precision(recipe, readable, device, compile)
            recipe = replace(recipe, precision=facts['precision_trial']['precision'])
        learn = _make_learner(readable, image_root(data), recipe, cache, state, device)
        check_space(out, learn.network)
        compiled = compile == 'on' and can_compile(learn.dls.device)
        if not resume:
            stack.enter_context(Run.create(out).locked())
        facts |= {'data': str(data.resolve()), 'unreadable': unreadable, 'track': track, 'compiled': compiled}
        _log_start(learn, recipe, state)
        _record_start(run, learn, recipe, items, resume, facts)
        _fit_and_save(learn, recipe, run, state, compiled, track)
    return run


def _measure_precision(recipe: Recipe, items: pd.DataFrame, device: str | None, compile: str) -> dict[str, Any]:
    """Return the precision that the main process measures to be the fastest, with the facts of the trial."""
    n_images = int((items.split == 'train').sum())
    chosen = choose_device(device or 'auto')
    compiled = compile == 'on' and has_compiler(chosen)
    return call_once(choose_precision, recipe, chosen, n_images, compiled)


def _check_items(items: pd.DataFrame, recipe: Recipe) -> None:
    """Log a summary of the images and warn of an unreliable validation. Raises `CXRError` if they do not suffice."""
    log.info(describe_items(items))
    log.info(describe_validation(items, recipe))
    check_trainable(items, recipe.valid)
    if not recipe.allow_leakage:
        check_leakage(items)
    warning = validation_warning(items) if recipe.valid != 'none' else None
    if warning and recipe.valid == 'official':
        warning += ' --valid patients is more reliable.'
    if warning:
        warnings.warn(warning, CXRWarning, stacklevel=3)


def _check_images(items: pd.DataFrame, root: Path, recipe: Recipe) -> tuple[ImageCache | None, list[str]]:
    """Return the cache of the recipe's images, if there is one, and the paths of unreadable images, which are skipped.

    Raises `ImageError` if images are unreadable and the recipe does not skip them.
    """
    cache = find_cache(root, Preprocessing.of(recipe))
    paths = [root / path for path in items[items.split.isin(['train', 'valid', SHIFT])].path]
    uncached = paths
    if cache is not None:
        uncached = [path for path in paths if path not in cache]
        log.info(f'{len(paths) - len(uncached):,} of {len(paths):,} images are read from the cache {cache.folder}')
    errors = call_once(find_unreadable, uncached, recipe.modality)
    if errors and recipe.on_bad_image == 'fail':
        first_error = list(errors.values())[0]
        raise ImageError(
            f'{describe_unreadable(errors)}. Remove or repair these images, or train with --on-bad-image skip.',
            first_error.code,
        )
    if errors:
        warnings.warn(
            f'{counted(len(errors))} {are(len(errors))} skipped: {describe_unreadable(errors)}',
            CXRWarning,
            stacklevel=3,
        )
    return cache, [path.relative_to(root).as_posix() for path in errors]


def _make_learner(
    items: pd.DataFrame,
    root: Path,
    recipe: Recipe,
    cache: ImageCache | None,
    state: dict[str, Any] | None,
    device: str | None,
) -> CXRLearner:
    """Return the seeded learner of `recipe`. Pretrained weights are not loaded if the weights come from a `state`."""
    check_trainable(items, recipe.valid)
    set_seed(recipe.seed, reproducible=True)
    dls = CXRDataLoaders.from_items(items, root, recipe, cache, device=device)
    return recipe_learner(dls, replace(recipe, weights='none') if state else recipe)


def _log_start(learn: CXRLearner, recipe: Recipe, state: dict[str, Any] | None) -> None:
    environment = describe_environment(learn.dls.device)
    trained, planned = count_epochs(recipe, state)
    log.info(
        f'training {recipe.arch} by the recipe {recipe.name} on {environment["device"]} ({environment["hardware"]}), '
        f'precision {recipe.precision}: {counted(learn.dls.train.n)} in {counted(len(learn.dls.train), "batch")}, '
        f'{counted(planned, "epoch")}' + (f', of which {trained} trained already' if trained else '')
    )


def _record_start(
    run: Run, learn: CXRLearner, recipe: Recipe, items: pd.DataFrame, resume: bool, facts: dict[str, Any]
) -> None:
    """Log the start in the journal of `run`; if the run is new, also write its recipe and items."""
    run.remove_partial_files()
    device = learn.dls.device
    circumstances = describe_environment(device)
    circumstances |= {'compiled': facts['compiled'], 'processes': process_count()}
    if resume:
        _warn_of_changes(run.last_event('start', 'resume'), circumstances)
    facts = facts | describe_network(learn.model, recipe) | circumstances
    if resume:
        added = recipe.phases[len(run.recipe.phases) :]
        if added:
            run.extend(recipe)
            facts['added'] = [asdict(phase) for phase in added]
            log.info('; '.join(describe_extension(phase) for phase in added))
        run.log_event('resume', **facts)
    else:
        run.log_event('start', **facts)
        run.start(recipe, items)


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = [
        f'{name}: {before[name]}, now {value}'
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if changes:
        warnings.warn(
            f'the run was started in another environment ({"; ".join(changes)}), so the last digits of its weights may '
            'differ from those of an uninterrupted run.',
            CXRWarning,
            stacklevel=4,
        )


def _fit_and_save(
    learn: CXRLearner,
    recipe: Recipe,
    run: Run,
    state: dict[str, Any] | None,
    compiled: bool,
    track: str | None,
) -> None:
    """Fit `learn`, and save the best network so far also if the loss diverges. Raises `Diverged` and `Stopped`."""
    callbacks: list[Callback] = [CompileSteps(recipe.size)] if compiled else []
    try:
        with StopOnSignal() as stop, share_batches(learn), tracking(track, run, recipe) as trackers:
            best = fit_run(learn, recipe, run, state, [stop, *trackers, *callbacks])
    except Diverged as error:
        if error.best:
            save_model(learn, run, recipe)
        raise
    except Exception:  # a signal can also stop worker processes, which raises various exceptions here
        if stop.received is None:
            raise
        raise _stopped(run, stop.received) from None
    save_model(learn, run, recipe)
    trained = [row['phase'] for row in learn.history.rows]
    shortened = list(recipe.shortened_phases(trained))
    run.log_event('end', best=without_nan(best), epochs=len(trained), stopped_early=shortened)
    if is_main_process():
        for name in (PREVIOUS_STATE, FAILURE):
            (run / name).unlink(missing_ok=True)


def _stopped(run: Run, number: int) -> Stopped:
    """Log the signal `number` in the journal of `run` and return the exception to raise."""
    name = Signals(number).name
    run.log_event('stop', signal=name)
    return Stopped(
        number,
        f'stopped by {name}. Continue after the last complete epoch: `cxr-fastai train --resume {run.path}`.',
    )


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` with None instead of NaN, which JSON does not have."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def save_model(learn: CXRLearner, run: Run, recipe: Recipe) -> None:
    """Write the network of `learn` into `run`: `model.safetensors`, and `learner.pkl` for fastai's `load_learner`."""
    save_weights(learn.model, run / WEIGHTS)
    if is_main_process():
        save_learner(learn, run / LEARNER, ModelConfig.from_recipe(recipe))


def fit_run(
    learn: CXRLearner,
    recipe: Recipe,
    run: Run,
    state: dict[str, Any] | None = None,
    cbs: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Fit `learn` by `recipe`, with its history and checkpoints in `run`; return the row of the best epoch.

    The fit continues from `state` if it is given. Raises as `CXRLearner.fit_recipe` does, and then writes
    `failure.json`.
    """
    items = run.items if (run / 'items.csv').is_file() else pd.DataFrame()
    checkpoint = Checkpoint(run, identify(recipe, items), state)
    show = ShowEpochs(recipe, checkpoint.start.phase)
    draw = DrawBatch(run / FIRST_BATCH)
    learn.history.run_folder = run
    try:
        # fastai's own progress bar writes control characters into log files.
        with learn.no_bar(), learn.no_logging(), closing(show):
            return learn.fit_recipe(recipe, cbs=[show, checkpoint, draw, *cbs], start=checkpoint.start)
    except Diverged as error:
        write_json(run / FAILURE, error.failure | {'best_epoch': error.best['epoch'] if error.best else None})
        raise
    finally:
        learn.history.run_folder = None

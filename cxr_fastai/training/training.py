"""A recipe and images become a run: phases, schedule, history, the best epoch."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives `Learner.no_bar`)
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (gives `Learner.fit_one_cycle`)
from fastai.learner import Learner
from fastai.torch_core import num_distrib, set_seed

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRWarning, ImageError, OutputError, Stopped
from cxr_fastai.core.files import check_new, write_json
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import describe_items, image_root, read_items
from cxr_fastai.data.loaders import find_unreadable, make_dls, name_images
from cxr_fastai.data.splits import check_leakage, check_trainable, doubt_validation
from cxr_fastai.images.cache import ImageCache, find_cache
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, save_weights
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.models.architectures import describe_network
from cxr_fastai.training.callbacks import History, KeepBest, ReduceOnPlateau, ShowEpochs, recipe_callbacks
from cxr_fastai.training.checkpoint import PREVIOUS, Checkpoint, StopOnSignal, identify, starting_at, take_up
from cxr_fastai.training.distributed import check_batch, once, shared, team
from cxr_fastai.training.hardware import CompileSteps, check_compile, choose_compile, describe_hardware
from cxr_fastai.training.learner import make_learner, reuse_memory, start_phase
from cxr_fastai.training.tracking import check_tracker, tracked

log = logging.getLogger(__name__)


@team()
def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    resume: bool = False,
    compile: str = 'auto',
    track: str | None = None,
) -> Run:
    """Train by `recipe` on the images of `data` and write the run folder `out`, which must not exist.

    Leaves the best epoch's network in `learner.pkl`. Two calls with one recipe on the CPU give the same weights, and so
    do one call and another that goes on where it was stopped: `resume` takes `out` up again. `compile` is one of
    `devices.COMPILE`, `track` of `tracking.TRACKERS`. In several processes, one of which writes, it trains one network.

    Raises `CXRError`; whatever can be checked before training is checked before the folder is made.
    """
    if not resume:
        check_new(out)
    _check_engine(recipe, compile, track)
    root = image_root(data)
    run = Run.open(out) if resume else Run(out)
    with ExitStack() as held:
        if resume:
            held.enter_context(run.locked())
        items = read_items(data, recipe.valid, recipe.seed, recipe.limit)
        state = take_up(run, recipe, items) if resume else None
        _check_items(items, recipe)
        cache, bad = _use_cache(items, root, recipe)
        if resume:
            bad = sorted({*bad, *run.unreadable})  # as it was begun
        readable = items[~items.path.isin(bad)]
        check_trainable(readable)
        set_seed(recipe.seed, reproducible=True)
        dls = make_dls(readable, root, recipe, cache)
        learn = make_learner(dls, replace(recipe, weights='none') if state else recipe)  # a state has its own
        compiled = choose_compile(compile, recipe, len(dls.train_ds), dls.device)
        if not resume:
            held.enter_context(Run.create(out).locked())
        run.sweep()
        now = {'device': str(dls.device), 'compiled': compiled, **_circumstances(dls.device)}
        if resume:
            _warn_of_changes(run.noted('start', 'resume'), now)
        run.note(
            'resume' if resume else 'start',
            data=str(data.resolve()),
            unreadable=bad,
            track=track,
            **describe_network(learn.model, recipe),
            **now,
        )
        if not resume:
            run.start(recipe, items)
        _fit_and_save(learn, recipe, run, state, compiled, track)
    return run


def _fit_and_save(
    learn: Learner,
    recipe: Recipe,
    run: Run,
    state: dict[str, Any] | None,
    compiled: bool,
    track: str | None,
) -> None:
    engine = [CompileSteps(recipe.size)] * compiled
    try:
        with StopOnSignal() as stop, shared(learn), tracked(track, run, recipe) as trackers:
            best = fit(learn, recipe, run, state, [stop, *trackers, *engine])
    except Diverged as failed:
        if failed.best:
            save_model(learn, run, recipe)
        raise
    except Exception:  # a signal may have gone to the workers too, whose end has many names
        if not stop.received:
            raise
        raise _tell_stop(run, stop.received) from None
    save_model(learn, run, recipe)
    run.note('end', best={name: None if value != value else value for name, value in best.items()})  # NaN is not itself
    for old in (PREVIOUS, 'failure.json') if is_main_process() else ():
        (run / old).unlink(missing_ok=True)


def save_model(learn: Learner, run: Run, recipe: Recipe) -> None:
    """Write the network of `learn` into `run` as `model.safetensors`, and for fastai's users as `learner.pkl`."""
    save_weights(learn.model, run / WEIGHTS)
    if is_main_process():
        save_learner(learn, run / LEARNER, ModelConfig.of(recipe))


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    other = [f'{name}: {before[name]}, now {value}' for name, value in now.items() if before.get(name, value) != value]
    if other:
        warnings.warn(
            f'the run was begun otherwise ({"; ".join(other)}), so the last digits of its weights may '
            'not be those of a run that nothing stopped.',
            CXRWarning,
            stacklevel=3,
        )


def _check_engine(recipe: Recipe, compile: str, track: str | None) -> None:
    check_compile(compile)
    check_tracker(track)
    check_batch(recipe.batch_size)


def _tell_stop(run: Run, number: int) -> Stopped:
    name = Signals(number).name
    run.note('stop', signal=name)
    return Stopped(
        number, f'stopped by {name}: `cxr-fastai train --resume {run.path}` goes on after the last whole epoch.'
    )


def _check_items(items: pd.DataFrame, recipe: Recipe) -> None:
    """Describe the images; raise `CXRError` for those that cannot be trained on, warn of a validation that says little."""
    log.info(describe_items(items))
    check_trainable(items)
    if not recipe.allow_leakage:
        check_leakage(items)
    if doubt := doubt_validation(items):
        advice = ' --valid patients is sounder.' if recipe.valid == 'official' else ''
        warnings.warn(doubt + advice, CXRWarning, stacklevel=3)


def _use_cache(items: pd.DataFrame, root: Path, recipe: Recipe) -> tuple[ImageCache | None, list[str]]:
    """The cache of images that fits the recipe, if there is one, and the paths of images that cannot be read, if those
    are to be skipped. Raises `ImageError` if not."""
    cache = find_cache(root, Preprocessing.of(recipe))
    images = [root / path for path in items[items.split.isin(['train', 'valid'])].path]
    unknown = [image for image in images if cache is None or image not in cache]
    if cache:
        log.info(f'{len(images) - len(unknown):,} of {len(images):,} images come decoded from {cache.folder}')
    bad = once(find_unreadable, unknown)
    if bad and recipe.on_bad_image == 'fail':
        raise ImageError(
            f'{name_images(bad)}. Remove or mend what cannot be read, or train with --on-bad-image skip.',
            next(iter(bad.values())).code,
        )
    if bad:
        warnings.warn(f'{len(bad)} images are skipped: {name_images(bad)}', CXRWarning, stacklevel=3)
    return cache, [path.relative_to(root).as_posix() for path in bad]


def fit(
    learn: Learner,
    recipe: Recipe,
    run: Run,
    state: dict[str, Any] | None = None,
    cbs: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Fit `learn` through the phases of `recipe`, give it the best epoch's weights, and return that epoch's row of
    `history.csv`. Goes on from `state`, if there is one, with `cbs` beside its own callbacks.

    Raises `Diverged` at the first loss that is no finite number, after giving `learn` the best weights so far.
    """
    reuse_memory()
    history, best, show = History(run), KeepBest(), ShowEpochs()
    checkpoint = Checkpoint(
        run, identify(recipe, run.items if (run / 'items.csv').is_file() else pd.DataFrame()), state
    )
    at, done = (state['phase'], state['epochs']) if state else (0, 0)
    # fastai's own bar writes control characters into logs.
    cbs = [history, best, show, checkpoint, *recipe_callbacks(recipe), *cbs]
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs), closing(show):
        for i, phase in enumerate(recipe.phases[at:], at):
            checkpoint.phase = i
            with starting_at(learn, done if i == at else 0):
                fit_phase(learn, phase, recipe)
            if history.failure:
                break
    if best.state:
        learn.model.load_state_dict(best.state)
    if history.failure:
        raise _failure(run, history.failure, best.row)
    return best.row


def fit_phase(learn: Learner, phase: Phase, recipe: Recipe) -> None:
    """Fit one phase by the schedule of `recipe`: at a constant learning rate that a plateau of the validation loss
    reduces, or one cycle up to the phase's rate and down again (Smith and Topin 2019), each group of parameters at its
    own."""
    start_phase(learn, phase)
    learn.history.phase = phase.name
    rates = slice(phase.lr * recipe.body_lr, phase.lr)  # from the body to the head
    if recipe.schedule == 'one-cycle':
        learn.fit_one_cycle(phase.epochs, rates)
    else:
        learn.fit(phase.epochs, rates, cbs=ReduceOnPlateau(recipe.plateau_factor, recipe.plateau_patience))


class Diverged(OutputError):
    """The loss became no finite number; `best` is the row of the best epoch before that, if there was one."""

    def __init__(self, message: str, best: dict[str, Any] | None):
        super().__init__(message)
        self.best = best


def _failure(run: Run, failure: dict[str, Any], best: dict[str, Any] | None) -> Diverged:
    write_json(run / 'failure.json', failure | {'best_epoch': best and best['epoch']})
    batch = f', batch {failure["batch"]}' if failure['batch'] else ''
    kept = f'epoch {best["epoch"]}, the best so far, is kept' if best else 'no epoch came before it'
    return Diverged(
        f'the loss of {failure["where"]} is {failure["loss"]} in epoch {failure["epoch"]}{batch}, so '
        f'training ended; {kept}. Train again with a lower --lr, or check --weights and the images.',
        best,
    )


def _circumstances(device: torch.device) -> dict[str, Any]:
    packages = ('cxr_fastai', 'fastai', 'torch', 'torchvision')
    return {
        'hardware': describe_hardware(device),
        'threads': torch.get_num_threads(),
        'processes': num_distrib() or 1,
        'python': platform.python_version(),
    } | {name: version(name) for name in packages}

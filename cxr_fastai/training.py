"""A recipe and films become a run: phases, schedule, history, the best epoch."""
from __future__ import annotations

import math
import platform
import time
import warnings
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives `Learner.no_bar`)
from fastai.learner import Learner
from fastai.torch_core import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cxr_fastai.artefacts import save_learner
from cxr_fastai.cache import FilmCache, find_cache
from cxr_fastai.core import CXRWarning, OutputError, Phase, Recipe, check_new, write_csv
from cxr_fastai.data import check_readable, make_dls
from cxr_fastai.images import Preprocessing
from cxr_fastai.items import check_leakage, check_trainable, describe_items, doubt_validation, film_root, read_items
from cxr_fastai.learner import make_learner, reuse_memory, start_phase
from cxr_fastai.run import Run

COLUMNS = ['phase', 'epoch', 'lr', 'train_loss', 'valid_loss', 'accuracy', 'roc_auc', 'sensitivity', 'specificity',
           'seconds']


def train(recipe: Recipe, data: Path, out: Path, console: Console | None = None) -> Run:
    """Train by `recipe` on the films of `data` and write the run folder `out`, which must not exist.

    Leaves the best epoch's network in `learner.pkl`. Two calls with one recipe on the CPU give the same weights.
    Raises `CXRError`; whatever can be checked before training is checked before the folder is made.
    """
    check_new(out)
    console, root = console or Console(), film_root(data)
    items = read_items(data, recipe.valid, recipe.seed, recipe.limit)
    console.print(describe_items(items), highlight=False, soft_wrap=True, markup=False)
    check_trainable(items)
    if not recipe.allow_leakage: check_leakage(items)
    if doubt := doubt_validation(items):
        advice = ' --valid patients is sounder.' if recipe.valid == 'official' else ''
        warnings.warn(doubt + advice, CXRWarning, stacklevel=2)
    cache = _use_cache(items, root, recipe, console)
    set_seed(recipe.seed, reproducible=True)
    dls = make_dls(items, root, recipe, cache)
    learn = make_learner(dls, recipe)
    run = Run.create(out)
    run.start(recipe, items)
    run.note('start', data=str(data.resolve()), device=str(dls.device), threads=torch.get_num_threads(), **_versions())
    best = fit(learn, recipe, run, console)
    save_learner(learn, run/'learner.pkl', recipe)
    run.note('end', best={name: None if value != value else value for name, value in best.items()})  # NaN is not itself
    return run


def _use_cache(items: pd.DataFrame, root: Path, recipe: Recipe, console: Console) -> FilmCache | None:
    """The cache of films that fits the recipe, if there is one; every film outside it is known to be readable."""
    cache = find_cache(root, Preprocessing.of(recipe))
    films = [root/path for path in items[items.split.isin(['train', 'valid'])].path]
    unknown = [film for film in films if cache is None or film not in cache]
    if cache: console.print(f'{len(films) - len(unknown):,} of {len(films):,} films come decoded from {cache.folder}',
                            highlight=False, soft_wrap=True, markup=False)
    check_readable(unknown)
    return cache


def fit(learn: Learner, recipe: Recipe, run: Run, console: Console | None = None) -> dict[str, Any]:
    """Fit `learn` through the phases of `recipe`, give it the best epoch's weights, and return that epoch's row of
    `history.csv`. Without a `console` one is made for the standard output. A loss that is no finite number ends it
    early; raises `OutputError` where no epoch came before that."""
    reuse_memory()
    history, best, show = History(run), KeepBest(), ShowEpochs(console or Console())
    # fastai's own bar writes control characters into logs.
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([history, best, show]), show:
        for phase in recipe.phases:
            if not history.diverged: fit_phase(learn, phase, recipe)
    if best.state is None: raise OutputError('the loss is not a finite number: lower --lr, or check --weights.')
    if history.diverged:
        warnings.warn(f'the loss became infinite or no number in epoch {len(history.rows) + 1}, so training stopped; '
                      f'epoch {best.row["epoch"]} is kept. A lower --lr may help.', CXRWarning, stacklevel=2)
    learn.model.load_state_dict(best.state)
    return best.row


def fit_phase(learn: Learner, phase: Phase, recipe: Recipe) -> None:
    """Fit one phase with a constant learning rate that a plateau of the validation loss reduces."""
    start_phase(learn, phase)
    learn.history.phase = phase.name
    learn.fit(phase.epochs, phase.lr, cbs=ReduceOnPlateau(recipe.plateau_factor, recipe.plateau_patience))


class History(Callback):
    """One row an epoch, in `rows` and in the run's `history.csv`, over all phases."""
    order = 55  # after the Recorder

    def __init__(self, run: Run): self.run_folder, self.rows, self.diverged = run, [], False

    def before_epoch(self):
        self.started, self.total, self.count = time.perf_counter(), 0.0, 0
        self.lr_now = self.opt.hypers[-1]['lr']

    def after_batch(self):
        if not self.training: return
        if not torch.isfinite(self.loss):
            self.diverged = True
            raise CancelFitException
        n = len(self.yb[0])
        self.total, self.count = self.total + self.loss.detach()*n, self.count + n

    def after_epoch(self):
        measured = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1], strict=False))
        row = measured | {'phase': self.phase, 'epoch': len(self.rows) + 1, 'lr': self.lr_now,
                          'train_loss': float(self.total)/self.count,  # fastai's is smoothed over older batches
                          'seconds': round(time.perf_counter() - self.started, 2)}
        self.rows.append({name: row[name] for name in COLUMNS})
        write_csv(self.run_folder/'history.csv', pd.DataFrame(self.rows))


class KeepBest(Callback):
    """Keep the weights of the best epoch over all phases: by validation AUC, by loss where it ties or is undefined."""
    order = 56

    def __init__(self): self.key, self.row, self.state = (-math.inf, -math.inf), None, None

    def after_epoch(self):
        row = self.history.rows[-1]
        key = (row['roc_auc'] if math.isfinite(row['roc_auc']) else 0.0, -row['valid_loss'])
        if not math.isfinite(row['valid_loss']) or key <= self.key: return
        self.key, self.row, self.state = key, row, deepcopy(self.model.state_dict())


class ReduceOnPlateau(Callback):
    """torch's ReduceLROnPlateau on the validation loss, stepped after each epoch.

    fastai's own callback of that name writes into copies of the settings when the optimiser is an `OptimWrapper`, and
    so changes nothing.
    """
    order = 57

    def __init__(self, factor: float, patience: int): self.factor, self.patience = factor, patience

    def before_fit(self):
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.opt.opt, factor=self.factor,
                                                                    patience=self.patience)

    def after_epoch(self): self.scheduler.step(self.history.rows[-1]['valid_loss'])


class ShowEpochs(Callback):
    """A line an epoch, and on a terminal a progress bar within it."""
    order = 58

    def __init__(self, console: Console): self.console, self.bar = console, None

    def before_train(self): self._start(f'{self.history.phase} {len(self.history.rows) + 1}', len(self.dls.train))
    def before_validate(self): self._start('validation', len(self.dls.valid))

    def after_batch(self):
        if self.bar: self.bar.advance(self.task)

    def after_train(self): self._stop()
    def after_validate(self): self._stop()

    def __enter__(self): return self
    def __exit__(self, *_): self._stop()

    def after_epoch(self):
        row = self.history.rows[-1]
        best = '  best' if row is self.keep_best.row else ''
        line = (f'{row["phase"]:>9} {row["epoch"]:>3}  lr {row["lr"]:.0e}  train {row["train_loss"]:.4f}  '
                f'valid {row["valid_loss"]:.4f}  AUC {row["roc_auc"]:.4f}  sens {row["sensitivity"]:.3f}  '
                f'spec {row["specificity"]:.3f}  {row["seconds"]:.0f} s{best}')
        self.console.print(line, highlight=False, soft_wrap=True)

    def _start(self, what: str, total: int):
        if not self.console.is_terminal: return
        self.bar = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            console=self.console, transient=True)
        self.task = self.bar.add_task(what, total=total)
        self.bar.start()

    def _stop(self):
        if self.bar: self.bar.stop()
        self.bar = None


def _versions() -> dict[str, Any]:
    packages = ('cxr_fastai', 'fastai', 'torch', 'torchvision')
    return {'python': platform.python_version()} | {name: version(name) for name in packages}

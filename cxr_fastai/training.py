"""A recipe and films become a run: phases, schedule, history, the best epoch."""
from __future__ import annotations

import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives `Learner.no_bar`)
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (gives `Learner.fit_one_cycle`)
from fastai.learner import Learner
from fastai.torch_core import set_seed
from rich.console import Console

from cxr_fastai.artefacts import save_learner
from cxr_fastai.cache import FilmCache, find_cache
from cxr_fastai.callbacks import History, KeepBest, ReduceOnPlateau, ShowEpochs, recipe_callbacks
from cxr_fastai.core import CXRWarning, OutputError, check_new
from cxr_fastai.data import check_readable, make_dls
from cxr_fastai.images import Preprocessing
from cxr_fastai.items import check_leakage, check_trainable, describe_items, doubt_validation, film_root, read_items
from cxr_fastai.learner import make_learner, reuse_memory, start_phase
from cxr_fastai.recipe import Phase, Recipe
from cxr_fastai.run import Run


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
    cbs = [history, best, show, *recipe_callbacks(recipe)]
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs), show:
        for phase in recipe.phases:
            if not history.diverged: fit_phase(learn, phase, recipe)
    if best.state is None: raise OutputError('the loss is not a finite number: lower --lr, or check --weights.')
    if history.diverged:
        warnings.warn(f'the loss became infinite or no number in epoch {len(history.rows) + 1}, so training stopped; '
                      f'epoch {best.row["epoch"]} is kept. A lower --lr may help.', CXRWarning, stacklevel=2)
    learn.model.load_state_dict(best.state)
    return best.row


def fit_phase(learn: Learner, phase: Phase, recipe: Recipe) -> None:
    """Fit one phase by the schedule of `recipe`: at a constant learning rate that a plateau of the validation loss
    reduces, or one cycle up to the phase's rate and down again (Smith and Topin 2019), each group of parameters at its
    own."""
    start_phase(learn, phase)
    learn.history.phase = phase.name
    rates = slice(phase.lr*recipe.body_lr, phase.lr)
    if recipe.schedule == 'one-cycle': learn.fit_one_cycle(phase.epochs, rates)
    else: learn.fit(phase.epochs, rates, cbs=ReduceOnPlateau(recipe.plateau_factor, recipe.plateau_patience))


def _versions() -> dict[str, Any]:
    packages = ('cxr_fastai', 'fastai', 'torch', 'torchvision')
    return {'python': platform.python_version()} | {name: version(name) for name in packages}

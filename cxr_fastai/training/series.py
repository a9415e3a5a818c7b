"""Train a series: the folds of a cross-validation, or several seeds, one after the other and resumable."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cxr_fastai.core.environment import Launch
from cxr_fastai.core.errors import Stopped, UsageError
from cxr_fastai.core.files import writing
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.recipe_fields import LIMITS
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import FOLDS, MAX_RUNS, MIN_RUNS, SEEDS, Series
from cxr_fastai.data.items import divide_items, hold_out_items, identify_images, image_root, read_items
from cxr_fastai.data.splits import check_trainable
from cxr_fastai.training.training import train

log = logging.getLogger(__name__)


def train_folds(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    folds: int,
    *,
    precision: str | None = None,
    compile: str = 'off',
    track: str | None = None,
    device: str | None = None,
) -> Series:
    """Train a network for each of `folds` parts of the patients, and validate it on that part.

    Every image of train and valid (without `recipe.limit`) is then a validation image of exactly one network, which was
    trained on none of that patient's images. The runs are `out/fold-0`, `out/fold-1` and so on; the other arguments are
    those of `train`. With the `precision` `auto`, the trial of the first training decides for all of them.

    Raises `CXRError` as `train` does, and `UsageError` in several processes and if a class has fewer patients than
    folds. What was trained until then can be continued by `resume_series`.
    """
    _check('--folds', folds)
    items = hold_out_items(read_items(data), image_root(data), recipe)
    patients = items[items.split.isin(['train', 'valid'])].groupby('label').patient.nunique()
    if patients.min() < folds:
        raise UsageError(
            f'--folds {folds}: {patients.idxmin()} has only {counted(patients.min(), "patient")}. Choose at most '
            f'{counted(patients.min(), "fold")}.'
        )
    recipe = replace(recipe, valid='patients')
    series = Series(Path(out), FOLDS, folds, recipe, identify_images(items), precision, compile, track)
    return _train_new(series, data, items, device)


def train_seeds(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    seeds: int,
    *,
    precision: str | None = None,
    compile: str = 'off',
    track: str | None = None,
    device: str | None = None,
) -> Series:
    """Train networks that differ in the seed only, from that of `recipe` on; see `train_folds`.

    With `valid='patients'`, the default, the seed also chooses the validation patients.
    """
    _check('--seeds', seeds)
    last, (_, highest) = recipe.seed + seeds - 1, LIMITS['seed']
    if last > highest:
        raise UsageError(f'--seeds {seeds}: the last seed would be {last}. Choose a --seed so that it is below 2**32.')
    items = hold_out_items(read_items(data), image_root(data), recipe)
    series = Series(Path(out), SEEDS, seeds, recipe, identify_images(items), precision, compile, track)
    return _train_new(series, data, items, device)


def resume_series(path: str | Path, data: str | Path, device: str | None = None) -> Series:
    """Continue the series in the folder `path`: an interrupted training first, then those that have not begun.

    Raises `CXRError` as `train` does, and `UsageError` if `data` contains other images than those of the series.
    """
    series = Series.open(path)
    _check(f'--resume {path}', series.number)
    items = read_items(data)
    if identify_images(items) != series.images:
        raise UsageError(
            f'{series.path}: its trainings so far have other images than {data} contains. Name the folder that they '
            'were trained on, or train with another --out.'
        )
    if series.find_missing():
        items = hold_out_items(items, image_root(data), series.recipe)
    return _train_missing(series, data, items, device)


def _check(option: str, number: int) -> None:
    if Launch.from_environment().processes > 1:
        raise UsageError(f'{option} trains in a single process. Start each training with the launcher instead.')
    if not MIN_RUNS <= number <= MAX_RUNS:
        raise UsageError(f'{option} {number}: a whole number from {MIN_RUNS} to {MAX_RUNS} is needed.')


def _train_new(series: Series, data: str | Path, items: pd.DataFrame, device: str | None) -> Series:
    first, *_ = series.recipes.values()
    check_trainable(divide_items(items, first), first.valid)
    series.create()
    return _train_missing(series, data, items, device)


def _train_missing(series: Series, data: str | Path, items: pd.DataFrame, device: str | None) -> Series:
    """Train what is missing. `items` are those of `data`, from which images were held out, but not yet divided."""
    first = series.folder_of_first
    for number, (name, recipe) in enumerate(series.recipes.items(), 1):
        folder = series.folder(name)
        if Run(folder).has_ended:
            log.info('%s: trained already', folder)
            continue
        log.info('%s: training %d of %d', folder, number, series.number)
        precision = series.precision
        if folder != first:  # the trial of the first training decides
            recipe, precision = replace(recipe, precision=Run.open(first).recipe.precision), None
        try:
            _train_one(series, folder, recipe, data, items, precision, device)
        except Stopped as error:
            advice = f'Continue: `cxr-fastai train --resume {series.path}`.'
            raise Stopped(error.number, f'stopped in {folder}. {advice}') from None
    return series


def _train_one(
    series: Series,
    folder: Path,
    recipe: Recipe,
    data: str | Path,
    items: pd.DataFrame,
    precision: str | None,
    device: str | None,
) -> None:
    resume = (folder / 'recipe.json').is_file()
    if resume:
        recipe, precision = Run.open(folder).recipe, None
    elif folder.exists():  # it was stopped before there was anything to continue
        with writing(folder):
            shutil.rmtree(folder)
    train(
        recipe,
        data,
        folder,
        resume=resume,
        compile=series.compile,
        track=series.track,
        device=device,
        precision=precision,
        items=divide_items(items, recipe),
    )

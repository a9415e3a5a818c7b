"""`save_run` turns a learner that was trained by hand into a run, which `evaluate`, `explain` and others can read."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import IntToFloatTensor
from fastai.learner import Learner
from fastai.vision.augment import Resize

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError, first_line
from cxr_fastai.core.files import write_csv
from cxr_fastai.core.recipe import CUSTOM, DATA_FIELDS, POSITIVE, UNKNOWN, VOCAB, Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_table
from cxr_fastai.data.loaders import CXRDataLoaders, augmentations, find_preprocessing
from cxr_fastai.data.transforms import NormalizeImage, list_labels
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, save_weights
from cxr_fastai.inference.pickles import KEPT_CALLBACKS, save_learner
from cxr_fastai.inference.predictor import load_undecided
from cxr_fastai.models.architectures import describe_network, find_arch
from cxr_fastai.models.networks import unwrap_network
from cxr_fastai.training.callbacks import COLUMNS, name_metrics
from cxr_fastai.training.hardware import describe_environment
from cxr_fastai.training.learner import CXRLearner
from cxr_fastai.training.training import without_nan

MAX_DIFFERENCE = 0.01
"""Largest difference of a probability between the learner and the run that `save_run` accepts."""
STANDARD_CALLBACKS = {*KEPT_CALLBACKS, 'History', 'PrepareAhead', 'SingleImages'}
"""Callbacks of a learner that `cxr_learner` made."""
COMPARED_IMAGES = 32
"""Number of validation images that `save_run` predicts twice."""


class ImageSource(NamedTuple):
    """The images of a learner: their `items` table, with paths relative to `root`, and the folder or CSV file."""

    items: pd.DataFrame
    root: Path
    source: Path
    from_table: bool


def save_run(learn: Learner, path: str | Path, arch: str | None = None) -> Run:
    """Write a trained learner into the new folder `path` and return it as a run.

    `evaluate`, `explain`, `report` and `export` work on it as on a run of `train`. What the learner does not know, such
    as the phases of its training, is written as unknown. Learners of fastai without this package, such as those of
    `vision_learner` with `ImageDataLoaders`, are accepted if their images are resized to squares in a way that this
    package knows.

    Args:
        arch: name of the architecture; needed if the learner was not made by `cxr_learner` or `vision_learner`.

    Raises `UsageError` if `path` is not empty, if the network cannot be built from its name, if the images of the
    learner are not files, or if the run does not reproduce the probabilities of the learner on validation images.
    """
    source = find_images(learn.dls)
    preprocessing = _find_preprocessing(learn.dls)
    recipe = _find_recipe(learn, arch or _find_arch(learn), preprocessing)
    run = Run.create(Path(path))
    try:
        run.log_event('start', **_describe_training(learn, recipe, source))
        run.start(recipe, source.items)
        write_csv(run / 'history.csv', pd.DataFrame(_history(learn), columns=COLUMNS))
        save_weights(unwrap_network(learn.model), run / WEIGHTS)
        _save_pickle(learn, recipe, run / LEARNER)
        difference = _largest_difference(learn, run, source)
        if math.isnan(difference) or difference > MAX_DIFFERENCE:
            raise UsageError(
                f'{path}: not saved, because probabilities of the run would differ from those of the learner by up to '
                f'{difference:.3f} (validation images). The learner prepares its images in another way: make its '
                'DataLoaders with CXRDataLoaders, and train again.'
            )
        run.log_event('end', best=_best_epoch(learn, recipe), difference=difference)
    except BaseException:  # also an interrupt
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def find_images(dls: DataLoaders) -> ImageSource:
    """Return the images of `dls`. Raises `UsageError` if there are none, or if they are not files."""
    if isinstance(dls, CXRDataLoaders) and hasattr(dls, 'item_table'):
        return ImageSource(dls.item_table, dls.root, dls.source or dls.root, from_table=dls.source is None)
    rows = []
    for split, dl in (('train', dls.train), ('valid', dls.valid)):
        labels = zip(_paths(dl), list_labels(dl.dataset), strict=True)
        rows += [(path, VOCAB[label], split) for path, label in labels]
    if not rows:
        raise UsageError(
            'the learner has no images, because it was loaded from a file. Give it DataLoaders first: learn.dls = dls.'
        )
    root = Path(os.path.commonpath([path.parent for path, _, _ in rows]))
    table = pd.DataFrame(rows, columns=['path', 'label', 'split'])
    table['path'] = [path.relative_to(root).as_posix() for path in table.path]
    return ImageSource(read_table(table, root), root, root, from_table=True)


def _paths(dl: Any) -> list[Path]:
    items = dl.items.path if isinstance(dl.items, pd.DataFrame) and 'path' in dl.items else dl.items
    if not all(isinstance(item, str | Path) for item in items):
        raise UsageError('the images of the learner are not files, so a run cannot name them. Use paths.')
    return [Path(item).resolve() for item in items]


def _find_preprocessing(dls: DataLoaders) -> Preprocessing:
    """Return the preprocessing of `dls`, or the one that is most similar to fastai's `Resize`."""
    for transform in dls.valid.after_item.fs:
        if isinstance(transform, Resize) and len(set(transform.size)) == 1:
            return Preprocessing(transform.size[0], str(transform.method))
    return find_preprocessing(dls)


def _find_arch(learn: Learner) -> str:
    """Return the name of the network of `learn`. Raises `UsageError` if it is not known."""
    arch = getattr(learn, 'arch', None) if 'arch' in vars(learn) else None
    if callable(arch):
        return f'vision_learner.{arch.__name__}'
    if isinstance(arch, str):
        return arch if isinstance(learn, CXRLearner) else f'vision_learner.timm.{arch}'
    raise UsageError(
        f'the name of the network, a {_name(unwrap_network(learn.model))}, is not known. Pass arch="NAME", a name that '
        '`cxr-fastai archs` lists or that add_arch registered, or make the learner with cxr_learner.'
    )


def _find_recipe(learn: Learner, arch: str, preprocessing: Preprocessing) -> Recipe:
    """Return the recipe that trained `learn`, or a custom one with what is known. Raises for an unknown `arch`."""
    find_arch(arch)
    if isinstance(learn, CXRLearner) and learn.recipe and _followed(learn, learn.recipe):
        return learn.recipe
    images = getattr(learn.dls, 'recipe', None)
    known = {field: getattr(images, field) for field in DATA_FIELDS} if images else {}
    known |= asdict(preprocessing)
    return replace(
        Recipe(UNKNOWN, (), name=CUSTOM, **known),
        arch=arch,
        phases=_find_phases(learn),
        weights=_first_weights(learn),
        valid=images.valid if images else UNKNOWN,
        batch_size=learn.dls.train.bs,
        weight_decay=learn.wd if learn.wd is not None else 0.0,
        optimizer=UNKNOWN,
        schedule=UNKNOWN,
    )


def _followed(learn: Any, recipe: Recipe) -> bool:
    """Return whether `recipe` alone trained `learn`: no other fit, no other callback, and no other transforms."""
    transforms = [IntToFloatTensor, *map(type, augmentations(recipe)), NormalizeImage]
    return (
        learn.recipe_dls is learn.dls
        and not getattr(learn.dls, 'has_own_tfms', False)
        and _has_phases([row['phase'] for row in learn.history.rows], recipe)
        and not _own_callbacks(learn)
        and {_name(transform) for transform in learn.dls.train.after_batch.fs} == {kind.__name__ for kind in transforms}
    )


def _has_phases(trained: list[str], recipe: Recipe) -> bool:
    """Return whether the epochs with the phases `trained` are those of `recipe`, of which some may have ended early."""
    counts = Counter(trained)
    limits = {phase.name: phase.epochs for phase in recipe.phases}
    expected = [name for name, epochs in limits.items() for _ in range(min(epochs, counts[name]))]
    is_complete = recipe.can_stop_early or len(trained) == recipe.epochs
    return trained == expected and is_complete


def _find_phases(learn: Learner) -> tuple[Phase, ...]:
    if isinstance(learn, CXRLearner):
        return tuple(learn.history.fits)
    return ()


def _first_weights(learn: Learner) -> str:
    weights = vars(learn).get('pretrained', UNKNOWN)
    return weights if isinstance(weights, str) else UNKNOWN


def _describe_training(learn: Learner, recipe: Recipe, source: ImageSource) -> dict[str, Any]:
    """Return the facts about the training for the journal."""
    device = learn.dls.device or torch.device('cpu')
    facts = {
        'saved_by_hand': True,
        'data': str(source.source.resolve()),
        'from_table': source.from_table,
        'unreadable': [],
        'callbacks': _own_callbacks(learn),
        'optimizer': _name_optimizer(learn),
        'loss': _name(learn.loss_func),
        'batch_tfms': [_name(transform) for transform in learn.dls.train.after_batch.fs],
    }
    facts |= describe_environment(device)
    facts |= describe_network(unwrap_network(learn.model), recipe)
    if recipe.weights == UNKNOWN:
        facts['origin'] = UNKNOWN
    return facts


def _own_callbacks(learn: Learner) -> list[str]:
    """Return the names of the callbacks that the user added to `learn`."""
    return [_name(callback) for callback in learn.cbs if _name(callback) not in STANDARD_CALLBACKS]


def _name_optimizer(learn: Learner) -> str:
    if learn.opt is None:
        return UNKNOWN
    if hasattr(learn.opt, 'opt'):
        return _name(learn.opt.opt)
    return getattr(learn.opt_func, '__name__', UNKNOWN)  # fastai's optimisers are functions


def _name(thing: Any) -> str:
    return type(thing).__name__


def _history(learn: Learner) -> Sequence[dict[str, Any]]:
    """Return the rows of `history.csv`; of a learner of another package only the last fit, as its recorder has it."""
    if isinstance(learn, CXRLearner):
        return learn.history.rows
    recorder = vars(learn).get('recorder')
    names = list(getattr(recorder, 'metric_names', ()))[1:-1]  # without the epoch and the time
    rows = []
    for number, values in enumerate(getattr(recorder, 'values', ()), 1):
        metrics = name_metrics(names, values)
        known = {name: float(metrics.get(name, math.nan)) for name in COLUMNS[2:]}
        rows.append({'phase': UNKNOWN, 'epoch': number, **known})
    return rows


def _best_epoch(learn: Learner, recipe: Recipe) -> dict[str, Any]:
    """Return the row of the epoch that the network is from; empty if that is not known."""
    if recipe.name == CUSTOM or not isinstance(learn, CXRLearner) or learn.best_row is None:
        return {}
    return without_nan(learn.best_row)


def _save_pickle(learn: Learner, recipe: Recipe, path: Path) -> None:
    """Write `learner.pkl` for fastai's `load_learner` if this package prepares the images of `learn`."""
    try:
        find_preprocessing(learn.dls)
        save_learner(learn, path, ModelConfig.from_recipe(recipe))
    except (CXRError, pickle.PicklingError, AttributeError, TypeError) as error:  # pickle raises all of these
        path.unlink(missing_ok=True)
        warnings.warn(f'the run has no {path.name}: {first_line(error)}', CXRWarning, stacklevel=3)


def _largest_difference(learn: Learner, run: Run, source: ImageSource) -> float:
    """Return the largest difference of a probability between `learn` and `run` on validation images.

    Without any, it is that on training images.
    """
    items = source.items
    splits = [items[items.split == split] for split in ('valid', 'train')]
    compared = next(rows for rows in splits if len(rows)).head(COMPARED_IMAGES)
    paths = [source.root / path for path in compared.path]
    dl = learn.dls.test_dl(paths, num_workers=0)
    act = None if hasattr(learn.loss_func, 'activation') else partial(torch.softmax, dim=1)
    expected, _ = learn.get_preds(dl=dl, act=act)
    rows = load_undecided(run).predict(paths)
    actual = np.array([row['p_pneumonia'] for row in rows], dtype=float)
    return float(np.abs(expected[:, POSITIVE].numpy() - actual).max())

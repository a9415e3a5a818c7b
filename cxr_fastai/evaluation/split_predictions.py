"""The predictions of the images of a split: those stored before if nothing has changed since, otherwise new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import OUT_OF_FOLD
from cxr_fastai.evaluation.calibration import log_losses
from cxr_fastai.evaluation.split_images import folder_with, own_images
from cxr_fastai.inference.config import sha256
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor, load_undecided

PREDICTION_COLUMNS = ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']
"""Columns of `predictions.csv`."""


@dataclass(frozen=True)
class SplitImages:
    """The images of a `split`: their `items`, below the folder `root`, which is None if they were not found."""

    split: str
    items: pd.DataFrame
    root: Path | None


@dataclass(frozen=True)
class OutOfFold:
    """The out-of-fold predictions in a run: the `table`, and the SHA-256 of its file, `stamp`."""

    table: pd.DataFrame
    stamp: str

    @classmethod
    def read(cls, run: Run) -> OutOfFold | None:
        """Return those of `run`; None if it has none. Raises `UsageError` if the file is damaged."""
        if not run.has_out_of_fold:
            return None
        return cls(run.out_of_fold, sha256(run / OUT_OF_FOLD))

    def rows(self, items: pd.DataFrame) -> pd.DataFrame:
        """Return the predictions of `items`, in their order, with `PREDICTION_COLUMNS`."""
        predictions = self.table.set_index('path', drop=False).loc[items.path]
        return predictions.assign(split='valid')[PREDICTION_COLUMNS].reset_index(drop=True)


def has_views(out_of_fold: pd.DataFrame) -> bool:
    """Return whether out-of-fold predictions are means over test-time views: then all have the value True of `tta`."""
    return 'tta' in out_of_fold and bool(out_of_fold.tta.all())


def choose_tta(run: Run, tta: bool | None, model: str, out_of_fold: OutOfFold | None) -> bool:
    """Return whether the images of `run` are predicted with test-time views: `tta`; if None, as they were before.

    A combined run that was not evaluated before follows the runs that it was made of. `model` is the SHA-256 of the
    network. Raises `UsageError` if the out-of-fold predictions were made the other way.
    """
    if out_of_fold is None:
        return _previous_views(run, model) if tta is None else tta
    stored = has_views(out_of_fold.table)
    if tta not in (None, stored):
        option, manner = ('--tta', 'without') if tta else ('--no-tta', 'with')
        raise UsageError(
            f'{option}: the out-of-fold predictions of {run.path} were made {manner} test-time views. Make them again: '
            f'`{run.out_of_fold_evaluation()} {option}`.'
        )
    return stored


def _previous_views(run: Run, model: str) -> bool:
    decision = Decision.from_run(run, model)
    return decision.tta if decision else bool(run.last_event('combine').get('tta'))


@dataclass(frozen=True)
class Source:
    """What predicts the images of `run`: its network with the SHA-256 `model`, which computes on `device`.

    With `tta` the probabilities are means over test-time views (see `Predictor`). The predictions `out_of_fold`, if
    any, stand for those of the split `valid`.
    """

    run: Run
    model: str
    tta: bool
    out_of_fold: OutOfFold | None
    batch_size: int
    device: str

    @cached_property
    def predictor(self) -> Predictor:
        """The network, which is loaded when it predicts first."""
        return replace(load_undecided(self.run, self.device), tta=self.tta)

    def predict(self, images: SplitImages) -> pd.DataFrame:
        """Return the predictions of `images`. Raises `ImageError` for an unreadable one."""
        if images.split == 'valid' and self.out_of_fold:
            return self.out_of_fold.rows(images.items)
        assert images.root is not None
        return predict_items(self.predictor, images.items, images.root, self.batch_size)

    def stamp(self, images: SplitImages) -> str:
        """Return the SHA-256 of what predictions of `images` are made from: see `stamp_images`."""
        if images.split == 'valid' and self.out_of_fold:
            return self.out_of_fold.stamp
        assert images.root is not None
        return stamp_images(images.items, images.root)

    def can_predict(self, images: SplitImages) -> bool:
        """Return whether the files of `images` were found, or are not needed."""
        return images.root is not None or (images.split == 'valid' and self.out_of_fold is not None)

    def made(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether the `metrics` of a split are those of this network with the same views."""
        return bool(metrics.get('model') == self.model and metrics.get('tta', False) == self.tta)

    def stored(self, known: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
        """Return the stored predictions by split that this source made. `known` are the metrics of the stored ones."""
        splits = [split for split, metrics in known.items() if self.made(metrics)]
        if not splits:
            return {}
        return {
            str(split): rows for split, rows in self.run.predictions.groupby('split', sort=False) if split in splits
        }


@dataclass(frozen=True)
class Predicted:
    """Predictions of one source: `tables` by split, and `stamps` of the splits whose predictions may be new.

    `deciding` are those of the complete split that the threshold is chosen on; None if its images were not found.
    """

    tables: dict[str, pd.DataFrame]
    stamps: dict[str, str]
    deciding: pd.DataFrame | None


def predict_missing(
    source: Source, known: Mapping[str, Any], images: SplitImages, deciding: str, data: Path | None, again: bool
) -> Predicted:
    """Predict `images`, and those of the run's split `deciding`, unless the same files were predicted before.

    `known` are the metrics by split of the predictions that are stored unchanged. With `again`, `images` are predicted
    in any case.
    """
    tables = source.stored(known)
    missing = []
    if again or not _is_current(source, known, tables, images):
        missing.append(images)
    out_of_fold = source.out_of_fold.table if source.out_of_fold else None
    own = own_images(source.run, deciding, out_of_fold)
    decisive = SplitImages(deciding, own, folder_with(own, source.run.images, data))
    if images.split != deciding and not _is_current(source, known, tables, decisive):
        tables.pop(deciding, None)
        if source.can_predict(decisive):
            missing.append(decisive)
    stamps = {}
    for part in missing:
        tables[part.split] = source.predict(part)
        stamps[part.split] = source.stamp(part)
    is_complete_split = deciding in tables and _have_same_paths(tables[deciding], own)
    return Predicted(tables, stamps, tables[deciding] if is_complete_split else None)


def _is_current(
    source: Source, known: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], images: SplitImages
) -> bool:
    """Return whether `tables` has the predictions of `images`, and what they were made from has not changed since.

    If the files are no longer there, the stored predictions count.
    """
    split = images.split
    if split not in tables or not _have_same_paths(tables[split], images.items):
        return False
    return not source.can_predict(images) or known[split].get('images') == source.stamp(images)


def _have_same_paths(predictions: pd.DataFrame, items: pd.DataFrame) -> bool:
    return predictions.path.to_list() == items.path.to_list()


def stamp_images(items: pd.DataFrame, root: Path) -> str:
    """Return a SHA-256 of the paths, sizes and modification times of the image files."""
    facts = []
    for path in items.path:
        stat = (root / path).stat()
        facts.append((path, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode(errors='surrogateescape')).hexdigest()


def predict_items(predictor: Predictor, items: pd.DataFrame, root: Path, batch_size: int = 32) -> pd.DataFrame:
    """Predict the images of `items`; return a table with `PREDICTION_COLUMNS`, where `loss` is the cross-entropy.

    Raises `ImageError` with the name of an unreadable image: metrics of the others would be those of another set.
    """
    rows = pd.DataFrame(predictor.predict([root / path for path in items.path], batch_size))
    failed = rows[rows.status != 'ok']
    if len(failed):
        first = failed.iloc[0]
        others = f' ({len(failed) - 1} more; `cxr-fastai predict` lists them)' if len(failed) > 1 else ''
        raise ImageError(f'{first.path}: {first.message}{others}. Remove or fix it, then evaluate again.', first.code)
    p = rows.p_pneumonia.astype(float)
    targs = (items.label == VOCAB[POSITIVE]).to_numpy()
    losses = log_losses(targs, p.to_numpy())
    table = items.reset_index(drop=True).assign(p_pneumonia=p, prediction=rows.prediction, loss=losses)
    return table[PREDICTION_COLUMNS]

"""Review of labels: which out-of-fold predictions contradict the label most, and which duplicates have other labels.

Each image is scored by the network of a cross-validation that was not trained on it, as confident learning requires
(Northcutt, Jiang and Chuang 2021): a network agrees with the labels that it was trained on. Nothing is relabelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.series import Series, is_folds
from cxr_fastai.data.image_stats import find_duplicates, measure_images
from cxr_fastai.evaluation.cross_validation import find_folder, read_out_of_fold
from cxr_fastai.inference.config import logits

REVIEW_COLUMNS = [
    'rank',
    'path',
    'label',
    'p_pneumonia',
    'p_label',
    'fold',
    'patient',
    'reason',
    'duplicate_of',
]
"""The columns of `review.csv`."""
CONTRADICTS = 'contradicts the label'
WEAK = 'agrees weakly with the label'
DUPLICATE = 'duplicate with another label'
"""The reasons for which an image is listed. The prediction contradicts the label if `p_label` is below 0.5."""
SHARE = 0.04
"""Share of the images that is listed by default."""
LEAST, MOST = 20, 250
"""Smallest and largest number of images that is listed by default."""


@dataclass(frozen=True)
class LabelReview:
    """The result of `review_labels`.

    Attributes
    ----------
    series : the folds whose networks scored the images.
    root : folder that the paths of the images are relative to.
    predictions : the out-of-fold predictions of all images, by path.
    table : columns `REVIEW_COLUMNS`, a row for each listed image, the images to look at first in front.
    contradictions : number of all images, listed or not, whose prediction contradicts the label.
    """

    series: Series
    root: Path
    predictions: pd.DataFrame
    table: pd.DataFrame
    contradictions: int

    def count(self, reason: str) -> int:
        """Return the number of images that are listed for `reason`."""
        return int((self.table.reason == reason).sum())


def review_labels(
    series: Series | StrPath,
    data: StrPath | None = None,
    top: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = 'auto',
) -> LabelReview:
    """List the labels that a human should look at again, of the images of a finished cross-validation.

    First come all images with a duplicate of another label (correlation of their thumbnails as in the audit), then the
    `top` other images by `rank_labels`.

    Args:
        series: the folds, or their folder. They are evaluated first if they have not been.
        data: folder or CSV file of the images; by default the one that the folds were trained on.
        top: number of images to list besides the duplicates (default: `default_top`).
        batch_size, device: as in `evaluate_folds`.
        workers: threads that read images for the search for duplicates (default: the number of cores).

    Raises `UsageError` if `series` is no finished cross-validation, if `top` is below 1, or if images are not found.
    """
    if top is not None and top < 1:
        raise UsageError(f'--top {top}: a whole number from 1 is needed.')
    series = series if isinstance(series, Series) else open_folds(series)
    predictions = read_out_of_fold(series, data, batch_size, device)
    root = find_folder(series, data)
    modality = series.recipe.modality
    _, thumbnails = measure_images(list(predictions.path), root, workers, modality)
    ranked = rank_labels(predictions)
    duplicates = list_conflicts(ranked, find_conflicts(predictions, thumbnails))
    others = ranked[~ranked.path.isin(duplicates.path)].head(top or default_top(len(ranked)))
    table = pd.concat([part for part in (duplicates, others) if len(part)], ignore_index=True)
    table = table.assign(rank=range(1, len(table) + 1))[REVIEW_COLUMNS]
    return LabelReview(series, root, predictions, table, int((ranked.reason == CONTRADICTS).sum()))


def open_folds(path: StrPath) -> Series:
    """Return the cross-validation in the folder `path`. Raises `UsageError` if it is none."""
    if not is_folds(path):
        raise UsageError(
            f'{path}: not the folder of `train --folds`. A label is reviewed by a network that was not trained on it, '
            'so several are needed: `cxr-fastai train --folds 5 --out DIR`.'
        )
    return Series.open(path)


def default_top(n: int) -> int:
    """Return how many of `n` images are listed by default: 4%, from 20 to 250.

    >>> default_top(100), default_top(5232), default_top(100_000)
    (20, 210, 250)
    """
    return min(n, MOST, max(LEAST, math.ceil(SHARE * n)))


def rank_labels(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the out-of-fold `predictions` with the columns `REVIEW_COLUMNS`, the most contradicted label first.

    The score `p_label` is the self-confidence of confident learning, the probability of the label, after
    `calibrate_folds`. Images of equal scores are sorted by path.
    """
    p_label = label_probabilities(predictions.label, calibrate_folds(predictions))
    reasons = np.where(p_label < 0.5, CONTRADICTS, WEAK)
    table = predictions.assign(p_label=p_label, reason=reasons, duplicate_of='')
    ranked = table.sort_values(['p_label', 'path'], ignore_index=True)
    return ranked.assign(rank=range(1, len(ranked) + 1))[REVIEW_COLUMNS]


def label_probabilities(labels: pd.Series, p: np.ndarray) -> np.ndarray:
    """Return the probability (n,) of each of the `labels`, from the probabilities of pneumonia `p` (n,)."""
    return np.where(labels == VOCAB[POSITIVE], p, 1 - p)


def calibrate_folds(predictions: pd.DataFrame) -> np.ndarray:
    """Return the probabilities of pneumonia (n,), on one scale for the networks of all folds.

    The networks differ in how extreme their scores are and in which class they prefer. So the logits of each fold get a
    slope and an intercept by logistic regression on its labels (Platt 1999), which are wrong for few images only. The
    order of the images of a fold stays.
    """
    p = predictions.p_pneumonia.to_numpy(float)
    targs = (predictions.label == VOCAB[POSITIVE]).to_numpy()
    calibrated = np.empty(len(p))
    for fold in predictions.fold.unique():
        rows = (predictions.fold == fold).to_numpy()
        z = logits(p[rows])
        slope, intercept = fit_scale(targs[rows], z)
        calibrated[rows] = expit(slope * z + intercept)
    return calibrated


def fit_scale(targs: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """Return the slope > 0 and the intercept for the logits `z` (n,) that explain the targets `targs` (n,) best.

    Standard normal priors of the intercept and of the logarithm of the slope keep them finite for few images, for
    classes that are separated completely, and for a single class.
    """
    signs = np.where(targs, 1, -1)

    def loss(parameters: np.ndarray) -> float:
        log_slope, intercept = parameters
        log_losses = np.logaddexp(0, -signs * (np.exp(log_slope) * z + intercept))
        return float(log_losses.sum() + 0.5 * (log_slope**2 + intercept**2))

    log_slope, intercept = minimize(loss, [0.0, 0.0], bounds=[(-3, 3), (-20, 20)]).x
    return float(np.exp(log_slope)), float(intercept)


def find_conflicts(items: pd.DataFrame, thumbnails: np.ndarray) -> list[tuple[str, str, float]]:
    """Return the paths of duplicate images with different labels, and the correlation of their `thumbnails` (n, h, w).

    `items` has a row with `path` and `label` for each thumbnail.
    """
    paths, labels = items.path.to_list(), items.label.to_list()
    return [
        (paths[i], paths[j], correlation)
        for i, j, correlation in find_duplicates(thumbnails)
        if labels[i] != labels[j] and paths[i] != paths[j]
    ]


def list_conflicts(ranked: pd.DataFrame, conflicts: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Return the rows of `ranked` that occur in `conflicts`, pair by pair, with `reason` and `duplicate_of`.

    The pair with the most contradicted label comes first. Each image is listed once; of several duplicates with another
    label, `duplicate_of` is the most similar one.
    """
    partners: dict[str, list[tuple[float, str]]] = {}
    for first, second, correlation in conflicts:
        partners.setdefault(first, []).append((-correlation, second))
        partners.setdefault(second, []).append((-correlation, first))
    duplicate_of: dict[str, str] = {}
    for path in ranked.path[ranked.path.isin(list(partners))]:
        for member in (path, *(other for _, other in sorted(partners[path]))):
            duplicate_of.setdefault(member, min(partners[member])[1])
    rows = ranked.set_index('path').loc[list(duplicate_of)].reset_index()
    return rows.assign(reason=DUPLICATE, duplicate_of=list(duplicate_of.values()))[REVIEW_COLUMNS]

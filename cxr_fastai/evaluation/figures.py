"""Figures and small images of an evaluated run, written into its `figures/` folder from the stored predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import atomic
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.curves import (
    plot_calibration,
    plot_net_benefit,
    plot_precision_recall,
    plot_risk_coverage,
    plot_roc,
    plot_scores,
)
from cxr_fastai.evaluation.evaluation import Evaluation, evaluate_split
from cxr_fastai.evaluation.plots import plot_confusion_matrix, plot_history, plot_robustness
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.formats import png_mark

CURVES: dict[str, Callable[[pd.DataFrame, dict[str, Any], str], Figure]] = {
    'roc': plot_roc,
    'precision_recall': plot_precision_recall,
    'calibration': plot_calibration,
    'scores': plot_scores,
    'net_benefit': plot_net_benefit,
    'risk_coverage': plot_risk_coverage,
}
"""Figures of every split that contains both classes."""
MAX_SHOWN = 12
"""Number of errors, and of typical correct predictions, that a report shows."""
PICTURE_SIZE = 192
"""Longer side of these images in pixels."""


def evaluate_and_draw(run: Run, how: Evaluation) -> tuple[dict[str, Any], list[str]]:
    """Evaluate a run as `evaluate` does, and write its figures and the small images of its report.

    The figures of other splits are drawn again where their metrics have changed, for example by another threshold.

    Returns:
        The metrics of the split, and the names of its figures relative to the run folder.
    """
    previous_metrics = run.intact_metrics()
    metrics, root = evaluate_split(run, how)
    current_metrics = run.metrics
    for other in previous_metrics.keys() & current_metrics.keys() - {how.split}:
        if current_metrics[other] != previous_metrics[other]:
            save_figures(run, other)
    save_images(run, how.split, root)
    return metrics, save_figures(run, how.split)


def save_figures(run: Run, split: str) -> list[str]:
    """Draw the figures of an evaluated `split`; return their names relative to the run folder."""
    metrics = run.metrics[split]
    predictions = run.predicted(split)
    title = _title(run, split)
    figures = {f'confusion_{split}': plot_confusion_matrix(metrics, title)}
    if (run / 'history.csv').exists():
        figures['history'] = plot_history(run.history, run.kept_epoch)
    if metrics['auc']['value'] is not None:
        for name, plot in CURVES.items():
            figures[f'{name}_{split}'] = plot(predictions, metrics, title)
    return [_save(run, name, figure) for name, figure in figures.items()]


def save_robustness_figure(run: Run, split: str) -> str:
    """Draw the robustness of `run` on `split`; return the name of the figure relative to the run folder."""
    robustness = run.robustness
    figure = plot_robustness(robustness[robustness.split == split], _title(run, split))
    return _save(run, f'robustness_{split}', figure)


def _title(run: Run, split: str) -> str:
    return f'{run.recipe.arch}, {split} split'


def _save(run: Run, name: str, figure: Figure) -> str:
    save_figure(figure, run / 'figures' / f'{name}.png')
    return f'figures/{name}.png'


def save_images(run: Run, split: str, root: Path) -> None:
    """Save small copies of the images that a report of `split` shows into `figures/images/`.

    `root` is the folder of the original images. Unreadable images, and images with burned-in text that may name the
    patient, are left out.
    """
    for path in shown_images(run.predicted(split)).path:
        try:
            image = open_image(root / path, modality=run.recipe.modality)
        except ImageError:
            continue
        if not image.burned_in:
            save_picture(image.pixels, image_picture(run, path))


def shown_images(predictions: pd.DataFrame) -> pd.DataFrame:
    """Select the images of a split that a report shows: the worst errors, then typical correct predictions."""
    return pd.concat([worst_errors(predictions), typical_correct(predictions)])


def worst_errors(predictions: pd.DataFrame, most: int = MAX_SHOWN) -> pd.DataFrame:
    """Select the `most` incorrect predictions with the greatest loss, the greatest first."""
    errors = predictions[predictions.prediction != predictions.label]
    return errors.nlargest(most, 'loss')


def typical_correct(predictions: pd.DataFrame, most: int = MAX_SHOWN) -> pd.DataFrame:
    """Select typical correct predictions: those with a loss closest to the median of their class, `most` in total."""
    correct = predictions[predictions.prediction == predictions.label]
    distance = (correct.loss - correct.groupby('label').loss.transform('median')).abs()
    by_distance = correct.assign(distance=distance).sort_values(['distance', 'path'])
    nearest = by_distance.groupby('label', sort=True).head(most // len(VOCAB))
    return nearest.sort_values('label', kind='stable').drop(columns='distance')


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 `pixels` (h, w) or (h, w, 3) to `path` as a small PNG; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    with atomic(path) as temporary:
        image.save(temporary, 'PNG', optimize=True, pnginfo=png_mark())


def image_picture(run: Run, path: str) -> Path:
    """Return the path of the small PNG of the image `path`, in `figures/images/`.

    The name is a hash of `path`: it is unique, and reveals nothing about the patient.
    """
    return run / 'figures' / 'images' / f'{_short_hash(path)}.png'


def cam_picture(run: Run, path: str, network: str) -> Path:
    """Return the path of the small PNG of the image `path` with its CAM, in `figures/cams/`.

    The name is a hash of `path` and of `network`, the SHA-256 of the network whose map it is.
    """
    return run / 'figures' / 'cams' / f'{_short_hash(network + path)}.png'


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:16]

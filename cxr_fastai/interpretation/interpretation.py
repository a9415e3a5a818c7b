"""Where a run is right and wrong, as pictures and lists of films; nothing here predicts again."""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import VOCAB, FilmError, atomic
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.curves import (
    plot_calibration,
    plot_net_benefit,
    plot_precision_recall,
    plot_risk_coverage,
    plot_roc,
    plot_scores,
)
from cxr_fastai.evaluation.plots import plot_confusion_matrix, plot_history, plot_robustness
from cxr_fastai.images.decode import open_film

CURVES = {'roc': plot_roc, 'precision_recall': plot_precision_recall, 'calibration': plot_calibration,
          'scores': plot_scores, 'net_benefit': plot_net_benefit, 'risk_coverage': plot_risk_coverage}
"""What is drawn of every split that has both classes."""
SHOWN = 12
"""Errors, and hits, that are shown."""
THUMB = 192
"""Pixels of the longer side of a film that is shown."""


def save_figures(run: Run, split: str) -> list[str]:
    """Draw what `evaluate` shows of `split` into the run's `figures/`; returns the names, relative to the run."""
    metrics, predictions, title = run.metrics[split], run.predicted(split), f'{run.recipe.arch}, {split} split'
    figures = {f'confusion_{split}': plot_confusion_matrix(metrics, title)}
    if (run/'history.csv').exists(): figures['history'] = plot_history(run.history)
    if metrics['auc']['value'] is not None:
        figures |= {f'{name}_{split}': plot(predictions, metrics, title) for name, plot in CURVES.items()}
    return [_save(run, name, figure) for name, figure in figures.items()]


def save_films(run: Run, split: str, root: Path) -> None:
    """Put small pictures of the `worst_errors` and `typical_hits` of `split`, which lie below `root`, into the run's
    `figures/films/`; none of a film with text that may name the patient."""
    for path in shown_films(run.predicted(split)).path:
        try: film = open_film(root/path)
        except FilmError: continue
        if not film.burned_in: save_picture(film.pixels, film_picture(run, path))


def shown_films(predictions: pd.DataFrame) -> pd.DataFrame:
    """The films of a split that a report shows: the worst errors, then typical hits."""
    return pd.concat([worst_errors(predictions), typical_hits(predictions)])


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 `pixels` (h, w) or (h, w, 3) as a small PNG to `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB, THUMB))
    with atomic(path) as temporary: image.save(temporary, 'PNG', optimize=True)


def film_picture(run: Run, path: str, folder: str = 'films') -> Path:
    """Where the small picture of the film `path` is, or in the folder `cams` that of its map; called so that it tells
    nothing and meets no other."""
    return run/'figures'/folder/f'{hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]}.png'


def worst_errors(predictions: pd.DataFrame, most: int = SHOWN) -> pd.DataFrame:
    """The films called wrongly, the most certain first."""
    return predictions[predictions.prediction != predictions.label].nlargest(most, 'loss')


def typical_hits(predictions: pd.DataFrame, most: int = SHOWN) -> pd.DataFrame:
    """Of the films of each class that are called rightly, those whose loss is nearest to the middle one, as many of
    each."""
    hits = predictions[predictions.prediction == predictions.label]
    off = (hits.loss - hits.groupby('label').loss.transform('median')).abs()
    nearest = hits.assign(off=off).sort_values(['off', 'path']).groupby('label', sort=True).head(most//len(VOCAB))
    return nearest.sort_values('label', kind='stable').drop(columns='off')


def save_robustness(run: Run, split: str) -> str:
    """Draw the run's robustness on `split` into its `figures/`; returns the name, relative to the run."""
    table = run.robustness
    return _save(run, f'robustness_{split}', plot_robustness(table[table.split == split],
                                                             f'{run.recipe.arch}, {split} split'))


def _save(run: Run, name: str, figure: Figure) -> str:
    save_figure(figure, run/'figures'/f'{name}.png')
    return f'figures/{name}.png'

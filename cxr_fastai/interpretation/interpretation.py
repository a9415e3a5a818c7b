"""Where a run is right and wrong, as pictures and lists of images; nothing here predicts again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
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
from cxr_fastai.evaluation.evaluation import evaluate, find_split
from cxr_fastai.evaluation.plots import plot_confusion_matrix, plot_history, plot_robustness
from cxr_fastai.images.decode import open_image
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.overlays import Explanation, blend, plot_gallery, plot_mean_maps

CURVES = {
    'roc': plot_roc,
    'precision_recall': plot_precision_recall,
    'calibration': plot_calibration,
    'scores': plot_scores,
    'net_benefit': plot_net_benefit,
    'risk_coverage': plot_risk_coverage,
}
"""What is drawn of every split that has both classes."""
SHOWN = 12
"""Errors, and hits, that are shown."""
THUMB = 192
"""Pixels of the longer side of an image that is shown."""


def save_figures(run: Run, split: str) -> list[str]:
    """Draw what `evaluate` shows of `split` into the run's `figures/`; returns the names, relative to the run."""
    metrics, predictions, title = run.metrics[split], run.predicted(split), f'{run.recipe.arch}, {split} split'
    figures = {f'confusion_{split}': plot_confusion_matrix(metrics, title)}
    if (run / 'history.csv').exists():
        figures['history'] = plot_history(run.history)
    if metrics['auc']['value'] is not None:
        figures |= {f'{name}_{split}': plot(predictions, metrics, title) for name, plot in CURVES.items()}
    return [_save(run, name, figure) for name, figure in figures.items()]


def save_images(run: Run, split: str, root: Path) -> None:
    """Put small pictures of the `worst_errors` and `typical_hits` of `split`, which lie below `root`, into the run's
    `figures/images/`; none of an image with text that may name the patient."""
    for path in shown_images(run.predicted(split)).path:
        try:
            image = open_image(root / path)
        except ImageError:
            continue
        if not image.burned_in:
            save_picture(image.pixels, image_picture(run, path))


def shown_images(predictions: pd.DataFrame) -> pd.DataFrame:
    """The images of a split that a report shows: the worst errors, then typical hits."""
    return pd.concat([worst_errors(predictions), typical_hits(predictions)])


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 `pixels` (h, w) or (h, w, 3) as a small PNG to `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB, THUMB))
    with atomic(path) as temporary:
        image.save(temporary, 'PNG', optimize=True)


def image_picture(run: Run, path: str, folder: str = 'images') -> Path:
    """Where the small picture of the image `path` is, or in the folder `cams` that of its map; called so that it tells
    nothing and meets no other."""
    return run / 'figures' / folder / f'{hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]}.png'


def worst_errors(predictions: pd.DataFrame, most: int = SHOWN) -> pd.DataFrame:
    """The images called wrongly, the most certain first."""
    return predictions[predictions.prediction != predictions.label].nlargest(most, 'loss')


def typical_hits(predictions: pd.DataFrame, most: int = SHOWN) -> pd.DataFrame:
    """Of the images of each class that are called rightly, those whose loss is nearest to the middle one, as many of
    each."""
    hits = predictions[predictions.prediction == predictions.label]
    off = (hits.loss - hits.groupby('label').loss.transform('median')).abs()
    nearest = hits.assign(off=off).sort_values(['off', 'path']).groupby('label', sort=True).head(most // len(VOCAB))
    return nearest.sort_values('label', kind='stable').drop(columns='off')


def save_robustness(run: Run, split: str) -> str:
    """Draw the run's robustness on `split` into its `figures/`; returns the name, relative to the run."""
    table = run.robustness
    return _save(
        run, f'robustness_{split}', plot_robustness(table[table.split == split], f'{run.recipe.arch}, {split} split')
    )


def _save(run: Run, name: str, figure: Figure) -> str:
    save_figure(figure, run / 'figures' / f'{name}.png')
    return f'figures/{name}.png'


KINDS = dict(zip(('false positive', 'false negative'), VOCAB, strict=True))
"""Kinds of error, and what the images of each show in truth."""


class CXRInterpretation:
    """A run's errors on a split, and what it looked at. `from_run` makes one; no probability is predicted twice."""

    def __init__(self, explainer: Explainer, predictions: pd.DataFrame, metrics: dict, root: Path):
        self.explainer, self.predictions, self.metrics, self.root = explainer, predictions, metrics, root

    @classmethod
    def from_run(cls, run: Run, split: str = 'test', data: Path | None = None, **how: str) -> CXRInterpretation:
        """That of `run` on `split`, evaluated now if it was not. `how` are `target`, `method` and `layer` of
        `Explainer`."""
        metrics = evaluate(run, data, split, again=False)
        return cls(
            Explainer(Predictor.load(run.path), **how), run.predicted(split), metrics, find_split(run, data, split)[0]
        )

    def top_losses(self, k: int = 12) -> pd.DataFrame:
        """The `k` images with the greatest loss, right or wrong."""
        return self.predictions.nlargest(k, 'loss')

    def most_confident_errors(self, k: int = 12) -> pd.DataFrame:
        """The `k` images called wrongly whose loss is greatest."""
        return self._wrong().nlargest(k, 'loss')

    def errors(self, kind: str, k: int = 12) -> pd.DataFrame:
        """The `k` worst errors of a `kind`: `false positive` or `false negative`. Raises `UsageError`."""
        if kind not in KINDS:
            raise UsageError(f'{kind!r} is no kind of error: choose {" or ".join(KINDS)}.')
        return self._wrong()[lambda wrong: wrong.label == KINDS[kind]].nlargest(k, 'loss')

    def most_uncertain(self, k: int = 12) -> pd.DataFrame:
        """The `k` images whose probability lies nearest to the threshold."""
        off = (self.predictions.p_pneumonia - self.metrics['threshold']).abs()
        return self.predictions.loc[off.nsmallest(k).index]

    def cam(self, images: pd.DataFrame) -> list[Explanation]:
        """The maps of `images`, rows of the predictions. Raises `ImageError` for one that is gone."""
        found = list(self._explain(images))
        for one in found:
            if isinstance(one, CXRError):
                raise one
        return found

    def plot_confusion_matrix(self) -> Figure:
        """Counts, and shares of each true class."""
        return plot_confusion_matrix(self.metrics)

    def plot_top_losses(self, k: int = 12, heatmap: bool = True) -> Figure:
        """The images with the greatest loss, under their maps."""
        return self._gallery(self.top_losses(k), 'the greatest losses', heatmap)

    def plot_errors(self, kind: str, k: int = 12, heatmap: bool = True) -> Figure:
        """The worst `false positive` or `false negative` images, under their maps."""
        return self._gallery(self.errors(kind, k), f'{kind}s, the most confident first', heatmap)

    def plot_uncertain(self, k: int = 12, heatmap: bool = True) -> Figure:
        """The images nearest to the threshold, under their maps."""
        return self._gallery(self.most_uncertain(k), 'the least certain, nearest to the threshold', heatmap)

    def plot_mean_maps(self, k: int = 100) -> Figure:
        """Where the network looks on average, over up to `k` images of each class."""
        groups = self.predictions.groupby('label')
        return plot_mean_maps(
            self._seen(pd.concat([rows.sample(min(k, len(rows)), random_state=0) for _, rows in groups]))
        )

    def _gallery(self, rows: pd.DataFrame, title: str, heatmap: bool) -> Figure:
        found = self._seen(rows)
        left_out = f', {len(rows) - len(found)} of them not to be shown' if len(found) < len(rows) else ''
        how = f' ({self.explainer.method}, {self.explainer.target})' if heatmap else ''
        return plot_gallery(found, f'{len(rows)} images: {title}{left_out}{how}', heatmap=heatmap)

    def _seen(self, rows: pd.DataFrame) -> list[Explanation]:
        return [one for one in self._explain(rows) if isinstance(one, Explanation)]

    def _explain(self, rows: pd.DataFrame) -> Iterator[Explanation | ImageError]:
        return self.explainer.explain(self.subjects(rows))

    def subjects(self, rows: pd.DataFrame) -> list[Subject]:
        """The images of `rows` of the predictions, with what is known of them."""
        return [Subject(self.root / row.path, row.path, row.label, row.p_pneumonia) for row in rows.itertuples()]

    def _wrong(self) -> pd.DataFrame:
        return self.predictions[self.predictions.prediction != self.predictions.label]


def save_galleries(run: Run, split: str, shown: CXRInterpretation, k: int = 12) -> list[str]:
    """Draw the `k` images of `split` that tell most, of each sort of which there are any, and the mean maps, into the
    run's `figures/`; returns the names, relative to the run."""
    kinds = [kind for kind in KINDS if len(shown.errors(kind, k))]
    figures = {
        'top_losses': shown.plot_top_losses(k),
        **{f'{kind}s': shown.plot_errors(kind, k) for kind in kinds},
        'uncertain': shown.plot_uncertain(k),
        'mean_maps': shown.plot_mean_maps(),
    }
    names = [f'figures/{name.replace(" ", "_")}_{split}.png' for name in figures]
    for name, figure in zip(names, figures.values(), strict=True):
        save_figure(figure, run / name)
    return names


def save_cams(run: Run, split: str, shown: CXRInterpretation) -> None:
    """Put small pictures of the images that a report of `split` shows, under their Grad-CAMs for pneumonia, whatever
    `shown` is about, into the run's `figures/cams/`."""
    rows = shown_images(run.predicted(split))
    found = Explainer(shown.explainer.predictor).explain(shown.subjects(rows))
    for path, one in zip(rows.path, found, strict=True):
        if isinstance(one, Explanation):
            save_picture(blend(one), image_picture(run, path, 'cams'))

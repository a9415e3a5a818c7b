"""Where a run is right and wrong, as pictures and lists of images; nothing here predicts again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate, find_split
from cxr_fastai.evaluation.figures import image_picture, save_picture, shown_images
from cxr_fastai.evaluation.plots import plot_confusion_matrix
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.overlays import Explanation, blend, plot_gallery, plot_mean_maps

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

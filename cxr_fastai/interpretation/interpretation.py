"""`CXRInterpretation`, which shows the errors of an evaluated run with explanation maps.

No probability is predicted a second time: the predictions table of the run is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate, find_split
from cxr_fastai.evaluation.figures import image_picture, save_picture, shown_images
from cxr_fastai.evaluation.plots import plot_confusion_matrix
from cxr_fastai.interpretation.explainer import Explainer, Subject, save_explanations
from cxr_fastai.interpretation.overlays import Explanation, blend, plot_gallery, plot_mean_maps

ERROR_KINDS = {'false positive': 'NORMAL', 'false negative': 'PNEUMONIA'}
"""Kind of error -> the true class of its images."""


class CXRInterpretation:
    """The predictions of a run on one split, sorted by how wrong or uncertain they are, with their explanation maps.

    Create it with `from_run`.
    """

    def __init__(self, run: Run, split: str, root: Path, explainer: Explainer) -> None:
        self.run = run
        self.split = split
        self.root = root
        self.explainer = explainer
        self.predictions = run.predicted(split)
        self.metrics: dict[str, Any] = run.metrics[split]

    @classmethod
    def from_run(
        cls,
        run: Run,
        split: str = 'test',
        data: Path | None = None,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
    ) -> CXRInterpretation:
        """Return the interpretation of `run` on `split`, which is evaluated first if it has not been.

        `data` is the data root (default: where the run was trained). `target`, `method` and `layer` are those of
        `Explainer`.
        """
        evaluate(run, data, split, again=False)
        root, _ = find_split(run, data, split)
        return cls(run, split, root, Explainer.load(run.path, target, method, layer))

    def top_losses(self, k: int = 12) -> pd.DataFrame:
        """Return the `k` predictions with the highest loss, correct or not."""
        return self.predictions.nlargest(k, 'loss')

    def most_confident_errors(self, k: int = 12) -> pd.DataFrame:
        """Return the `k` incorrect predictions with the highest loss."""
        return self._incorrect().nlargest(k, 'loss')

    def errors(self, kind: str, k: int = 12) -> pd.DataFrame:
        """Return the `k` errors of one `kind`, `false positive` or `false negative`, with the highest loss.

        Raises `UsageError` for another kind.
        """
        if kind not in ERROR_KINDS:
            raise UsageError(f'{kind!r} is not a kind of error. Choose {" or ".join(ERROR_KINDS)}.')
        incorrect = self._incorrect()
        return incorrect[incorrect.label == ERROR_KINDS[kind]].nlargest(k, 'loss')

    def _incorrect(self) -> pd.DataFrame:
        return self.predictions[self.predictions.prediction != self.predictions.label]

    def most_uncertain(self, k: int = 12) -> pd.DataFrame:
        """Return the `k` predictions with a probability nearest to the threshold."""
        distance = (self.predictions.p_pneumonia - self.metrics['threshold']).abs()
        return self.predictions.loc[distance.nsmallest(k).index]

    def subjects(self, rows: pd.DataFrame) -> list[Subject]:
        """Return the images of `rows` of the predictions, with their true class and probability."""
        return [Subject(self.root / row.path, row.path, row.label, row.p_pneumonia) for row in rows.itertuples()]

    def cam(self, rows: pd.DataFrame) -> list[Explanation]:
        """Return the explanations of the images in `rows`. Raises `ImageError` if one cannot be read."""
        explanations = []
        for explanation in self._explain(rows):
            if isinstance(explanation, ImageError):
                raise explanation
            explanations.append(explanation)
        return explanations

    def _explain(self, rows: pd.DataFrame) -> Iterator[Explanation | ImageError]:
        return self.explainer.explain(self.subjects(rows))

    def plot_confusion_matrix(self) -> Figure:
        """Plot the confusion matrix with counts and row percentages."""
        return plot_confusion_matrix(self.metrics)

    def plot_top_losses(self, k: int = 12, heatmap: bool = True) -> Figure:
        """Plot the `k` images with the highest loss, with their maps unless `heatmap` is False."""
        return self._plot_gallery(self.top_losses(k), 'highest loss', heatmap)

    def plot_errors(self, kind: str, k: int = 12, heatmap: bool = True) -> Figure:
        """Plot the `k` most confident errors of one `kind`; see `errors`."""
        return self._plot_gallery(self.errors(kind, k), f'{kind}s, most confident first', heatmap)

    def plot_uncertain(self, k: int = 12, heatmap: bool = True) -> Figure:
        """Plot the `k` images with a probability nearest to the threshold."""
        return self._plot_gallery(self.most_uncertain(k), 'most uncertain, nearest to the threshold', heatmap)

    def plot_mean_maps(self, k: int = 100) -> Figure:
        """Plot the mean map of each class, over up to `k` randomly chosen images of the class."""
        samples = [rows.sample(min(k, len(rows)), random_state=0) for _, rows in self.predictions.groupby('label')]
        return plot_mean_maps(self._readable(pd.concat(samples)))

    def _plot_gallery(self, rows: pd.DataFrame, title: str, heatmap: bool) -> Figure:
        explanations = self._readable(rows)
        title = f'{len(rows)} images: {title}'
        missing = len(rows) - len(explanations)
        if missing:
            title += f', {missing} of them cannot be shown'
        if heatmap:
            title += f' ({self.explainer.method}, {self.explainer.target})'
        return plot_gallery(explanations, title, heatmap=heatmap)

    def _readable(self, rows: pd.DataFrame) -> list[Explanation]:
        return [explanation for explanation in self._explain(rows) if isinstance(explanation, Explanation)]


def explain_split(
    interpretation: CXRInterpretation, k: int, folder: Path, batch_size: int = 32, allow_burned_in: bool = False
) -> Iterator[tuple[Path, Explanation | ImageError]]:
    """Explain the `k` images with the highest loss and save the figures; see `explainer.save_explanations`."""
    subjects = interpretation.subjects(interpretation.top_losses(k))
    return save_explanations(interpretation.explainer.explain(subjects, batch_size, allow_burned_in), folder)


def save_galleries(interpretation: CXRInterpretation, k: int = 12) -> list[str]:
    """Save galleries of `k` images, the mean maps and the maps for the report in the `figures/` of the run.

    The galleries show the highest losses, each kind of error that occurs, and the most uncertain predictions. Returns
    their file names relative to the run folder.
    """
    figures = {'top_losses': interpretation.plot_top_losses(k)}
    for kind in ERROR_KINDS:
        if len(interpretation.errors(kind, k)):
            figures[f'{kind}s'.replace(' ', '_')] = interpretation.plot_errors(kind, k)
    figures['uncertain'] = interpretation.plot_uncertain(k)
    figures['mean_maps'] = interpretation.plot_mean_maps()
    names = []
    for name, figure in figures.items():
        path = f'figures/{name}_{interpretation.split}.png'
        save_figure(figure, interpretation.run / path)
        names.append(path)
    save_cams(interpretation)
    return names


def save_cams(interpretation: CXRInterpretation) -> None:
    """Save thumbnails of the images that the report shows, with their maps, in `figures/cams/` of the run.

    These are Grad-CAMs for pneumonia, whatever the target and method of `interpretation` are.
    """
    rows = shown_images(interpretation.predictions)
    explainer = Explainer(interpretation.explainer.predictor)
    explanations = explainer.explain(interpretation.subjects(rows))
    for path, explanation in zip(rows.path, explanations, strict=True):
        if isinstance(explanation, Explanation):
            save_picture(blend(explanation), image_picture(interpretation.run, path, 'cams'))

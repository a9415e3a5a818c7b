"""`CXRInterpretation`, fastai's `ClassificationInterpretation` with explanation maps and errors by kind.

Every image is predicted once: by `from_learner`, or by `evaluate` for `from_run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import CategoryMap
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.figures import NotebookFigure, show
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.evaluation.plots import plot_confusion_matrix
from cxr_fastai.interpretation.explainer import Explainer, Subject, check_choices, read_subjects
from cxr_fastai.interpretation.overlays import Explanation, plot_gallery, plot_mean_maps
from cxr_fastai.interpretation.sources import LearnerSource, RunSource, load_inputs

ERROR_KINDS = {'false positive': 'NORMAL', 'false negative': 'PNEUMONIA'}
"""Kind of error -> the true class of its images."""
Rows: TypeAlias = pd.DataFrame | Iterable[int] | int
"""Images: rows of `predictions`, or their positions, as `top_losses` returns them."""


class CXRInterpretation(ClassificationInterpretation):
    """Predictions of chest X-ray images, sorted by how wrong or uncertain they are, with maps of what influenced them.

    Create it with `from_learner` or `from_run`. The methods of fastai have fastai's parameters and results. Methods
    that plot return the figure, and in notebooks they also show it.

    Attributes
    ----------
    preds, targs, decoded, losses : probabilities (n, 2), true and predicted class indices (n,), and losses (n,).
    vocab : the names of the classes.
    predictions : the same as a table, a row for each image, with the columns of `predictions.csv` that are known.
    threshold : an image is classified as pneumonia if its probability is at least this threshold.
    root : the folder that the paths in `predictions` are relative to.
    run, split : the evaluated run, or None, and the split of the images, or None if it is not known.
    """

    def __init__(
        self,
        source: LearnerSource | RunSource,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
    ) -> None:
        check_choices(target, method)
        self.source = source
        self.target = target
        self.method = method
        self.layer = layer
        self.act = source.act
        self.preds = source.preds
        self.targs = source.targs
        self.losses = source.losses
        self.predictions: pd.DataFrame = source.predictions
        self.threshold = source.threshold
        self.decoded = torch.tensor([VOCAB.index(label) for label in self.predictions.prediction])
        self.vocab = CategoryMap(list(VOCAB), sort=False)
        self.root: Path = source.root
        self.run: Run | None = source.run
        self.split = source.split
        self._explainer: Explainer | None = None

    @classmethod
    def from_learner(
        cls,
        learn: Learner,
        ds_idx: int = 1,
        dl: TfmdDL | None = None,
        act: Any = None,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
        threshold: float = 0.5,
    ) -> CXRInterpretation:
        """Predict the images of `dl`, by default those of `learn.dls[ds_idx]`, and return their interpretation.

        Parameters
        ----------
        ds_idx : 1 for the validation images, 0 for the training images, which are predicted without augmentation.
        dl : a loader with labels, such as `learn.dls.test_dl(items, with_labels=True)`.
        act : activation for the predictions instead of that of the learner's loss function.
        target, method, layer : class, method and layer of the maps; see `Explainer`.
        threshold : images with at least this probability are classified as pneumonia.

        Maps need images that `OpenImage` prepares, as in `CXRDataLoaders`; other learners of these classes have all
        other methods. Raises `UsageError` for images without labels, for other classes, and for an unknown `target` or
        `method`.
        """
        check_choices(target, method)
        return cls(LearnerSource.predict(learn, ds_idx, dl, act, threshold), target, method, layer)

    @classmethod
    def from_run(
        cls,
        run: Run | StrPath,
        split: str = 'test',
        data: StrPath | None = None,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
        device: str = 'auto',
    ) -> CXRInterpretation:
        """Return the interpretation of `run` on `split`, which is evaluated first if it has not been.

        `data` is the data root (default: where the run was trained). `target`, `method`, `layer` and `device` are those
        of `Explainer.load`. The threshold is the one of the run, and `losses` are cross-entropies.
        """
        data = Path(data) if data is not None else None
        check_choices(target, method)
        return cls(RunSource.read(as_run(run), split, data, device), target, method, layer)

    @property
    def learn(self) -> Learner:
        """The learner. That of a run is loaded when it is needed; raises `CXRError` if the run has none."""
        return self.source.learn

    @property
    def dl(self) -> TfmdDL:
        """The loader of the images, in the order of `predictions`."""
        return self.source.dl

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the predictions, in the form of `metrics.json`."""
        return self.source.metrics

    @property
    def explainer(self) -> Explainer:
        """The explainer of the network. Raises `UsageError` if there are no maps; the message says why."""
        if self._explainer is None:
            self._explainer = self.source.explainer(self.target, self.method, self.layer)
        return self._explainer

    # The methods of fastai.

    def __getitem__(self, idxs: Rows) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        """Return inputs, predictions, targets, decoded predictions and losses of some images. Predicts nothing."""
        positions = self._positions(idxs)
        inputs = load_inputs(self.learn, self.dl, positions)
        return (
            inputs,
            self.preds[positions],
            self.targs[positions],
            self.decoded[positions],
            self.losses[positions],
        )

    def top_losses(self, k: int | None = None, largest: bool = True, items: bool = False) -> tuple[Any, ...]:
        """Return the `k` largest or smallest losses and the positions of their images; with `items` also the items.

        All losses are returned without `k`, or if there are fewer. `hardest` returns the rows of `predictions`.
        """
        k = len(self.losses) if k is None else min(k, len(self.losses))
        return super().top_losses(k, largest, items)

    def plot_top_losses(
        self,
        k: int | slice | Iterable[int] = 12,
        largest: bool = True,
        heatmap: bool = True,
        **kwargs: Any,
    ) -> NotebookFigure:
        """Plot the images with the `k` largest or smallest losses, with their maps unless `heatmap` is False.

        `k` can also be the ranks to plot, such as `range(12, 24)`. `kwargs` are `nrows`, `ncols` and `figsize`.
        """
        _, order = self.top_losses(largest=largest)
        positions = order.tolist()
        if isinstance(k, int | np.integer):
            shown = positions[:k]
        elif isinstance(k, slice):
            shown = positions[k]
        else:
            shown = [positions[rank] for rank in k if rank < len(positions)]
        title = 'highest loss first' if largest else 'lowest loss first'
        return show(self.draw_gallery(shown, title, heatmap, **kwargs))

    def show_results(self, idxs: Rows, **kwargs: Any) -> None:
        """Show some images with their true and their predicted classes."""
        import fastai.vision.learner  # noqa: F401  (registers `show_results` for images; slow because of timm)

        super().show_results(self._positions(idxs), **kwargs)

    def confusion_matrix(self) -> np.ndarray:
        """Return the numbers of images (2, 2), with a row for each true and a column for each predicted class."""
        return confusion_matrix(self.targs.numpy(), self.decoded.numpy(), labels=range(len(VOCAB)))

    def plot_confusion_matrix(
        self,
        normalize: bool = False,
        title: str = 'Confusion matrix',
        cmap: str = 'Blues',
        norm_dec: int = 2,
        plot_txt: bool = True,
        figsize: tuple[float, float] | None = None,
        dpi: float | None = None,
    ) -> NotebookFigure:
        """Plot the confusion matrix with counts and their shares of the true class.

        With `normalize` only the shares are written, with `norm_dec` decimal places; without `plot_txt` nothing is.
        `figsize` is in inches and `dpi` in dots per inch.
        """
        counts = self.confusion_matrix()
        cells = dict(zip(('tn', 'fp', 'fn', 'tp'), counts.ravel().tolist(), strict=True))
        facts = {'confusion': cells, 'n': int(counts.sum()), 'threshold': self.threshold}
        figure = cast(NotebookFigure, plot_confusion_matrix(facts, title))
        if figsize:
            figure.set_size_inches(figsize)
        if dpi:
            figure.set_dpi(dpi)
        ax = figure.axes[0]
        ax.images[0].set_cmap(cmap)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for text, share in zip(list(ax.texts), shares.ravel(), strict=True):
            if not plot_txt:
                text.remove()
            elif normalize:
                text.set_text(f'{share:.{norm_dec}f}')
        return show(figure)

    def print_classification_report(self) -> None:
        """Print precision, recall and F1 of each class, as scikit-learn does."""
        targs, decoded = self.targs.numpy(), self.decoded.numpy()
        labels = range(len(VOCAB))
        print(classification_report(targs, decoded, labels=labels, target_names=VOCAB, zero_division=0))

    # The predictions as a table, and their errors by kind.

    def hardest(self, k: int = 12) -> pd.DataFrame:
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
        distance = (self.predictions.p_pneumonia - self.threshold).abs()
        return self.predictions.loc[distance.nsmallest(k).index]

    def plot_errors(self, kind: str, k: int = 12, heatmap: bool = True, **kwargs: Any) -> NotebookFigure:
        """Plot the `k` most confident errors of one `kind`; see `errors` and `plot_top_losses`."""
        return show(self.draw_gallery(self.errors(kind, k), f'{kind}s, most confident first', heatmap, **kwargs))

    def plot_uncertain(self, k: int = 12, heatmap: bool = True, **kwargs: Any) -> NotebookFigure:
        """Plot the `k` images with a probability nearest to the threshold; see `plot_top_losses`."""
        return show(self.draw_gallery(self.most_uncertain(k), 'most uncertain first', heatmap, **kwargs))

    # The images and their maps.

    def subjects(self, rows: Rows) -> list[Subject]:
        """Return some images with their names, true classes and probabilities."""
        return [self.source.subject(position) for position in self._positions(rows)]

    def cam(self, rows: Rows) -> list[Explanation]:
        """Return some images with their maps. Raises `ImageError` if one cannot be read."""
        explanations = []
        for explanation in self.explainer.explain(self.subjects(rows)):
            if isinstance(explanation, ImageError):
                raise explanation
            explanations.append(explanation)
        return explanations

    def plot_mean_maps(self, k: int = 100) -> NotebookFigure:
        """Plot the mean map of each class, over up to `k` randomly chosen images of the class."""
        return show(self.draw_mean_maps(k))

    def draw_mean_maps(self, k: int = 100) -> NotebookFigure:
        """Draw the figure of `plot_mean_maps`, and show it nowhere."""
        samples = [rows.sample(min(k, len(rows)), random_state=0) for _, rows in self.predictions.groupby('label')]
        return plot_mean_maps(_without_errors(self.explainer.explain(self.subjects(pd.concat(samples)))))

    def draw_gallery(
        self,
        rows: Rows,
        title: str,
        heatmap: bool = True,
        nrows: int | None = None,
        ncols: int | None = None,
        figsize: tuple[float, float] | None = None,
    ) -> NotebookFigure:
        """Draw some images with their maps, and show the figure nowhere; images that cannot be read are counted."""
        subjects = self.subjects(rows)
        if heatmap:
            explained = self.explainer.explain(subjects)
        else:
            explained = read_subjects(subjects, self.threshold, self.source.preprocessing)
        explanations = _without_errors(explained)
        title = f'{counted(len(subjects))}, {title}'
        missing = len(subjects) - len(explanations)
        if missing:
            title += f', {missing} of them cannot be shown'
        title += f' · threshold {self.threshold:g}'
        if heatmap:
            title += f' · {self.method} for {self.target}'
        columns = ncols or _count_columns(len(explanations), nrows)
        return plot_gallery(explanations, title, columns, heatmap, figsize)

    def _positions(self, rows: Rows) -> list[int]:
        """Return the positions of `rows` in `predictions`. Raises `UsageError` for images that are not among them."""
        if not isinstance(rows, pd.DataFrame):
            positions = np.atleast_1d(np.asarray(rows))
            return (np.flatnonzero(positions) if positions.dtype == bool else positions).tolist()
        first_positions = {path: i for i, path in reversed(list(enumerate(self.predictions.path)))}
        unknown = [path for path in rows.path if path not in first_positions]
        if unknown:
            raise UsageError(f'{unknown[0]}: not an image of these predictions. Pass rows of `predictions`.')
        return [first_positions[path] for path in rows.path]


def _count_columns(n: int, nrows: int | None) -> int:
    if nrows:
        return max(math.ceil(n / nrows), 1)
    return min(max(n, 2), 4)


def _without_errors(explanations: Iterator[Explanation | ImageError]) -> list[Explanation]:
    return [explanation for explanation in explanations if isinstance(explanation, Explanation)]

"""Why a network gave its scores: maps of single films, and `CXRInterpretation`, a run's errors in fastai's manner."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import POSITIVE, VOCAB, CXRError, FilmError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate, find_split
from cxr_fastai.evaluation.plots import plot_confusion_matrix
from cxr_fastai.images.decode import Preprocessing, open_film
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.cam import activation_maps, check_method, enlarge, find_layer, name_layer, scale
from cxr_fastai.interpretation.interpretation import film_picture, save_picture, shown_films
from cxr_fastai.interpretation.overlays import Explanation, blend, plot_gallery, plot_mean_maps
from cxr_fastai.models.architectures import to_input

SIDE = 512
"""Pixels of the longer side of a film that is shown under its map."""
KINDS = dict(zip(('false positive', 'false negative'), VOCAB, strict=True))
"""Kinds of error, and what the films of each show in truth."""
BATCH = 32
"""Films that go through the network at once."""
BURNED_IN = 'E_BURNED_IN'


@dataclass(frozen=True)
class Subject:
    """A film to explain: its `path`, the `name` it is called by, and, if known, what it shows in truth and the raw
    probability `p` of pneumonia."""
    path: Path
    name: str = ''
    label: str | None = None
    p: float | None = None


@dataclass(frozen=True)
class Explainer:
    """Makes maps with the network of `predictor`: for the class `target`, by a `method` of `cams.METHODS`, at a `layer`
    (default: the last before any pooling that ends the body). Raises `UsageError` for what does not exist."""
    predictor: Predictor
    target: str = VOCAB[-1]
    method: str = 'gradcam'
    layer: str | None = None

    def __post_init__(self):
        if self.target not in VOCAB: raise UsageError(f'--target {self.target}: choose {" or ".join(VOCAB)}.')
        check_method(self.predictor.model, self.method, self.layer)

    @property
    def place(self) -> str:
        """The name of the layer whose maps are weighed."""
        model = self.predictor.model
        return name_layer(model, find_layer(model, self.layer, self.method))

    def maps(self, films: np.ndarray) -> np.ndarray:
        """Maps (n, size, size) from 0 to 1 of grey uint8 films (n, size, size), each by its own largest value; 0
        everywhere where nothing speaks for the target."""
        return np.concatenate([self._maps(films[start:start + BATCH]) for start in range(0, len(films), BATCH)])

    def scores(self, films: np.ndarray) -> np.ndarray:
        """The probability (n,) of the target in grey uint8 films (n, size, size)."""
        p = np.concatenate([self.predictor.scores(films[start:start + BATCH])
                            for start in range(0, len(films), BATCH)])
        return p if self.target == VOCAB[POSITIVE] else 1 - p

    def _maps(self, films: np.ndarray) -> np.ndarray:
        raw = activation_maps(self.predictor.model, to_input(films), VOCAB.index(self.target), self.method, self.layer)
        return scale(enlarge(raw, films.shape[-1])).numpy()

    def explain(self, films: Iterable[Subject], batch_size: int = 32,
                burned_in: bool = False) -> Iterator[Explanation | FilmError]:
        """An explanation a film, in their order; the error of one that cannot be used, or, unless `burned_in` films are
        allowed, may show the name of its patient. Where a film's probability is known, it is not predicted again."""
        wanted = iter(films)
        while batch := list(islice(wanted, batch_size)): yield from self._explain(batch, burned_in)

    def _explain(self, batch: list[Subject], burned_in: bool) -> Iterator[Explanation | FilmError]:
        seen = Preprocessing.of(self.predictor.config)
        opened = [_open(film.path, seen, burned_in) for film in batch]
        pairs = [(subject, film) for subject, film in zip(batch, opened, strict=True) if isinstance(film, np.ndarray)]
        squares = np.stack([seen.fit(film) for _, film in pairs]) if pairs else np.zeros((0, 1, 1), np.uint8)
        known = [subject.p for subject, _ in pairs]
        p = self.predictor.scores(squares) if None in known else known
        found = iter(self._place(*pair, *of) for pair, of in zip(
            pairs, zip(self.maps(squares) if pairs else (), p, strict=True), strict=True))
        for film in opened: yield film if isinstance(film, FilmError) else next(found)

    def _place(self, subject: Subject, film: np.ndarray, heat: np.ndarray, p: float) -> Explanation:
        shown = Image.fromarray(film)
        shown.thumbnail((SIDE, SIDE))
        over = Preprocessing.of(self.predictor.config).spread(heat, shown.height, shown.width)
        return Explanation(np.asarray(shown), np.clip(over, 0, 1), subject.name or str(subject.path),
                           self.predictor.show(float(p)), self.predictor.threshold, self.target, self.method,
                           subject.label)


class CXRInterpretation:
    """A run's errors on a split, and what it looked at. `from_run` makes one; no probability is predicted twice."""

    def __init__(self, explainer: Explainer, predictions: pd.DataFrame, metrics: dict, root: Path):
        self.explainer, self.predictions, self.metrics, self.root = explainer, predictions, metrics, root

    @classmethod
    def from_run(cls, run: Run, split: str = 'test', data: Path | None = None, **how: str) -> CXRInterpretation:
        """That of `run` on `split`, evaluated now if it was not. `how` are `target`, `method` and `layer` of
        `Explainer`."""
        metrics = evaluate(run, data, split, again=False)
        return cls(Explainer(Predictor.load(run.path), **how), run.predicted(split), metrics,
                   find_split(run, data, split)[0])

    def top_losses(self, k: int = 12) -> pd.DataFrame:
        """The `k` films with the greatest loss, right or wrong."""
        return self.predictions.nlargest(k, 'loss')

    def most_confident_errors(self, k: int = 12) -> pd.DataFrame:
        """The `k` films called wrongly whose loss is greatest."""
        return self._wrong().nlargest(k, 'loss')

    def errors(self, kind: str, k: int = 12) -> pd.DataFrame:
        """The `k` worst errors of a `kind`: `false positive` or `false negative`. Raises `UsageError`."""
        if kind not in KINDS: raise UsageError(f'{kind!r} is no kind of error: choose {" or ".join(KINDS)}.')
        return self._wrong()[lambda wrong: wrong.label == KINDS[kind]].nlargest(k, 'loss')

    def most_uncertain(self, k: int = 12) -> pd.DataFrame:
        """The `k` films whose probability lies nearest to the threshold."""
        off = (self.predictions.p_pneumonia - self.metrics['threshold']).abs()
        return self.predictions.loc[off.nsmallest(k).index]

    def cam(self, films: pd.DataFrame) -> list[Explanation]:
        """The maps of `films`, rows of the predictions. Raises `FilmError` for one that is gone."""
        found = list(self._explain(films))
        for one in found:
            if isinstance(one, CXRError): raise one
        return found

    def plot_confusion_matrix(self) -> Figure:
        """Counts, and shares of each true class."""
        return plot_confusion_matrix(self.metrics)

    def plot_top_losses(self, k: int = 12, heatmap: bool = True) -> Figure:
        """The films with the greatest loss, under their maps."""
        return self._gallery(self.top_losses(k), 'the greatest losses', heatmap)

    def plot_errors(self, kind: str, k: int = 12, heatmap: bool = True) -> Figure:
        """The worst `false positive` or `false negative` films, under their maps."""
        return self._gallery(self.errors(kind, k), f'{kind}s, the most confident first', heatmap)

    def plot_uncertain(self, k: int = 12, heatmap: bool = True) -> Figure:
        """The films nearest to the threshold, under their maps."""
        return self._gallery(self.most_uncertain(k), 'the least certain, nearest to the threshold', heatmap)

    def plot_mean_maps(self, k: int = 100) -> Figure:
        """Where the network looks on average, over up to `k` films of each class."""
        groups = self.predictions.groupby('label')
        return plot_mean_maps(self._seen(pd.concat([rows.sample(min(k, len(rows)), random_state=0)
                                                    for _, rows in groups])))

    def _gallery(self, rows: pd.DataFrame, title: str, heatmap: bool) -> Figure:
        found = self._seen(rows)
        left_out = f', {len(rows) - len(found)} of them not to be shown' if len(found) < len(rows) else ''
        how = f' ({self.explainer.method}, {self.explainer.target})' if heatmap else ''
        return plot_gallery(found, f'{len(rows)} films: {title}{left_out}{how}', heatmap=heatmap)

    def _seen(self, rows: pd.DataFrame) -> list[Explanation]:
        return [one for one in self._explain(rows) if isinstance(one, Explanation)]

    def _explain(self, rows: pd.DataFrame) -> Iterator[Explanation | FilmError]:
        return self.explainer.explain(self.subjects(rows))

    def subjects(self, rows: pd.DataFrame) -> list[Subject]:
        """The films of `rows` of the predictions, with what is known of them."""
        return [Subject(self.root/row.path, row.path, row.label, row.p_pneumonia) for row in rows.itertuples()]

    def _wrong(self) -> pd.DataFrame: return self.predictions[self.predictions.prediction != self.predictions.label]


def save_galleries(run: Run, split: str, shown: CXRInterpretation, k: int = 12) -> list[str]:
    """Draw the `k` films of `split` that tell most, of each sort of which there are any, and the mean maps, into the
    run's `figures/`; returns the names, relative to the run."""
    kinds = [kind for kind in KINDS if len(shown.errors(kind, k))]
    figures = {'top_losses': shown.plot_top_losses(k), **{f'{kind}s': shown.plot_errors(kind, k) for kind in kinds},
               'uncertain': shown.plot_uncertain(k), 'mean_maps': shown.plot_mean_maps()}
    names = [f'figures/{name.replace(" ", "_")}_{split}.png' for name in figures]
    for name, figure in zip(names, figures.values(), strict=True): save_figure(figure, run/name)
    return names


def save_cams(run: Run, split: str, shown: CXRInterpretation) -> None:
    """Put small pictures of the films that a report of `split` shows, under their Grad-CAMs for pneumonia, whatever
    `shown` is about, into the run's `figures/cams/`."""
    rows = shown_films(run.predicted(split))
    found = Explainer(shown.explainer.predictor).explain(shown.subjects(rows))
    for path, one in zip(rows.path, found, strict=True):
        if isinstance(one, Explanation): save_picture(blend(one), film_picture(run, path, 'cams'))


def _open(path: Path, seen: Preprocessing, burned_in: bool) -> np.ndarray | FilmError:
    try: film = open_film(path, seen)  # decoded as for prediction
    except FilmError as error: return error
    if film.burned_in and not burned_in:
        return FilmError('its file says that the picture may name the patient: --allow-burned-in shows it anyway.',
                         BURNED_IN).of(path)
    return film.pixels

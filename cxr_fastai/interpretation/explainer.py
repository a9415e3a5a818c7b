"""Why a network gave its scores: maps of single films, and `CXRInterpretation`, a run's errors in fastai's manner."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import FilmError, UsageError
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.images.decode import open_film
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.cam import activation_maps, check_method, enlarge, find_layer, name_layer, scale
from cxr_fastai.interpretation.overlays import Explanation
from cxr_fastai.models.inputs import to_input

SIDE = 512
"""Pixels of the longer side of a film that is shown under its map."""
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


def _open(path: Path, seen: Preprocessing, burned_in: bool) -> np.ndarray | FilmError:
    try: film = open_film(path, seen)  # decoded as for prediction
    except FilmError as error: return error
    if film.burned_in and not burned_in:
        return FilmError('its file says that the picture may name the patient: --allow-burned-in shows it anyway.',
                         BURNED_IN).of(path)
    return film.pixels

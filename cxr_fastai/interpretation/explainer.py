"""Why a network gave its scores: maps of single images, and `CXRInterpretation`, a run's errors in fastai's manner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.cam import activation_maps, check_method, enlarge, find_layer, name_layer, scale
from cxr_fastai.interpretation.overlays import Explanation
from cxr_fastai.models.inputs import to_input

SIDE = 512
"""Pixels of the longer side of an image that is shown under its map."""
BATCH = 32
"""Images that go through the network at once."""
BURNED_IN = 'E_BURNED_IN'


@dataclass(frozen=True)
class Subject:
    """An image to explain: its `path`, the `name` it is called by, and, if known, what it shows in truth and the raw
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
        if self.target not in VOCAB:
            raise UsageError(f'--target {self.target}: choose {" or ".join(VOCAB)}.')
        check_method(self.predictor.model, self.method, self.layer)

    @property
    def place(self) -> str:
        """The name of the layer whose maps are weighed."""
        model = self.predictor.model
        return name_layer(model, find_layer(model, self.layer, self.method))

    def maps(self, images: np.ndarray) -> np.ndarray:
        """Maps (n, size, size) from 0 to 1 of grey uint8 images (n, size, size), each by its own largest value; 0
        everywhere where nothing speaks for the target."""
        return np.concatenate([self._maps(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The probability (n,) of the target in grey uint8 images (n, size, size)."""
        p = np.concatenate(
            [self.predictor.scores(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        )
        return p if self.target == VOCAB[POSITIVE] else 1 - p

    def _maps(self, images: np.ndarray) -> np.ndarray:
        raw = activation_maps(self.predictor.model, to_input(images), VOCAB.index(self.target), self.method, self.layer)
        return scale(enlarge(raw, images.shape[-1])).numpy()

    def explain(
        self, images: Iterable[Subject], batch_size: int = 32, burned_in: bool = False
    ) -> Iterator[Explanation | ImageError]:
        """An explanation an image, in their order; the error of one that cannot be used, or, unless `burned_in` images are
        allowed, may show the name of its patient. Where an image's probability is known, it is not predicted again."""
        wanted = iter(images)
        while batch := list(islice(wanted, batch_size)):
            yield from self._explain(batch, burned_in)

    def _explain(self, batch: list[Subject], burned_in: bool) -> Iterator[Explanation | ImageError]:
        seen = Preprocessing.of(self.predictor.config)
        opened = [_open(image.path, seen, burned_in) for image in batch]
        pairs = [
            (subject, image) for subject, image in zip(batch, opened, strict=True) if isinstance(image, np.ndarray)
        ]
        squares = np.stack([seen.fit(image) for _, image in pairs]) if pairs else np.zeros((0, 1, 1), np.uint8)
        known = [subject.p for subject, _ in pairs]
        p = self.predictor.scores(squares) if None in known else known
        found = iter(
            self._place(*pair, *of)
            for pair, of in zip(pairs, zip(self.maps(squares) if pairs else (), p, strict=True), strict=True)
        )
        for image in opened:
            yield image if isinstance(image, ImageError) else next(found)

    def _place(self, subject: Subject, image: np.ndarray, heat: np.ndarray, p: float) -> Explanation:
        shown = Image.fromarray(image)
        shown.thumbnail((SIDE, SIDE))
        over = Preprocessing.of(self.predictor.config).spread(heat, shown.height, shown.width)
        return Explanation(
            np.asarray(shown),
            np.clip(over, 0, 1),
            subject.name or str(subject.path),
            self.predictor.show(float(p)),
            self.predictor.threshold,
            self.target,
            self.method,
            subject.label,
        )


def _open(path: Path, seen: Preprocessing, burned_in: bool) -> np.ndarray | ImageError:
    try:
        image = open_image(path, seen)  # decoded as for prediction
    except ImageError as error:
        return error
    if image.burned_in and not burned_in:
        return ImageError(
            'its file says that the picture may name the patient: --allow-burned-in shows it anyway.', BURNED_IN
        ).of(path)
    return image.pixels

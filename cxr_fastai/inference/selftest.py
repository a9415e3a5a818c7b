"""The self-test of a model file: reference images, and the probabilities that were predicted for them at export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.inference.engines import Engine

IMAGES = 8
"""Number of reference images."""
TOLERANCE = 1e-4
"""Largest difference of a probability on another machine or in another file format."""


class ParityError(CXRError):
    """A model file does not reproduce the probabilities that were stored with it."""

    exit_code = 5


@dataclass(frozen=True)
class SelfTest:
    """Reference `images`, grey uint8 (n, s, s), and their stored probabilities `p` (n,) of pneumonia."""

    images: np.ndarray
    p: np.ndarray

    @classmethod
    def create(cls, engine: Engine, size: int) -> SelfTest:
        """Return a self-test with the predictions of `engine` for `IMAGES` synthetic images of `size` px."""
        images = draw_images(size)
        p, _ = engine(images)
        return cls(images, p)

    def check(self, engine: Engine, source: StrPath, first: int = IMAGES) -> None:
        """Raise `ParityError` unless `engine` reproduces the stored probabilities of the `first` images.

        `source` is the file that the message names.
        """
        expected = self.p[:first]
        try:
            p, _ = engine(self.images[:first])
        except Exception as error:  # torch and ONNX Runtime have no common base class
            raise ParityError(
                f'{source}: the model cannot predict its reference images ({first_line(error, 200)}). '
                'It is damaged, or made for other software. Get it again from its source.'
            ) from error
        difference = np.inf
        if p.shape == expected.shape and p.dtype.kind == 'f':
            difference = float(np.abs(p - expected).max())
        if np.isnan(difference) or difference > TOLERANCE:
            raise ParityError(
                f'{source}: the model does not reproduce its stored predictions (a probability differs by '
                f'{difference:.2g}). It is damaged, or made for other software. Get it again from its source.'
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, which a pickle can contain without a class of another package."""
        return {'images': self.images.tobytes(), 'size': self.images.shape[-1], 'p': self.p.tolist()}

    @classmethod
    def from_dict(cls, facts: dict[str, Any], source: StrPath) -> SelfTest:
        """Return the self-test that `as_dict` described. Raises `CXRError` if `facts`, from `source`, are not one."""
        try:
            size = facts['size']
            images = np.frombuffer(b''.join([facts['images']]), np.uint8).reshape(-1, size, size)
            p = np.array(facts['p'], np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CXRError(f'{source}: the reference images of its self-test are damaged.') from None
        return cls.from_arrays(images, p, source)

    @classmethod
    def from_arrays(cls, images: np.ndarray, p: np.ndarray, source: StrPath) -> SelfTest:
        """Return the self-test of arrays that `source` contains. Raises `CXRError` if a shape, type or value is bad."""
        are_images = images.ndim == 3 and images.dtype == np.uint8 and images.shape[1] == images.shape[2]
        are_probabilities = p.dtype.kind == 'f' and bool(((p >= 0) & (p <= 1)).all())
        if not are_images or not are_probabilities or len(images) == 0 or p.shape != (len(images),):
            raise CXRError(f'{source}: the reference images of its self-test are damaged.')
        return cls(images, p)


def draw_images(size: int) -> np.ndarray:
    """Return `IMAGES` synthetic images, uint8 (n, size, size); the classes alternate."""
    from PIL import Image

    from cxr_fastai.images.synthetic import Chest, draw_image

    rng = np.random.default_rng(0)
    images = []
    for i in range(IMAGES):
        image, _ = draw_image(Chest.draw(rng), VOCAB[i % 2], max(size, 64), rng)
        images.append(np.asarray(Image.fromarray(image).resize((size, size))))
    return np.stack(images)

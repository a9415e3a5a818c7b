"""Eight synthetic images, and what a network predicted of them when it was saved: does it still?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.recipe import VOCAB

IMAGES = 8
TOLERANCE = 1e-4
"""By how much a probability may differ on another machine, or in another format."""
Engine = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Images, grey uint8 (n, s, s), become probabilities of pneumonia (n,) and features (n, c)."""


class ParityError(CXRError):
    """A model file that does not predict what it did when it was saved."""

    exit_code = 5


@dataclass(frozen=True)
class Canary:
    """`images`, grey uint8 (n, s, s), and the probabilities `p` (n,) of pneumonia."""

    images: np.ndarray
    p: np.ndarray

    @classmethod
    def of(cls, engine: Engine, size: int) -> Canary:
        """What `engine` predicts of four synthetic images of each class, of `size` px."""
        images = draw_images(size)
        return cls(images, engine(images)[0])

    def check(self, engine: Engine, source: Path, few: int = IMAGES, threshold: float = 0.5) -> None:
        """Raise `ParityError` unless `engine` predicts the same of the first `few` images, and calls them the same."""
        known = self.p[:few]
        try:
            p = engine(self.images[:few])[0]
        except Exception as error:  # those of torch and ONNX Runtime share no base
            raise ParityError(
                f'{source}: it cannot predict the images that it was saved with '
                f'({first_line(error, 200)}): it is damaged, or made for other software: get it anew.'
            ) from error
        same = p.shape == known.shape and p.dtype.kind == 'f'
        worst, plain = float(np.abs(p - known).max()) if same else np.inf, np.abs(known - threshold) > TOLERANCE
        if not worst <= TOLERANCE or ((p >= threshold) != (known >= threshold))[plain].any():
            raise ParityError(
                f'{source}: it does not predict what it did when it was saved (a probability differs by '
                f'{worst:.2g}): it is damaged, or made for other software: get it anew.'
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which need no package to be read."""
        return {'images': self.images.tobytes(), 'size': self.images.shape[-1], 'p': self.p.tolist()}

    @classmethod
    def from_dict(cls, facts: dict[str, Any], source: Path) -> Canary:
        """The inverse of `as_dict`. Raises `CXRError` for what is none."""
        try:
            images = np.frombuffer(bytearray(facts['images']), np.uint8).reshape(-1, facts['size'], facts['size'])
            return cls.checked(images, np.array(facts['p'], np.float64), source)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CXRError(f'{source}: its canary images are damaged.') from None

    @classmethod
    def checked(cls, images: np.ndarray, p: np.ndarray, source: Path) -> Canary:
        """A canary of what a file holds. Raises `CXRError` where that is no set of images with probabilities."""
        square = images.ndim == 3 and images.dtype == np.uint8 and images.shape[1] == images.shape[2]
        told = p.dtype.kind == 'f' and p.shape == (len(images),) and ((p >= 0) & (p <= 1)).all()
        if not (square and told and len(images) >= 1):
            raise CXRError(f'{source}: its canary images are damaged.')
        return cls(images, p)


def draw_images(size: int) -> np.ndarray:
    """Four synthetic images of each class in turn, uint8 (8, size, size)."""
    from PIL import Image

    from cxr_fastai.images.synthetic import Chest, draw_image

    rng, images = np.random.default_rng(0), []
    for i in range(IMAGES):
        image, _ = draw_image(Chest.draw(rng), VOCAB[i % 2], max(size, 64), rng)
        images.append(np.asarray(Image.fromarray(image).resize((size, size))))
    return np.stack(images)

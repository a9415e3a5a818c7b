"""Images with parts of the anatomy hidden, to measure where a classifier looks.

Arms, neck, abdomen and the edge of the exposed field tell much of the label of a data set: the age of the child, how it
was held, and which device took the image. A classifier that looks at the disease needs the lungs. How well it does
without them shows how far it relies on the rest, and an image with the surroundings of another one shows which of the
two it follows. The design follows Xiao et al. (2021), "Noise or Signal: The Role of Image Backgrounds in Object
Recognition".

The lungs are estimated by a fixed box, because nearly all images are cropped to the chest. It contains both lungs of
nearly every image, but also the heart, the spine and parts of the shoulders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FEATHER = 0.03
"""Width of the transition between two images, as a fraction of the side, so that no edge shows where they meet."""


@dataclass(frozen=True)
class Box:
    """A part of an image; `top`, `bottom`, `left` and `right` are fractions of its height and width."""

    top: float
    bottom: float
    left: float
    right: float

    def mask(self, side: int) -> np.ndarray:
        """Return which pixels of an image (side, side) are in the box, as bool (side, side)."""
        mask = np.zeros((side, side), bool)
        top, bottom, left, right = (round(side * edge) for edge in (self.top, self.bottom, self.left, self.right))
        mask[top:bottom, left:right] = True
        return mask

    def soft_mask(self, side: int) -> np.ndarray:
        """Return the share of the box in each pixel, float32 (side, side), which falls from 1 to 0 within `FEATHER`."""
        centres = (np.arange(side, dtype=np.float32) + 0.5) / side
        rows = np.minimum(centres - self.top, self.bottom - centres)
        columns = np.minimum(centres - self.left, self.right - centres)
        return np.clip(np.minimum.outer(rows, columns) / FEATHER + 0.5, 0, 1)


LUNGS = Box(0.15, 0.85, 0.10, 0.90)
"""Contains both lungs of nearly every image."""
THORAX = Box(0.08, 0.92, 0.05, 0.95)
"""Contains the whole chest; only a thin frame is outside."""


def _black(square: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros_like(square)


def _mean(square: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.full_like(square, round(square.mean()))


def _noise(square: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    levels = square.mean() + square.std() * rng.standard_normal(square.shape, np.float32)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


FILLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    'black': _black,
    'mean': _mean,
    'noise': _noise,
}
"""What hides a part of an image, by name: a function of the image that returns another one.

`mean` is the mean level of the image, and `noise` has its mean and standard deviation.
"""


@dataclass(frozen=True)
class Hiding:
    """Hides the pixels in `box`, or with `outside` those out of it, by a fill of `FILLS`."""

    box: Box
    fill: str
    outside: bool = False

    def __call__(self, square: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a copy of a grey image, uint8 (s, s), with the pixels hidden."""
        hidden = self.box.mask(len(square)) != self.outside
        return np.where(hidden, FILLS[self.fill](square, rng), square)


PARTS = {'lungs hidden': (LUNGS, False), 'thorax hidden': (THORAX, False), 'lungs only': (LUNGS, True)}
HIDINGS = {f'{part}, {fill}': Hiding(box, fill, outside) for part, (box, outside) in PARTS.items() for fill in FILLS}
"""Name of a row of a robustness table to the function that hides a part of an image."""
EXCHANGED = 'surroundings exchanged'
"""Name of the row of images that have the surroundings of an image of the other class."""
ANATOMY = (*HIDINGS, EXCHANGED)
"""Names of the rows about anatomy."""


def exchange_surroundings(square: np.ndarray, other: np.ndarray, box: Box = LUNGS) -> np.ndarray:
    """Return the image `square` within `box`, and `other` around it, with a soft transition; both are uint8 (s, s)."""
    share = box.soft_mask(len(square))
    return np.rint(share * square + (1 - share) * other).astype(np.uint8)

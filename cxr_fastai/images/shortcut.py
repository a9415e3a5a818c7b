"""Films whose sharpness and resolution tell nothing of their class any more: all as poor as the poorest tenth."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cxr_fastai.data.image_stats import sharpness
from cxr_fastai.images.corruptions import reencode, smooth
from cxr_fastai.images.decode import BILINEAR

POOREST = 10
"""Percentile of the films that the others are reduced to."""
QUALITY = 75
"""JPEG quality of all films, that of most programs."""
TRIES = 12
CLOSE = 0.002
"""Relative error of sharpness at which the search ends."""
MOST_SIGMA, LONGEST_STEP = 0.06, 0.01
"""Of the search, as shares of the side."""
SLOPES = (-3, -0.15)
"""Steepest and flattest fall of log sharpness by pixel of sigma that the search believes."""


@dataclass(frozen=True)
class Equaliser:
    """Makes films alike in what should not tell their class: `Equaliser.of(squares, sides)`, then call it on each.

    A film goes to the common resolution (`side` px and up again; nothing where that is its side already), through a
    Gaussian of its own vertical and horizontal width, and through JPEG of one quality, so that in the end its vertical
    and horizontal sharpness (`traits.sharpness`) are those `wanted`. A film that is poorer already is not sharpened:
    where most of the poorest tenth are of one class, so much of the difference is left.

    That takes away what one number tells, not all that fine detail does: on real films several numbers together
    (steps and spectral bands of the equalised films) still tell the label, part of which is the disease.
    """
    wanted: tuple[float, float]
    side: int

    @classmethod
    def of(cls, squares: Iterable[np.ndarray], sides: Iterable[int]) -> Equaliser:
        """That of a split: `squares`, grey uint8 (s, s) each, and the shorter sides of their files in pixels.

        Sharpness is compared after resampling and JPEG, which is where films end; files larger than the squares lose
        no resolution, since they were read at the squares' side.
        """
        side = round(np.percentile(list(sides), POOREST))
        wanted = np.percentile([sharpness(_store(square, side)) for square in squares], POOREST, axis=0)
        return cls((float(wanted[0]), float(wanted[1])), side)

    def __call__(self, square: np.ndarray) -> np.ndarray:
        """`square`, grey uint8 (s, s), reduced; by the secant method in both directions at once."""
        return _search(square, np.array(self.wanted), self.side)


def _search(square: np.ndarray, wanted: np.ndarray, side: int) -> np.ndarray:
    """The best of `TRIES` films; sigma, log sharpness over that wanted and its slope are (vertical, horizontal)."""
    sigma, slope = np.zeros(2), np.full(2, -1.0)
    best, excess = _try(square, sigma, wanted, side)
    least = _error(sigma, excess)
    for _ in range(TRIES):
        if least < CLOSE: break
        step = np.clip(-excess/slope, -LONGEST_STEP*len(square), LONGEST_STEP*len(square))
        following = np.clip(sigma + step, 0, MOST_SIGMA*len(square))
        tried, found = _try(square, following, wanted, side)
        moved = np.abs(following - sigma) > 1e-3
        slope = np.where(moved, np.clip((found - excess)/np.where(moved, following - sigma, 1), *SLOPES), slope)
        sigma, excess = following, found
        if _error(sigma, excess) < least: best, least = tried, _error(sigma, excess)
    return best


def _try(square: np.ndarray, sigma: np.ndarray, wanted: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    stored = _store(smooth(square, *sigma) if sigma.any() else square, side)
    return stored, np.log(np.maximum(sharpness(stored), 1e-6)/np.maximum(wanted, 1e-6))


def _error(sigma: np.ndarray, excess: np.ndarray) -> float:
    """How far off the worse direction is; being too poor without any blur counts nothing."""
    return float(np.abs(np.where((sigma == 0) & (excess < 0), 0, excess)).max())


def _store(square: np.ndarray, side: int) -> np.ndarray:
    """`square` at the resolution `side`, back at its own, and through JPEG."""
    if side < len(square):
        small = Image.fromarray(square).resize((side, side), BILINEAR)
        square = np.asarray(small.resize(square.shape[::-1], BILINEAR))
    return reencode(square, QUALITY)

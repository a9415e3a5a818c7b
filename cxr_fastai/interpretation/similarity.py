"""How alike two maps are: in structure, in the order of their values, and linearly."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter
from scipy.stats import spearmanr

SIDE = 56
"""Pixels that maps are compared at: finer ones hold no more than their layer gave."""
WINDOW = 7
STABLE = 0.01**2, 0.03**2
"""What keeps the ratios of SSIM finite, for values up to 1, as its authors have it."""


def likeness(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The mean `ssim` and `spearman` of pairs of maps (s, s) from 0 to 1."""
    small = [(shrink(a), shrink(b)) for a, b in pairs]
    return {'ssim': float(np.mean([ssim(a, b) for a, b in small])),
            'spearman': float(np.mean([rank_correlation(a, b) for a, b in small]))}


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The structural similarity of two maps from 0 to 1, over square windows (Wang et al. 2004)."""
    mean, (c1, c2) = lambda x: uniform_filter(x.astype(np.float64), WINDOW), STABLE
    at, bt = mean(a), mean(b)
    spread, both = mean(a*a) + mean(b*b) - at*at - bt*bt, mean(a*b) - at*bt
    return float(((2*at*bt + c1)*(2*both + c2)/((at*at + bt*bt + c1)*(spread + c2))).mean())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two maps; 0 where one is flat."""
    return float(spearmanr(a.ravel(), b.ravel()).statistic) if _vary(a, b) else 0.0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two maps; 0 where one is flat."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if _vary(a, b) else 0.0


def shrink(heat: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A map (s, s) as the means of (side, side) parts; a smaller one as it is."""
    if len(heat) <= side: return heat
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BOX))


def _vary(*maps: np.ndarray) -> bool: return all(np.ptp(heat) > 0 for heat in maps)

"""One temperature makes probabilities more or less certain, and changes no order; it needs nothing but NumPy."""
from __future__ import annotations

import numpy as np

EDGE = 1e-15
"""Probabilities nearer to 0 and 1 than this count as this far: double precision has no logit for 1."""


def temper(p: np.ndarray | float, temperature: float) -> np.ndarray | float:
    """Probabilities (n,) with their logits divided by `temperature` (Guo et al. 2017); their order stays."""
    return p if temperature == 1 else 1/(1 + np.exp(-logits(p)/temperature))


def logits(p: np.ndarray | float) -> np.ndarray | float:
    """The logits of probabilities, those of 0 and 1 cut to what double precision tells from them."""
    cut = np.clip(p, EDGE, 1 - EDGE)
    return np.log(cut) - np.log1p(-cut)

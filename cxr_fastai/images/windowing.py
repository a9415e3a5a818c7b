"""Conversion of deep pixels (9 to 32 bits, or floats) to 8 bits through a window.

Values below the window become black, values above it white.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cxr_fastai.core.errors import ImageError

PERCENTILES = (0.5, 99.5)
"""The window of a file that declares none: between these percentiles of its pixels, so that few values are clipped."""
MAX_SAMPLE = 4_000_000
"""Number of pixels from which the percentiles of a float image are estimated."""
MAX_LEVELS = 1 << 16
"""Maximum number of integer levels that are counted exactly."""


class Window(NamedTuple):
    """The values that become black (`low`) and white (`high`)."""

    low: float
    high: float

    def describe(self) -> str:
        """Return a note for `DecodedImage.notes`."""
        return f'window {self.low:g} to {self.high:g}, {PERCENTILES[0]}% to {PERCENTILES[1]}% of the pixels'


def percentile_grey(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """Convert `pixels` (h, w), integers or floats, to grey uint8 (h, w) by their percentiles; return a note as well.

    Infinite pixels become black or white, and NaN becomes black. Raises `ImageError` E_BLANK if all pixels are equal.
    """
    if np.issubdtype(pixels.dtype, np.integer) and int(pixels.max()) - int(pixels.min()) < MAX_LEVELS:
        levels, counts = count_levels(pixels)
        table, note = percentile_table(levels.astype(float), counts)
        return look_up(pixels, table), note
    sample = pixels.ravel()[:: 1 + pixels.size // MAX_SAMPLE]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise ImageError('all pixels are NaN or infinite', 'E_BLANK')
    low, high = np.percentile(sample, PERCENTILES)
    window = _choose_window(low, high, sample.min(), sample.max())
    note = window.describe()
    invalid = pixels.size - np.count_nonzero(np.isfinite(pixels))
    if invalid:
        note += f'; {invalid} pixels are NaN or infinite'
    return scale_to_grey(pixels, *window), note


def percentile_table(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the grey level of each value by the percentiles of the image, uint8 (n,), and a note.

    Each of the `values` (n,) occurs `counts` (n,) times. Raises `ImageError` E_BLANK if only one value occurs.
    """
    occurring = values[counts > 0]
    if not occurring.size:
        raise ImageError('all pixels are padding', 'E_BLANK')
    low, high = weighted_percentiles(values, counts, PERCENTILES)
    window = _choose_window(low, high, occurring.min(), occurring.max())
    return scale_to_grey(values, *window), window.describe()


def _choose_window(low: float, high: float, minimum: float, maximum: float) -> Window:
    """Return the window between the percentiles `low` and `high`, or between all values if they coincide."""
    if low < high:
        return Window(float(low), float(high))
    if minimum < maximum:
        return Window(float(minimum), float(maximum))
    raise ImageError(f'all pixels have the value {minimum:g}', 'E_BLANK')


def weighted_percentiles(values: np.ndarray, counts: np.ndarray, percentiles: tuple[float, float]) -> np.ndarray:
    """Return the `percentiles` of `values` (n,), each of which occurs `counts` (n,) times; NaN if none occurs."""
    order = np.argsort(values)
    cumulative = np.cumsum(counts[order])
    total = cumulative[-1]
    if total == 0:
        return np.full(len(percentiles), np.nan)
    positions = np.searchsorted(cumulative, np.array(percentiles) / 100 * total)
    return values[order][positions].astype(float)


def count_levels(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all integers from the minimum to the maximum of `stored`, and how often each occurs.

    Raises `ImageError` E_BITDEPTH if there are more than `MAX_LEVELS`.
    """
    low, high = int(stored.min()), int(stored.max())
    if high - low >= MAX_LEVELS:
        raise ImageError(f'the values from {low} to {high} span more than 16 bits', 'E_BITDEPTH')
    return np.arange(low, high + 1), np.bincount(_from_zero(stored).ravel())


def look_up(stored: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace each value of `stored` by its entry in `table`, which starts at the minimum of `stored`."""
    return table[_from_zero(stored)]


def _from_zero(stored: np.ndarray) -> np.ndarray:
    dtype = np.int32 if stored.itemsize < 4 else np.int64  # a level of 32 bits may be above the maximum of int32
    return np.subtract(stored, int(stored.min()), dtype=dtype)


def scale_to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low` and below to 0, `high` and above to 255, linearly between, and NaN to 0: uint8 of the same shape."""
    # Whole images are computed in place and in 32 bits, because 40 megapixels would otherwise take a gigabyte.
    dtype = np.float32 if values.ndim > 1 else np.float64
    grey = np.subtract(values, low, dtype=dtype, casting='same_kind')
    grey *= 255 / (high - low)
    np.nan_to_num(grey, copy=False, nan=0, posinf=255, neginf=0)
    np.clip(grey, 0, 255, out=grey)
    return np.rint(grey, out=grey).astype(np.uint8)

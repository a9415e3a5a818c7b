"""Deep pixels (9 to 32 bits, or floats) become 8 bits through a window: what is below is black, above it white."""

from __future__ import annotations

import numpy as np

from cxr_fastai.core.errors import ImageError

PERCENTILES = (0.5, 99.5)
"""Of the pixels, where nothing declares a window: between them all 256 levels are used, beyond them little is lost."""
SAMPLE = 4_000_000
"""Pixels of an image of floats that are enough for its percentiles."""
MOST_LEVELS = 1 << 16


def percentile_grey(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """Spread `pixels` (h, w), integers or floats, between their percentiles: grey uint8 (h, w), and a note of it.

    Infinite pixels become black or white and NaN black. Raises `ImageError` E_BLANK where all pixels are alike.
    """
    if np.issubdtype(pixels.dtype, np.integer) and np.ptp(pixels) < MOST_LEVELS:
        levels, counts = count_levels(pixels)
        table, note = percentile_table(levels.astype(float), counts)
        return look_up(pixels, table), note
    lost = pixels.size - np.count_nonzero(np.isfinite(pixels))
    sample = pixels.ravel()[:: 1 + pixels.size // SAMPLE]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise ImageError('no pixel is a finite number', 'E_BLANK')
    window = _checked(*np.percentile(sample, PERCENTILES), sample.min(), sample.max())
    return spread(pixels, *window), _note(*window) + (f'; {lost} pixels are no finite number' if lost else '')


def percentile_table(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, str]:
    """The grey level (uint8) of each of `values` (n,) between their percentiles, where `counts` tells how often each
    occurs; and a note of the window. Raises `ImageError` E_BLANK where all that occur are alike."""
    there = values[counts > 0]
    if not there.size:
        raise ImageError('every pixel is padding', 'E_BLANK')
    window = _checked(*weighted_percentiles(values, counts, PERCENTILES), there.min(), there.max())
    return spread(values, *window), _note(*window)


def weighted_percentiles(values: np.ndarray, counts: np.ndarray, percentiles: tuple[float, float]) -> np.ndarray:
    """The `percentiles` of `values` (n,), each of which occurs `counts` (n,) times; NaN where none occurs."""
    order = np.argsort(values)
    share = np.cumsum(counts[order])
    if not share[-1]:
        return np.full(len(percentiles), np.nan)
    return values[order][np.searchsorted(share, np.array(percentiles) / 100 * share[-1])].astype(float)


def count_levels(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers from the least of `stored` to the greatest, and how often each occurs. Raises `ImageError`
    E_BITDEPTH where they span more than 16 bits."""
    low, high = int(stored.min()), int(stored.max())
    if high - low >= MOST_LEVELS:
        raise ImageError(f'values from {low} to {high} span more than 16 bits', 'E_BITDEPTH')
    return np.arange(low, high + 1), np.bincount(_from_zero(stored).ravel())


def look_up(stored: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[stored]`, where the first entry of `table` belongs to the least of `stored`."""
    return table[_from_zero(stored)]


def spread(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` and below to 0, `high` and above to 255, evenly between, NaN to 0: uint8 of the same shape."""
    # In place and, for whole images, in 32 bits: 40 megapixels would fill a gigabyte otherwise.
    grey = np.subtract(values, low, dtype=np.float32 if values.ndim > 1 else np.float64, casting='same_kind')
    grey *= 255 / (high - low)
    np.nan_to_num(grey, copy=False, nan=0, posinf=255, neginf=0)
    return np.rint(np.clip(grey, 0, 255, out=grey), out=grey).astype(np.uint8)


def _from_zero(stored: np.ndarray) -> np.ndarray:
    return np.subtract(stored, int(stored.min()), dtype=np.int32)


def _checked(low: float, high: float, least: float, greatest: float) -> tuple[float, float]:
    """The window, or the whole range where nearly all pixels are alike."""
    if low < high:
        return float(low), float(high)
    if least < greatest:
        return float(least), float(greatest)
    raise ImageError(f'every pixel is {least:g}', 'E_BLANK')


def _note(low: float, high: float) -> str:
    return f'window {low:g} to {high:g}, {PERCENTILES[0]} to {PERCENTILES[1]} % of the pixels'

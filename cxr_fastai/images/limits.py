"""What an image file may cost to decode, and what an image has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import ImageError

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 40_000_000
MAX_BYTES = 400_000_000
MAX_SCANNED = 400_000_000
"""Pixels times scans of a progressive JPEG; each scan visits all pixels, and a few bytes make one."""
MIN_SIDE = 64
MAX_ASPECT = 4


def check_pixels(width: int, height: int) -> None:
    """Raise `ImageError` E_TOO_LARGE over `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise ImageError(f'{width}x{height} is over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE')


def check_shape(width: int, height: int) -> None:
    """Raise `ImageError` E_TOO_SMALL for less than a thumbnail, and for a strip."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f'{width}x{height} is under {MIN_SIDE} pixels', 'E_TOO_SMALL')
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f'{width}x{height} is over {MAX_ASPECT} times as long as wide', 'E_TOO_SMALL')


def check_scans(jpeg: bytes, width: int, height: int) -> None:
    """Raise `ImageError` E_TIMEOUT for a JPEG of so many scans that decoding would take minutes."""
    scans = jpeg.count(b'\xff\xda')
    if scans * width * height > MAX_SCANNED:
        raise ImageError(f'{scans} progressive scans of {width}x{height} would take too long', 'E_TIMEOUT')


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: grey `pixels` uint8 (h, w), and what the file was: its `format`, the `mode` its pixels are stored
    in (Pillow's name, or DICOM's), `bits` a sample, `width` and `height` as stored.

    `notes` tell what was done beyond decoding, such as the window of a deep image; `burned_in` is true where the file
    says that text in the picture may name the patient.
    """

    pixels: np.ndarray
    format: str
    mode: str
    bits: int
    width: int
    height: int
    notes: tuple[str, ...] = ()
    burned_in: bool = False

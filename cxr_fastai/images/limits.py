"""The limits that image files must respect, and `DecodedImage`, the result of decoding.

The checks run on the header of a file, before its pixels are decoded, so that a malicious file costs neither time nor
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cxr_fastai.core.errors import ImageError

MAX_BYTES = 400_000_000
"""Maximum size of a file."""
MAX_PIXELS = 40_000_000
"""Maximum width times height of an image."""
MAX_PADDED_PIXELS = 4 * MAX_PIXELS
"""Maximum pixels of all strips or tiles of a TIFF file, with those outside the picture, times the separate planes.

Tiles that are no larger than the picture have less than four times its pixels.
"""
MAX_SCANNED_PIXELS = 400_000_000
"""Maximum pixels times scans of a JPEG: each scan visits all pixels, and costs only a few bytes."""
MAX_METADATA = 4_000_000
"""Maximum bytes of all metadata of a JPEG, PNG or TIFF file, counted as its reader would copy them."""
MAX_STRUCTURE = 200_000
"""Maximum bytes of a JPEG before its first scan that are no metadata: tables, frame headers and fill bytes."""
MAX_PARTS = 2000
"""Maximum number of segments of a JPEG before or between its scans, or of chunks of a PNG file that are no pixels."""
MAX_EXIF_PARTS = 100
"""Maximum number of segments that contain EXIF data; one has 64 KiB. Pillow copies all data for each."""
MAX_STRIPS = 16_384
"""Maximum number of strips or tiles of a TIFF file with JPEG compression."""
MAX_CHUNKS = 200_000
"""Maximum number of all chunks of a PNG file, or of all segments of the JPEG pictures in a TIFF file."""
MAX_TAGS = 1000
"""Maximum number of tags in a directory of a TIFF file or of EXIF data."""
MAX_TILES = 4096
"""Maximum number of tiles of a JPEG 2000 picture."""
MAX_PRECINCTS = 200_000
"""Maximum number of precincts of a JPEG 2000 picture. 40 megapixels in colour have 40,000 with sides of 64."""
MAX_BLOCKS = 500_000
"""Maximum number of code blocks of a JPEG 2000 picture. 40 megapixels in colour have 470,000 with sides of 16."""
MAX_INCLUSIONS = 20_000_000
"""Maximum number of code blocks times layers of a JPEG 2000 picture: each packet tells which blocks it includes."""
MAX_PACKETS = 2_000_000
"""Maximum number of packets of a JPEG 2000 picture, and of positions where they are looked for."""
MAX_CODINGS = 16
"""Maximum number of different settings for the components and tiles of a JPEG 2000 picture."""
MAX_MARKERS = 100_000
"""Maximum number of segments in all headers of a JPEG 2000 picture."""
MAX_BOXES = 1000
"""Maximum number of boxes around a JPEG 2000 picture."""
MAX_WINDOWS = 8
"""Number of windows of a DICOM file that are tried."""
MIN_SIDE = 64
"""Minimum width and height in pixels."""
MAX_ASPECT = 4
"""Maximum ratio of the longer side to the shorter one."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image and facts about its file.

    `pixels` are grey uint8 (h, w). `format` is the file format, `mode` the pixel mode as stored (Pillow's name, or the
    photometric interpretation of DICOM), `bits` the bits per sample; `width` and `height` are those of the file, which
    may be larger than `pixels`. `notes` describe every change beyond decoding, such as the window of a 12-bit image.
    `burned_in` is True if the file says that its picture contains text, which may identify the patient. `square` is the
    network's view of the image, grey uint8 (size, size), if it was made along with the pixels, otherwise empty.
    """

    pixels: np.ndarray
    format: str
    mode: str
    bits: int
    width: int
    height: int
    notes: tuple[str, ...] = ()
    burned_in: bool = False
    square: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.uint8))


def check_pixels(width: int, height: int) -> None:
    """Raise `ImageError` E_TOO_LARGE for more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        raise ImageError(f'{width}x{height} is over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE')


def check_shape(width: int, height: int) -> None:
    """Raise `ImageError` E_TOO_SMALL for a side below `MIN_SIDE` or an aspect ratio above `MAX_ASPECT`."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f'{width}x{height}: a side is under {MIN_SIDE} pixels', 'E_TOO_SMALL')
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f'{width}x{height}: the aspect ratio is over {MAX_ASPECT}', 'E_TOO_SMALL')


def check_amount(size: int, parts: int) -> None:
    """Raise `ImageError` E_TOO_LARGE for more than `MAX_METADATA` bytes of metadata, or `MAX_PARTS` parts."""
    if size > MAX_METADATA:
        raise ImageError(f'{size:,} bytes of metadata are over {MAX_METADATA:,}', 'E_TOO_LARGE')
    if parts > MAX_PARTS:
        raise ImageError(f'more than {MAX_PARTS:,} parts before or between the pixels', 'E_TOO_LARGE')

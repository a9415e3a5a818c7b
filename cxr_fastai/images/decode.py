"""Any image file becomes one uint8 grey array, and that what a network sees: training and prediction share both."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images import dicom
from cxr_fastai.images.limits import MAX_BYTES, MAX_PIXELS, DecodedImage, check_pixels, check_scans, check_shape
from cxr_fastai.images.windowing import percentile_grey

if TYPE_CHECKING:
    from cxr_fastai.images.preprocessing import Preprocessing

FORMATS = {'JPEG': ('.jpeg', '.jpg'), 'PNG': ('.png',), 'TIFF': ('.tiff', '.tif'), 'DICOM': dicom.SUFFIXES}
"""What is decoded, recognised by content; and the names it usually has."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""What is looked for in folders; a fixed list, since the system's table of types differs from host to host."""
OPENED = ('JPEG', 'PNG', 'TIFF', 'GIF')
"""What Pillow may look into; GIF only to tell an animation from a file that is no picture."""
BITS = {
    '1': 1,
    'L': 8,
    'P': 8,
    'PA': 8,
    'LA': 8,
    'La': 8,
    'RGB': 8,
    'RGBX': 8,
    'RGBA': 8,
    'RGBa': 8,
    'CMYK': 8,
    'YCbCr': 8,
    'I;16': 16,
    'I;16B': 16,
    'I;16L': 16,
    'I;16N': 16,
    'I': 32,
    'F': 32,
}
"""Pillow's modes, and their bits a sample; deeper than 8 needs a window, or it would turn white or black."""
MARKS = (
    ('JPEG', 0, b'\xff\xd8\xff'),
    ('PNG', 0, b'\x89PNG\r\n'),
    ('TIFF', 0, b'II*\0'),
    ('TIFF', 0, b'MM\0*'),
    ('DICOM', 128, b'DICM'),
)
"""How files begin: format, place, bytes."""
PLAIN = ('L', 'RGB')
"""Modes that many images have, and that need no note."""
MIN_DEVIATION = 2
"""Grey levels; below that an image shows nothing."""
WHITE_IS_ZERO = 0
PNG_BITS = 24
"""Where the bits a sample stand in a PNG file."""
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
BLACK = (0, 0, 0, 255)


def read_image(path: str | Path) -> np.ndarray:
    """The whole image `path` in grey: uint8 (h, w). Raises `ImageError` for everything that is not such an image."""
    return open_image(path).pixels


def open_image(path: str | Path, wanted: Preprocessing | None = None) -> DecodedImage:
    """Decode the image `path`; where a preprocessing is `wanted`, at no more pixels than that needs.

    Raises `ImageError`, with the file's name in the message and a stable code.
    """
    suffix = Path(path).suffix.lower()
    try:
        image = decode_image(read_bytes(path), wanted, suffix)
    except ImageError as error:
        raise error.of(path) from error.__cause__
    if suffix in SUFFIXES and suffix not in FORMATS[image.format]:
        return replace(image, notes=(*image.notes, f'{image.format} in spite of its name'))
    return image


def sniff(data: bytes) -> str:
    """The format that an image file's first bytes promise, or `?`: `JPEG`, `PNG`, `TIFF`, `DICOM`."""
    return next((name for name, place, mark in MARKS if data.startswith(mark, place)), '?')


def decode_image(data: bytes, wanted: Preprocessing | None = None, suffix: str = '') -> DecodedImage:
    """Decode an image file's bytes; `suffix` of its name only helps to say what is wrong. Raises `ImageError`."""
    if not data:
        raise ImageError('the file is empty', 'E_EMPTY')
    image = dicom.read_dicom(data) if dicom.is_dicom(data, suffix) else _from_picture(data, wanted)
    check_shape(image.width, image.height)
    if _deviation(image.pixels) < MIN_DEVIATION:
        raise ImageError('it is blank: all pixels are nearly alike', 'E_BLANK')
    return image


def _from_picture(data: bytes, wanted: Preprocessing | None) -> DecodedImage:
    try:
        with Image.open(BytesIO(data), formats=OPENED) as image:
            _check_picture(image, data)
            (width, height), mode = image.size, image.mode
            if image.format == 'JPEG' and wanted:
                image.draft('L', wanted.enough(width, height))
            grey, notes = _grey(image)
            return DecodedImage(grey, image.format, mode, BITS[mode], width, height, tuple(notes))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f'none of {", ".join(FORMATS)}', 'E_FORMAT') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f'over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE') from None
    # Pillow's decoders let SyntaxError, ValueError and others out, and a batch must survive each of them.
    except Exception as error:
        if 'too large' in str(error).lower():
            raise ImageError(f'{error}', 'E_TOO_LARGE') from error
        raise ImageError(f'truncated or damaged: {error}', 'E_TRUNCATED') from error


def _check_picture(image: Image.Image, data: bytes) -> None:
    """Raise `ImageError` for what the header alone refuses, before pixels are decoded."""
    check_pixels(*image.size)
    if getattr(image, 'is_animated', False):
        raise ImageError('several frames or pages', 'E_MULTIFRAME')
    if image.format not in FORMATS:
        raise ImageError(f'{image.format} is none of {", ".join(FORMATS)}', 'E_FORMAT')
    if image.mode not in BITS:
        raise ImageError(f'pixels of mode {image.mode}', 'E_BITDEPTH')
    if (bits := _stored_bits(image, data)) > 8 == BITS[image.mode]:
        raise ImageError(f'{bits} bits of colour or transparency: store it as grey of 16 bits', 'E_BITDEPTH')
    check_shape(*image.size)
    if image.format == 'JPEG':
        check_scans(data, *image.size)


def _stored_bits(image: Image.Image, data: bytes) -> int:
    """Bits a sample in the file, where Pillow may keep the upper 8 of them without a word."""
    if image.format == 'PNG':
        return data[PNG_BITS]
    return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))) if image.format == 'TIFF' else 8


def _grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """The upright picture in grey, uint8 (h, w), and notes of what was done."""
    upright, notes = _turn(image)
    # Turning makes a new picture, which lacks what the file's says beside its pixels.
    grey, more = (_from_deep if BITS[image.mode] > 8 else _from_bytes)(upright, image)
    return grey, notes + more


def _turn(image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.format != 'TIFF':
        image.load()  # a PNG may hold its EXIF behind the pixels; Pillow turns a TIFF in here
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        turn = None  # metadata that cannot be read turn nothing
    if turn is None:
        return image, []
    image.load()
    upright = image if image.format == 'TIFF' else image.transpose(turn)
    return upright, ['turned as its EXIF orientation says']


def _from_bytes(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    if not image.has_transparency_data:
        return np.asarray(upright.convert('L')), [] if image.mode in PLAIN else [f'{image.mode} to grey']
    black = Image.new('RGBA', upright.size, BLACK)
    opaque = Image.alpha_composite(black, upright.convert('RGBA'))
    return np.asarray(opaque.convert('L')), ['transparency laid on black']


def _from_deep(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    grey, note = percentile_grey(np.asarray(upright))
    # Pillow inverts such a TIFF only at 8 bits.
    inverted = getattr(image, 'tag_v2', {}).get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO
    return (255 - grey, [note, 'white is zero: inverted']) if inverted else (grey, [note])


def _deviation(pixels: np.ndarray) -> float:
    """Standard deviation of uint8 `pixels`, from their histogram: quicker than numpy's by far."""
    counts, levels = np.array(Image.fromarray(pixels).histogram()), np.arange(256)
    mean = counts @ levels / pixels.size
    return math.sqrt(counts @ (levels - mean) ** 2 / pixels.size)


def read_bytes(path: str | Path) -> bytes:
    """What is in the image file `path`. Raises `ImageError`, without the file's name, where it is no regular file of a
    size that can be an image's, or cannot be read."""
    try:
        # Asked before opening: opening a pipe would wait for ever.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ImageError('not a regular file', 'E_NOT_REGULAR')
        if found.st_size > MAX_BYTES:
            raise ImageError(f'{found.st_size:,} bytes are over {MAX_BYTES:,}', 'E_TOO_LARGE')
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error), 'E_IO') from error
    except ValueError:
        raise ImageError('no file can have this name', 'E_IO') from None  # a NUL, for one

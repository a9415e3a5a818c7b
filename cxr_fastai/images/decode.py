"""Decoding of image files in any supported format to one grey uint8 array."""

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
"""Supported format to its usual suffixes. The content of a file decides, not its name."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Suffixes of the files that are searched for in folders."""
PILLOW_FORMATS = ('JPEG', 'PNG', 'TIFF', 'GIF')
"""Formats that Pillow may open. GIF only serves to give animations a clear error."""
MAGIC_NUMBERS = (
    ('JPEG', 0, b'\xff\xd8\xff'),
    ('PNG', 0, b'\x89PNG\r\n'),
    ('TIFF', 0, b'II*\0'),
    ('TIFF', 0, b'MM\0*'),
    ('DICOM', 128, b'DICM'),
)
"""Format, offset and bytes at the beginning of a file."""
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
"""Pixel mode of Pillow to its bits per sample. Deeper images than 8 bits need a window."""
COMMON_MODES = ('L', 'RGB')
"""Modes of most images, which need no note."""
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that turns the image upright."""
PNG_BIT_DEPTH = 24
"""Offset of the bit depth in a PNG file."""
WHITE_IS_ZERO = 0
"""Value of the TIFF tag PhotometricInterpretation."""
BLACK = (0, 0, 0, 255)
MIN_DEVIATION = 2
"""Minimum standard deviation of the grey levels; an image below it shows nothing."""


def read_image(path: str | Path) -> np.ndarray:
    """Read the image `path` at full resolution: grey uint8 (h, w). Raises `ImageError`."""
    return open_image(path).pixels


def open_image(path: str | Path, preprocessing: Preprocessing | None = None) -> DecodedImage:
    """Decode the image `path`; a large JPEG at no more pixels than `preprocessing` needs, if given.

    Raises `ImageError` with the path in its message and a stable code.
    """
    suffix = Path(path).suffix.lower()
    try:
        image = decode_image(read_bytes(path), preprocessing, suffix)
    except ImageError as error:
        raise error.with_path(path) from error.__cause__
    if suffix in SUFFIXES and suffix not in FORMATS[image.format]:
        return replace(image, notes=(*image.notes, f'the file is {image.format} despite its suffix {suffix}'))
    return image


def read_bytes(path: str | Path) -> bytes:
    """Return the contents of the image file `path`.

    Raises `ImageError`, without the path in its message, if it is not a regular file, too large or not readable.
    """
    try:
        # The status comes first, because opening a pipe would wait forever.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError('not a regular file', 'E_NOT_REGULAR')
        if status.st_size > MAX_BYTES:
            raise ImageError(f'{status.st_size:,} bytes are over {MAX_BYTES:,}', 'E_TOO_LARGE')
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error), 'E_IO') from error
    except ValueError:  # for example a NUL character
        raise ImageError('not a valid file name', 'E_IO') from None


def sniff(data: bytes) -> str:
    """Return the format of a file by its first bytes: `JPEG`, `PNG`, `TIFF`, `DICOM`, or `?`."""
    for name, offset, magic in MAGIC_NUMBERS:
        if data.startswith(magic, offset):
            return name
    return '?'


def decode_image(data: bytes, preprocessing: Preprocessing | None = None, suffix: str = '') -> DecodedImage:
    """Decode the bytes of an image file. Raises `ImageError`, without a path in its message.

    `suffix` is that of the file name; it only improves the error message of damaged files.
    """
    if not data:
        raise ImageError('the file is empty', 'E_EMPTY')
    image = dicom.read_dicom(data) if dicom.is_dicom(data, suffix) else _decode_picture(data, preprocessing)
    check_shape(image.width, image.height)
    if _deviation(image.pixels) < MIN_DEVIATION:
        raise ImageError('the image is blank: all pixels are nearly alike', 'E_BLANK')
    return image


def _deviation(pixels: np.ndarray) -> float:
    """Return the standard deviation of uint8 `pixels` from their histogram, which is much faster than NumPy's."""
    counts = np.array(Image.fromarray(pixels).histogram())
    levels = np.arange(256)
    mean = counts @ levels / pixels.size
    return math.sqrt(counts @ (levels - mean) ** 2 / pixels.size)


def _decode_picture(data: bytes, preprocessing: Preprocessing | None) -> DecodedImage:
    """Decode any format but DICOM."""
    try:
        with Image.open(BytesIO(data), formats=PILLOW_FORMATS) as image:
            _check_header(image, data)
            width, height = image.size
            mode = image.mode
            if image.format == 'JPEG' and preprocessing:
                image.draft('L', preprocessing.decode_size(width, height))
            grey, notes = _to_grey(image)
            return DecodedImage(grey, str(image.format), mode, BITS[mode], width, height, tuple(notes))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f'the format is not one of {", ".join(FORMATS)}', 'E_FORMAT') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f'over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE') from None
    # Pillow's decoders raise SyntaxError, ValueError and others; none of them may end a batch.
    except Exception as error:
        if 'too large' in str(error).lower():
            raise ImageError(f'{error}', 'E_TOO_LARGE') from error
        raise ImageError(f'truncated or damaged: {error}', 'E_TRUNCATED') from error


def _check_header(image: Image.Image, data: bytes) -> None:
    """Raise `ImageError` for everything that can be refused before the pixels are decoded."""
    check_pixels(*image.size)
    if getattr(image, 'is_animated', False):
        raise ImageError('several frames or pages', 'E_MULTIFRAME')
    if image.format not in FORMATS:
        raise ImageError(f'the format {image.format} is not one of {", ".join(FORMATS)}', 'E_FORMAT')
    if image.mode not in BITS:
        raise ImageError(f'unsupported pixel mode {image.mode}', 'E_BITDEPTH')
    bits = _stored_bits(image, data)
    if bits > 8 and BITS[image.mode] == 8:
        raise ImageError(
            f'{bits} bits per sample with colour or transparency. Store the image as 16-bit grey', 'E_BITDEPTH'
        )
    check_shape(*image.size)
    if image.format == 'JPEG':
        check_scans(data, *image.size)


def _stored_bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per sample in the file, of which Pillow may silently keep only the upper 8."""
    if image.format == 'PNG':
        return data[PNG_BIT_DEPTH]
    if image.format == 'TIFF':
        return max(_tiff_tags(image).get(ExifTags.Base.BitsPerSample, (1,)))
    return 8


def _tiff_tags(image: Image.Image) -> dict:
    return getattr(image, 'tag_v2', {})


def _to_grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Return the upright image in grey, uint8 (h, w), and notes of what was changed."""
    upright, notes = _turn_upright(image)
    # The metadata come from `image`, because turning creates an image without them.
    if BITS[image.mode] > 8:
        grey, more_notes = _grey_from_deep(upright, image)
    else:
        grey, more_notes = _grey_from_8_bits(upright, image)
    return grey, notes + more_notes


def _turn_upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.format != 'TIFF':
        image.load()  # first, because a PNG may store its EXIF data behind the pixels
    try:
        operation = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        operation = None  # unreadable metadata are ignored
    if operation is None:
        return image, []
    note = 'rotated according to its EXIF orientation'
    if image.format == 'TIFF':
        image.load()  # Pillow turns a TIFF when it loads it
        return image, [note]
    return image.transpose(operation), [note]


def _grey_from_8_bits(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    if image.has_transparency_data:
        background = Image.new('RGBA', upright.size, BLACK)
        opaque = Image.alpha_composite(background, upright.convert('RGBA'))
        return np.asarray(opaque.convert('L')), ['transparency replaced by black']
    notes = [] if image.mode in COMMON_MODES else [f'converted from {image.mode} to grey']
    return np.asarray(upright.convert('L')), notes


def _grey_from_deep(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    grey, note = percentile_grey(np.asarray(upright))
    # Pillow inverts a TIFF with WhiteIsZero only at 8 bits.
    if _tiff_tags(image).get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        return 255 - grey, [note, 'inverted, because 0 means white in the file']
    return grey, [note]

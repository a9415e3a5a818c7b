"""Decoding of images, in files of any supported format or in memory, to one grey uint8 array."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.foreign import IS_LFS_POINTER, LFS_POINTER
from cxr_fastai.core.paths import FOREIGN_PATH, is_windows_path
from cxr_fastai.images import dicom
from cxr_fastai.images.arrays import describe_array, grey_pixels
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.formats import FORMATS, name_foreign_format
from cxr_fastai.images.limits import MAX_BYTES, DecodedImage, check_pixels, check_shape
from cxr_fastai.images.pictures import PILLOW_FORMATS, convert_pillow_image, decode_picture

if TYPE_CHECKING:
    from cxr_fastai.images.preprocessing import Preprocessing

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray
"""An image: the path of its file, the contents of its file, an image of Pillow, or an array of grey uint8 pixels."""

Decode = Callable[[Any, 'Preprocessing | None', str, str], DecodedImage]
"""A function like `decode_image`."""

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Suffixes of the files that are searched for in folders."""
MAGIC_NUMBERS = (
    ('JPEG', 0, b'\xff\xd8\xff'),
    ('PNG', 0, b'\x89PNG\r\n'),
    ('TIFF', 0, b'II*\0'),
    ('TIFF', 0, b'MM\0*'),
    ('DICOM', 128, b'DICM'),
)
"""Format, offset and bytes at the beginning of a file."""
MIN_DEVIATION = 2
"""Minimum standard deviation of the grey levels; an image below it shows nothing."""


@dataclass(frozen=True)
class LoadedFile(os.PathLike[str]):
    """An image file that was read already: its `path` and its `contents`, or the error for which it cannot be read."""

    path: Path
    contents: bytes | ImageError = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """Return the contents. Raises `ImageError`."""
        if isinstance(self.contents, ImageError):
            raise self.contents
        return self.contents


def read_image(path: str | os.PathLike, modality: str = '') -> np.ndarray:
    """Read the image `path` at full resolution: grey uint8 (h, w). Raises `ImageError`.

    `modality` has the codes of other DICOM modalities than those of radiographs that are accepted, such as `RG,CT`.
    """
    return open_image(path, modality=modality).pixels


def grey_array(image: bytes | Image.Image | np.ndarray) -> np.ndarray:
    """Convert an image in memory to the grey pixels that its file would give: uint8 (h, w). See `decode_image`."""
    return decode_image(image).pixels


def file_path(image: Any) -> str | None:
    """Return the path of the file `image`, or None if `image` is an image in memory."""
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def open_image(
    image: ImageLike,
    preprocessing: Preprocessing | None = None,
    name: str | None = None,
    decode: Decode | None = None,
    modality: str = '',
) -> DecodedImage:
    """Decode an image: the path of a file, or an image in memory as in `decode_image`.

    A large JPEG is decoded at no more pixels than `preprocessing` needs, if given. Raises `ImageError` with a stable
    code, and with the `name` of the image in its message: by default its path, or `image`. `decode` is the function
    that decodes it, by default `decode_image` in this process; see `DecoderPool.decode`. `modality` has the codes of
    DICOM modalities that are accepted besides those of `preprocessing`.
    """
    path = file_path(image)
    suffix = Path(path or '').suffix.lower()
    try:
        data: Any = image
        if path is not None:
            data = read_bytes(image if isinstance(image, LoadedFile) else path)
        decode = decode or decode_image
        decoded = decode(data, preprocessing, suffix, modality)
    except ImageError as error:
        raise error.with_path(name or path or 'image') from error.__cause__
    if suffix in SUFFIXES and suffix not in FORMATS[decoded.format]:
        return replace(decoded, notes=(*decoded.notes, f'the file is {decoded.format} despite its suffix {suffix}'))
    return decoded


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return the contents of the image file `path`, or those of a `LoadedFile`.

    Raises `ImageError`, without the path in its message, if it is not a regular file, too large or not readable.
    """
    if isinstance(path, LoadedFile):
        return path.read()
    try:
        check_file(os.stat(path))  # first, because opening a pipe would wait forever
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(f'{reason}: {FOREIGN_PATH}' if is_windows_path(os.fspath(path)) else reason, 'E_IO') from error
    except ValueError:  # for example a NUL character
        raise ImageError('not a valid file name', 'E_IO') from None


def check_file(status: os.stat_result) -> None:
    """Raise `ImageError` if the file with this `status` is not a regular one, or too large."""
    if not stat.S_ISREG(status.st_mode):
        raise ImageError('not a regular file', 'E_NOT_REGULAR')
    _check_bytes(status.st_size)


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f'{size:,} bytes are over {MAX_BYTES:,}', 'E_TOO_LARGE')


def sniff(data: bytes) -> str:
    """Return the format of a file by its first bytes: `JPEG`, `PNG`, `TIFF`, `DICOM`, or `?`."""
    for name, offset, magic in MAGIC_NUMBERS:
        if data.startswith(magic, offset):
            return name
    return '?'


def decode_image(
    image: bytes | Image.Image | np.ndarray,
    preprocessing: Preprocessing | None = None,
    suffix: str = '',
    modality: str = '',
) -> DecodedImage:
    """Decode an image in memory. Raises `ImageError` with a stable code, without a path in its message.

    The bytes of a file are decoded as the file is; `suffix` is that of its name, which only improves the error message
    of damaged files. DICOM files of other modalities than CR, DX and DR are rejected unless `preprocessing` or
    `modality` accept them. An image of Pillow gives the pixels of its file: its EXIF orientation is applied,
    transparency becomes black, and deep images are windowed. It is always decoded at full size, even if `preprocessing`
    would reduce the file. An array must contain the grey levels themselves: uint8 (h, w), (h, w, 1), or (h, w, 3) with
    equal channels. Everything else has the code `E_ARRAY` (arrays and tensors) or `E_TYPE`.

    If you rotate an image of Pillow, apply its EXIF orientation before with `PIL.ImageOps.exif_transpose`, which also
    removes it. fastai's `PILImage.create` converts to RGB, which makes an image of 16 bits white: pass its path.
    """
    decoded = _decode(image, preprocessing, suffix, modality)
    check_shape(decoded.width, decoded.height)
    if _deviation(decoded.pixels) < MIN_DEVIATION:
        raise ImageError('the image is blank: all pixels are nearly alike', 'E_BLANK')
    return decoded


def _decode(image: Any, preprocessing: Preprocessing | None, suffix: str, modality: str) -> DecodedImage:
    """Decode any image in memory, without the checks that all of them need."""
    if isinstance(image, bytes | bytearray | memoryview):
        _check_bytes(memoryview(image).nbytes)
        return _decode_file(bytes(image), preprocessing, suffix, modality)
    if isinstance(image, Image.Image):
        return convert_pillow_image(image)
    if isinstance(image, np.ndarray):
        pixels = grey_pixels(image)
        height, width = pixels.shape
        check_pixels(width, height)
        return DecodedImage(pixels, 'array', str(image.dtype), 8, width, height)
    if hasattr(image, 'dtype') and hasattr(image, 'shape'):
        raise ImageError(
            f'{describe_array(image)}: only NumPy arrays are read. Convert it to one of uint8 (h, w).', 'E_ARRAY'
        )
    raise ImageError(
        f'{type(image).__name__}: not an image. Pass a path, an image of Pillow, a uint8 array (h, w), or the bytes of '
        'a file.',
        'E_TYPE',
    )


def _decode_file(data: bytes, preprocessing: Preprocessing | None, suffix: str, modality: str) -> DecodedImage:
    if not data:
        raise ImageError('the file is empty', 'E_EMPTY')
    if dicom.is_dicom(data, suffix):
        modalities = parse_modalities(modality)
        if preprocessing:
            modalities += parse_modalities(preprocessing.modality)
        return dicom.read_dicom(data, modalities)
    _check_format(data)
    return decode_picture(data, preprocessing)


def _check_format(data: bytes) -> None:
    """Raise `ImageError`, which names the format, if the file that contains `data` is of another known format."""
    if data.startswith(LFS_POINTER):
        raise ImageError(f'{IS_LFS_POINTER}', 'E_FORMAT')
    name = name_foreign_format(data)
    if name and name not in PILLOW_FORMATS:
        raise ImageError(f'the format {name} is not one of {", ".join(FORMATS)}', 'E_FORMAT')


def _deviation(pixels: np.ndarray) -> float:
    """Return the standard deviation of uint8 `pixels` from their histogram, which is much faster than NumPy's."""
    counts = np.array(Image.fromarray(pixels).histogram())
    levels = np.arange(256)
    mean = counts @ levels / pixels.size
    return math.sqrt(counts @ (levels - mean) ** 2 / pixels.size)

"""Decoding of images, in files of any supported format or in memory, to one grey uint8 array."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from cxr_fastai.core.errors import ImageError, first_line
from cxr_fastai.core.foreign import IS_LFS_POINTER, LFS_POINTER
from cxr_fastai.core.paths import FOREIGN_PATH, is_windows_path
from cxr_fastai.images import dicom
from cxr_fastai.images.arrays import describe_array, grey_pixels
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.formats import name_foreign_format
from cxr_fastai.images.headers import check_metadata
from cxr_fastai.images.jpeg_header import check_scans
from cxr_fastai.images.limits import MAX_BYTES, MAX_PIXELS, DecodedImage, check_pixels, check_shape
from cxr_fastai.images.tiff_header import check_exif
from cxr_fastai.images.windowing import percentile_grey

if TYPE_CHECKING:
    from cxr_fastai.images.preprocessing import Preprocessing

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray
"""An image: the path of its file, the contents of its file, an image of Pillow, or an array of grey uint8 pixels."""

Decode = Callable[[Any, 'Preprocessing | None', str, str], DecodedImage]
"""A function like `decode_image`."""

FORMATS = {'JPEG': ('.jpeg', '.jpg'), 'PNG': ('.png',), 'TIFF': ('.tiff', '.tif'), 'DICOM': dicom.SUFFIXES}
"""Supported format to its usual suffixes. The content of a file decides, not its name."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Suffixes of the files that are searched for in folders."""
PILLOW_FORMATS = ('JPEG', 'PNG', 'TIFF', 'GIF')
"""Formats that Pillow may open. GIF only serves to give animations a clear error."""
GIF_BYTES = 1_000_000
"""Number of bytes of a GIF file that are read, to tell an animation from an image. Both are refused."""
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
PNG_16_BITS = ';16B'
"""End of the name by which Pillow describes the pixels of a PNG file with 16 bits per sample."""
WHITE_IS_ZERO = 0
"""Value of the TIFF tag PhotometricInterpretation."""
UNSIGNED = 1
SIGNED = 2
"""Values of the TIFF tag SampleFormat. Pillow takes signed levels of 8 bits to be unsigned, and unsigned ones of 32
bits to be signed."""
SIGN_BIT = np.uint8(128)
BLACK = (0, 0, 0, 255)
MIN_DEVIATION = 2
"""Minimum standard deviation of the grey levels; an image below it shows nothing."""
LOADING = Lock()
"""Pillow reads the file of an image when its pixels are needed, and two threads may have the same image to convert."""


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
        data: Any = image if path is None else read_bytes(path)
        decode = decode or decode_image
        decoded = decode(data, preprocessing, suffix, modality)
    except ImageError as error:
        raise error.with_path(name or path or 'image') from error.__cause__
    if suffix in SUFFIXES and suffix not in FORMATS[decoded.format]:
        return replace(decoded, notes=(*decoded.notes, f'the file is {decoded.format} despite its suffix {suffix}'))
    return decoded


def read_bytes(path: str | Path) -> bytes:
    """Return the contents of the image file `path`.

    Raises `ImageError`, without the path in its message, if it is not a regular file, too large or not readable.
    """
    try:
        # The status comes first, because opening a pipe would wait forever.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError('not a regular file', 'E_NOT_REGULAR')
        _check_bytes(status.st_size)
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(f'{reason}: {FOREIGN_PATH}' if is_windows_path(path) else reason, 'E_IO') from error
    except ValueError:  # for example a NUL character
        raise ImageError('not a valid file name', 'E_IO') from None


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
    of damaged files. DICOM files of other modalities than CR, DX and DR are refused unless `preprocessing` or
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
        return _convert_pillow_image(image)
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
    return _decode_picture(data, preprocessing)


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


def _decode_picture(data: bytes, preprocessing: Preprocessing | None) -> DecodedImage:
    """Decode any format but DICOM."""
    check_metadata(data)
    if data.startswith(b'GIF8'):
        data = data[:GIF_BYTES]
    with _pillow_errors(), Image.open(BytesIO(data), formats=PILLOW_FORMATS) as image:
        _check_header(image)
        if image.format not in FORMATS:
            raise ImageError(f'the format {image.format} is not one of {", ".join(FORMATS)}', 'E_FORMAT')
        width, height = image.size
        check_shape(width, height)
        if image.format == 'JPEG':
            check_scans(data, width, height)
            if preprocessing:
                image.draft('L', preprocessing.decode_size(width, height))
        return _convert(image, str(image.format), width, height)


def _convert_pillow_image(image: Image.Image) -> DecodedImage:
    """Convert an image that the user opened or created. Its format may be any, because it is not ours to open."""
    with _pillow_errors():
        _check_header(image)
        width, height = image.size
        check_shape(width, height)
        with LOADING:
            _check_open(image)
            return _convert(image, image.format or 'PIL', width, height)


def _check_open(image: Image.Image) -> None:
    """Raise `ImageError` if the file of `image` was closed before its pixels were read."""
    needs_file = bool(getattr(image, 'tile', ()))
    if needs_file and getattr(image, 'fp', None) is None:
        raise ImageError('the image was closed before its pixels were read. Call image.load() before', 'E_IO')


def _convert(image: Image.Image, form: str, width: int, height: int) -> DecodedImage:
    mode = image.mode
    grey, notes = _to_grey(image)
    return DecodedImage(grey, form, mode, BITS[mode], width, height, tuple(notes))


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Raise `ImageError` instead of everything that Pillow may raise within the block."""
    try:
        yield
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
        raise ImageError(f'truncated or damaged: {first_line(error)}', 'E_TRUNCATED') from error


def _check_header(image: Image.Image) -> None:
    """Raise `ImageError` for everything that can be refused before the pixels are decoded."""
    check_pixels(*image.size)
    if getattr(image, 'is_animated', False):
        raise ImageError('several frames or pages', 'E_MULTIFRAME')
    if image.mode not in BITS:
        raise ImageError(f'unsupported pixel mode {image.mode}', 'E_BITDEPTH')
    bits = _stored_bits(image)
    if bits > 8 and BITS[image.mode] == 8:
        raise ImageError(
            f'{bits} bits per sample with colour or transparency. Store the image as 16-bit grey', 'E_BITDEPTH'
        )


def _stored_bits(image: Image.Image) -> int:
    """Return the bits per sample in the file, of which Pillow may silently keep only the upper 8.

    The pixels that are still to be decoded have the name of their layout, such as `RGB;16B`. Once Pillow has decoded
    them, only a TIFF file tells its bits.
    """
    if image.format == 'TIFF':
        return max(_tiff_tags(image).get(ExifTags.Base.BitsPerSample, (1,)))
    layouts = [str(tile.args) for tile in getattr(image, 'tile', ())]
    return 16 if any(layout.endswith(PNG_16_BITS) for layout in layouts) else 8


def _sample_formats(image: Image.Image) -> tuple[int, ...]:
    """Return the TIFF tag SampleFormat of `image`; nothing for other formats."""
    if image.format != 'TIFF':
        return ()
    return tuple(_tiff_tags(image).get(ExifTags.Base.SampleFormat, (UNSIGNED,)))


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
        check_exif(_exif_data(image))
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


def _exif_data(image: Image.Image) -> bytes:
    """Return the EXIF data of `image` as its file stores them: in a part of its own, or in hexadecimal in a PNG."""
    data = image.info.get('exif')
    profile = image.info.get('Raw profile type exif')
    if data is None and profile:
        return bytes.fromhex(''.join(profile.split('\n')[3:]))
    return data or b''


def _grey_from_8_bits(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    if image.has_transparency_data:
        background = Image.new('RGBA', upright.size, BLACK)
        opaque = Image.alpha_composite(background, upright.convert('RGBA'))
        return np.asarray(opaque.convert('L')), ['transparency replaced by black']
    if SIGNED in _sample_formats(image):
        return np.asarray(upright.convert('L')) ^ SIGN_BIT, ['signed levels, of which -128 is black']
    notes = [] if image.mode in COMMON_MODES else [f'converted from {image.mode} to grey']
    return np.asarray(upright.convert('L')), notes


def _grey_from_deep(upright: Image.Image, image: Image.Image) -> tuple[np.ndarray, list[str]]:
    levels = np.asarray(upright)
    if levels.dtype == np.int32 and UNSIGNED in _sample_formats(image):
        levels = levels.view(np.uint32)
    grey, note = percentile_grey(levels)
    # Pillow inverts a TIFF with WhiteIsZero only at 8 bits.
    if _tiff_tags(image).get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        return 255 - grey, [note, 'inverted, because 0 means white in the file']
    return grey, [note]

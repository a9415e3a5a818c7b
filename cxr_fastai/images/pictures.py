"""Decoding of JPEG, PNG and TIFF files, and of images of Pillow, to one grey uint8 array."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from cxr_fastai.core.errors import ImageError, first_line
from cxr_fastai.images.formats import FORMATS
from cxr_fastai.images.headers import check_metadata
from cxr_fastai.images.jpeg_header import check_scans
from cxr_fastai.images.limits import MAX_PIXELS, DecodedImage, check_pixels, check_shape
from cxr_fastai.images.tiff_header import check_exif
from cxr_fastai.images.windowing import percentile_grey

if TYPE_CHECKING:
    from cxr_fastai.images.preprocessing import Preprocessing

PILLOW_FORMATS = ('JPEG', 'PNG', 'TIFF', 'GIF')
"""Formats that Pillow may open. GIF only serves to give animations a clear error."""
GIF_BYTES = 1_000_000
"""Number of bytes of a GIF file that are read, to tell an animation from an image. Neither is read."""
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
TIFF_STARTS = (b'II*\0', b'MM\0*')
LOADING = Lock()
"""Pillow reads the file of an image when its pixels are needed, and two threads may have the same image to convert."""


def decode_picture(data: bytes, preprocessing: Preprocessing | None) -> DecodedImage:
    """Decode any format but DICOM."""
    check_metadata(data)
    if data.startswith(b'GIF8'):
        data = data[:GIF_BYTES]
    with _pillow_errors(data), Image.open(BytesIO(data), formats=PILLOW_FORMATS) as image:
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


def convert_pillow_image(image: Image.Image) -> DecodedImage:
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


def _describe_unknown(data: bytes) -> str:
    """Return why Pillow does not know the file that contains `data`."""
    if data[:4] in TIFF_STARTS:
        return 'this kind of TIFF file is not read. Save the image with 8 or 16 bits, or with floats of 32 bits'
    return f'the format is not one of {", ".join(FORMATS)}'


@contextmanager
def _pillow_errors(data: bytes = b'') -> Iterator[None]:
    """Raise `ImageError` instead of everything that Pillow may raise within the block. `data` are those of the file."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(_describe_unknown(data), 'E_FORMAT') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f'over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE') from None
    # Pillow's decoders raise SyntaxError, ValueError and others; none of them may end a batch.
    except Exception as error:
        if 'too large' in str(error).lower():
            raise ImageError(f'{error}', 'E_TOO_LARGE') from error
        raise ImageError(f'truncated or damaged: {first_line(error)}', 'E_TRUNCATED') from error


def _check_header(image: Image.Image) -> None:
    """Raise `ImageError` for everything that can be found before the pixels are decoded."""
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

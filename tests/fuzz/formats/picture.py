"""JPEG, PNG, TIFF and GIF files through the decoder of images."""

import warnings

from imagefiles import DEEP, GREY, encoded, png_with
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image

DEADLINE = 5


def seeds() -> list[bytes]:
    """Return valid files of each format, with and without EXIF data."""
    exif = Image.Exif()
    exif[0x112] = 6
    jpegs = [encoded(GREY, 'JPEG', exif=exif), encoded(GREY, 'JPEG', progressive=True)]
    pngs = [encoded(GREY, exif=exif), encoded(DEEP), png_with((b'tEXt', b'a\0b'))]
    jpegs.append(encoded(GREY, 'JPEG', exif=exif, comment=b'\xff\xda' * 20, icc_profile=bytes(300)))
    tiffs = [encoded(GREY, 'TIFF', compression='jpeg'), encoded(DEEP, 'TIFF', big_tiff=True)]
    tiffs += [encoded(DEEP, 'TIFF'), encoded(GREY, 'TIFF', compression='tiff_lzw'), encoded(GREY, 'TIFF', exif=exif)]
    return [*jpegs, *pngs, *tiffs, encoded(GREY, 'GIF')]


def check(data: bytes) -> None:
    """Decode a file; an image, or an `ImageError` of one line, is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            decode_image(data)
        except ImageError as error:
            assert '\n' not in str(error)

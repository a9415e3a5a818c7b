"""Decoding of the stored pixels of DICOM files, whatever package decodes their transfer syntax."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.dicom_frames import (
    ENCAPSULATED,
    JPEG_EXTENDED,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    check_frame,
    unpack_encapsulated,
    unpack_rle,
)

if TYPE_CHECKING:
    from pydicom import Dataset

PACKAGES = {
    JPEG_EXTENDED: 'pylibjpeg pylibjpeg-libjpeg',
    **dict.fromkeys(JPEG_LOSSLESS, 'python-gdcm'),
    **dict.fromkeys(JPEG_LS, 'pyjpegls'),
    '1.2.840.10008.1.2.4.201': 'pylibjpeg pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.202': 'pylibjpeg pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.203': 'pylibjpeg pylibjpeg-openjpeg',
}
"""Transfer syntax to the packages that decode it, if pydicom and Pillow do not: 12-bit and lossless JPEG, JPEG-LS, and
high-throughput JPEG 2000. pydicom decodes no other compressed syntax with any package, such as MPEG, JPEG XL and the
retired processes of JPEG."""
DECODER_OF_12_BITS = 'pylibjpeg'
"""The only decoder of pydicom for JPEG Extended with 12 bits."""
UNDECODABLE = 'PixelData cannot be decoded: it is damaged, or its decoder does not support it'
AS_STORED: Any = {'as_rgb': False}
"""Option of pydicom's decoders: YBR stays. Conversion to RGB takes a gigabyte for 40 megapixels."""


def decode_pixels(image: Dataset) -> np.ndarray:
    """Return the stored pixels (h, w), or (h, w, 3) in RGB, or the grey channel (h, w) of YBR.

    Raises `ImageError` E_DICOM_SYNTAX if no installed package decodes them, and E_DICOM_CORRUPT.
    """
    from pydicom.pixels import get_decoder

    syntax = image.file_meta.TransferSyntaxUID
    if syntax == ENCAPSULATED:
        unpack_encapsulated(image)
    else:
        _check_syntax(image, syntax)
        if syntax == RLE:
            unpack_rle(image)
        elif syntax.is_encapsulated:
            check_frame(image)
    try:
        pixels, facts = get_decoder(image.file_meta.TransferSyntaxUID).as_array(image, **AS_STORED)
    except Exception as error:  # of any decoder, with a message that may quote the file
        raise ImageError(UNDECODABLE, 'E_DICOM_CORRUPT') from error
    if str(facts['photometric_interpretation']).startswith('YBR_FULL'):  # the first channel is grey already
        pixels = np.ascontiguousarray(pixels[..., 0])
    return keep_stored_bits(pixels, image.BitsStored, bool(image.PixelRepresentation))


def _check_syntax(image: Dataset, syntax: Any) -> None:
    """Raise `ImageError` E_DICOM_SYNTAX if no installed package decodes `image`."""
    if _is_supported(image, syntax):
        return
    shown = '(not a valid identifier)'
    if re.fullmatch('[0-9.]+', syntax):
        name = syntax.name.split(',')[0]  # without the details of its compression
        shown = f'{syntax} ({name})' if name != syntax else syntax
    packages = PACKAGES.get(str(syntax))
    if packages:
        raise ImageError(f'transfer syntax {shown}: to read it, pip install {packages}', 'E_DICOM_SYNTAX')
    raise ImageError(
        f'transfer syntax {shown}: no Python package reads it here. Export the image uncompressed from its archive',
        'E_DICOM_SYNTAX',
    )


def _is_supported(image: Dataset, syntax: Any) -> bool:
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return False
    if syntax == JPEG_EXTENDED and image.BitsStored > 8:
        return DECODER_OF_12_BITS in decoder.available_plugins
    return decoder.is_available


def keep_stored_bits(pixels: np.ndarray, bits: int, is_signed: bool) -> np.ndarray:
    """Return `pixels` without what the file stores beyond its `bits` (PS3.5, 8.1.1), such as overlays of old devices.

    Decoders differ in what they do about those bits, so this comes after each of them. The highest of the `bits` is the
    sign if the pixels are signed. Values that are all in the range of so many signed or unsigned bits are returned as
    they are: decoders know the sign of a compressed picture (PS3.5, 8.2.4), and no such value comes from other bits.
    """
    unused = 8 * pixels.itemsize - bits
    lowest = -(1 << bits - 1) if is_signed else 0
    if unused <= 0 or (pixels.min() >= lowest and pixels.max() < 1 << bits):
        return pixels
    kept = pixels.astype(f'{"i" if is_signed else "u"}{pixels.itemsize}')
    np.left_shift(kept, unused, out=kept)
    return np.right_shift(kept, unused, out=kept)

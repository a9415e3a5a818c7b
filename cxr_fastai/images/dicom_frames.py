"""Checks of the compressed pixels in DICOM files, before a decoder works on them, and decoding of simple ones."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.j2k_header import check_j2k, read_j2k_header
from cxr_fastai.images.jpeg_header import (
    JPEG_SIGNATURE,
    CodestreamHeader,
    check_jpeg,
    check_scans,
    read_jpeg_header,
    read_jpegls_header,
)

if TYPE_CHECKING:
    from pydicom import Dataset

RLE = '1.2.840.10008.1.2.5'
JPEG_EXTENDED = '1.2.840.10008.1.2.4.51'
JPEG_LOSSLESS = ('1.2.840.10008.1.2.4.57', '1.2.840.10008.1.2.4.70')
ENCAPSULATED = '1.2.840.10008.1.2.1.98'
"""Transfer syntax of pixels that are packed like compressed ones, but not compressed."""
JPEG_LS = ('1.2.840.10008.1.2.4.80', '1.2.840.10008.1.2.4.81')
RLE_HEADER = struct.Struct('<16I')
"""The number of segments, and up to 15 offsets of segments."""
MAX_FRAGMENTS = 20_000
"""Maximum number of fragments of the compressed picture."""
FRAGMENT = struct.Struct('<HHI')
"""The start of a fragment: its tag and its length."""


def read_frame(image: Dataset) -> bytes:
    """Return the only compressed picture of `image`. Raises `ImageError` E_DICOM_CORRUPT for too many fragments."""
    from pydicom.encaps import get_frame

    _check_fragments(image.PixelData)
    return get_frame(image.PixelData, 0, number_of_frames=1)


def _check_fragments(data: bytes) -> None:
    position = 0
    count = 0
    while position + FRAGMENT.size <= len(data):
        _, _, length = FRAGMENT.unpack_from(data, position)
        position += FRAGMENT.size + length
        count += 1
        if count > MAX_FRAGMENTS:
            raise ImageError(f'more than {MAX_FRAGMENTS:,} fragments', 'E_DICOM_CORRUPT')


def check_frame(image: Dataset) -> None:
    """Raise `ImageError` if the compressed picture is not what the file declares, or would take long to decode.

    `image` is compressed as JPEG, JPEG 2000 or JPEG-LS.
    """
    frame = read_frame(image)
    if image.file_meta.TransferSyntaxUID in JPEG_LS:
        _compare(read_jpegls_header(frame), image)
    elif frame.startswith(JPEG_SIGNATURE):
        check_jpeg(frame)
        _compare(read_jpeg_header(frame), image)
        check_scans(frame, image.Columns, image.Rows)
    else:
        _compare(read_j2k_header(frame), image)
        check_j2k(frame)


def _compare(header: CodestreamHeader, image: Dataset) -> None:
    """Raise `ImageError` unless the `header` of a codestream agrees with the elements of `image`."""
    if (header.width, header.height) != (image.Columns, image.Rows):
        raise ImageError('the picture is not of the size that the file declares', 'E_DICOM_CORRUPT')
    if header.components != image.SamplesPerPixel:
        raise ImageError('the picture has other components than the file declares', 'E_DICOM_CORRUPT')
    if header.bits > image.BitsAllocated:
        raise ImageError('the picture is deeper than the file declares', 'E_DICOM_CORRUPT')


def unpack_rle(image: Dataset) -> None:
    """Replace the RLE pixels of `image` by plain ones. Raises `ImageError` E_DICOM_CORRUPT.

    A segment has one byte of each pixel, the most significant first, in the coding PackBits.
    """
    from pydicom.uid import ExplicitVRLittleEndian

    frame = read_frame(image)
    depth = image.BitsAllocated // 8
    n_pixels = image.Rows * image.Columns
    count, *offsets = RLE_HEADER.unpack_from(frame)
    if count != image.SamplesPerPixel * depth or count > len(offsets):
        raise ImageError(f'{count} RLE segments do not fit the pixels', 'E_DICOM_CORRUPT')
    ends = [*offsets[1:count], len(frame)]
    planes = np.empty((image.SamplesPerPixel, n_pixels, depth), np.uint8)
    for index in range(count):
        segment = frame[offsets[index] : ends[index]]
        sample, byte = divmod(index, depth)
        planes[sample, :, depth - 1 - byte] = _unpack_segment(segment, n_pixels)
    image.PixelData = planes.tobytes()
    image.PlanarConfiguration = 1
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def unpack_encapsulated(image: Dataset) -> None:
    """Replace the packed pixels of `image`, which are not compressed, by plain ones. Raises `ImageError`."""
    from pydicom.uid import ExplicitVRLittleEndian

    image.PixelData = read_frame(image)
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _unpack_segment(segment: bytes, n_pixels: int) -> np.ndarray:
    """Return the bytes of one segment: uint8 (n_pixels,)."""
    try:
        row = Image.frombytes('L', (n_pixels, 1), segment, 'packbits', 'L')
    except ValueError as error:
        raise ImageError('an RLE segment ends early', 'E_DICOM_CORRUPT') from error
    return np.asarray(row)[0]

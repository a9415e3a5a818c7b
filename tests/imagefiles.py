"""Valid and invalid image files for tests, all generated, as bytes."""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO

import jpeg_ls
import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian as Explicit
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from scipy.ndimage import gaussian_filter

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.headers import check_metadata

PATIENT = 'Doe^Jane'
DEEP = np.uint16(1000 + 3000 * np.linspace(0, 1, 96 * 80).reshape(96, 80))
"""12-bit levels, from 1000 at the top to 4000 at the bottom."""
RAMP = np.rint(255 * np.clip((DEEP - np.percentile(DEEP, 0.5)) / np.ptp(np.percentile(DEEP, [0.5, 99.5])), 0, 1))
"""`DEEP` in the window between its percentiles."""


def within(levels: int, a: np.ndarray, b: np.ndarray) -> bool:
    """Return True if `a` and `b` differ by at most so many grey levels."""
    return np.abs(a.astype(int) - b).max() <= levels


def smooth(h: int, w: int, seed: int = 0) -> np.ndarray:
    """Return a smooth random picture with all levels, grey uint8 (h, w)."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((h, w)), 5)
    return np.uint8(255 * (noise - noise.min()) / np.ptp(noise))


GREY = smooth(96, 80)


def encoded(picture, form='PNG', **options) -> bytes:
    """Return the file of a picture, an array or an image, in the format `form`."""
    buffer = BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return the PNG of `GREY` with more chunks behind its header."""
    png = encoded(GREY)
    return png[:33] + b''.join(_chunk(name, body) for name, body in chunks) + png[33:]


def colour_png(bits: int) -> bytes:
    """Return a colour PNG of 8 or 16 bits per sample."""
    rows = np.repeat(DEEP[..., None], 3, 2).astype('>u2' if bits == 16 else np.uint8)
    packed = b''.join(b'\0' + row.tobytes() for row in rows)
    chunks = (
        (b'IHDR', struct.pack('>IIBBBBB', DEEP.shape[1], DEEP.shape[0], bits, 2, 0, 0, 0)),
        (b'IDAT', zlib.compress(packed)),
        (b'IEND', b''),
    )
    return b'\x89PNG\r\n\x1a\n' + b''.join(_chunk(name, body) for name, body in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def progressive_with(scans: int, size: int) -> bytes:
    """Return a progressive JPEG of `size` x `size` pixels in which a scan of a few bytes is repeated `scans` times."""
    jpeg = encoded(np.zeros((size, size), np.uint8), 'JPEG', progressive=True)
    last_scan = jpeg[jpeg.rindex(b'\xff\xda') : -2]
    return jpeg[:-2] + last_scan * scans + jpeg[-2:]


def dicom(pixels=DEEP, syntax=Explicit, data=None, **tags) -> bytes:
    """Return a 12-bit digital radiograph with a patient's name; `tags` replace or, with None, remove elements."""
    with disable_value_validation():
        return _dicom(pixels, syntax, data, tags)


def _dicom(pixels, syntax, data, tags: dict) -> bytes:
    image = FileDataset('', {}, file_meta=FileMetaDataset(), preamble=b'\0' * 128)
    image.file_meta.TransferSyntaxUID = syntax
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = '1.2.3'
    image.PatientName, image.Modality, image.PhotometricInterpretation = PATIENT, 'DX', 'MONOCHROME2'
    image.Rows, image.Columns, image.SamplesPerPixel = *pixels.shape[:2], 1
    image.BitsAllocated, image.PixelRepresentation = 8 * pixels.itemsize, int(pixels.dtype.kind == 'i')
    image.BitsStored = 12 if pixels.itemsize == 2 else 8
    image.HighBit = image.BitsStored - 1
    for name, value in tags.items():
        if value is None:
            delattr(image, name)
        else:
            setattr(image, name, value)
    image.PixelData = pixels.tobytes() if data is None else data
    image['PixelData'].VR = 'OW' if pixels.itemsize == 2 and data is None else 'OB'
    return _file(image)


def compressed(syntax) -> bytes:
    """Return a digital radiograph of 8 bits (RLE and JPEG-LS: 12) in a compressed transfer syntax."""
    forms = {JPEGBaseline8Bit: ('JPEG', {'quality': 95}), JPEG2000Lossless: ('JPEG2000', {})}
    if syntax in forms:
        form, options = forms[syntax]
        return dicom(GREY, syntax, encapsulate([encoded(GREY, form, **options)]))
    image = dcmread(BytesIO(dicom()))
    image.compress({RLELossless: RLELossless, JPEGLSLossless: JPEGLSLossless}[syntax], generate_instance_uid=False)
    return _file(image)


def recompressed(stored: np.ndarray, syntax: str, **tags) -> bytes:
    """Return a digital radiograph of 12 bits whose decoded pixels are `stored`, uint16, in the transfer syntax."""
    if syntax == JPEG2000Lossless:
        frame = encoded(stored, 'JPEG2000', irreversible=False, no_jp2=True)
    elif syntax == JPEGLSLossless:
        frame = bytes(jpeg_ls.encode_array(stored))
    elif syntax == RLELossless:
        plain = dcmread(BytesIO(dicom(stored, BitsStored=16, HighBit=15)))
        plain.compress(RLELossless, generate_instance_uid=False)
        return dicom(stored, syntax, plain.PixelData, **tags)
    elif syntax == '1.2.840.10008.1.2.1.98':
        frame = stored.tobytes()
    else:
        return dicom(stored, syntax, **tags)
    return dicom(stored, syntax, encapsulate([frame]), **tags)


def with_text(name: str, text: str | None, image: bytes | None = None) -> bytes:
    """Return the DICOM file `image` with an element whose text is written as it is; None removes it."""
    read = dcmread(BytesIO(image or dicom()))
    if name in read:
        del read[name]
    if text is not None:
        value = text.encode('latin-1')
        read.add_new(name, 'OB', value + b' ' * (len(value) % 2))
    file = _incomplete_file(read)
    if text is None:
        return file
    # The element is written as bytes, with a long header, and gets the short header of a text.
    tag = struct.pack('<HH', tag_for_keyword(name) >> 16, tag_for_keyword(name) & 0xFFFF)
    start = file.index(tag + b'OB')
    length = struct.unpack_from('<I', file, start + 8)[0]
    kind = {'NumberOfFrames': b'IS', 'PixelPaddingValue': b'LO'}.get(name, b'DS')
    return file[:start] + tag + kind + struct.pack('<H', length) + file[start + 12 :]


def without(name: str, image: bytes) -> bytes:
    """Return the DICOM file `image` without an element of its dataset or its header."""
    read = dcmread(BytesIO(image))
    part = read.file_meta if name in read.file_meta else read
    del part[name]
    return _incomplete_file(read)


def lut(first: int, values: list[int], bits: int) -> Dataset:
    """Return an item of a VOI or modality LUT sequence."""
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(values), first, bits], values
    item['LUTDescriptor'].VR = item['LUTData'].VR = 'US'
    return item


def _file(image: FileDataset) -> bytes:
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _incomplete_file(image: FileDataset) -> bytes:
    """Write elements that are there, where pydicom's `save_as` insists on those that are required."""
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    buffer.write(b'\0' * 128 + b'DICM')
    write_file_meta_info(buffer, image.file_meta, enforce_standard=False)
    write_dataset(buffer, image)
    return buffer.getvalue()


def error_code(check: Callable[[bytes], object], data: bytes) -> str:
    """Return the code of the error that `check` raises for the file `data`, or `ok`."""
    try:
        check(data)
    except ImageError as error:
        return error.code
    return 'ok'


header_code = partial(error_code, check_metadata)
"""The error code of the header of a picture alone, or `ok`. No pixel is decoded."""

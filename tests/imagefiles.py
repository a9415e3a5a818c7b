"""Image files for tests, good and bad: bytes made on the spot, none taken from anywhere."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian as Explicit
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from scipy.ndimage import gaussian_filter

PATIENT = 'Doe^Jane'
DEEP = np.uint16(1000 + 3000 * np.linspace(0, 1, 96 * 80).reshape(96, 80))
"""12 bits' worth of levels, from 1000 at the top to 4000 at the bottom."""


def smooth(h: int, w: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture, grey uint8 (h, w), over all levels."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((h, w)), 5)
    return np.uint8(255 * (noise - noise.min()) / np.ptp(noise))


GREY = smooth(96, 80)


def encoded(picture, form='PNG', **options) -> bytes:
    """The bytes of a picture (an array or an image) in a file format."""
    buffer = BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, form, **options)
    return buffer.getvalue()


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """The PNG of `GREY` with more chunks behind its header."""
    png = encoded(GREY)
    return png[:33] + b''.join(_chunk(name, body) for name, body in chunks) + png[33:]


def colour_png(bits: int) -> bytes:
    """A PNG in colour of 8 or 16 bits a sample, with levels of 12 bits in the latter."""
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
    """A progressive JPEG of `size` pixels a side, with a scan of a few bytes repeated."""
    jpeg = encoded(np.zeros((size, size), np.uint8), 'JPEG', progressive=True)
    at = [i for i in range(len(jpeg) - 1) if jpeg[i : i + 2] == b'\xff\xda']
    return jpeg[:-2] + jpeg[at[-1] : -2] * scans + jpeg[-2:]


def dicom(pixels=DEEP, syntax=Explicit, data=None, **tags) -> bytes:
    """A digital radiograph of 12 bits in 16, with a patient's name; `tags` change or (None) remove what it says."""
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
    return _written(image)


def compressed(syntax) -> bytes:
    """A digital radiograph of 8 bits (12 in RLE and JPEG-LS) in a compressed transfer syntax."""
    forms = {JPEGBaseline8Bit: ('JPEG', {'quality': 95}), JPEG2000Lossless: ('JPEG2000', {})}
    if syntax in forms:
        form, options = forms[syntax]
        return dicom(GREY, syntax, encapsulate([encoded(GREY, form, **options)]))
    image = dcmread(BytesIO(dicom()))
    image.compress({RLELossless: RLELossless, JPEGLSLossless: JPEGLSLossless}[syntax], generate_instance_uid=False)
    return _written(image)


def without(name: str, image: bytes) -> bytes:
    """The DICOM file `image` without an element of its dataset or, for the transfer syntax, of its header."""
    read = dcmread(BytesIO(image))
    del (read.file_meta if name in read.file_meta else read)[name]
    return _written(read, whole=False)


def lut(first: int, values: list[int], bits: int) -> Dataset:
    """An item of a VOI or modality LUT sequence."""
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(values), first, bits], values
    item['LUTDescriptor'].VR = item['LUTData'].VR = 'US'
    return item


def _written(image, whole: bool = True) -> bytes:
    buffer = BytesIO()
    if whole:
        image.save_as(buffer, enforce_file_format=True)
    else:
        from pydicom.filebase import DicomBytesIO
        from pydicom.filewriter import write_dataset, write_file_meta_info

        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, False
        out.write(b'\0' * 128 + b'DICM')
        write_file_meta_info(out, image.file_meta, enforce_standard=False)
        write_dataset(out, image)
        return out.getvalue()
    return buffer.getvalue()

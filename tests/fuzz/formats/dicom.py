"""DICOM files through the decoder of images: plain, RLE, JPEG, JPEG 2000 and JPEG-LS."""

import random
import struct
import warnings

from imagefiles import compressed, dicom, lut, with_text
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image

DEADLINE = 5
PIECES = (
    struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF),
    struct.pack('<HHI', 0xFFFE, 0xE00D, 0),
    struct.pack('<HHI', 0xFFFE, 0xE0DD, 0),
    struct.pack('<HH2sHI', 0x28, 0x3010, b'SQ', 0, 0xFFFFFFFF),
    struct.pack('<HH2sH', 0x28, 0x1050, b'DS', 6) + b'1\\2\\3 ',
    struct.pack('<HH2sH', 0x28, 0x1053, b'DS', 4) + b'1e99',
    struct.pack('<HH2sHH', 0x28, 0x10, b'US', 2, 65_535),
)


def seeds() -> list[bytes]:
    """Return a valid file of each kind of pixels, and one with a LUT."""
    syntaxes = (RLELossless, JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless)
    window = dicom(WindowCenter=[2500, 1], WindowWidth=[1001, 2], RescaleSlope=2, RescaleIntercept=-100)
    text = with_text('WindowCenter', '[2500,0, 1]', dicom(PixelSpacing=[0.3, 0.2], PresentationLUTShape='INVERSE'))
    return [dicom(), window, text, dicom(VOILUTSequence=[lut(0, [1, 2, 3], 12)]), *map(compressed, syntaxes)]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Insert elements, or change the head of the file, where most bytes have a meaning."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(132, min(len(data), 900))
        if draw.random() < 0.4:
            data = data[:place] + draw.choice(PIECES) * draw.choice((1, 1, 50)) + data[place:]
        else:
            data = data[:place] + draw.randbytes(draw.randint(1, 4)) + data[place + 4 :]
    return data


def check(data: bytes) -> None:
    """Decode a file; an image, or an `ImageError` of one line, is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            decode_image(data, suffix='.dcm')
        except ImageError as error:
            assert '\n' not in str(error)

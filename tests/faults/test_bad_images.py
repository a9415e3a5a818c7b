"""Every kind of bad image file gives its error code and one clear line, quickly and in little memory.

The numbers are those of the project's list of bad inputs, in which files 1 to 53 are images.
"""

import os
import re
import socket
import subprocess
import sys
import types
import zlib
from functools import cache

import numpy as np
import pydicom.pixels
import pytest
from imagefiles import (
    DEEP,
    GREY,
    PATIENT,
    colour_png,
    compressed,
    dicom,
    encoded,
    png_with,
    progressive_with,
    smooth,
    without,
)
from PIL import Image, ImageDraw
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from cxr_fastai.core import environment
from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image, open_image
from cxr_fastai.images.dicom_elements import TAGS, read_elements
from cxr_fastai.images.preprocessing import Preprocessing

OTHER = Image.fromarray(255 - GREY)
CT = '1.2.840.10008.5.1.4.1.1.2'
FRAMES = {'save_all': True, 'append_images': [OTHER]}
PNG, JPEG = encoded(GREY), encoded(GREY, 'JPEG', quality=95)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def blank(level: int) -> bytes:
    pixels = np.full((96, 80), level, np.uint8)
    pixels[::2] ^= 1
    return encoded(pixels)


@cache
def bomb() -> bytes:
    """Return 200 MiB of zeros, compressed."""
    return zlib.compress(bytes(200 << 20), 9)


REFUSED = {
    '1 zero bytes': (b'', 'E_EMPTY', 'the file is empty'),
    '2 text': (b'patient, image', 'E_FORMAT', 'not one of JPEG, PNG, TIFF, DICOM'),
    '2 HTML': (b'<!doctype html><title>404</title>', 'E_FORMAT', 'not one of JPEG'),
    '2 executable': (b'MZ' + bytes(4000), 'E_FORMAT', 'not one of JPEG'),
    '3 truncated JPEG': (JPEG[: len(JPEG) // 2], 'E_TRUNCATED', 'truncated'),
    '4 PNG with a bad CRC': (flipped(PNG, PNG.index(b'IDAT') + 20), 'E_TRUNCATED', 'damaged'),
    '5 PNG with a short IDAT': (PNG[: PNG.index(b'IDAT') + 400], 'E_TRUNCATED', 'truncated'),
    '11 float TIFF without numbers': (
        encoded(np.full((96, 80), np.nan, np.float32), 'TIFF'),
        'E_BLANK',
        'all pixels are NaN',
    ),
    '19 animated GIF': (encoded(Image.fromarray(GREY), 'GIF', **FRAMES), 'E_MULTIFRAME', 'several frames'),
    '19 APNG': (encoded(Image.fromarray(GREY), 'PNG', **FRAMES), 'E_MULTIFRAME', 'several frames'),
    '20 TIFF of two pages': (encoded(Image.fromarray(GREY), 'TIFF', **FRAMES), 'E_MULTIFRAME', 'several frames'),
    '21 one pixel': (encoded(GREY[:1, :1]), 'E_TOO_SMALL', '1x1: a side is under 64 pixels'),
    '21 one line': (encoded(smooth(1, 5000)), 'E_TOO_SMALL', '5000x1: a side is under'),
    '22 a side of 63': (encoded(smooth(63, 200)), 'E_TOO_SMALL', '200x63: a side is under'),
    '22 five times as long': (encoded(smooth(400, 80)), 'E_TOO_SMALL', '80x400: the aspect ratio is over 4'),
    '23 black': (blank(0), 'E_BLANK', 'nearly alike'),
    '23 white': (blank(255), 'E_BLANK', 'nearly alike'),
    '23 constant and deep': (encoded(np.full((96, 80), 3000, np.uint16)), 'E_BLANK', 'all pixels have the value 3000'),
    '24 a bomb of 1 bit': (lambda: encoded(Image.new('1', (20_000, 20_000))), 'E_TOO_LARGE', 'over 40,000,000 pixels'),
    '25 108 megapixels': (lambda: encoded(Image.new('1', (12_000, 9_000))), 'E_TOO_LARGE', 'over 40,000,000 pixels'),
    '25 41 megapixels': (lambda: encoded(Image.new('L', (8_200, 5_000))), 'E_TOO_LARGE', '8200x5000 is over'),
    '26 100,000 text chunks': (lambda: png_with(*[(b'tEXt', b'key\0value')] * 100_000), 'E_TOO_LARGE', '2,000 parts'),
    '26 zTXt bomb': (lambda: png_with((b'zTXt', b'k\0\0' + bomb())), 'E_TOO_LARGE', 'too large'),
    '26 iCCP bomb': (lambda: png_with((b'iCCP', b'k\0\0' + bomb())), 'E_TOO_LARGE', 'too large'),
    '27 EPS': (encoded(GREY, 'EPS'), 'E_FORMAT', 'not one of'),
    '27 PSD': (b'8BPS\0\1' + bytes(2000), 'E_FORMAT', 'not one of'),
    '27 FITS': (b'SIMPLE  =                    T' + b' ' * 2850, 'E_FORMAT', 'not one of'),
    '27 SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'E_FORMAT', 'not one of'),
    '28 JPEG 2000': (encoded(GREY, 'JPEG2000'), 'E_FORMAT', 'not one of'),
    '28 AVIF': (encoded(Image.fromarray(GREY).convert('RGB'), 'AVIF'), 'E_FORMAT', 'not one of'),
    '28 HEIC': (b'\0\0\0\x18ftypheic' + bytes(2000), 'E_FORMAT', 'not one of'),
    '28 GIF': (encoded(GREY, 'GIF'), 'E_FORMAT', 'GIF is not one of'),
    '29 thousands of scans': (lambda: progressive_with(3000, 3000), 'E_TIMEOUT', 'progressive scans of 3000x3000'),
    '29 sixty scans of nine megapixels': (lambda: progressive_with(60, 3000), 'E_TIMEOUT', 'progressive scans'),
    '33 CT slice': (
        dicom(Modality='CT'),
        'E_DICOM_MODALITY',
        'modality CT: only CR, DR, DX are accepted. --modality CT accepts it too',
    ),
    '39 JPEG lossless': (
        dicom(GREY, '1.2.840.10008.1.2.4.70', encapsulate([JPEG])),
        'E_DICOM_SYNTAX',
        r'1\.2\.840\.10008\.1\.2\.4\.70 .*pip install python-gdcm',
    ),
    '39 JPEG of 12 bits': (
        dicom(DEEP, '1.2.840.10008.1.2.4.51', encapsulate([JPEG])),
        'E_DICOM_SYNTAX',
        'pylibjpeg-libjpeg',
    ),
    '39 truncated deflated': (dicom(syntax='1.2.840.10008.1.2.1.99')[:-900], 'E_DICOM_CORRUPT', 'PixelData'),
    '41 frames': (dicom(NumberOfFrames=2), 'E_MULTIFRAME', '2 frames'),
    '42 no pixel data': (without('PixelData', dicom()), 'E_DICOM_NOPIXEL', 'no pixel data'),
    '43 no preamble': (dicom()[132:], 'E_DICOM_CORRUPT', 'no DICM preamble'),
    '43 no transfer syntax': (without('TransferSyntaxUID', dicom()), 'E_DICOM_CORRUPT', 'no transfer syntax'),
    '44 truncated pixels': (dicom()[:-4000], 'E_DICOM_CORRUPT', '11,360 bytes, but 80x96 pixels need 15,360'),
    '45 too many rows': (dicom(Rows=60_000), 'E_DICOM_CORRUPT', 'PixelData has 15,360 bytes'),
    '45 too many rows and columns': (dicom(Rows=60_000, Columns=60_000), 'E_TOO_LARGE', '60000x60000 is over'),
    '46 a billion frames': (dicom(NumberOfFrames=10**9), 'E_MULTIFRAME', '1000000000 frames'),
    '47 13 bits allocated': (dicom(BitsAllocated=13), 'E_DICOM_CORRUPT', 'BitsAllocated 13: not one of'),
    '48 bad VR': (
        dicom().replace(b'\x28\0\x10\0US', b'\x28\0\x10\0ZZ'),
        'E_DICOM_CORRUPT',
        r'Rows \(0028,0010\) is missing or not',
    ),
    '49 report': (without('PixelData', dicom(Modality='SR')), 'E_DICOM_MODALITY', 'modality SR'),
    '49 ultrasound': (dicom(Modality='US'), 'E_DICOM_MODALITY', 'modality US'),
    '49 no modality': (dicom(Modality=None, SOPClassUID=CT), 'E_DICOM_MODALITY', 'modality CT'),
    '49 PDF': (without('PixelData', dicom(Modality='DOC')), 'E_DICOM_MODALITY', 'modality DOC'),
    '49 modality with a name in it': (dicom(Modality='DOE^JANE'), 'E_DICOM_MODALITY', r'modality \(not a valid code\)'),
    '50 secondary capture': (dicom(Modality='OT'), 'E_DICOM_MODALITY', 'modality OT'),
    '50 palette': (dicom(GREY, PhotometricInterpretation='PALETTE COLOR'), 'E_DICOM_MODALITY', 'PALETTE COLOR'),
    'RLE that swells': (dicom(GREY, RLELossless, encapsulate([bytes(90_000)])), 'E_DICOM_CORRUPT', 'bytes of pixels'),
    'JPEG 2000 of another size': (
        dicom(GREY, JPEG2000Lossless, encapsulate([encoded(smooth(300, 300), 'JPEG2000')])),
        'E_DICOM_CORRUPT',
        'not of the size that the file declares',
    ),
    'scans in DICOM': (
        lambda: dicom(np.zeros((3000, 3000), np.uint8), JPEGBaseline8Bit, encapsulate([progressive_with(60, 3000)])),
        'E_TIMEOUT',
        'scans of 3000x3000',
    ),
    'bits that end elsewhere': (dicom(DEEP << 4, HighBit=15), 'E_BITDEPTH', '12 bits that end at bit 15'),
    '16-bit colour PNG': (colour_png(16), 'E_BITDEPTH', '16 bits per sample with colour'),
}


def picture(draw) -> bytes:
    image = Image.new('RGB', (256, 256), 'white')
    draw(ImageDraw.Draw(image))
    return encoded(image, 'JPEG', quality=90)


ROTATED = Image.Exif()
ROTATED[0x112] = 6
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
# Files that can be read. The input gate, not the decoder, detects images that are not chest X-rays.
READ = {
    '6 PNG named .jpg': (PNG, 'the file is PNG despite its suffix .jpg'),
    '7 JPEG and HTML': (JPEG + b'<html><script>alert(1)</script></html>', None),
    '8 16-bit PNG': (encoded(np.uint16(DEEP * 16)), 'window 162.. to 637.*0.5% to 99.5% of the pixels'),
    '9 12 bits in 16': (encoded(DEEP), 'window 1014 to 3985'),
    '10 int32 TIFF': (encoded(np.int32(DEEP), 'TIFF'), 'window 1014 to 3985'),
    '11 float TIFF': (encoded(np.float32(DEEP) / 4000, 'TIFF'), 'window 0.2535'),
    '12 RGBA': (encoded(OTHER.convert('RGBA')), 'transparency replaced by black'),
    '13 LA': (encoded(OTHER.convert('LA')), 'transparency replaced by black'),
    '14 palette': (encoded(OTHER.convert('P')), 'converted from P to grey'),
    '15 1 bit': (encoded(OTHER.convert('1')), 'converted from 1 to grey'),
    '16 CMYK JPEG': (encoded(OTHER.convert('CMYK'), 'JPEG'), 'converted from CMYK to grey'),
    '17 colour photograph': (encoded(Image.fromarray(NOISE).resize((400, 300)), 'JPEG'), None),
    '18 EXIF orientation': (encoded(GREY, 'JPEG', exif=ROTATED), 'rotated according to its EXIF orientation'),
    '30 negative': (encoded(255 - GREY), None),
    '31 upside down': (encoded(GREY[::-1, ::-1]), None),
    '32 lateral view': (dicom(ViewPosition='LL'), 'window'),
    '34 some other picture': (encoded(smooth(200, 150, seed=1)), None),
    '35 text page': (picture(lambda draw: draw.text((20, 20), 'Discharge letter', fill=0, font_size=28)), None),
    '35 noise': (encoded(NOISE), None),
    '38 MONOCHROME1': (dicom(PhotometricInterpretation='MONOCHROME1'), r'inverted \(MONOCHROME1\)'),
    '40 JPEG baseline': (compressed(JPEGBaseline8Bit), None),
    '40 JPEG 2000': (compressed(JPEG2000Lossless), None),
    '40 RLE': (compressed(RLELossless), 'window'),
    '40 JPEG-LS': (compressed(JPEGLSLossless), 'window'),
    '50 RGB': (
        dicom(
            np.repeat(GREY[..., None], 3, 2), SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0
        ),
        'converted from colour to grey',
    ),
    '51 no window': (dicom(), 'window 1014 to 3985, 0.5% to 99.5% of the pixels'),
    '52 absurd window': (dicom(WindowCenter=2000, WindowWidth=0), 'window 1014 to 3985'),
    '53 burned-in annotation': (dicom(BurnedInAnnotation='YES'), 'may identify the patient'),
}


@pytest.mark.parametrize('kind', REFUSED)
@pytest.mark.filterwarnings('ignore:Invalid value:UserWarning')
def test_a_bad_image_gives_its_error_code_and_path(tmp_path, kind):
    data, code, reason = REFUSED[kind]
    path = tmp_path / 'image.jpg'
    path.write_bytes(data() if callable(data) else data)  # large files are generated only when they are needed
    for preprocessing in (None, Preprocessing(64)):
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(path, preprocessing)
        message = str(caught.value)
        assert caught.value.code == code and message.startswith(f'{path}: {code}: ')
        assert '\n' not in message and PATIENT not in message and len(message.replace(str(path), '')) < 180


@pytest.mark.parametrize('kind', READ)
def test_an_unusual_image_is_read_and_every_change_is_noted(tmp_path, kind):
    data, note = READ[kind]
    (tmp_path / 'image.jpg').write_bytes(data)
    image = open_image(tmp_path / 'image.jpg')
    notes = [text for text in image.notes if 'despite its suffix' not in text or kind.startswith('6')]
    assert image.pixels.dtype == np.uint8 and image.pixels.ndim == 2 and image.pixels.std() > 2
    if note is None:
        assert not notes
    else:
        assert any(re.search(note, text) for text in notes)
    assert image.burned_in == kind.startswith('53') and PATIENT not in repr(image)


def test_pipes_sockets_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / 'socket'))
    for path in (tmp_path / 'pipe', tmp_path / 'socket', tmp_path / 'folder', '/dev/zero'):
        with pytest.raises(ImageError, match='not a regular file') as caught:
            open_image(path)
        assert caught.value.code == 'E_NOT_REGULAR'


def test_errors_about_a_missing_file_name_it(tmp_path):
    with pytest.raises(ImageError, match=r'gone.png: E_IO: No such file') as caught:
        open_image(tmp_path / 'gone.png')
    assert caught.value.code == 'E_IO'


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / 'huge.png', 'wb') as file:
        file.truncate(400_000_001)
    with pytest.raises(ImageError, match='bytes are over') as caught:
        open_image(tmp_path / 'huge.png')
    assert caught.value.code == 'E_TOO_LARGE'


def test_names_and_dates_of_patients_are_not_parsed():
    assert not {'PatientName', 'PatientID', 'PatientBirthDate', 'StudyDate', 'SOPInstanceUID'} & set(TAGS)
    assert PATIENT not in str(read_elements(dicom()))


def test_a_missing_pydicom_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    (tmp_path / 'a.dcm').write_bytes(dicom())
    with pytest.raises(ImageError, match=r'pip install "cxr_fastai\[dicom\]"') as caught:
        open_image(tmp_path / 'a.dcm')
    assert caught.value.code == 'E_DICOM_SYNTAX'


def test_a_missing_decoder_of_a_transfer_syntax_is_named(monkeypatch, tmp_path):
    (tmp_path / 'a.dcm').write_bytes(compressed(JPEGLSLossless))
    monkeypatch.setattr(pydicom.pixels, 'get_decoder', lambda syntax: types.SimpleNamespace(is_available=False))
    with pytest.raises(ImageError, match=r'E_DICOM_SYNTAX: .*1.2.840.10008.1.2.4.80 .*pip install pyjpegls'):
        open_image(tmp_path / 'a.dcm')


@pytest.mark.parametrize('mode', ['RGB', pytest.param('L', marks=pytest.mark.slow)])
def test_progressive_images_of_usual_encoders_are_read(mode):
    large = Image.fromarray(smooth(2500, 3000)).convert(mode)
    assert decode_image(encoded(large, 'JPEG', progressive=True)).pixels.shape == (2500, 3000)


LARGEST = {
    '16-bit PNG': lambda ramp: encoded(ramp, compress_level=1),
    'float TIFF': lambda ramp: encoded(np.float32(ramp), 'TIFF'),
    'int32 TIFF': lambda ramp: encoded(np.int32(ramp) * 9000, 'TIFF'),
    'RGBA': lambda ramp: encoded(Image.fromarray(np.uint8(ramp >> 8)).convert('RGBA'), compress_level=1),
    'DICOM': lambda ramp: dicom(ramp >> 4),
    'colour': lambda ramp: encoded(Image.fromarray(np.uint8(ramp >> 8)).convert('RGB'), 'JPEG', progressive=True),
}
PEAKS = """
import re, sys
from cxr_fastai.images.preprocessing import Preprocessing
for path in sys.argv[1:]:
    Preprocessing().load(path)
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
"""A program that prints its peak memory in KiB after each image."""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs the memory usage in /proc: run it on Linux')
@pytest.mark.parametrize('shape', [(2000, 3200), pytest.param((5000, 8000), marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', LARGEST)
def test_an_image_of_40_megapixels_takes_less_than_a_gigabyte(tmp_path, kind, shape):
    for name, (h, w) in (('small', (100, 160)), ('large', shape)):
        ramp = np.uint16(64000 // w * np.broadcast_to(np.arange(w), (h, w)))
        (tmp_path / name).write_bytes(LARGEST[kind](ramp))
    done = subprocess.run(
        [sys.executable, '-c', PEAKS, tmp_path / 'small', tmp_path / 'large'],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = map(int, done.stdout.split())
    assert peak - before < (1_000_000 - before) * h * w / 40e6

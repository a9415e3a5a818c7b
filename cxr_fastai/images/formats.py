"""The file formats that are read, names of others, and the mark by which pictures of this package are recognised."""

from __future__ import annotations

import re

from PIL.PngImagePlugin import PngInfo

from cxr_fastai.core.files import SOFTWARE
from cxr_fastai.images.dicom import SUFFIXES as DICOM_SUFFIXES

FORMATS = {'JPEG': ('.jpeg', '.jpg'), 'PNG': ('.png',), 'TIFF': ('.tiff', '.tif'), 'DICOM': DICOM_SUFFIXES}
"""Supported format to its usual suffixes. The content of a file decides, not its name."""
FOREIGN_FORMATS = (
    ('WebP', rb'RIFF.{4}WEBP'),
    ('BMP', rb'BM.{4}\0{4}'),
    ('GIF', rb'GIF8[79]a'),
    ('JPEG 2000', rb'\0{3}\x0cjP  |\xff\x4f\xff\x51'),
    ('JPEG XL', rb'\0{3}\x0cJXL |\xff\x0a'),
    ('AVIF', rb'.{4}ftypavi[fs]'),
    ('HEIC', rb'.{4}ftyp(he[iv][cxms]|mif1|msf1)'),
    ('PSD', rb'8BPS'),
    ('FITS', rb'SIMPLE  ='),
    ('NIfTI', rb'.{344}n[+i]1\0'),
    ('NRRD', rb'NRRD000'),
    ('NumPy', rb'\x93NUMPY'),
    ('HDF5', rb'\x89HDF\r\n'),
    ('Parquet', rb'PAR1'),
    ('PDF', rb'%PDF-'),
    ('spreadsheet', rb'PK\x03\x04.{26}(\[Content_Types\]|_rels/|xl/|docProps/|mimetypeapplication/vnd\.oasis)'),
    ('spreadsheet', rb'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1'),
    ('ZIP', rb'PK\x03\x04|PK\x05\x06'),
    ('gzip', rb'\x1f\x8b\x08'),
    ('7z', rb'7z\xbc\xaf\x27\x1c'),
    ('RAR', rb'Rar!\x1a\x07'),
)
"""Name of a format that is not read, and how its files start."""
SPREADSHEET = 'spreadsheet'
ARCHIVES = ('ZIP', 'gzip', '7z', 'RAR')
HEAD_BYTES = 352
"""Bytes at the start of a file that are enough to recognise its format."""
FIGURES = 'maps or figures of cxr_fastai'
MASKS = 'masks'
"""What pictures that this package drew are."""
MARKS = ((b'tEXtSoftware\0' + SOFTWARE.encode() + b' masks', MASKS), (b'tEXtSoftware\0' + SOFTWARE.encode(), FIGURES))
"""The part of a PNG file that names the software which drew it, and what it drew."""


def name_foreign_format(data: bytes) -> str | None:
    """Return the name of the format of a file that starts with `data`, if it is a known one that is not read."""
    for name, start in FOREIGN_FORMATS:
        if re.match(start, data[:HEAD_BYTES], re.DOTALL):
            return name
    return None


def png_mark(kind: str = FIGURES) -> PngInfo:
    """Return the metadata that mark a PNG file as drawn by this package: `FIGURES` or `MASKS`."""
    info = PngInfo()
    info.add_text('Software', f'{SOFTWARE} masks' if kind == MASKS else SOFTWARE)
    return info


def name_own_picture(data: bytes) -> str | None:
    """Return what a PNG file that starts with `data` is, if this package drew it; None for any other file."""
    if data.startswith(b'\x89PNG'):
        for mark, kind in MARKS:
            if mark in data[:HEAD_BYTES]:
                return kind
    return None

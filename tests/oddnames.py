"""File names that are hard to store, to print or to open in a spreadsheet, and images with such names."""

import os
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest

FORMULAS = ['=cmd|"/c calc"!A0.png', '+1.png', '-1.png', '@SUM(A1).png', '\t=1.png', '\r=1.png', '\0.png']
"""Names that a spreadsheet would evaluate."""
NAMES = [
    *FORMULAS,
    "'=1.png",
    "''=1.png",
    "'",
    "'plain.png",
    'a\rb.png',
    'a\nb.png',
    'a\r\nb.png',
    'a,"b".png',
    ' x ',
    '<script>alert(1)</script>.png',
    r'$\bad$.png',
    '[/x].png',
    '\x1b[31mred.png',
    'fdp.\u202egnp',
    'a\u2028b',
    '胸',
    unicodedata.normalize('NFC', 'é.png'),
    unicodedata.normalize('NFD', 'é.png'),
    'x' * 5000,
]
"""Texts that a table must store unchanged."""
FILES = [
    b'=cmd.jpeg',
    b'+1.jpeg',
    b'-1.jpeg',
    b'@SUM.jpeg',
    b'\t1.jpeg',
    b'\r1.jpeg',
    b"'=1.jpeg",
    b'<script>alert(1)<.jpeg',
    rb'$\bad$.jpeg',
    b'[/x].jpeg',
    b'bad\xff\xfe.jpeg',
    b'\x1b[31mred.jpeg',
    b'new\nline.jpeg',
    'rtl\u202egpj.jpeg'.encode(),
    b'back\\.jpeg',
    *(unicodedata.normalize(form, 'é.jpeg').encode() for form in ('NFC', 'NFD')),
    b'a/same.jpeg',
    b'b/same.jpeg',
]
"""Names that Linux allows for an image; a slash makes a folder."""


def copy_with_odd_names(image: Path, folder: Path) -> Path:
    """Copy `image` into `folder` under each of the names `FILES`; skips the test on other systems than Linux."""
    if sys.platform != 'linux':
        pytest.skip('other systems than Linux refuse some of these file names; run the test on Linux')
    for name in FILES:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(os.fsencode(image), path)
    return folder

"""DICOM images with the identity that archives give them, and the check of DICOM files by dciodvfy (dicom3tools)."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagefiles import dicom, smooth
from PIL import Image
from pydicom.dataset import Dataset

VALIDATOR = shutil.which('dciodvfy')
needs_validator = pytest.mark.skipif(not VALIDATOR, reason='needs dciodvfy: install dicom3tools')


def radiograph(number: int = 1, pixels: np.ndarray | None = None, **tags: Any) -> bytes:
    """The DICOM file of a radiograph, alone in a study of its own."""
    identity = {
        'SOPInstanceUID': f'1.2.3.{number}',
        'StudyInstanceUID': f'1.2.4.{number}',
        'SeriesInstanceUID': f'1.2.5.{number}',
        'PatientID': f'ID-{number}',
        'PatientBirthDate': '19600229',
        'PatientSex': 'F',
        'StudyDate': '20260102',
        'StudyTime': '030405',
        'StudyID': '7',
        'AccessionNumber': 'A-1',
        'StudyDescription': 'Thorax',
    }
    grey = smooth(96, 80, number) if pixels is None else pixels
    return dicom(grey, **(identity | tags))


def save_radiographs(images: list[Path], folder: Path) -> list[Path]:
    """Write each of the `images` as a DICOM file to `folder`."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, image in enumerate(images, 1):
        path = folder / f'{number}.dcm'
        path.write_bytes(radiograph(number, np.asarray(Image.open(image).convert('L'))))
        paths.append(path)
    return paths


class BrokenFor:
    """A constructor of highdicom that fails in an unexpected way on the image with one SOP Instance UID."""

    def __init__(self, constructor: Any, uid: str) -> None:
        self.constructor = constructor
        self.uid = uid

    def __call__(self, *args: Any, **options: Any) -> Any:
        evidence = options.get('evidence') or args[:1]
        if evidence[0].SOPInstanceUID == self.uid:
            raise RuntimeError(f'{evidence[0].PatientName} is not expected here')
        return self.constructor(*args, **options)


def report_text(report: Dataset) -> str:
    """All texts of a Structured Report, one a line."""
    return '\n'.join(str(element.value) for element in report.iterall() if element.keyword == 'TextValue')


def violations(path: Path) -> list[str]:
    """The errors that dciodvfy finds in a DICOM file."""
    done = subprocess.run([VALIDATOR, path], capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('Error')]

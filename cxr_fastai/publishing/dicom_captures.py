"""DICOM Secondary Captures: an image under its explanation map, with a warning burned in (extra `dicom`)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxr_fastai.inference.predictor import Row
from cxr_fastai.interpretation.overlays import CAVEAT
from cxr_fastai.publishing.dicom_reports import CAPTURE_SERIES, Algorithm, describe, equipment, highdicom_errors
from cxr_fastai.publishing.dicom_source import DicomSource

if TYPE_CHECKING:
    from highdicom.sc import SCImage

BANNER = 'RESEARCH USE ONLY - NOT FOR DIAGNOSIS'
MIN_WIDTH = 512
"""Width in pixels to which narrower pictures are enlarged, so that the text has room."""
CHARACTERS = 56
"""Characters in a line of text, at most; the size of the font follows from it."""
LINE_HEIGHT = 1.4
"""Height of a line, in heights of the font."""
DERIVATION = 'Overlay of a map of what influenced the score of the network (Grad-CAM)'
ANY_ORIENTATION = ('L', 'F')
"""The orientation that highdicom wants, in place of which that of the image is written, which is often unknown."""


def burn_in(overlay: np.ndarray, row: Row) -> np.ndarray:
    """Return `overlay`, uint8 (h, w, 3), between a strip that says `BANNER` and one with the result of `row`.

    The strips are added above and below, so that they cover nothing. A narrow picture is enlarged to `MIN_WIDTH`.
    """
    picture = Image.fromarray(overlay)
    if picture.width < MIN_WIDTH:
        height = round(picture.height * MIN_WIDTH / picture.width)
        picture = picture.resize((MIN_WIDTH, height), Image.Resampling.BILINEAR)
    result = textwrap.wrap(f'{describe(row)} The map shows what {CAVEAT}.', CHARACTERS)
    above = _strip(picture.width, [BANNER], 'yellow')
    below = _strip(picture.width, [*result, BANNER], 'white')
    return np.concatenate([above, np.asarray(picture), below])


def _strip(width: int, lines: list[str], colour: str) -> np.ndarray:
    """Return a black picture with `lines` of text, uint8 (h, width, 3)."""
    size = _font_size(width)
    font = ImageFont.load_default(size)
    step = round(LINE_HEIGHT * size)
    strip = Image.new('RGB', (width, step * len(lines) + step // 2))
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((width // 2, step * number + step // 4), line, fill=colour, font=font, anchor='ma')
    return np.asarray(strip)


def _font_size(width: int) -> float:
    """Return the size of the default font, in pixels, in which `CHARACTERS` letters fit into `width` pixels."""
    size = 2.0 * width / CHARACTERS
    text_width = ImageFont.load_default(size).getlength('n' * CHARACTERS)
    return 0.95 * size * width / text_width


def make_capture(source: DicomSource, overlay: np.ndarray, row: Row, algorithm: Algorithm) -> SCImage:
    """Return the Secondary Capture of `overlay`, uint8 (h, w, 3), in the study of `source` and a new series.

    The identifiers follow from the SOP Instance UID of the image and the `algorithm`. Raises `ImageError`
    E_DICOM_REFERENCE or E_DICOM_CORRUPT as `make_report` does.
    """
    from highdicom.sc import SCImage
    from pydicom.uid import ExplicitVRLittleEndian

    with highdicom_errors():
        capture = SCImage.from_ref_dataset(
            source.elements,
            pixel_array=burn_in(overlay, row),
            photometric_interpretation='RGB',
            bits_allocated=8,
            coordinate_system='PATIENT',
            patient_orientation=ANY_ORIENTATION,
            series_instance_uid=algorithm.make_uid(source.uid, 'series of the capture'),
            series_number=CAPTURE_SERIES,
            sop_instance_uid=algorithm.make_uid(source.uid, 'capture'),
            instance_number=1,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **equipment(algorithm, 'map'),
        )
        capture.copy_patient_and_study_information(source.elements)
        _describe_picture(capture, source)
    return capture


def _describe_picture(capture: SCImage, source: DicomSource) -> None:
    """Write how the picture was made, and which image it shows, into `capture`."""
    from pydicom import Dataset

    shown = Dataset()
    shown.ReferencedSOPClassUID = source.elements.SOPClassUID
    shown.ReferencedSOPInstanceUID = source.elements.SOPInstanceUID
    capture.SourceImageSequence = [shown]
    capture.ConversionType = 'WSD'  # by a workstation
    capture.DerivationDescription = DERIVATION
    capture.BurnedInAnnotation = 'NO'  # the text does not identify the patient
    capture.Laterality = ''  # not known, but required of a body part that might be paired
    capture.PatientOrientation = list(source.orientation)
    capture.LossyImageCompression = '01' if source.is_lossy else '00'

"""Secondary Captures show the map between warnings, cover nothing of the image, and are valid."""

import numpy as np
import pytest
from dicomstudies import needs_validator, radiograph, violations
from pydicom import dcmread

from cxr_fastai.publishing.dicom_captures import MIN_WIDTH, burn_in, make_capture
from cxr_fastai.publishing.dicom_reports import Algorithm
from cxr_fastai.publishing.dicom_source import read_source

ALGORITHM = Algorithm('resnet50', 'ab' * 32, 0.57, 'sensitivity:0.95')
ROW = {'p_pneumonia': 0.97, 'prediction': 'PNEUMONIA', 'threshold': 0.57, 'code': None, 'message': None}
OVERLAY = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)


@pytest.mark.parametrize('shape', [(64, 256), (512, 128), (300, 600), (900, 1800)], ids=str)
def test_the_warnings_are_beside_the_picture_and_not_on_it(shape):
    overlay = np.full((*shape, 3), 7, np.uint8)
    picture = burn_in(overlay, ROW)
    is_strip = (picture != 7).any(axis=2).any(axis=1)
    rows = np.flatnonzero(~is_strip)
    height = round(shape[0] * max(1, MIN_WIDTH / shape[1]))
    assert picture.shape[1] == max(shape[1], MIN_WIDTH)
    assert len(rows) == height and rows[-1] - rows[0] == height - 1
    for strip in (picture[: rows[0]], picture[rows[-1] + 1 :]):
        assert strip.max() > 200 and not strip[:, [0, -1]].any()  # there is text, and it is not cut


def test_the_pixels_of_a_wide_overlay_are_unchanged(tmp_path):
    make_capture(read_source(radiograph()), OVERLAY, ROW, ALGORITHM).save_as(tmp_path / 'c.dcm')
    pixels = dcmread(tmp_path / 'c.dcm').pixel_array
    start = next(i for i in range(len(pixels)) if (pixels[i] == OVERLAY[0]).all())
    assert (pixels[start : start + 300] == OVERLAY).all()


def test_a_capture_joins_the_study_and_names_its_image():
    capture = make_capture(read_source(radiograph()), OVERLAY, ROW, ALGORITHM)
    assert capture.StudyInstanceUID == '1.2.4.1' and capture.SeriesInstanceUID != '1.2.5.1'
    assert (capture.PatientID, capture.StudyDescription) == ('ID-1', 'Thorax')
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == '1.2.3.1'
    assert 'research use only' in capture.SeriesDescription
    assert capture.BurnedInAnnotation == 'NO'


def test_identifiers_follow_from_image_and_model():
    def uid(number: int = 1, sha256: str = 'ab' * 32) -> str:
        algorithm = Algorithm('resnet50', sha256, 0.57, 'sensitivity:0.95')
        return make_capture(read_source(radiograph(number)), OVERLAY, ROW, algorithm).SOPInstanceUID

    assert uid() == uid()
    assert len({uid(), uid(2), uid(sha256='cd' * 32)}) == 3


@needs_validator
@pytest.mark.parametrize(
    'tags',
    [
        {},
        {'PatientOrientation': ['L', 'F'], 'LossyImageCompression': '00'},
        {'LossyImageCompression': '01'},
        {'SpecificCharacterSet': 'ISO_IR 100', 'PatientName': 'Müller^Jörg', 'PatientSex': 'm'},
    ],
    ids=str,
)
def test_captures_are_valid_dicom(tmp_path, tags):
    capture = make_capture(read_source(radiograph(**tags)), OVERLAY, ROW, ALGORITHM)
    capture.save_as(tmp_path / 'c.dcm', enforce_file_format=True)
    assert violations(tmp_path / 'c.dcm') == []

"""The folder of DICOM results: a report for each DICOM image, and reasons for the others."""

import numpy as np
import pytest
from dicomstudies import BrokenFor, radiograph, report_text
from imagefiles import GREY, PATIENT, encoded, without
from pydicom import dcmread

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.interpretation.overlays import Explanation
from cxr_fastai.publishing.dicom_output import DicomFolder, check_dicom_folder
from cxr_fastai.publishing.dicom_reports import Algorithm

ALGORITHM = Algorithm('resnet50', 'ab' * 32, 0.57, 'sensitivity:0.95')
OK = {'path': 'x', 'status': 'ok', 'p_pneumonia': 0.97, 'prediction': 'PNEUMONIA', 'threshold': 0.57}
OK |= {'code': None, 'message': None}
BROKEN = OK | {'status': 'error', 'p_pneumonia': None, 'prediction': None, 'code': 'E_DICOM_CORRUPT', 'message': 'x'}


def explanation(image) -> Explanation:
    return Explanation(GREY, np.ones(GREY.shape), image.name, 0.97, 0.57)


@pytest.fixture
def folder(tmp_path) -> DicomFolder:
    return DicomFolder(tmp_path / 'new' / 'out', ALGORITHM)


def save(path, data: bytes):
    path.write_bytes(data)
    return path


def test_each_dicom_image_gets_a_report_and_each_explanation_a_capture(folder, tmp_path):
    images = [save(tmp_path / f'{number}.dcm', radiograph(number)) for number in (1, 2)]
    folder.write_reports(images, [OK, OK])
    pairs = list(folder.write_captures(images, [(None, explanation(image)) for image in images]))
    assert (folder.reports, folder.captures, folder.problems) == (2, 2, [])
    files = [dcmread(path) for path in sorted(folder.folder.iterdir())]
    assert [file.Modality for file in files] == ['OT', 'OT', 'SR', 'SR']
    assert {file.StudyInstanceUID for file in files} == {'1.2.4.1', '1.2.4.2'}
    assert [path.name.startswith('sc_') for path, _ in pairs] == [True, True]


def test_the_same_images_and_model_give_files_of_the_same_names(folder, tmp_path):
    image = save(tmp_path / '1.dcm', radiograph())
    folder.write_reports([image], [OK])
    names = sorted(folder.folder.iterdir())
    DicomFolder(folder.folder, ALGORITHM).write_reports([image], [OK])
    assert sorted(folder.folder.iterdir()) == names


def test_images_that_are_not_dicom_are_counted_and_others_keep_their_reports(folder, tmp_path):
    images = [
        save(tmp_path / 'a.png', encoded(GREY)),
        save(tmp_path / 'b.dcm', radiograph()),
        tmp_path / 'gone.dcm',
        save(tmp_path / 'c.dcm', b'no DICOM'),
    ]
    folder.write_reports(images, [OK, OK, BROKEN | {'code': 'E_IO'}, BROKEN])
    assert (folder.reports, folder.others, folder.problems) == (1, 1, [])
    assert [error.code for _, error in folder.unreported] == ['E_NOT_DICOM', 'E_IO', 'E_DICOM_CORRUPT']
    assert len(list(folder.folder.iterdir())) == 1


def test_an_image_without_a_study_is_named_and_gets_no_report(folder, tmp_path):
    image = save(tmp_path / 'a.dcm', without('StudyInstanceUID', radiograph()))
    folder.write_reports([image], [OK])
    (problem,) = folder.problems
    assert str(problem).startswith(f'{image}: E_DICOM_REFERENCE: StudyInstanceUID is missing')
    assert list(folder.folder.iterdir()) == []


def test_an_image_that_cannot_be_decoded_gets_a_report_of_the_reason(folder, tmp_path):
    image = save(tmp_path / 'a.dcm', without('PixelData', radiograph()))
    folder.write_reports([image], [BROKEN | {'code': 'E_DICOM_NOPIXEL', 'message': 'no pixel data'}])
    (path,) = folder.folder.iterdir()
    assert 'No prediction: E_DICOM_NOPIXEL: no pixel data' in report_text(dcmread(path))


def test_the_second_image_with_the_same_identifier_does_not_replace_the_report_of_the_first(folder, tmp_path):
    images = [save(tmp_path / f'{name}.dcm', radiograph()) for name in 'ab']
    folder.write_reports(images, [OK, OK | {'p_pneumonia': 0.6}])
    assert folder.reports == 1 and folder.problems[0].code == 'E_DICOM_REPEATED'
    (path,) = folder.folder.iterdir()
    assert '0.970' in report_text(dcmread(path))


def test_rows_that_were_read_from_a_resumed_table_are_reported_too(folder, tmp_path):
    image = save(tmp_path / '1.dcm', radiograph())
    folder.write_reports([image], [OK | {'p_pneumonia': '0.97', 'threshold': '0.57'}])
    assert folder.reports == 1


def test_an_image_that_may_not_be_shown_gets_no_capture(folder, tmp_path):
    image = save(tmp_path / '1.dcm', radiograph())
    folder.write_reports([image], [OK])
    error = ImageError('contains text', 'E_BURNED_IN')
    assert list(folder.write_captures([image], [(None, error)])) == [(None, error)]
    assert folder.captures == 0


def test_a_capture_that_cannot_be_made_is_a_problem_and_keeps_its_map(folder, tmp_path, monkeypatch):
    from highdicom.sc import SCImage

    images = [save(tmp_path / f'{number}.dcm', radiograph(number)) for number in (1, 2)]
    folder.write_reports(images, [OK, OK])
    monkeypatch.setattr(SCImage, 'from_ref_dataset', BrokenFor(SCImage.from_ref_dataset, '1.2.3.1'))
    explanations = [(None, explanation(image)) for image in images]
    (no_path, kept), (path, explained) = folder.write_captures(images, explanations)
    assert (no_path, kept) == explanations[0]
    assert path.exists() and explained is explanations[1][1]
    assert (folder.reports, folder.captures) == (2, 1)
    (problem,) = folder.problems
    assert str(problem).startswith(f'{images[0]}: E_DICOM_CORRUPT') and PATIENT not in str(problem)
    assert folder.uncaptured == [('x', problem)]


def test_elements_that_were_not_copied_are_listed_by_image(folder, tmp_path):
    images = [save(tmp_path / f'{n}.dcm', radiograph(n, PatientSex='female')) for n in (1, 2)]
    folder.write_reports(images, [OK, OK])
    assert folder.omissions == {('PatientSex',): images}


def test_a_file_in_place_of_the_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match='not a folder'):
        check_dicom_folder(save(tmp_path / 'file', b''))

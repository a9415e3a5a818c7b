"""The service answers with DICOM files if a request asks for them, in the study of each image."""

import base64
import email.parser
import email.policy
from io import BytesIO

import numpy as np
import pytest
from dicomstudies import BrokenFor, needs_validator, radiograph, report_text, violations
from highdicom.sr import ComprehensiveSR
from imagefiles import GREY, PATIENT, encoded, without
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from services import files, is_error, predict

from cxr_fastai.publishing.dicom_reports import Algorithm
from cxr_fastai.serving import reports
from cxr_fastai.serving.reports import Part, Reports, encode_reports, make_reports, wants_dicom
from cxr_fastai.serving.uploads import APIError

ACCEPT = {'accept': 'multipart/related; type="application/dicom"'}
ALGORITHM = Algorithm('resnet50', 'ab' * 32, 0.57, 'sensitivity:0.95')
ROW = {'path': 'image-1', 'status': 'ok', 'p_pneumonia': 0.97, 'prediction': 'PNEUMONIA', 'threshold': 0.57}
ROW |= {'code': None, 'message': None}


def parts(body: bytes, content_type: str) -> dict[str, Dataset]:
    """The DICOM files of an answer by their location, as a client reads them."""
    head = f'Content-Type: {content_type}\r\n\r\n'.encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    assert message.get_content_type() == 'multipart/related' and not message.defects
    found = {}
    for part in message.iter_parts():
        assert part.get_content_type() == 'application/dicom'
        found[part['content-location']] = dcmread(BytesIO(part.get_payload(decode=True)))
    return found


@pytest.mark.parametrize(
    ('accept', 'expected'),
    [
        ('', False),
        ('*/*', False),
        ('application/json', False),
        ('application/dicom', False),
        ('multipart/related; type="application/dicom+json"', False),
        ('multipart/related; type="application/dicom"; q=0', False),
        ('multipart/related; type="application/dicom"', True),
        ('multipart/related; type=application/dicom', True),
        ('Multipart/Related;type="application/dicom";transfer-syntax=*', True),
        ('multipart/related', True),
        ('text/html, multipart/related; type="application/dicom"; q=0.5', True),
    ],
)
def test_the_header_accept_decides(accept, expected):
    assert wants_dicom(accept) is expected


def test_without_highdicom_the_request_is_refused(monkeypatch):
    monkeypatch.setattr(reports, 'is_installed', lambda package: False)
    with pytest.raises(APIError) as caught:
        wants_dicom(ACCEPT['accept'])
    assert (caught.value.status, caught.value.code) == (406, 'E_DICOM')


def test_a_body_has_all_files_and_the_header_warning_names_the_others():
    content = make_reports(radiograph(), ROW, ALGORITHM).parts[0].content
    answers = [Reports('image-1', (Part('image-1/report', content),)), Reports('image-2', code='E_NOT_DICOM')]
    body, headers = encode_reports(answers)
    assert list(parts(body, headers['content-type'])) == ['image-1/report']
    assert headers['warning'] == '299 - "image-2: E_NOT_DICOM"'


def test_an_overlay_becomes_a_capture(tmp_path):
    buffer = BytesIO()
    overlay = np.random.default_rng(0).integers(0, 255, (600, 640, 3), dtype=np.uint8)
    Image.fromarray(overlay).save(buffer, 'PNG')
    row = ROW | {'explanation': {'overlay': base64.b64encode(buffer.getvalue()).decode()}}
    report, capture = make_reports(radiograph(), row, ALGORITHM).parts
    assert (report.location, capture.location) == ('image-1/report', 'image-1/map')
    image = dcmread(BytesIO(capture.content))
    assert image.StudyInstanceUID == '1.2.4.1' and image.pixel_array.shape[1:] == (640, 3)


@pytest.mark.parametrize(
    ('data', 'code'),
    [
        (encoded(GREY), 'E_NOT_DICOM'),
        (b'', 'E_NOT_DICOM'),
        (without('StudyInstanceUID', radiograph()), 'E_DICOM_REFERENCE'),
        (radiograph()[:200], 'E_DICOM_'),
    ],
)
def test_an_image_without_a_report_has_a_code(data, code):
    answer = make_reports(data, ROW, ALGORITHM)
    assert answer.parts == () and answer.code.startswith(code)


def test_an_error_of_a_map_keeps_the_report_and_is_named(monkeypatch):
    from highdicom.sc import SCImage

    monkeypatch.setattr(SCImage, 'from_ref_dataset', BrokenFor(SCImage.from_ref_dataset, '1.2.3.1'))
    overlay = base64.b64encode(encoded(GREY)).decode()
    answer = make_reports(radiograph(), ROW | {'explanation': {'overlay': overlay}}, ALGORITHM)
    assert [part.location for part in answer.parts] == ['image-1/report'] and answer.code == 'E_DICOM_CORRUPT'
    _, headers = encode_reports([answer])
    assert headers['warning'] == '299 - "image-1: E_DICOM_CORRUPT"'


# Through HTTP


@pytest.fixture(scope='module')
def studies(images) -> list[bytes]:
    """Three radiographs that the bundle accepts."""
    paths = sorted((images / 'test').rglob('*.jpeg'))[:3]
    return [radiograph(n, np.asarray(Image.open(path).convert('L'))) for n, path in enumerate(paths, 1)]


def test_a_request_gets_a_report_for_each_dicom_image_and_maps_on_request(client, studies):
    response = client.post('/v1/predict', files=files(*studies, encoded(GREY)), headers=ACCEPT)
    assert response.status_code == 200
    assert response.headers['warning'] == '299 - "image-4: E_NOT_DICOM"'
    answer = parts(response.content, response.headers['content-type'])
    assert list(answer) == ['image-1/report', 'image-2/report', 'image-3/report']
    assert [report.StudyInstanceUID for report in answer.values()] == ['1.2.4.1', '1.2.4.2', '1.2.4.3']
    rows = predict(client, *studies)
    for row, report in zip(rows, answer.values(), strict=True):
        assert (f'{row["p_pneumonia"]:.3f}' if row['status'] == 'ok' else row['code']) in report_text(report)
    response = client.post('/v1/predict?explain=true', files=files(*studies), headers=ACCEPT)
    answer = parts(response.content, response.headers['content-type'])
    accepted = [row['path'] for row in rows if row['status'] == 'ok']
    assert {name.removesuffix('/map') for name in answer if name.endswith('/map')} <= set(accepted)


def test_the_reports_of_the_service_are_those_of_predict(client, bundle, studies, tmp_path):
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.publishing.dicom_output import DicomFolder
    from cxr_fastai.publishing.dicom_reports import identify_model

    (tmp_path / 'image.dcm').write_bytes(studies[0])
    predictor = Predictor.load(bundle, engine='onnx')
    folder = DicomFolder(tmp_path / 'out', Algorithm.of(predictor, identify_model(bundle)))
    folder.write_reports([tmp_path / 'image.dcm'], list(predictor.predict([tmp_path / 'image.dcm'])))
    (path,) = folder.folder.iterdir()
    response = client.post('/v1/predict', files=files(studies[0]), headers=ACCEPT)
    (report,) = parts(response.content, response.headers['content-type']).values()
    assert path.name == f'sr_{report.SOPInstanceUID}.dcm'


def test_an_unexpected_error_of_highdicom_costs_the_report_of_its_image_only(client, studies, monkeypatch):
    monkeypatch.setattr('highdicom.sr.ComprehensiveSR', BrokenFor(ComprehensiveSR, '1.2.3.2'))
    odd = [
        without('StudyInstanceUID', studies[0]),
        radiograph(7, PatientName='x' * 5000, StudyDate='20250101-20260102'),
        radiograph(8).replace(PATIENT.encode(), b'D\xf6e^Jane'),
    ]
    response = client.post('/v1/predict', files=files(*studies, *odd), headers=ACCEPT)
    assert response.status_code == 200
    assert response.headers['warning'] == '299 - "image-2: E_DICOM_CORRUPT", 299 - "image-4: E_DICOM_REFERENCE"'
    answer = parts(response.content, response.headers['content-type'])
    assert list(answer) == [f'image-{number}/report' for number in (1, 3, 5, 6)]


def test_a_request_without_a_dicom_image_is_refused_and_errors_stay_json(client):
    assert is_error(client.post('/v1/predict', files=files(encoded(GREY)), headers=ACCEPT), 422, 'E_NOT_DICOM')
    assert is_error(client.post('/v1/predict', headers=ACCEPT), 415, 'E_MEDIA_TYPE')


def test_a_rejected_image_gets_a_report_of_the_reason(client):
    response = client.post('/v1/predict', files=files(radiograph(Modality='CT')), headers=ACCEPT)
    (report,) = parts(response.content, response.headers['content-type']).values()
    assert 'No prediction: E_DICOM_MODALITY: modality CT' in report_text(report)


@needs_validator
def test_the_files_of_the_service_are_valid_dicom(client, studies, tmp_path):
    response = client.post('/v1/predict?explain=true', files=files(*studies), headers=ACCEPT)
    for number, file in enumerate(parts(response.content, response.headers['content-type']).values()):
        file.save_as(tmp_path / f'{number}.dcm')
        assert violations(tmp_path / f'{number}.dcm') == []

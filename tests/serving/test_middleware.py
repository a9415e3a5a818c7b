"""Middleware rejects foreign hosts and origins, adds security headers, and logs requests without names."""

import logging
import tempfile

import pytest
from imagefiles import dicom
from services import ADDRESS, PATIENT, files, is_error

FILE_NAME = '../../ZqFileXv.dcm'


@pytest.mark.parametrize(
    ('host', 'status'),
    [
        ('127.0.0.1', 200),
        ('localhost:8000', 200),
        ('LOCALHOST', 200),
        ('[::1]:8000', 200),
        ('xray.hospital.example', 200),
        ('elsewhere.example', 400),
        ('127.0.0.1.elsewhere.example', 400),
        ('www.localhost', 400),
        ('localhost.', 400),
        ('', 400),
        ('[', 400),
    ],
)
def test_only_own_host_names_are_accepted(protected, host, status):
    response = protected.get('/', headers={'host': host})
    assert response.status_code == status
    assert status == 200 or is_error(response, 400, 'E_HOST')


@pytest.mark.parametrize('path', ['/health', '/ready'])
@pytest.mark.parametrize('method', ['GET', 'HEAD'])
def test_probes_may_use_the_address_of_the_service(protected, method, path):
    response = protected.request(method, path, headers={'host': '10.0.0.7:8000'})
    assert response.status_code == 200
    assert response.content == (b'' if method == 'HEAD' else b'{"status":"ok"}')


@pytest.mark.parametrize(
    'headers',
    [
        {'origin': 'https://elsewhere.example'},
        {'origin': 'null'},
        {'origin': 'http://['},
        {'origin': 'http://127.0.0.1:9000'},
        {'sec-fetch-site': 'cross-site'},
    ],
)
def test_pages_of_other_sites_cannot_send_images(client, headers):
    assert is_error(client.post('/v1/predict', files=files(b''), headers=headers), 400, 'E_ORIGIN')


def test_the_own_page_can_send_images_and_no_other_origin_is_allowed(client):
    own = client.post('/v1/predict', files=files(b''), headers={'origin': ADDRESS, 'sec-fetch-site': 'same-origin'})
    preflight = client.options(
        '/v1/predict', headers={'origin': 'https://elsewhere.example', 'access-control-request-method': 'POST'}
    )
    assert own.status_code == 200 and is_error(preflight, 405, 'E_METHOD')
    for response in (own, preflight):
        assert not [name for name in response.headers if name.startswith('access-control')]


def test_every_response_has_a_request_id_and_security_headers(client):
    for response in (client.get('/health'), client.get('/nowhere'), client.post('/v1/predict')):
        assert len(response.headers['x-request-id']) == 12
        assert response.headers['cache-control'] == 'no-store'
        assert response.headers['x-content-type-options'] == 'nosniff'
        assert "default-src 'none'" in response.headers['content-security-policy']


def test_tokens_are_not_logged(protected, caplog):
    with caplog.at_level(logging.DEBUG):
        for token in ('ZqRightXv', '0123456789abcdef'):
            protected.post('/v1/predict', files=files(b''), headers={'authorization': f'Bearer {token}'})
    assert caplog.text.count('route=') == 2
    for word in ('Bearer', 'ZqRightXv', '0123456789abcdef'):
        assert word not in caplog.text


def test_file_names_and_patients_are_neither_logged_nor_returned(client, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    images = [dicom(PatientName=PATIENT), dicom(Modality=PATIENT), dicom(NumberOfFrames='2', PatientID=PATIENT), b'']
    with caplog.at_level(logging.DEBUG):
        response = client.post(
            '/v1/predict?explain=true', files=files(*images, name=FILE_NAME), headers={'x-patient': PATIENT}
        )
        client.request(PATIENT.upper(), f'/{PATIENT}?{PATIENT}')
    assert response.status_code == 200 and not list(tmp_path.iterdir())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith('cxr_fastai')]
    (line,) = [line for line in lines if 'method=POST' in line]
    assert f'id={response.headers["x-request-id"]} method=POST route=/v1/predict bytes=' in line
    assert 'images=4 formats=?,DICOM status=200 ms=' in line
    for word in (PATIENT, PATIENT.upper(), 'ZqFileXv', 'testclient'):
        assert word not in response.text and not [line for line in lines if word in line]

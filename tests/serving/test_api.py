"""The REST API describes the model and itself, protects it by a token, and answers every error in JSON."""

import hashlib
import logging

import pytest
from imagefiles import dicom
from services import PATIENT, files, is_error, predict, read_metrics, running_app

from cxr_fastai.inference.bundle import MANIFEST, Bundle
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.serving.app import Settings

TOKEN = '0123456789abcdef'


def test_metrics_count_requests_images_and_batches(bundle, paths):
    with running_app(Settings(bundle)) as client:
        predict(client, paths[0].read_bytes(), b'', b'')
        assert client.post('/v1/predict').status_code == 415
        assert client.post('/v1/predict', headers={'host': 'elsewhere'}).status_code == 400
        metrics = read_metrics(client)
    for status in (200, 415, 400):
        assert metrics[f'cxr_requests_total {status}'] == 1
    assert metrics['cxr_images_total E_EMPTY error'] == 2 and metrics['cxr_request_seconds_count'] == 1
    assert metrics['cxr_batch_images_count'] == metrics['cxr_batch_images_sum'] == 1
    assert metrics['cxr_requests_waiting'] == 0 and metrics['cxr_ready'] == 1


def test_the_model_is_described_with_its_threshold_and_hash(client, bundle):
    facts = client.get('/v1/model').json()
    config = Bundle.open(bundle).config
    assert facts['sha256'] == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    assert (facts['arch'], facts['size']) == (config.arch, config.size)
    assert (facts['threshold'], facts['threshold_rule']) == (config.threshold, config.threshold_rule)
    assert facts['notice'] == 'Research software, not a medical device.'


def test_the_openapi_document_is_valid_and_lists_all_responses(client, protected):
    from jsonschema import Draft202012Validator

    document = client.get('/openapi.json').json()
    assert document['openapi'].startswith('3.1')
    for schema in document['components']['schemas'].values():
        Draft202012Validator.check_schema(schema)
    operation = document['paths']['/v1/predict']['post']
    assert set(operation['responses']) == {'200', '400', '401', '406', '408', '413', '415', '422', '503'}
    responses = document['paths']['/metrics']['get']['responses']
    assert list(responses['200']['content']) == ['text/plain']
    assert list(responses['401']['content']) == ['application/json']
    assert set(document['paths']) == {'/v1/predict', '/v1/model', '/health', '/ready', '/metrics'}
    assert 'security' not in operation
    protected_paths = protected.get('/openapi.json').json()['paths']
    assert 'security' in protected_paths['/v1/predict']['post'] and 'security' not in protected_paths['/ready']['get']


def test_unknown_options_and_routes_get_an_error_in_json(client):
    assert is_error(client.post('/v1/predict?explain=maybe', files=files(b'')), 422, 'E_OPTION')
    assert is_error(client.get('/nowhere'), 404, 'E_NOT_FOUND')
    response = client.get('/v1/predict')
    assert is_error(response, 405, 'E_METHOD') and response.headers['allow'] == 'POST'


@pytest.mark.parametrize(
    ('query', 'reason'),
    [
        ('explian=true', "'explian': unknown option; the options of this address are: explain."),
        ('Explain=true', "'Explain': unknown option"),
        ('threshold=0.9', "'threshold': unknown option"),
        ('explain=true&x=1', "'x': unknown option"),
        ('explain=true&explain=false', "'explain': given 2 times"),
        ('explain=yess', 'explain: '),
        ('explain=', 'explain: '),
        ('x' * 1000, "'" + 50 * 'x' + "': unknown option"),
    ],
)
def test_a_misspelt_option_is_not_ignored(client, paths, query, reason):
    response = client.post(f'/v1/predict?{query}', files=files(paths[0].read_bytes()))
    assert is_error(response, 422, 'E_OPTION') and response.json()['message'].startswith(reason)


def test_an_address_without_options_refuses_any_but_probes_do_not(client, protected):
    response = client.get('/v1/model?verbose=1')
    assert is_error(response, 422, 'E_OPTION') and response.json()['message'].endswith('this address has no options.')
    assert client.get('/health?t=1').status_code == client.get('/ready?t=1').status_code == 200
    assert is_error(protected.get('/v1/model?verbose=1'), 401, 'E_TOKEN')


def test_a_file_in_a_misspelt_field_is_not_left_out(client, paths):
    image = ('image', ('a.jpeg', paths[0].read_bytes()))
    response = client.post('/v1/predict', files=[*files(paths[0].read_bytes()), image])
    assert is_error(response, 422, 'E_FIELD') and "field 'image'" in response.json()['message']
    response = client.post('/v1/predict', files=files(paths[0].read_bytes()), data={'note': 'text'})
    assert response.status_code == 200


def test_an_unexpected_failure_is_a_503_and_a_log_line_without_the_request(client, monkeypatch, caplog):
    def fail(self, name, read):
        raise RuntimeError(f'{PATIENT} in {read}')

    monkeypatch.setattr(Predictor, 'start_row', fail)
    with caplog.at_level(logging.DEBUG):
        response = client.post('/v1/predict', files=files(dicom(PatientName=PATIENT), name=f'../{PATIENT}.dcm'))
    assert is_error(response, 503, 'E_INTERNAL')
    assert response.headers['x-request-id'] in response.json()['message']
    lines = [record.getMessage() for record in caplog.records if record.name == 'cxr_fastai.serving']
    assert len(lines) == 2 and 'RuntimeError at test_api.py:' in lines[0] and 'status=503' in lines[1]
    assert PATIENT not in caplog.text and 'Traceback' not in caplog.text


@pytest.mark.parametrize(
    'authorization',
    [
        None,
        'Bearer wrong',
        f'Bearer {TOKEN[:-1]}X',
        TOKEN,
        'Bearer \xe9',
        f'Bearer {TOKEN} x',
        f'Basic {TOKEN}',
    ],
)
def test_requests_without_the_token_are_rejected(protected, authorization):
    headers = {'authorization': authorization.encode('latin-1')} if authorization else {}
    for response in (
        protected.get('/v1/model', headers=headers),
        protected.get('/metrics', headers=headers),
        protected.get('/examples/0.png', headers=headers),
        protected.post('/v1/predict', files=files(b''), headers=headers),
    ):
        assert is_error(response, 401, 'E_TOKEN') and response.headers['www-authenticate'] == 'Bearer'


def test_the_token_gives_access_and_health_checks_need_none(protected):
    headers = {'authorization': f'Bearer {TOKEN}'}
    assert protected.get('/v1/model', headers=headers).status_code == 200
    assert predict(protected, b'', headers=headers)[0]['code'] == 'E_EMPTY'
    for path in ('/health', '/ready', '/openapi.json'):
        assert protected.get(path).status_code == 200


def test_tokens_are_compared_in_constant_time(protected, monkeypatch):
    import secrets

    compared = []
    compare = secrets.compare_digest
    monkeypatch.setattr(secrets, 'compare_digest', lambda *pair: compared.append(pair) or compare(*pair))
    protected.get('/v1/model', headers={'authorization': 'Bearer no'})
    assert compared == [(b'no', TOKEN.encode())]

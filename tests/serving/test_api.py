"""What the service answers: rows, pictures, facts and refusals, asked in the process itself."""

import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from imagefiles import GREY, dicom, encoded
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import CANARY, MANIFEST, Bundle, manifest_text
from cxr_fastai.inference.predictor import COLUMNS, Predictor
from cxr_fastai.interpretation.overlays import Explanation, blend
from cxr_fastai.serving.app import make_app
from cxr_fastai.serving.service import Limits, Service, Settings, find_bundle

HERE = 'http://127.0.0.1:8000'
PATIENT = 'ZqPatientXv'
"""A name that stands nowhere else."""
NAME = '../../ZqFileXv.dcm'


def until(found, seconds: float = 60):
    """What `found` gives, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, 'it never came'
        time.sleep(0.005)
    return value


@contextmanager
def living(settings: Settings):
    """A client of the service, which is ready."""
    with TestClient(make_app(settings), HERE, raise_server_exceptions=False) as client:
        until(lambda: client.get('/ready').status_code == 200)
        yield client


def inner(client: TestClient):
    """The app behind the guards."""
    app = client.app
    while not hasattr(app, 'state'):
        app = app.app
    return app


def form(*images: bytes, name: str = 'image.png') -> list:
    return [('images', (name, image, 'application/octet-stream')) for image in images]


def rows_of(client, *images: bytes, **options) -> list[dict]:
    told = client.post('/v1/predict', files=form(*images), **options)
    assert told.status_code == 200, told.text
    return told.json()['images']


def same(row: dict, other: dict) -> bool:
    """Whether two rows tell the same of an image."""
    p, q = (one['p_pneumonia'] for one in (row, other))
    near = p is q is None or abs(p - q) <= 1e-6
    return near and all(row[name] == other[name] for name in COLUMNS if name not in ('path', 'p_pneumonia'))


@pytest.fixture(scope='module')
def client(bundle):
    with living(Settings(bundle)) as client:
        yield client


@pytest.fixture(scope='module')
def paths(images, tmp_path_factory) -> list[Path]:
    """Images of the data set, and one of each kind that is none."""
    folder = tmp_path_factory.mktemp('kinds')
    bad = {
        'empty.png': b'',
        'text.png': b'no image',
        'cut.png': encoded(GREY)[:-200],
        'deep.dcm': dicom(),
        'blank.png': encoded(np.zeros((96, 96), np.uint8)),
        'ct.dcm': dicom(Modality='CT'),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return [*sorted((images / 'test').rglob('*.jpeg'))[::3], *sorted(folder.iterdir())]


@pytest.fixture(scope='module')
def serial(bundle, paths) -> list[dict]:
    """What the Predictor says, image by image; of a file it repeats the code in the message."""
    rows = Predictor.load(bundle, engine='onnx').predict(paths, batch_size=1, workers=1)
    return [row | {'message': row['message'] and row['message'].removeprefix(f'{row["code"]}: ')} for row in rows]


# Rows


@pytest.mark.parametrize('seed', [0, 1])
def test_rows_are_those_of_the_predictor_whatever_the_order_and_the_batch(client, paths, serial, seed):
    order = np.random.default_rng(seed).permutation(len(paths))
    rows = rows_of(client, *(paths[i].read_bytes() for i in order))
    assert [row['path'] for row in rows] == [f'image-{i}' for i in range(1, len(order) + 1)]
    for row, i in zip(rows, order, strict=True):
        assert same(row, serial[i]), (row, serial[i])


def test_an_image_alone_gets_the_row_that_it_gets_among_others(client, paths, serial):
    for path, row in list(zip(paths, serial, strict=True))[::2]:
        assert same(*rows_of(client, path.read_bytes()), row)


def test_one_bad_image_stops_no_other(client, paths, serial):
    rows = rows_of(client, *(path.read_bytes() for path in paths))
    assert {'ok', 'error', 'rejected'} <= {row['status'] for row in rows}
    assert [row['code'] for row in rows] == [row['code'] for row in serial]
    for row in rows:
        assert (row['p_pneumonia'] is None) == (row['prediction'] is None) == (row['status'] != 'ok')


def test_a_row_has_the_columns_of_every_table_and_a_picture_only_when_it_is_explained(client, paths):
    image = paths[0].read_bytes()
    assert (
        list(rows_of(client, image)[0]) == list(rows_of(client, image, params={'explain': False})[0]) == list(COLUMNS)
    )
    assert list(rows_of(client, image, b'', params={'explain': True})[1]) == [*COLUMNS, 'explanation']


def test_an_image_that_breaks_the_network_stops_no_other(bundle, paths, monkeypatch):
    poison, judge = Preprocessing.of(Bundle.open(bundle).config).load(paths[0]), Predictor.judge

    def breaking(self, images):
        if any(np.array_equal(image, poison) for image in images):
            raise MemoryError
        return judge(self, images)

    with living(Settings(bundle, wait=0.2)) as client:
        monkeypatch.setattr(Predictor, 'judge', breaking)
        service = inner(client).state.service
        service.batcher.judge = service.predictor.judge
        told = [client.portal.start_task_soon(submit, service, paths[i]) for i in (1, 0, 2)]
        assert [isinstance(one.exception(60), MemoryError) for one in told] == [False, True, False]


async def submit(service: Service, path: Path) -> tuple[float, float]:
    return await service.batcher.submit(service.predictor.preprocessing.load(path))


# Pictures


def pixels(picture: str) -> np.ndarray:
    with Image.open(BytesIO(base64.b64decode(picture, validate=True))) as image:
        assert image.format == 'PNG'
        return np.asarray(image)


@pytest.fixture(scope='module')
def explained(client, paths) -> list[dict]:
    return rows_of(client, *(path.read_bytes() for path in paths), params={'explain': True})


def test_an_explained_image_comes_under_the_map_that_explain_draws(bundle, paths, explained):
    from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
    from cxr_fastai.models.inputs import to_input

    predictor, drawn = Predictor.load(bundle, engine='torch'), 0
    for path, row in zip(paths, explained, strict=True):
        if row['status'] != 'ok' or not row['explanation']['overlay']:
            continue
        image, square = pixels(row['explanation']['image']), predictor.preprocessing.load(path)
        heat = scale(enlarge(activation_maps(predictor.model, to_input(square[None])), len(square))).numpy()[0]
        heat = np.clip(predictor.preprocessing.spread(heat, *image.shape), 0, 1)
        expected = blend(Explanation(image, heat, 'image', row['p_pneumonia'], row['threshold']))
        assert np.array_equal(pixels(row['explanation']['overlay']), expected)
        drawn += 1
    assert drawn or all(row['explanation']['note'] for row in explained if row['status'] == 'ok')


def test_a_picture_tells_what_the_file_was_and_why_there_is_no_map(paths, explained):
    for path, row in zip(paths, explained, strict=True):
        shown = row['explanation']
        if shown is None:
            with pytest.raises(ImageError, match='.'):
                open_image(path)
            continue
        image = open_image(path)
        assert (shown['format'], shown['width'], shown['height']) == (image.format, image.width, image.height)
        assert shown['overlay'] or shown['note'] or row['status'] != 'ok'


def test_an_image_with_a_burned_in_name_is_judged_and_not_shown(client):
    (row,) = rows_of(client, dicom(BurnedInAnnotation='YES'), params={'explain': True})
    assert (
        row['explanation']['image'] is row['explanation']['overlay'] is None
        and 'may name the patient' in row['explanation']['note']
    )


# Facts


def test_it_lives_at_once_and_is_ready_when_the_canary_images_agree(bundle, monkeypatch):
    import threading

    held, opened = threading.Event(), Service.open

    def slow(*args, **kwargs):
        assert held.wait(60)
        return opened(*args, **kwargs)

    monkeypatch.setattr(Service, 'open', slow)
    with TestClient(make_app(Settings(bundle)), HERE) as client:
        assert client.get('/health').json() == {'status': 'ok'}
        for asked in ('/ready', '/v1/model'):
            told = client.get(asked)
            assert (told.status_code, told.json()['code'], told.headers['retry-after']) == (503, 'E_STARTING', '1')
        assert client.post('/v1/predict', files=form(encoded(GREY))).status_code == 503
        assert metrics(client)['cxr_ready'] == 0
        held.set()
        until(lambda: client.get('/ready').status_code == 200)
        assert metrics(client)['cxr_ready'] == 1


@pytest.mark.parametrize(('error', 'kind'), [(None, 'ParityError'), (RuntimeError('unforeseen'), 'RuntimeError')])
def test_a_bundle_that_cannot_be_opened_is_told_and_never_gets_ready(disagreeing, bundle, monkeypatch, error, kind):
    def broken(*_, **__):
        raise error

    if error:
        monkeypatch.setattr(Service, 'open', broken)
    failed = []
    with TestClient(make_app(Settings(bundle if error else disagreeing), failed.append), HERE) as client:
        until(lambda: failed)
        assert type(failed[0]).__name__ == kind and client.get('/ready').status_code == 503


def changed(bundle: Path, folder: Path, **files: bytes) -> Path:
    """A copy of `bundle` with other files, and a manifest that tells of them."""
    shutil.copytree(bundle, folder)
    facts = json.loads((folder / MANIFEST).read_text())['files']
    for name, data in files.items():
        (folder / name).write_bytes(data)
        facts[name] = {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)}
    (folder / MANIFEST).write_text(manifest_text(facts))
    return folder


@pytest.fixture(scope='module')
def disagreeing(bundle, tmp_path_factory) -> Path:
    """A whole bundle whose last canary image is said to be something else; opening alone looks at the first two."""
    from safetensors.numpy import save

    tensors = Bundle.open(bundle).tensors(CANARY)
    tensors['p'] = tensors['p'].copy()
    tensors['p'][-1] = 1 - tensors['p'][-1] / 2
    return changed(bundle, tmp_path_factory.mktemp('odd') / 'bundle', **{CANARY: save(tensors)})


CODES = """
import json, multiprocessing, sys
from pathlib import Path
import cxr_fastai.serving.app, uvicorn
from cxr_fastai.serving.server import listen, work
from cxr_fastai.serving.service import Settings

def code(path):
    process = multiprocessing.get_context('fork').Process(target=work, args=(Settings(path), listen('127.0.0.1', 0)))
    process.start()
    process.join()
    return process.exitcode
print(json.dumps([code(Path(path)) for path in sys.argv[1:]]))
"""


def test_the_process_ends_with_the_code_of_what_is_wrong_with_the_bundle(disagreeing, bundle, tmp_path):
    damaged = tmp_path / 'damaged'
    shutil.copytree(bundle, damaged)
    (damaged / CANARY).write_bytes(b'x' + (damaged / CANARY).read_bytes()[1:])
    (tmp_path / 'learner.pkl').write_bytes(b'')
    expected = {disagreeing: 5, damaged: 1, tmp_path / 'learner.pkl': 2, tmp_path: 2}
    told = subprocess.run([sys.executable, '-c', CODES, *expected], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == list(expected.values()), told.stderr
    assert 'Traceback' not in told.stderr and told.stderr.count('ERROR cxr_fastai.serving.server') == len(expected)


def test_only_bundles_are_served(bundle, tmp_path):
    assert find_bundle(bundle / 'model.onnx') == bundle
    for name in ('learner.pkl', 'other.onnx', 'model.safetensors'):
        with pytest.raises(UsageError, match='bundles alone'):
            find_bundle(tmp_path / name)


def metrics(client) -> dict:
    """Name of each sample, with the values of its labels -> its value."""
    told = client.get('/metrics')
    assert told.headers['content-type'].startswith('text/plain; version=0.0.4')
    found = {}
    for family in text_string_to_metric_families(told.text):
        for sample in family.samples:
            labels = ''.join(f' {value}' for name, value in sorted(sample.labels.items()))
            found[sample.name + labels] = sample.value
    return found


def test_metrics_count_requests_images_and_batches(bundle, paths):
    with living(Settings(bundle, per_client=1)) as client:
        rows_of(client, paths[0].read_bytes(), b'', b'')
        assert client.post('/v1/predict').status_code == 415
        assert client.post('/v1/predict', headers={'host': 'elsewhere'}).status_code == 400
        found = metrics(client)
    assert found['cxr_requests_total 200'] == found['cxr_requests_total 415'] == found['cxr_requests_total 400'] == 1
    assert found['cxr_images_total E_EMPTY error'] == 2 and found['cxr_request_seconds_count'] == 1
    assert found['cxr_batch_images_count'] == found['cxr_batch_images_sum'] == 1
    assert found['cxr_requests_waiting'] == 0 and found['cxr_ready'] == 1


def test_the_model_is_told_with_its_threshold_and_hash(client, bundle):
    told, known = client.get('/v1/model').json(), Bundle.open(bundle)
    assert told['sha256'] == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest() == known.identity
    assert (told['arch'], told['size'], told['threshold'], told['threshold_rule']) == (
        known.config.arch,
        known.config.size,
        known.config.threshold,
        known.config.threshold_rule,
    )
    assert told['notice'] == 'Research software, not a medical device.'


def test_the_document_of_the_interface_is_valid_and_tells_what_may_be_answered(client):
    from jsonschema import Draft202012Validator

    document = client.get('/openapi.json').json()
    assert document['openapi'].startswith('3.1')
    for schema in document['components']['schemas'].values():
        Draft202012Validator.check_schema(schema)
    asked = document['paths']['/v1/predict']['post']
    assert set(asked['responses']) == {'200', '400', '401', '413', '415', '422', '429', '503'}
    assert 'text/plain' in document['paths']['/metrics']['get']['responses']['200']['content']
    assert set(document['paths']) == {'/v1/predict', '/v1/model', '/health', '/ready', '/metrics'}


# Refusals


def refused(told, status: int, code: str) -> bool:
    """Whether an answer is that refusal, in JSON, without what the program looks like inside."""
    assert told.headers['content-type'] == 'application/json' and set(told.json()) == {'code', 'message'}
    assert 'Traceback' not in told.text and 'retry-after' in told.headers or status not in (429, 503)
    return (told.status_code, told.json()['code']) == (status, code)


def body(*parts: bytes, end: bytes = b'--b--\r\n') -> bytes:
    """A form with the boundary b."""
    head = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    return b''.join(head + part + b'\r\n' for part in parts) + end


MULTIPART = {'content-type': 'multipart/form-data; boundary=b'}
FIELD = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
FORMS = {
    'no boundary': (b'', {'content-type': 'multipart/form-data'}, 400, 'E_FORM'),
    'another boundary': (body(b'x'), {'content-type': 'multipart/form-data; boundary=c'}, 400, 'E_FORM'),
    'no type': (body(b'x'), {}, 415, 'E_MEDIA_TYPE'),
    'JSON': (b'{}', {'content-type': 'application/json'}, 415, 'E_MEDIA_TYPE'),
    'compressed': (body(b'x'), MULTIPART | {'content-encoding': 'gzip'}, 415, 'E_ENCODING'),
    'nothing': (b'', MULTIPART, 422, 'E_NO_IMAGES'),
    'an empty form': (body(), MULTIPART, 422, 'E_NO_IMAGES'),
    'a truncated part': (body(b'x', end=b'')[:-3], MULTIPART, 422, 'E_CUT'),
    'a truncated second part': (body(b'x', b'y', end=b''), MULTIPART, 422, 'E_CUT'),
    'text in the place of an image': (FIELD.replace(b'x', b'images') + b'--b--\r\n', MULTIPART, 422, 'E_NO_IMAGES'),
    'a part without a name': (b'--b\r\nContent-Disposition: form-data\r\n\r\n\r\n--b--\r\n', MULTIPART, 400, 'E_FORM'),
    'a broken header': (b'--b\r\n\x00\xff\r\n\r\n--b--\r\n', MULTIPART, 400, 'E_FORM'),
    '65 images': (body(*[b'x'] * 65), MULTIPART, 413, 'E_TOO_MANY'),
    '1001 images': (body(*[b'x'] * 1001), MULTIPART, 413, 'E_TOO_MANY'),
    '10^5 fields': (FIELD * 10**5 + b'--b--\r\n', MULTIPART, 413, 'E_TOO_MANY'),
}


@pytest.mark.parametrize('kind', FORMS)
def test_a_form_that_is_none_is_refused(client, kind):
    content, headers, status, code = FORMS[kind]
    assert refused(client.post('/v1/predict', content=content, headers=headers), status, code)


def test_sixty_four_images_are_not_too_many(client):
    assert len(rows_of(client, *[b''] * 64)) == 64


@pytest.mark.parametrize('length', [True, False])
def test_a_body_over_the_limit_is_refused_with_and_without_its_length(bundle, length):
    sent = []

    def parts():
        for i in range(40):
            sent.append(i)
            yield b'x' * 1000

    with living(Settings(bundle, limits=Limits(body=10_000))) as client:
        content = b''.join(parts()) if length else parts()
        assert refused(client.post('/v1/predict', content=content, headers=MULTIPART), 413, 'E_BODY')
        assert client.post('/v1/predict', files=form(b'x' * 9000)).status_code == 200


def test_options_and_routes_that_do_not_exist_are_refused_in_json(client):
    assert refused(client.post('/v1/predict?explain=maybe', files=form(b'')), 422, 'E_OPTION')
    assert refused(client.get('/nowhere'), 404, 'E_NOT_FOUND')
    told = client.get('/v1/predict')
    assert refused(told, 405, 'E_METHOD') and told.headers['allow'] == 'POST'


def test_what_nobody_foresaw_is_a_503_and_a_line_without_what_was_sent(client, monkeypatch, caplog):
    def broken(self, name, read):
        raise RuntimeError(f'{PATIENT} in {read}')

    monkeypatch.setattr(Predictor, 'take', broken)
    with caplog.at_level(logging.DEBUG):
        told = client.post('/v1/predict', files=form(dicom(PatientName=PATIENT), name=NAME))
    assert refused(told, 503, 'E_INTERNAL') and told.headers['x-request-id'] in told.json()['message']
    lines = [record.getMessage() for record in caplog.records if record.name == 'cxr_fastai.serving.server']
    assert len(lines) == 2 and 'RuntimeError at test_api.py:' in lines[0] and 'status=503' in lines[1]
    assert PATIENT not in caplog.text and 'Traceback' not in caplog.text


# Doors


@pytest.mark.parametrize(
    ('host', 'code'),
    [
        ('127.0.0.1', 200),
        ('localhost:8000', 200),
        ('LOCALHOST', 200),
        ('[::1]:8000', 200),
        ('xray.hospital.example', 200),
        ('elsewhere.example', 400),
        ('127.0.0.1.elsewhere.example', 400),
        ('localhost.', 400),
        ('', 400),
        ('[', 400),
    ],
)
def test_it_goes_by_its_own_names_alone(named, host, code):
    told = named.get('/health', headers={'host': host})
    assert told.status_code == code and (code == 200 or refused(told, 400, 'E_HOST'))


@pytest.fixture(scope='module')
def named(bundle):
    """A service with a name of its own, a token, and one request at a time for each client."""
    with living(Settings(bundle, hosts=('XRay.hospital.example',), token='0123456789abcdef', per_client=1)) as client:
        yield client


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
def test_pages_of_other_sites_may_not_send_images(client, headers):
    assert refused(client.post('/v1/predict', files=form(b''), headers=headers), 400, 'E_ORIGIN')


def test_its_own_page_may_send_images_and_no_other_site_is_let_in(client):
    own = client.post('/v1/predict', files=form(b''), headers={'origin': HERE, 'sec-fetch-site': 'same-origin'})
    asked = client.options(
        '/v1/predict', headers={'origin': 'https://elsewhere.example', 'access-control-request-method': 'POST'}
    )
    assert own.status_code == 200 and refused(asked, 405, 'E_METHOD')
    for told in (own, asked):
        assert not [name for name in told.headers if name.startswith('access-control')]


@pytest.mark.parametrize(
    'told',
    [
        None,
        'Bearer wrong',
        'Bearer 0123456789abcdeX',
        '0123456789abcdef',
        'Bearer \xe9',
        'bearer 0123456789abcdef ',
        'Basic 0123456789abcdef',
    ],
)
def test_without_the_token_there_is_no_answer(named, told):
    headers = {'authorization': told.encode('latin-1')} if told else {}
    for asked in (
        named.get('/v1/model', headers=headers),
        named.get('/metrics', headers=headers),
        named.post('/v1/predict', files=form(b''), headers=headers),
    ):
        assert refused(asked, 401, 'E_TOKEN') and asked.headers['www-authenticate'] == 'Bearer'


def test_the_token_opens_and_health_needs_none(named):
    headers = {'authorization': 'Bearer 0123456789abcdef'}
    assert named.get('/v1/model', headers=headers).status_code == 200
    assert rows_of(named, b'', headers=headers)[0]['code'] == 'E_EMPTY'
    for asked in ('/health', '/ready', '/openapi.json'):
        assert named.get(asked).status_code == 200


def test_tokens_are_compared_in_a_time_that_tells_nothing(named, monkeypatch):
    import hmac

    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, 'compare_digest', lambda *pair: compared.append(pair) or compare(*pair))
    named.get('/v1/model', headers={'authorization': 'Bearer no'})
    assert compared == [(b'Bearer no', b'Bearer 0123456789abcdef')]


def test_tokens_are_not_logged(named, caplog):
    with caplog.at_level(logging.DEBUG):
        for told in ('ZqRightXv', '0123456789abcdef'):
            named.post('/v1/predict', files=form(b''), headers={'authorization': f'Bearer {told}'})
    assert caplog.text.count('route=') == 2
    for word in ('Bearer', 'ZqRightXv', '0123456789abcdef'):
        assert word not in caplog.text


# What stays


def test_file_names_and_patients_are_neither_logged_nor_told(client, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    images = [dicom(PatientName=PATIENT), dicom(Modality=PATIENT), dicom(NumberOfFrames='2', PatientID=PATIENT), b'']
    with caplog.at_level(logging.DEBUG):
        told = client.post('/v1/predict?explain=true', files=form(*images, name=NAME), headers={'x-patient': PATIENT})
        client.request(PATIENT.upper(), f'/{PATIENT}?{PATIENT}')
    assert told.status_code == 200 and not list(tmp_path.iterdir())
    ours = [record.getMessage() for record in caplog.records if record.name.startswith('cxr_fastai')]
    line = next(one for one in ours if 'method=POST' in one)
    assert f'id={told.headers["x-request-id"]} method=POST route=/v1/predict bytes=' in line
    assert 'images=4 formats=?,DICOM status=200 ms=' in line
    for word in (PATIENT, PATIENT.upper(), 'ZqFileXv', 'testclient'):
        assert word not in told.text and not [one for one in ours if word in one]


def test_every_answer_carries_an_id_and_headers_that_keep_it_at_home(client):
    for told in (client.get('/health'), client.get('/nowhere'), client.post('/v1/predict')):
        assert len(told.headers['x-request-id']) == 12 and told.headers['cache-control'] == 'no-store'
        assert told.headers['x-content-type-options'] == 'nosniff'
        assert "default-src 'none'" in told.headers['content-security-policy']


LOADED = """
import json, sys, time
from pathlib import Path
from starlette.testclient import TestClient
from cxr_fastai.serving.service import Settings
from cxr_fastai.serving.app import make_app
with TestClient(make_app(Settings(Path(sys.argv[1]))), 'http://127.0.0.1') as client:
    while client.get('/ready').status_code != 200: time.sleep(.01)
    image = [('images', ('a', Path(sys.argv[2]).read_bytes()))]
    assert client.post('/v1/predict', files=image).status_code == 200
    print(json.dumps([name for name in sys.argv[3:] if name in sys.modules]))
"""


def test_a_process_that_explains_nothing_holds_no_fastai_no_pickles_no_pandas_and_no_torch(bundle, paths):
    names = ['fastai', 'cxr_fastai.inference.pickles', 'cxr_fastai.training.learner', 'pandas', 'typer', 'torch']
    told = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', LOADED, bundle, paths[0], *names],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert json.loads(told.stdout) == []

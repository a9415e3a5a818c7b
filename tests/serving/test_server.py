"""The server withstands slow, broken and numerous requests, clients that leave, and signals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from bundlefiles import change_tensors, seal
from imagefiles import dicom, encoded, smooth
from services import (
    HEALTH,
    LOCAL,
    PATIENCE,
    PATIENT,
    ProcessServer,
    connected,
    form,
    is_closed,
    is_ready,
    post,
    read_reply,
    request_for,
    request_head,
    running_server,
    send,
    wait_until,
)

from cxr_fastai.cli import main
from cxr_fastai.inference.bundle import SELFTEST, Bundle
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.serving.app import Settings
from cxr_fastai.serving.server import Server
from cxr_fastai.serving.uploads import Limits

IMAGE = encoded(smooth(96, 96))


@pytest.fixture(scope='module')
def impatient(bundle):
    """A server that gives clients half a second to send a request of at most 100 kB."""
    with running_server(Server(Settings(bundle, port=0, send_seconds=0.5, limits=Limits(body=10**5)))) as server:
        yield server


@pytest.fixture(scope='module')
def patient(bundle):
    """A server that waits long for a request of at most 100 kB."""
    with running_server(Server(Settings(bundle, port=0, send_seconds=PATIENCE, limits=Limits(body=10**5)))) as server:
        yield server


@pytest.fixture
def small(bundle):
    """A server that answers two requests at a time and shuts down at once."""
    with running_server(Server(Settings(bundle, port=0, max_requests=2, drain_seconds=0.2))) as server:
        yield server


# Large, broken and slow requests


def test_a_body_that_is_announced_too_large_is_rejected_before_it_is_sent(patient):
    status, error, _ = send(patient.port, request_head('Content-Length: 100000000'))
    assert (status, error['code']) == (413, 'E_BODY')


@pytest.mark.parametrize('closing', [(), ('Connection: close',)], ids=['keep-alive', 'close'])
@pytest.mark.parametrize('chunked', [False, True], ids=['length', 'chunked'])
def test_a_client_that_sends_all_of_a_large_body_can_read_the_error(patient, closing, chunked):
    body = form(b'x' * 8_000_000)
    framing = f'Content-Length: {len(body)}'
    if chunked:
        framing = 'Transfer-Encoding: chunked'
        body = f'{len(body):x}\r\n'.encode() + body + b'\r\n0\r\n\r\n'
    with connected(patient.port, request_head(framing, *closing), body) as connection:
        status, error, _ = read_reply(connection)
        assert (status, error['code']) == (413, 'E_BODY')
        if not closing:
            connection.sendall(request_for(IMAGE))
            assert read_reply(connection)[0] == 200


@pytest.mark.parametrize(
    ('header', 'expected'), [('Origin: http://elsewhere.example', 400), ('Content-Encoding: gzip', 415)]
)
def test_other_errors_reach_a_client_that_is_still_sending(patient, header, expected):
    body = form(b'x' * 8_000_000)
    head = request_head(f'Content-Length: {len(body)}', 'Connection: close', header)
    assert send(patient.port, head, body)[0] == expected


def test_an_endless_body_gets_an_error_and_is_cut_at_the_deadline(impatient):
    chunk = b'8000\r\n' + b'x' * 0x8000 + b'\r\n'
    with connected(impatient.port, request_head('Transfer-Encoding: chunked'), *[chunk] * 4) as connection:
        assert read_reply(connection)[1]['code'] == 'E_BODY'
        wait_until(lambda: is_closed(connection, chunk))
    assert is_ready(impatient.port)


BROKEN_REQUESTS = {
    'two lengths': request_head('Content-Length: 5', 'Content-Length: 6'),
    'negative length': request_head('Content-Length: -1'),
    'length of 5000 digits': request_head(f'Content-Length: {"9" * 5000}'),
    'unknown encoding': request_head('Transfer-Encoding: gzip'),
    'no host': b'POST /v1/predict HTTP/1.1\r\n\r\n',
    'two hosts': request_head('Host: elsewhere.example'),
    'line without a colon': request_head('nonsense'),
    'header of 1 MB': request_head('X: ' + 'x' * 10**6),
    'control characters in a header': request_head('X: a\nb\0c'),
    'not HTTP': b'\x16\x03\x01\x02\x00\x01\x00' + b'\r\n' * 4,
    'chunk without a size': request_head('Transfer-Encoding: chunked') + b'many\r\n',
}


@pytest.mark.parametrize('kind', BROKEN_REQUESTS)
def test_a_request_that_is_not_http_gets_an_error_status(patient, kind):
    status, error, _ = send(patient.port, BROKEN_REQUESTS[kind])
    assert status in (400, 431, 501) and error == {}
    assert is_ready(patient.port)


def test_a_websocket_is_rejected(patient):
    lines = (
        'Upgrade: websocket',
        'Connection: Upgrade',
        'Sec-WebSocket-Version: 13',
        'Sec-WebSocket-Key: MTIzNDU2Nzg5MTIzNDU2Nw==',
    )
    head = '\r\n'.join(('GET /v1/predict HTTP/1.1', f'Host: {LOCAL}', *lines, '', ''))
    with connected(patient.port, head.encode()) as connection:
        assert connection.recv(100).startswith(b'HTTP/1.1 403')


def test_a_connection_can_send_requests_for_longer_than_the_deadline_of_one(impatient):
    body = form(IMAGE)
    start = time.monotonic()
    with connected(impatient.port) as connection:
        while time.monotonic() < start + 0.8:
            connection.sendall(request_head(*[f'Content-Length: {len(body)}'] * 2) + body)
            assert read_reply(connection)[0] == 200


INCOMPLETE_REQUESTS = {
    'nothing': b'',
    'request line': b'POST /v1/pre',
    'headers': request_head()[:-2],
    'body': request_head('Content-Length: 90000'),
    'chunks': request_head('Transfer-Encoding: chunked') + b'8000\r\n',
    'pipelined headers': HEALTH + request_head()[:-2],
    'pipelined body': HEALTH + request_head('Content-Length: 90000'),
}


@pytest.mark.parametrize('kind', INCOMPLETE_REQUESTS)
def test_slow_clients_are_cut_at_the_deadline_while_others_are_served(impatient, kind):
    start = time.monotonic()
    request = INCOMPLETE_REQUESTS[kind]
    with connected(impatient.port, request) as silent, connected(impatient.port, request) as dribbling:
        assert post(impatient.port, IMAGE)[0] == 200
        wait_until(lambda: is_closed(silent))
        wait_until(lambda: is_closed(dribbling, b'x'))
    assert time.monotonic() - start > 0.4


def test_a_slow_body_gets_an_error_before_it_is_cut(impatient):
    status, error, _ = send(impatient.port, request_head('Content-Length: 90000'))
    assert (status, error['code']) == (408, 'E_SLOW')


@pytest.mark.skipif(
    not hasattr(socket, 'TCP_USER_TIMEOUT'), reason='only Linux closes connections that are not read; run it on Linux'
)
def test_a_client_that_reads_no_response_is_cut(impatient):
    request = f'GET /docs HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n'.encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.1)
        connection.connect((LOCAL, impatient.port))
        wait_until(lambda: is_cut_while_sending(connection, request))
    assert is_ready(impatient.port)


def is_cut_while_sending(connection: socket.socket, request: bytes) -> bool:
    try:
        connection.sendall(request)
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_ten_incomplete_requests_do_not_block_others(patient):
    requests = list(INCOMPLETE_REQUESTS.values())[:5] * 2
    connections = [socket.create_connection((LOCAL, patient.port), timeout=PATIENCE) for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
    for _ in range(3):
        assert post(patient.port, IMAGE)[0] == 200
    for connection in connections:
        connection.close()


# Many requests, and clients that leave


def test_a_full_service_tells_clients_when_to_try_again(small):
    model = small.hold_model()
    with connected(small.port, request_for(IMAGE)) as first, connected(small.port, request_for(IMAGE)) as second:
        wait_until(lambda: small.service.active_requests == 2)
        status, error, headers = post(small.port, IMAGE)
        assert (status, error['code'], headers['retry-after']) == (503, 'E_BUSY', '1')
        model.release()
        assert read_reply(first)[0] == read_reply(second)[0] == 200
    assert post(small.port, IMAGE)[0] == 200 and small.service.active_requests == 0


def test_the_images_of_a_client_that_leaves_are_dropped(small):
    model = small.hold_model()
    with connected(small.port, request_for(IMAGE)) as first:
        wait_until(lambda: model.batches)
        with connected(small.port, request_for(*[IMAGE] * 5)):
            wait_until(lambda: small.service.active_requests == 2)
        wait_until(lambda: small.service.active_requests == 1)
        with connected(small.port, request_for(IMAGE)) as third:
            wait_until(lambda: small.service.active_requests == 2)
            model.release()
            assert read_reply(first)[0] == read_reply(third)[0] == 200
    assert sum(model.batches) == 2


def test_a_client_that_leaves_during_the_computation_makes_room_for_others(small):
    model = small.hold_model()
    with connected(small.port, request_for(IMAGE)):
        wait_until(lambda: model.batches)
    wait_until(lambda: small.service.active_requests == 0)
    model.release()
    assert post(small.port, IMAGE)[0] == 200


def test_too_many_open_requests_are_rejected_while_pages_are_served(small):
    incomplete = [connected(small.port, request_head('Content-Length: 90000')) for _ in range(4)]
    for connection in incomplete:
        connection.__enter__()
    try:
        status, error, _ = wait_until(lambda: busy_reply(small.port))
        assert (status, error['code']) == (503, 'E_BUSY') and is_ready(small.port)
    finally:
        for connection in incomplete:
            connection.__exit__(None, None, None)
    wait_until(lambda: post(small.port, IMAGE)[0] == 200)


def busy_reply(port: int):
    reply = post(port, IMAGE)
    return reply if reply[0] != 200 else None


def test_a_prediction_that_takes_too_long_is_cancelled(bundle):
    with running_server(Server(Settings(bundle, port=0, answer_seconds=0.2))) as server:
        server.hold_model()
        status, error, headers = post(server.port, IMAGE)
        assert (status, error['code'], headers['retry-after']) == (503, 'E_TIMEOUT', '5')
        assert server.service.active_requests == 0


def test_requests_that_cannot_finish_before_the_shutdown_get_a_503(small):
    model = small.hold_model()
    with connected(small.port, request_for(IMAGE)) as connection:
        wait_until(lambda: model.batches)
        small.server.stop()
        status, error, headers = read_reply(connection)
        assert (status, error['code'], headers['retry-after']) == (503, 'E_ENDING', '5')


# The command in a process


@pytest.fixture(scope='module')
def process(bundle, tmp_path_factory):
    """The command `serve` as a user starts it."""
    process = ProcessServer(bundle, tmp_path_factory.mktemp('server'))
    wait_until(lambda: is_ready(process.port))
    yield process
    process.kill()


@pytest.fixture(scope='module')
def known_images(bundle, images):
    """Images with their probabilities."""
    paths = sorted((images / 'test').rglob('*.jpeg'))[:8]
    predictor = replace(Predictor.load(bundle, engine='onnx'), gate=None)
    rows = predictor.predict(paths, batch_size=1)
    return [(path.read_bytes(), row['p_pneumonia']) for path, row in zip(paths, rows, strict=True)]


def is_right(predictions: dict, p: float) -> bool:
    """True if the only row has the probability `p`, or was rejected by the input gate."""
    (row,) = predictions['images']
    return row['status'] == 'rejected' or abs(row['p_pneumonia'] - p) <= 1e-6


@pytest.mark.parametrize('clients', [80, pytest.param(200, marks=pytest.mark.slow)])
def test_many_requests_at_once_are_answered_correctly_or_sent_away(process, known_images, clients):
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda i: post(process.port, known_images[i % len(known_images)][0]), range(clients)))
    assert {status for status, *_ in replies} <= {200, 503}
    for i, (status, content, headers) in enumerate(replies):
        if status == 200:
            assert is_right(content, known_images[i % len(known_images)][1])
        else:
            assert content['code'] == 'E_BUSY' and headers['retry-after'] == '1'
    assert sum(status == 200 for status, *_ in replies) >= 32 and is_ready(process.port)


@pytest.mark.slow
def test_random_requests_get_only_documented_responses(process, tmp_path):
    options = '--checks all --mode all --max-examples 8 --seed 1 --generation-database none --no-color'
    command = [sys.executable, '-m', 'schemathesis.cli', 'run', f'http://{LOCAL}:{process.port}/openapi.json']
    done = subprocess.run([*command, *options.split()], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0 and 'No issues found' in done.stdout, done.stdout + done.stderr


def images_with_names() -> list[bytes]:
    """DICOM files with the name of a patient: intact, rejected, damaged, and too large for small buffers."""
    named = dicom(PatientName=PATIENT, PatientID=PATIENT, StudyDate=PATIENT, PatientAge=PATIENT)
    return [
        named,
        named[:-900],
        named.replace(b'DX', b'CT'),
        dicom(Modality=PATIENT),
        dicom(NumberOfFrames='2'),
        named.replace(b'LO', b'??'),
        named + b'\0' * 2_000_000,
        PATIENT.encode(),
        b'',
    ]


def test_uploads_leave_no_file_on_the_disk_and_no_name_in_the_log(process):
    seen_files = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen_files.update(process.temporary.iterdir(), process.home.iterdir())

    watching = threading.Thread(target=watch)
    watching.start()
    images = images_with_names()
    try:
        status, content, _ = post(process.port, *images, name=f'../../{PATIENT}', lines=(f'X-Patient: {PATIENT}',))
        with connected(process.port, request_for(*images)[:-9]):
            pass
        assert post(process.port, *[b''] * 65)[0] == 413
        send(process.port, request_head('Content-Length: 0', f'User-Agent: {PATIENT}', path=f'/{PATIENT}?{PATIENT}'))
        send(process.port, f'{PATIENT} HTTP/1.1\r\n\r\n'.encode())
    finally:
        done.set()
        watching.join()
    assert status == 200 and len(content['images']) == 9 and PATIENT not in json.dumps(content)
    assert not seen_files and not list(process.temporary.iterdir()) and not list(process.home.iterdir())
    for word in (PATIENT, 'Traceback', 'Warning'):
        assert word not in process.log
    assert sum(LOCAL in line for line in process.log.splitlines()) == 1  # the line with the address of the service


def test_at_sigterm_under_load_every_response_is_complete_and_right(bundle, tmp_path, known_images):
    process = ProcessServer(bundle, tmp_path)
    port = process.port
    wait_until(lambda: is_ready(port))
    replies = []
    ended = threading.Event()

    def keep_posting(i: int) -> None:
        while not ended.is_set():
            with suppress(ConnectionError):
                replies.append((i, *post(port, known_images[i][0])))

    try:
        with ThreadPoolExecutor(len(known_images)) as pool:
            clients = [pool.submit(keep_posting, i) for i in range(len(known_images))]
            wait_until(lambda: len(replies) > 40)
            start = time.monotonic()
            process.process.terminate()
            try:
                exit_code = process.process.wait(PATIENCE)
            finally:
                ended.set()
            for client in clients:
                client.exception()
    finally:
        process.kill()
    assert exit_code == 0 and time.monotonic() - start < 10
    for i, status, content, _ in replies:
        assert status in (200, 503) and (status == 503 or is_right(content, known_images[i][1]))
    assert 'Traceback' not in process.log


@pytest.mark.parametrize('number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_the_model_loads_ends_the_process_without_a_traceback(bundle, tmp_path, number):
    process = ProcessServer(bundle, tmp_path)
    try:
        assert process.port
        os.killpg(process.process.pid, number)
        assert process.process.wait(PATIENCE) == 0 and 'Traceback' not in process.log
    finally:
        process.kill()


def test_the_exit_code_says_why_a_bundle_cannot_be_served(bundle, tmp_path, capfd):
    failing = tmp_path / 'failing'
    damaged = tmp_path / 'damaged'
    for folder in (failing, damaged):
        shutil.copytree(bundle, folder)
    p = Bundle.open(bundle).selftest.p.copy()
    p[-1] = 1 - p[-1] / 2  # not the first image: opening a bundle checks only two
    change_tensors(failing, SELFTEST, p=p)
    seal(failing)
    (damaged / SELFTEST).write_bytes(b'x' + (damaged / SELFTEST).read_bytes()[1:])
    (tmp_path / 'learner.pkl').write_bytes(b'')
    expected = {failing: 5, damaged: 1, tmp_path / 'learner.pkl': 2, tmp_path: 2}
    for path, code in expected.items():
        assert main(['serve', str(path), '--port', '0']) == code
        output, error = capfd.readouterr()
        assert error.count('error: ') == 1 and 'Traceback' not in error
        assert code != 2 or 'serving' not in output


def test_an_address_in_use_is_an_error(bundle, capfd):
    with socket.create_server((LOCAL, 0)) as other:
        port = other.getsockname()[1]
        assert main(['serve', str(bundle), '--port', str(port)]) == 2
    assert f'--port {port}: ' in capfd.readouterr().err

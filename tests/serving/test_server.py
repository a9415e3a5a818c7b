"""What the service bears: slow, broken and countless requests, signals and kills, asked through sockets."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from imagefiles import dicom, encoded, smooth

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.serving.server import listen, make_server, serve
from cxr_fastai.serving.service import Limits, Settings

LOCAL = '127.0.0.1'
PATIENT = 'ZqPatientXv'
"""A name that stands nowhere else."""
PART = 'Content-Disposition: form-data; name="images"; filename="{}"\r\n\r\n'
LATE = 60
"""Seconds after which a test gives up waiting, on a machine that is busy."""


def until(found):
    """What `found` gives, once it is true."""
    deadline = time.monotonic() + LATE
    while not (value := found()):
        assert time.monotonic() < deadline, 'it never came'
        time.sleep(0.005)
    return value


def form(*images: bytes, name: str = 'a') -> bytes:
    """The images as a form with the boundary b."""
    return b''.join(b'--b\r\n' + PART.format(name).encode() + image + b'\r\n' for image in images) + b'--b--\r\n'


def head(*lines: str, path: str = '/v1/predict') -> bytes:
    """The beginning of a request with a form."""
    first = (f'POST {path} HTTP/1.1', f'Host: {LOCAL}', 'Content-Type: multipart/form-data; boundary=b')
    return '\r\n'.join((*first, *lines, '', '')).encode()


def whole(*images: bytes, lines: tuple[str, ...] = (), **how) -> bytes:
    """A request for predictions."""
    data = form(*images, **how)
    return head(f'Content-Length: {len(data)}', *lines) + data


@contextmanager
def connected(port: int, *sent: bytes):
    """A socket that has sent something."""
    with socket.create_connection((LOCAL, port), timeout=LATE) as sock:
        for part in sent:
            sock.sendall(part)
        yield sock


def answer(sock: socket.socket) -> tuple[int, dict, dict[str, str]]:
    """The next answer: status, what its JSON says, headers. Raises where it is not whole."""
    told = http.client.HTTPResponse(sock)
    told.begin()
    return told.status, json.loads(told.read()), {name.lower(): value for name, value in told.getheaders()}


def ask(port: int, *sent: bytes) -> tuple[int, dict, dict[str, str]]:
    with connected(port, *sent) as sock:
        return answer(sock)


def post(port: int, *images: bytes, **how) -> tuple[int, dict, dict[str, str]]:
    return ask(port, whole(*images, **how))


def lives(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return ask(port, f'GET /ready HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n'.encode())[0] == 200
    return False


def cut(sock: socket.socket, *more: bytes) -> bool:
    """Whether the other side has ended the connection, asked by sending it `more`."""
    try:
        for part in more:
            sock.sendall(part)
        sock.settimeout(0.01)
        return not sock.recv(2**16)
    except TimeoutError:
        return False
    except OSError:
        return True


# A server in a thread of this process


class Held:
    """An engine that waits until it is let go, and knows how many images it was given at a time."""

    def __init__(self, judge):
        self.judge, self.free, self.sizes = judge, threading.Event(), []

    def __call__(self, images):
        self.sizes.append(len(images))
        assert self.free.wait(LATE)
        return self.judge(images)


class Served:
    """A server: its `port` and, once it is ready, its `service`."""

    def __init__(self, settings: Settings):
        self.server, self.listening = make_server(settings), listen(LOCAL, 0)
        self.port = self.listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))

    @property
    def service(self):
        app = self.server.config.app
        while not hasattr(app, 'state'):
            app = app.app
        return app.state.service

    def hold(self) -> Held:
        """Let its engine wait."""
        held = self.service.batcher.judge = Held(self.service.predictor.judge)
        return held


@contextmanager
def served(settings: Settings):
    made = Served(settings)
    made.thread.start()
    try:
        until(lambda: lives(made.port))
        yield made
    finally:
        made.server.should_exit = True
        if isinstance(made.service.batcher.judge, Held):
            made.service.batcher.judge.free.set()
        made.thread.join(LATE)


@pytest.fixture(scope='module')
def quick(bundle):
    """A service that gives a client half a second to send a request."""
    with served(Settings(bundle, sending=0.5, limits=Limits(body=10**5))) as made:
        yield made


@pytest.fixture(scope='module')
def patient(bundle):
    """A service that waits long for a request of at most 100 kB."""
    with served(Settings(bundle, sending=LATE, limits=Limits(body=10**5))) as made:
        yield made


@pytest.fixture
def small(bundle):
    """A service where two may wait, and that ends at once."""
    with served(Settings(bundle, queue=2, drain=0.2)) as made:
        yield made


IMAGE = encoded(smooth(96, 96))


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(patient):
    with connected(patient.port, head('Content-Length: 100000000')) as sock:
        status, told, _ = answer(sock)
        assert (status, told['code']) == (413, 'E_BODY')


@pytest.mark.parametrize('closing', [(), ('Connection: close',)])
@pytest.mark.parametrize('chunked', [False, True])
def test_who_sends_all_of_a_body_that_is_too_large_gets_to_read_why_not(patient, closing, chunked):
    data = form(b'x' * 8_000_000)
    length = 'Transfer-Encoding: chunked' if chunked else f'Content-Length: {len(data)}'
    if chunked:
        data = f'{len(data):x}\r\n'.encode() + data + b'\r\n0\r\n\r\n'
    with connected(patient.port, head(length, *closing), data) as sock:
        status, told, _ = answer(sock)
        assert (status, told['code']) == (413, 'E_BODY')
        if closing:
            return
        sock.sendall(whole(IMAGE))
        assert answer(sock)[0] == 200


def test_other_refusals_reach_a_client_who_is_still_sending_too(patient):
    data = form(b'x' * 8_000_000)
    for lines, status in ((('Origin: http://elsewhere.example',), 400), (('Content-Encoding: gzip',), 415)):
        told = ask(patient.port, head(f'Content-Length: {len(data)}', 'Connection: close', *lines), data)
        assert told[0] == status


def test_endless_chunks_are_answered_while_they_come_and_cut_after_the_deadline(quick):
    chunk = b'8000\r\n' + b'x' * 0x8000 + b'\r\n'
    with connected(quick.port, head('Transfer-Encoding: chunked'), *[chunk] * 4) as sock:
        assert answer(sock)[1]['code'] == 'E_BODY'
        until(lambda: cut(sock, chunk))
    assert lives(quick.port)


BROKEN = {
    'two lengths': head('Content-Length: 5', 'Content-Length: 6'),
    'a negative length': head('Content-Length: -1'),
    'a length of many digits': head(f'Content-Length: {"9" * 5000}'),
    'no such encoding': head('Transfer-Encoding: gzip'),
    'no host': b'POST /v1/predict HTTP/1.1\r\n\r\n',
    'two hosts': head('Host: elsewhere.example'),
    'a line without a colon': head('nonsense'),
    'a header of 1 MB': head('X: ' + 'x' * 10**6),
    'an end of a line in a header': head('X: a\nb\0c'),
    'no HTTP': b'\x16\x03\x01\x02\x00\x01\x00' + b'\r\n' * 4,
    'a chunk without a size': head('Transfer-Encoding: chunked') + b'many\r\n',
}


@pytest.mark.parametrize('kind', BROKEN)
def test_what_is_no_request_is_refused_in_json(patient, kind):
    status, told, headers = ask(patient.port, BROKEN[kind])
    assert status == 400 and set(told) == {'code', 'message'} and headers['content-type'] == 'application/json'
    assert lives(patient.port)


def test_a_length_told_twice_alike_and_many_requests_on_a_connection_are_fine(quick):
    data, began = form(IMAGE), time.monotonic()
    with connected(quick.port) as sock:
        while time.monotonic() < began + 0.8:  # beyond the deadline of each
            sock.sendall(head(*[f'Content-Length: {len(data)}'] * 2) + data)
            assert answer(sock)[0] == 200


HEALTH = b'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n'
"""A whole request that the next one follows in the same packet."""


@pytest.mark.parametrize(
    'sent',
    [
        b'',
        b'POST /v1/pre',
        head()[:-2],
        head('Content-Length: 90000'),
        head('Transfer-Encoding: chunked') + b'8000\r\n',
        HEALTH + head()[:-2],
        HEALTH + head('Content-Length: 90000'),
    ],
)
@pytest.mark.parametrize('more', [b'', b'x'])
def test_a_slow_request_is_cut_after_the_deadline_while_others_are_answered(quick, sent, more):
    began = time.monotonic()
    with connected(quick.port, sent) as sock:
        assert post(quick.port, IMAGE)[0] == 200
        until(lambda: cut(sock, more))
    assert time.monotonic() - began > 0.4


def test_ten_half_open_sockets_leave_it_answering(patient):
    halves = [b'', b'G', head()[:-2], head('Content-Length: 90000'), head('Content-Length: 90000') + b'--b\r\n']
    opened = [socket.create_connection((LOCAL, patient.port), timeout=LATE) for _ in range(10)]
    for sock, half in zip(opened, halves * 2, strict=True):
        sock.sendall(half)
    for _ in range(3):
        assert post(patient.port, IMAGE)[0] == 200
    for sock in opened:
        sock.close()
    until(lambda: len(patient.server.server_state.connections) == 0)


def test_who_comes_while_as_many_wait_as_may_is_told_when_to_try_again(small):
    held = small.hold()
    with connected(small.port, whole(IMAGE)) as one, connected(small.port, whole(IMAGE)) as two:
        until(lambda: small.service.waiting == 2)
        status, told, headers = post(small.port, IMAGE)
        assert (status, told['code'], headers['retry-after']) == (503, 'E_BUSY', '1')
        held.free.set()
        assert answer(one)[0] == answer(two)[0] == 200
    assert post(small.port, IMAGE)[0] == 200 and small.service.waiting == 0


def test_the_work_of_a_client_who_leaves_is_dropped_and_its_place_is_free(small):
    held = small.hold()
    with connected(small.port, whole(IMAGE)) as first:
        until(lambda: held.sizes)
        with connected(small.port, whole(*[IMAGE] * 5)):
            until(lambda: small.service.waiting == 2)
        until(lambda: small.service.waiting == 1)
        with connected(small.port, whole(IMAGE)) as third:
            until(lambda: small.service.waiting == 2)
            held.free.set()
            assert answer(first)[0] == answer(third)[0] == 200
    assert sum(held.sizes) == 2  # the five of the second were never computed


def test_a_client_who_leaves_during_its_own_computation_frees_its_place(small):
    held = small.hold()
    with connected(small.port, whole(IMAGE)):
        until(lambda: held.sizes)
    until(lambda: small.service.waiting == 0)
    held.free.set()
    assert post(small.port, IMAGE)[0] == 200


def test_an_answer_that_takes_too_long_is_given_up(bundle):
    with served(Settings(bundle, seconds=0.2)) as made:
        made.hold()
        status, told, headers = post(made.port, IMAGE)
        assert (status, told['code'], headers['retry-after']) == (503, 'E_TIMEOUT', '5') and made.service.waiting == 0


def test_one_client_cannot_take_every_place(bundle):
    with served(Settings(bundle, per_client=1)) as made:
        held = made.hold()
        with connected(made.port, whole(IMAGE)) as sock:
            until(lambda: held.sizes)
            status, told, headers = post(made.port, IMAGE)
            assert (status, told['code'], headers['retry-after']) == (429, 'E_TOO_OFTEN', '1') and lives(made.port)
            held.free.set()
            assert answer(sock)[0] == 200
        assert post(made.port, IMAGE)[0] == 200


def test_what_cannot_be_finished_when_the_service_ends_is_a_503(small):
    held = small.hold()
    with connected(small.port, whole(IMAGE)) as sock:
        until(lambda: held.sizes)
        small.server.should_exit = True
        status, told, headers = answer(sock)
        assert (status, told['code'], headers['retry-after']) == (503, 'E_ENDING', '5')


# Processes


class Process:
    """The command, in a process group of its own, with its `port` and what it prints in the file `log`."""

    def __init__(self, bundle: Path, folder: Path, *options: str):
        self.log, self.home, self.temporary = folder / 'log', folder / 'home', folder / 'tmp'
        for made in (self.home, self.temporary):
            made.mkdir()
        argv = [sys.executable, '-m', 'cxr_fastai', 'serve', str(bundle.resolve()), '--port', '0', *options]
        here = os.pathsep.join(str(Path(path or '.').resolve()) for path in sys.path)
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                argv,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
                env=os.environ | {'TMPDIR': str(self.temporary), 'PYTHONPATH': here},
            )

    @property
    def port(self) -> int:
        """Its port, once it tells it."""
        line = until(lambda: next((line for line in self.told.splitlines() if 'serving ' in line), ''))
        return int(line.partition(f'http://{LOCAL}:')[2].split()[0])

    @property
    def told(self) -> str:
        return self.log.read_text()

    @property
    def worker(self) -> int:
        """The process that serves."""
        found = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children').read_text().split()
        return next((int(pid) for pid in found if b'spawn_main' in Path(f'/proc/{pid}/cmdline').read_bytes()), 0)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LATE)


@pytest.fixture(scope='module')
def server(bundle, tmp_path_factory):
    """A service like a user's, whose folder for temporary files is its own."""
    process = Process(bundle, tmp_path_factory.mktemp('server'))
    until(lambda: lives(process.port))
    yield process
    process.end()


@pytest.fixture
def start(bundle, tmp_path):
    """Start a service; nothing survives the test."""
    started = []

    def starting(*options: str) -> Process:
        started.append(Process(bundle, tmp_path, *options))
        return started[-1]

    yield starting
    for process in started:
        process.end()


@pytest.fixture(scope='module')
def known(bundle, images) -> list[tuple[bytes, float]]:
    """Images, and their probabilities one by one."""
    paths = sorted((images / 'test').rglob('*.jpeg'))[:8]
    predictor = replace(Predictor.load(bundle, engine='onnx'), gate=None)
    rows = predictor.predict(paths, batch_size=1)
    return [(path.read_bytes(), row['p_pneumonia']) for path, row in zip(paths, rows, strict=True)]


def right(told: dict, p: float) -> bool:
    """Whether the answer tells this probability, or that the gate lets none through."""
    (row,) = told['images']
    return row['status'] == 'rejected' or abs(row['p_pneumonia'] - p) <= 1e-6


def test_of_two_hundred_posts_at_once_each_is_right_or_told_to_come_again(server, known):
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda i: post(server.port, known[i % len(known)][0]), range(200)))
    assert {status for status, *_ in answers} <= {200, 503}
    for i, (status, told, headers) in enumerate(answers):
        if status == 200:
            assert right(told, known[i % len(known)][1])
        else:
            assert told['code'] == 'E_BUSY' and headers['retry-after'] == '1'
    assert sum(status == 200 for status, *_ in answers) >= 32 and lives(server.port)


def test_random_requests_find_nothing_that_the_document_does_not_tell(server, tmp_path):
    argv = [
        'run',
        f'http://{LOCAL}:{server.port}/openapi.json',
        '--checks',
        'all',
        '--mode',
        'all',
        '--max-examples',
        '8',
        '--seed',
        '1',
        '--generation-database',
        'none',
        '--no-color',
    ]
    found = subprocess.run(
        [sys.executable, '-m', 'schemathesis.cli', *argv], cwd=tmp_path, text=True, capture_output=True
    )
    assert found.returncode == 0 and 'No issues found' in found.stdout, found.stdout + found.stderr


def odd_images() -> list[bytes]:
    """Images with a patient's name, whole, refused, damaged, and larger than what is kept in memory by habit."""
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


def test_uploads_leave_nothing_on_the_disk_and_no_name_in_the_log(server):
    seen, over = set(), threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen.update(server.temporary.iterdir(), server.home.iterdir())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        status, told, _ = post(server.port, *odd_images(), name=f'../../{PATIENT}', lines=(f'X-Patient: {PATIENT}',))
        with connected(server.port, whole(*odd_images())[:-9]):
            pass
        assert post(server.port, *[b''] * 65)[0] == 413
        ask(server.port, head('Content-Length: 0', f'User-Agent: {PATIENT}', path=f'/{PATIENT}?{PATIENT}'))
        ask(server.port, f'{PATIENT} HTTP/1.1\r\n\r\n'.encode())
    finally:
        over.set()
        watching.join()
    assert status == 200 and len(told['images']) == 9 and PATIENT not in json.dumps(told)
    assert not seen and not list(server.temporary.iterdir()) and not list(server.home.iterdir())
    assert PATIENT not in server.told and 'Traceback' not in server.told and 'Warning' not in server.told
    assert [LOCAL in line for line in server.told.splitlines()].count(True) == 1  # where it serves


def test_a_killed_worker_is_followed_by_another_on_the_same_port(server, known):
    port, before = server.port, server.worker
    os.kill(before, signal.SIGKILL)
    until(lambda: server.worker not in (0, before))
    status, told, _ = until(lambda: (found := post(port, known[0][0]))[0] == 200 and found)
    assert status == 200 and right(told, known[0][1])
    assert 'ended by signal 9: a new one starts' in server.told and not list(server.temporary.iterdir())


def test_at_sigterm_under_load_every_answer_that_comes_is_whole_and_right(start, known):
    process, answers, ended = start(), [], threading.Event()
    port = process.port
    until(lambda: lives(port))

    def keep_asking(i: int) -> None:
        while not ended.is_set():
            with suppress(ConnectionError):
                answers.append((i, *post(port, known[i][0])))

    with ThreadPoolExecutor(len(known)) as pool:
        for i in range(len(known)):
            pool.submit(keep_asking, i).add_done_callback(lambda done: done.exception())
        until(lambda: len(answers) > 40)
        began = time.monotonic()
        process.process.terminate()
        try:
            code = process.process.wait(LATE)
        finally:
            ended.set()
    assert code == 0 and time.monotonic() - began < 10
    for i, status, told, _ in answers:
        assert status in (200, 503) and (status == 503 or right(told, known[i][1]))
    assert 'Traceback' not in process.told


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_at_once_while_it_starts_ends_it_without_a_traceback(start, number):
    process = start()
    until(lambda: process.port and process.worker)
    os.killpg(process.process.pid, number)
    assert process.process.wait(LATE) == 0 and 'Traceback' not in process.told


def test_the_worker_does_not_outlive_who_started_it(start):
    process = start()
    until(lambda: lives(process.port))
    worker = process.worker
    process.process.kill()
    until(lambda: not Path(f'/proc/{worker}').exists() or ' Z ' in Path(f'/proc/{worker}/stat').read_text())


def test_a_process_that_is_killed_as_soon_as_it_starts_is_given_up(monkeypatch, bundle):
    class Killed:
        exitcode = -9

        def join(self) -> None:
            started.append(self)

    started, said = [], []
    monkeypatch.setattr('cxr_fastai.serving.server._start', lambda settings, listening: Killed())
    with pytest.raises(CXRError, match='ends by signal 9 as soon as it starts'):
        serve(Settings(bundle, port=0), said.append)
    assert len(started) == 4 and len(said) == 4  # where it serves, and three new ones

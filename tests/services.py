"""Services for tests: an app in this process, a server in a thread, a command in a process, and requests to them."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cxr_fastai.serving.app import Settings, make_app
from cxr_fastai.serving.server import Server

LOCAL = '127.0.0.1'
ADDRESS = f'http://{LOCAL}:8000'
PATIENCE = 60
"""Seconds after which a test gives up waiting, on a busy machine."""
PATIENT = 'ZqPatientXv'
"""A name that occurs nowhere else."""
HEALTH = f'GET /health HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n'.encode()
READY = f'GET /ready HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n'.encode()

Reply = tuple[int, dict[str, Any], dict[str, str]]
"""Status, JSON and headers of a response."""


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return the value of `condition` as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, 'the condition never became true'
        time.sleep(0.005)
    return value


# An app in this process


@contextmanager
def running_app(settings: Settings) -> Iterator[TestClient]:
    """A client of an app that is ready."""
    with TestClient(make_app(settings), ADDRESS, raise_server_exceptions=False) as client:
        wait_until(lambda: client.get('/ready').status_code == 200)
        yield client


def service_of(app: Any) -> Any:
    """The service behind the middleware of `app`, or None while it is loading."""
    while not hasattr(app, 'state'):
        app = app.app
    return app.state.service


def files(*images: bytes, name: str = 'image.png') -> list[tuple[str, tuple[str, bytes, str]]]:
    """The images as files of the form of a `TestClient`."""
    return [('images', (name, image, 'application/octet-stream')) for image in images]


def predict(client: TestClient, *images: bytes, **options: Any) -> list[dict[str, Any]]:
    """The rows of a successful request."""
    response = client.post('/v1/predict', files=files(*images), **options)
    assert response.status_code == 200, response.text
    return response.json()['images']


def is_error(response: Any, status: int, code: str) -> bool:
    """True for this error response. Every error is JSON, without internals of the program."""
    assert response.headers['content-type'] == 'application/json'
    assert set(response.json()) == {'code', 'message'}
    assert 'Traceback' not in response.text
    assert response.status_code != 503 or 'retry-after' in response.headers
    return (response.status_code, response.json()['code']) == (status, code)


def read_metrics(client: TestClient) -> dict[str, float]:
    """The samples of the metrics, by name and the values of their labels."""
    response = client.get('/metrics')
    assert response.headers['content-type'].startswith('text/plain; version=0.0.4')
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ''.join(f' {value}' for _, value in sorted(sample.labels.items()))
            samples[sample.name + labels] = sample.value
    return samples


# A server in a thread


class HeldModel:
    """A model that computes only after `release`; `batches` are the sizes of the batches it was given."""

    def __init__(self, infer: Callable) -> None:
        self.infer = infer
        self.released = threading.Event()
        self.batches: list[int] = []

    def __call__(self, images: Any) -> Any:
        self.batches.append(len(images))
        assert self.released.wait(PATIENCE)
        return self.infer(images)

    def release(self) -> None:
        self.released.set()


class ThreadServer:
    """A server in a thread of this process."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = server.port
        self.url = server.url

    @property
    def service(self) -> Any:
        return service_of(self.server.app)

    def hold_model(self) -> HeldModel:
        """Put a `HeldModel` into the service."""
        self.service.batcher.infer = HeldModel(self.service.predictor.infer)
        return self.service.batcher.infer


@contextmanager
def running_server(server: Server) -> Iterator[ThreadServer]:
    """Run `server` in a thread within this context, and wait until it is ready."""
    thread = threading.Thread(target=server.run)
    thread.start()
    running = ThreadServer(server)
    try:
        wait_until(lambda: is_ready(server.port))
        yield running
    finally:
        server.stop()
        if running.service and isinstance(running.service.batcher.infer, HeldModel):
            running.service.batcher.infer.release()
        thread.join(PATIENCE)
    assert not thread.is_alive()


# The command in a process


class ProcessServer:
    """The command `serve` in a process group of its own, with its own home and temporary folder."""

    def __init__(self, bundle: Path, folder: Path, *options: str) -> None:
        self.log_file = folder / 'log'
        self.home = folder / 'home'
        self.temporary = folder / 'tmp'
        self.home.mkdir()
        self.temporary.mkdir()
        command = [sys.executable, '-m', 'cxr_fastai', 'serve', str(bundle.resolve()), '--port', '0', *options]
        python_path = os.pathsep.join(str(Path(path or '.').resolve()) for path in sys.path)
        with self.log_file.open('wb') as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
                env=os.environ | {'TMPDIR': str(self.temporary), 'PYTHONPATH': python_path},
            )

    @property
    def log(self) -> str:
        """What the process has printed."""
        return self.log_file.read_text()

    @property
    def port(self) -> int:
        """The port, as soon as the process has printed it."""
        wait_until(lambda: f'http://{LOCAL}:' in self.log)
        return int(self.log.partition(f'http://{LOCAL}:')[2].split()[0])

    def kill(self) -> None:
        """Kill the process and everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


# Requests through sockets


def form(*images: bytes, name: str = 'a') -> bytes:
    """The images as a multipart form with the boundary b."""
    head = f'--b\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode()
    return b''.join(head + image + b'\r\n' for image in images) + b'--b--\r\n'


def request_head(*lines: str, path: str = '/v1/predict') -> bytes:
    """The headers of a request with a form."""
    first = (f'POST {path} HTTP/1.1', f'Host: {LOCAL}', 'Content-Type: multipart/form-data; boundary=b')
    return '\r\n'.join((*first, *lines, '', '')).encode()


def request_for(*images: bytes, lines: tuple[str, ...] = (), name: str = 'a') -> bytes:
    """A complete request for predictions."""
    body = form(*images, name=name)
    return request_head(f'Content-Length: {len(body)}', *lines) + body


@contextmanager
def connected(port: int, *parts: bytes) -> Iterator[socket.socket]:
    """A connection that has sent `parts`."""
    with socket.create_connection((LOCAL, port), timeout=PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


def read_reply(connection: socket.socket) -> Reply:
    """Read the next response of a connection. Raises an exception if it is incomplete."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, json.loads(body) if body else {}, headers


def send(port: int, *parts: bytes) -> Reply:
    """Send a request over a new connection."""
    with connected(port, *parts) as connection:
        return read_reply(connection)


def post(port: int, *images: bytes, **options: Any) -> Reply:
    """Request predictions over a new connection."""
    return send(port, request_for(*images, **options))


def is_ready(port: int) -> bool:
    """True if the service is ready."""
    with suppress(OSError, http.client.HTTPException):
        return send(port, READY)[0] == 200
    return False


def is_closed(connection: socket.socket, *parts: bytes) -> bool:
    """True if the server has closed the connection, which is tested by sending `parts` and reading."""
    try:
        for part in parts:
            connection.sendall(part)
        connection.settimeout(0.01)
        return not connection.recv(2**16)
    except TimeoutError:
        return False
    except OSError:
        return True

"""Archives and servers that were made to fill memory, disks or time: each is refused, and nothing is left behind."""

import gzip
import io
import os
import shutil
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import zipfile
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from archivefiles import NAMES, write_arrays, write_images_zip, write_zip

from cxr_fastai.core.errors import CXRError
from cxr_fastai.data.archives import unpack_arrays, unpack_images
from cxr_fastai.data.sources import SOURCES, download


def assert_refused(tmp_path, archive, match, unpack=unpack_images):
    with pytest.raises(CXRError, match=match) as caught:
        unpack(archive, tmp_path / 'images')
    assert '\n' not in str(caught.value)


def test_an_array_file_that_inflates_to_gigabytes_is_refused_from_its_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / 'b.npz', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('train_images.npy', bytes(100 * 2**20))
    assert_refused(tmp_path, tmp_path / 'b.npz', 'times the packed size', unpack_arrays)


@pytest.mark.parametrize(
    ('header', 'match'),
    [
        ({'shape': (2**40, 224, 224), 'descr': '|u1', 'fortran_order': False}, 'expected uint8'),
        ({'shape': (2, 224, 224), 'descr': '|u1', 'fortran_order': True}, 'by columns'),
        ({'shape': (2, 224, 224), 'descr': '|O', 'fortran_order': False}, 'allow_pickle is off'),
        ({'shape': (50_000_000, 224, 224), 'descr': '|u1', 'fortran_order': False}, 'expected uint8'),
    ],
    ids=['huge', 'columns', 'objects', 'more than the labels'],
)
def test_the_header_of_an_array_is_checked_before_its_values(tmp_path, header, match):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    write_arrays(tmp_path / 'a.npz')
    with zipfile.ZipFile(tmp_path / 'a.npz') as source, zipfile.ZipFile(tmp_path / 'b.npz', 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, buffer.getvalue() + data[128:] if name == 'train_images.npy' else data)
    assert_refused(tmp_path, tmp_path / 'b.npz', match, unpack_arrays)


def test_entries_that_share_their_data_are_refused(tmp_path):
    archive = write_images_zip(tmp_path / 'a.zip')
    data = bytearray(archive.read_bytes())
    first = data.index(b'PK\1\2')
    second = data.index(b'PK\1\2', first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    archive.write_bytes(data)
    assert_refused(tmp_path, archive, 'are also those of another')


def test_a_local_header_with_another_name_is_damage(tmp_path):
    archive = write_images_zip(tmp_path / 'a.zip')
    data = bytearray(archive.read_bytes())
    data[30] ^= 1
    archive.write_bytes(data)
    assert_refused(tmp_path, archive, 'not a complete zip file')


def write_directory(path: Path, n: int, end_of_entry: bytes, claimed: int) -> None:
    """Write a zip file of `n` entries in its directory, each with that end, whose last record claims another number."""
    entry = struct.pack('<4s4H3I2H', b'PK\1\2', 20, 20, 0, 0, 0, 0, 0, 0, 0) + end_of_entry
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, claimed, claimed, n * len(entry), 0, 0)
    path.write_bytes(n * entry + end)


def test_a_directory_of_many_entries_is_refused_before_it_is_read(tmp_path):
    write_directory(tmp_path / 'a.zip', 800_000, bytes(16), claimed=65_535)
    assert_refused(tmp_path, tmp_path / 'a.zip', 'its directory of 35,200,000 bytes is over')


def test_the_entries_are_counted_although_the_last_record_claims_a_few(tmp_path):
    write_directory(tmp_path / 'a.zip', 200_001, bytes(18), claimed=5)
    assert_refused(tmp_path, tmp_path / 'a.zip', 'more than 200,000 entries')


def test_an_archive_in_an_archive_is_not_unpacked(tmp_path):
    inner = write_images_zip(tmp_path / 'inner.zip').read_bytes()
    archive = write_images_zip(tmp_path / 'a.zip', ('chest_xray/inner.zip', inner))
    assert sum(unpack_images(archive, tmp_path / 'images').values()) == 1


@pytest.mark.parametrize('unpack', [unpack_images, unpack_arrays])
def test_a_pipe_instead_of_an_archive_is_refused(tmp_path, unpack):
    os.mkfifo(tmp_path / 'a.zip')
    assert_refused(tmp_path, tmp_path / 'a.zip', 'not a regular file', unpack)


def test_a_stored_entry_of_another_size_is_refused(tmp_path):
    archive = write_zip(tmp_path / 'a.zip', [(NAMES[0], bytes(1000))])
    data = bytearray(archive.read_bytes())
    place = data.index(b'PK\1\2') + 24
    data[place : place + 4] = struct.pack('<I', 2**31)
    archive.write_bytes(data)
    assert_refused(tmp_path, archive, 'refused|allowed')


class Flood(BaseHTTPRequestHandler):
    """Sends bytes without end and without a length, or redirects to itself."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith('/loop'):
            self.send_response(302)
            self.send_header('Location', self.path + 'o')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(200)
        if self.path == '/announced':
            self.send_header('Content-Length', str(10**12))
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(100_000))
        except OSError:
            pass


@pytest.fixture
def flood(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '*')
    with ThreadingHTTPServer(('127.0.0.1', 0), Flood) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ('page', 'limits', 'match'),
    [
        ('/endless', {'max_bytes': 1_000_000}, 'may have 1,000,000'),
        ('/announced', {}, 'sends 1,000,000,000,000 bytes or more'),
        ('/endless', {'max_seconds': 0.2}, 'longer than 0.2 seconds'),
        ('/loop', {}, 'answers 302'),
    ],
)
def test_a_download_has_an_end(tmp_path, flood, page, limits, match):
    source = replace(SOURCES['mendeley'], url=flood + page, backoff=0, **limits)
    with pytest.raises(CXRError, match=match) as caught:
        download(tmp_path / 'images', source)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'images').exists()


class ManyBodies(Flood):
    """Sends a long body with a redirect, with a temporary error, or byte by byte. Counts the bytes it could send."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get('Authorization')))
        if self.path == '/end':
            return self.send_error(404)
        if self.path == '/elsewhere':
            return self.start(302, {'Location': f'http://localhost:{self.server.server_port}/end', **EMPTY})
        if self.path == '/here':
            return self.start(302, {'Location': '/end', **EMPTY})
        if self.path == '/slow':
            self.start(200, {'Content-Length': '60'})
            return self.write([b'x'] * 60, pause=0.1)
        if self.path == '/gzip':
            body = self.server.gzipped
            self.start(302, {'Location': '/end', 'Content-Encoding': 'gzip', 'Content-Length': str(len(body))})
            return self.write([body])
        if self.path == '/chunked':
            self.start(302, {'Location': '/end', 'Transfer-Encoding': 'chunked'})
            return self.write([b'100000\r\n' + bytes(2**20) + b'\r\n'] * (LONG // 2**20))
        self.start(302 if self.path == '/endless' else 503, {'Location': '/end'})
        return self.write([bytes(2**20)] * (LONG // 2**20))

    def start(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def write(self, parts: list[bytes], pause: float = 0):
        with suppress(OSError):
            for part in parts:
                self.wfile.write(part)
                self.server.sent += len(part)
                time.sleep(pause)


LONG = 100 * 2**20
EMPTY = {'Content-Length': '0'}


@pytest.fixture
def bodies(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '*')
    with ThreadingHTTPServer(('127.0.0.1', 0), ManyBodies) as server:
        server.requests, server.sent, server.gzipped = [], 0, gzip.compress(bytes(LONG), 1)
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refused_download(tmp_path, server, path: str, match: str, user: str = '', **limits) -> float:
    """Download from `server`, which must end with an error; return the seconds it took."""
    url = f'http://{user}127.0.0.1:{server.server_port}{path}'
    source = replace(SOURCES['mendeley'], url=url, **{'backoff': 0, **limits})
    start = time.monotonic()
    with pytest.raises(CXRError, match=match):
        download(tmp_path / 'images', source)
    return time.monotonic() - start


@pytest.mark.parametrize('page', ['/endless', '/gzip', '/chunked'])
def test_the_body_of_a_redirect_is_not_read(tmp_path, bodies, page):
    tracemalloc.start()
    refused_download(tmp_path, bodies, page, 'answers 404')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LONG / 4
    assert bodies.sent < LONG / 2
    assert [path for path, _ in bodies.requests] == [page, '/end']


def test_the_body_of_a_temporary_error_is_not_read(tmp_path, bodies):
    refused_download(tmp_path, bodies, '/busy', 'answers 503')
    assert bodies.sent < LONG / 2
    assert len(bodies.requests) == 4


def test_repeated_requests_end_at_the_deadline(tmp_path, bodies):
    seconds = refused_download(tmp_path, bodies, '/busy', 'longer than 0.2 seconds', backoff=10, max_seconds=0.2)
    assert seconds < 4


def test_a_file_that_arrives_byte_by_byte_ends_at_the_deadline(tmp_path, bodies):
    assert refused_download(tmp_path, bodies, '/slow', 'longer than 0.5 seconds', max_seconds=0.5) < 4


def test_a_password_is_sent_to_no_other_host(tmp_path, bodies):
    for page in ('/here', '/elsewhere'):
        refused_download(tmp_path, bodies, page, 'answers 404', user='user:password@')
    secret = 'Basic dXNlcjpwYXNzd29yZA=='
    assert bodies.requests == [('/here', secret), ('/end', secret), ('/elsewhere', secret), ('/end', None)]


class ToPlain(Flood):
    """Redirects to an unencrypted address, or to an invalid one."""

    def do_GET(self):
        self.send_response(302)
        self.send_header('Location', self.server.location)
        self.send_header('Content-Length', '0')
        self.end_headers()


@pytest.fixture
def encrypted(tmp_path, monkeypatch):
    certificate = tmp_path / 'certificate.pem'
    subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=127.0.0.1', '-addext']
        + ['subjectAltName=IP:127.0.0.1', '-keyout', certificate, '-out', tmp_path / 'public.pem'],
        check=True,
        capture_output=True,
    )
    with open(certificate, 'ab') as file:
        file.write((tmp_path / 'public.pem').read_bytes())
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(tmp_path / 'public.pem'))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(('127.0.0.1', 0), ToPlain) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which('openssl') is None, reason='needs openssl for a certificate')
@pytest.mark.parametrize(
    ('location', 'match'),
    [
        ('http://127.0.0.1:1/zip', 'redirects from https to http'),
        ('HTTP://127.0.0.1:1/zip', 'redirects from https to http'),
        ('hTtp:/zip', 'redirects from https to http'),
        ('http://[::1/zip', 'redirects to an invalid address'),
    ],
)
def test_a_redirect_from_https_to_http_is_refused(tmp_path, encrypted, location, match):
    encrypted.location = location
    url = f'https://127.0.0.1:{encrypted.server_port}/zip'
    with pytest.raises(CXRError, match=match):
        download(tmp_path / 'images', replace(SOURCES['mendeley'], url=url, backoff=0))

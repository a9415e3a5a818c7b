"""Downloads are complete or resumable, whatever the server does: tested with a local server that fails on request."""

import hashlib
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from archivefiles import write_arrays, write_images_zip

from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.data import sources
from cxr_fastai.data.archives import unpack_images
from cxr_fastai.data.items import ITEM_COLUMNS
from cxr_fastai.data.sources import SOURCES, Source, download


@dataclass
class Behaviour:
    """What the server sends, how it fails, and the headers of the requests it received."""

    body: bytes = b''
    etag: str = '"1"'
    content_type: str = 'application/zip'
    cuts: list[int] = field(default_factory=list)
    """The number of bytes after which each of the next responses breaks off."""
    codes: list[int] = field(default_factory=list)
    """The status of each of the next responses; 0 for a good one."""
    ranges: bool = True
    wrong_start: int = 0
    length: int | None = None
    max_range: int | None = None
    """The largest number of bytes in a response to a range request."""
    requests: list[Message] = field(default_factory=list)

    @property
    def ranges_requested(self) -> list[str | None]:
        return [headers['Range'] for headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        behaviour = self.server.behaviour
        behaviour.requests.append(self.headers)
        code = behaviour.codes.pop(0) if behaviour.codes else 0
        if code:
            return self.send(code, b'no')
        range_header = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        same_version = self.headers.get('If-Range') in (None, behaviour.etag)
        if not (range_header and behaviour.ranges and same_version):
            return self.send(200, behaviour.body)
        start, total = int(range_header[1]), len(behaviour.body)
        if start >= total:
            return self.send(416, b'no', f'bytes */{total}')
        end = min(total, start + (behaviour.max_range or total))
        content_range = f'bytes {start + behaviour.wrong_start}-{end - 1}/{total}'
        return self.send(206, behaviour.body[start:end], content_range)

    def send(self, status, body, content_range=None):
        behaviour = self.server.behaviour
        self.send_response(status)
        self.send_header('Content-Type', behaviour.content_type)
        self.send_header('Content-Length', str(behaviour.length or len(body)))
        self.send_header('ETag', behaviour.etag)
        if content_range:
            self.send_header('Content-Range', content_range)
        self.end_headers()
        if behaviour.cuts and status in (200, 206):
            body = body[: behaviour.cuts.pop(0)]
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(sources, 'CHUNK', 1000)
    monkeypatch.setenv('NO_PROXY', '*')
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.behaviour = Behaviour()
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def behaviour(server, tmp_path) -> Behaviour:
    archive = write_images_zip(tmp_path / 'made.zip', ('__MACOSX/._train', b''))
    server.behaviour.body = archive.read_bytes()
    archive.unlink()
    return server.behaviour


@pytest.fixture
def mendeley(server, behaviour) -> Source:
    url = f'http://127.0.0.1:{server.server_port}/zip'
    return replace(SOURCES['mendeley'], url=url, images=4, limitation='', backoff=0)


@pytest.fixture
def images(tmp_path) -> Path:
    return tmp_path / 'images'


def assert_refused(images, source, match, error=CXRError) -> str:
    with pytest.raises(error, match=match) as caught:
        download(images, source)
    assert '\n' not in str(caught.value)
    assert not images.exists()
    assert not list(images.parent.glob('.*'))
    return str(caught.value)


def files_kept(images) -> list[str]:
    return sorted(path.name for path in Path(f'{images}.download').iterdir())


def part_file(images) -> Path:
    folder = Path(f'{images}.download')
    folder.mkdir(exist_ok=True)
    return folder / 'ChestXRay2017.zip.part'


def test_images_arrive_in_the_kaggle_layout(images, mendeley):
    table = download(images, mendeley)
    assert table.columns.tolist() == ITEM_COLUMNS
    assert len(table) == 4
    assert all((images / path).is_file() for path in table.path)
    assert set(table.split) == {'train', 'test'}
    assert set(table.label) == {'NORMAL', 'PNEUMONIA'}
    assert table.attrs['ignored'] == {'__MACOSX': 1}
    assert [path.name for path in images.parent.iterdir()] == ['images']


def test_an_interrupted_connection_is_resumed(images, mendeley, behaviour):
    behaviour.cuts = [5000]
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [None, 'bytes=5000-']
    first, second = behaviour.requests
    assert second['If-Range'] == '"1"'
    assert first['Accept-Encoding'] == 'identity'


def test_a_later_call_resumes_where_an_earlier_one_failed(images, mendeley, behaviour):
    behaviour.cuts, behaviour.codes = [3000], [0, 503, 503, 503, 503]
    message = assert_refused(images, mendeley, '503')
    assert files_kept(images) == ['ChestXRay2017.zip.etag', 'ChestXRay2017.zip.part']
    assert 'Run the same command again to resume' in message
    behaviour.requests.clear()
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == ['bytes=3000-']


def test_retries_are_counted_from_the_last_progress(images, mendeley, behaviour):
    behaviour.cuts = [1000] * 6
    assert len(download(images, mendeley)) == 4
    assert len(behaviour.requests) == 7


def test_a_server_without_range_requests_sends_the_whole_file_again(images, mendeley, behaviour):
    behaviour.cuts, behaviour.ranges = [5000], False
    assert len(download(images, mendeley)) == 4
    assert len(behaviour.requests) == 2


def test_a_new_version_on_the_server_is_not_joined_to_the_old_one(images, mendeley):
    part_file(images).write_bytes(b'old' * 1000)
    part_file(images).with_suffix('.etag').write_text('"0"')
    assert len(download(images, mendeley)) == 4


@pytest.mark.parametrize('text', ['', 'old', '"0"\r\nHost: other', '"a\0"', '"' + 'x' * 2000 + '"', '\ud800'])
def test_a_part_of_an_unreadable_version_is_downloaded_again(images, mendeley, behaviour, text):
    part_file(images).write_bytes(behaviour.body[:1000])
    part_file(images).with_suffix('.etag').write_bytes(text.encode(errors='surrogatepass'))
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [None]


@pytest.mark.parametrize('suffix', ['.part', '.etag'])
def test_a_pipe_instead_of_a_part_is_replaced(images, mendeley, behaviour, suffix):
    os.mkfifo(part_file(images).with_suffix(suffix))
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [None]


def test_a_complete_download_is_not_repeated(images, mendeley, behaviour):
    part_file(images).write_bytes(behaviour.body)
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [f'bytes={len(behaviour.body)}-'], 'one request, for what is missing'


def test_a_partial_file_that_is_too_long_is_downloaded_again(images, mendeley, behaviour):
    part_file(images).write_bytes(behaviour.body + b'more')
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [f'bytes={len(behaviour.body) + 4}-', None]


def test_a_range_that_starts_at_the_wrong_byte_is_downloaded_again(images, mendeley, behaviour):
    behaviour.cuts, behaviour.wrong_start = [5000], 7
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested == [None, 'bytes=5000-', None]


def test_ranges_that_end_early_are_continued(images, mendeley, behaviour):
    behaviour.cuts, behaviour.max_range = [2000], 3000
    assert len(download(images, mendeley)) == 4
    assert behaviour.ranges_requested[1:3] == ['bytes=2000-', 'bytes=5000-']


def test_a_file_that_never_reaches_its_length_is_an_error(images, mendeley, behaviour):
    behaviour.length, behaviour.ranges = len(behaviour.body) + 100, False
    assert_refused(images, mendeley, 'the connection was interrupted')
    assert len(behaviour.requests) == 4


def test_temporary_server_errors_are_retried(images, mendeley, behaviour):
    behaviour.codes = [500, 429, 503]
    assert len(download(images, mendeley)) == 4


@pytest.mark.parametrize(('code', 'n_requests'), [(500, 4), (404, 1), (403, 1)])
def test_a_lasting_server_error_is_reported_with_the_manual_download(images, mendeley, behaviour, code, n_requests):
    behaviour.codes = [code] * 9
    message = assert_refused(images, mendeley, f'the server answers {code} ')
    place = f'{images}.download/ChestXRay2017.zip'
    assert f'download ChestXRay2017.zip (about 1.2 GB) from {mendeley.page}, save it as {place} and' in message
    assert len(behaviour.requests) == n_requests


def test_a_web_page_instead_of_the_file_does_not_destroy_a_partial_download(images, mendeley, behaviour):
    part_file(images).write_bytes(behaviour.body[:3000])
    behaviour.content_type, behaviour.ranges = 'text/html; charset=utf-8', False
    assert_refused(images, mendeley, 'the server sent a web page instead of the file')
    assert part_file(images).read_bytes() == behaviour.body[:3000]


def replace_by_page(body: bytes) -> bytes:
    return b'<!doctype html>'


def cut_end(body: bytes) -> bytes:
    return body[:-100]


@pytest.mark.parametrize('damage', [replace_by_page, cut_end])
def test_a_damaged_zip_file_is_deleted(images, mendeley, behaviour, damage):
    behaviour.body = damage(behaviour.body)
    message = 'not a complete zip file .* The download was deleted. Run the same command again'
    assert_refused(images, mendeley, message)
    assert files_kept(images) == []


def test_an_incomplete_data_set_is_refused(images, mendeley):
    assert_refused(images, replace(mendeley, images=5856), 'holds 4 images; expected 5,856')


def test_an_archive_that_leads_out_of_the_folder_is_refused(images, mendeley, behaviour, tmp_path):
    behaviour.body = write_images_zip(tmp_path / 'evil.zip', ('../evil.jpeg', b'')).read_bytes()
    assert_refused(images, mendeley, r"'\.\./evil.jpeg' is refused")


def test_without_a_connection_the_file_can_be_downloaded_by_hand(images, mendeley, server, behaviour):
    server.socket.close()
    message = assert_refused(images, mendeley, 'no connection')
    place = Path(re.search(r'save it as (\S+) and run', message)[1])
    place.write_bytes(behaviour.body)
    assert len(download(images, mendeley)) == 4
    assert files_kept(images) == ['ChestXRay2017.zip'], "the user's own file stays"


def test_a_damaged_file_downloaded_by_hand_is_named_and_stays(images, mendeley):
    place = part_file(images).with_suffix('')
    place.write_bytes(b'not a zip file')
    assert_refused(images, mendeley, f'not a complete zip file .* Delete {place} and run the same command again')
    assert place.exists()


def test_a_folder_with_files_in_it_is_refused_before_any_request(images, mendeley, behaviour):
    images.mkdir()
    (images / 'mine').touch()
    with pytest.raises(UsageError, match='exists already'):
        download(images, mendeley)
    assert (images / 'mine').exists()
    assert not behaviour.requests


def test_an_empty_folder_is_filled(images, mendeley):
    images.mkdir()
    assert len(download(images, mendeley)) == 4


def test_the_folder_may_be_relative(images, mendeley, monkeypatch):
    monkeypatch.chdir(images.parent)
    download(Path('images'), mendeley)
    assert (images / 'train').is_dir()


def test_a_read_only_folder_is_an_output_error(mendeley):
    if not Path('/sys').is_dir():
        pytest.skip('needs a file system that refuses new files, such as /sys; run it on Linux')
    with pytest.raises(OutputError, match='cannot be written'):
        download(Path('/sys/images'), mendeley)


def test_a_full_disk_does_not_delete_the_download(images, mendeley):
    def fill_disk(*_):
        raise OSError(28, 'No space left on device')

    assert_refused(images, replace(mendeley, unpack=fill_disk), 'No space left', OutputError)
    assert files_kept(images) == ['ChestXRay2017.zip.etag', 'ChestXRay2017.zip.part']


def test_an_unknown_source_gives_the_list_of_sources(images):
    with pytest.raises(UsageError, match='--source nih: choose mendeley, kaggle, medmnist'):
        download(images, 'nih')


def test_a_terminal_shows_the_bytes_and_their_rate(images, mendeley, terminal):
    with terminal.used():
        download(images, mendeley)
    assert re.search(r'ChestXRay2017.zip.*B/s', terminal.getvalue())


def test_without_a_terminal_nothing_is_printed(images, mendeley, behaviour, capfd):
    behaviour.codes, behaviour.cuts = [503], [5000]
    download(images, mendeley)
    assert capfd.readouterr() == ('', '')


@pytest.fixture
def medmnist(server, tmp_path) -> Source:
    write_arrays(tmp_path / 'made.npz')
    body = (tmp_path / 'made.npz').read_bytes()
    (tmp_path / 'made.npz').unlink()
    server.behaviour.body, server.behaviour.content_type = body, 'application/octet-stream'
    url = f'http://127.0.0.1:{server.server_port}/npz'
    return replace(SOURCES['medmnist'], url=url, images=8, md5=hashlib.md5(body).hexdigest(), backoff=0)


def test_medmnist_warns_that_its_validation_split_is_not_by_patient(images, medmnist):
    with pytest.warns(CXRWarning, match='no patient numbers') as caught:
        table = download(images, medmnist)
    assert Counter(table.split) == {'train': 4, 'valid': 2, 'test': 2}
    assert caught[0].filename == __file__


def test_a_download_with_the_wrong_hash_is_deleted(images, medmnist):
    source = replace(medmnist, md5='0' * 32)
    assert_refused(images, source, f'MD5 hash is {medmnist.md5}; expected {"0" * 32}.*was deleted')
    assert files_kept(images) == []


def test_a_complete_download_with_the_right_hash_needs_no_connection(images, medmnist, server):
    server.socket.close()
    part_file(images).with_name('pneumoniamnist_224.npz.part').write_bytes(server.behaviour.body)
    with pytest.warns(CXRWarning):
        assert len(download(images, medmnist)) == 8


@pytest.fixture
def kaggle(monkeypatch) -> Callable[[Callable[[str], str] | None], Source]:
    """Replaces kagglehub by one that calls a given function with the handle; None makes it missing."""

    def replace_kagglehub(dataset_download: Callable[[str], str] | None) -> Source:
        module = SimpleNamespace(dataset_download=dataset_download) if dataset_download else None
        monkeypatch.setitem(sys.modules, 'kagglehub', module)
        return replace(SOURCES['kaggle'], images=4)

    return replace_kagglehub


def test_kaggle_images_come_from_the_cache_of_kagglehub(images, kaggle, tmp_path):
    unpack_images(write_images_zip(tmp_path / 'made.zip'), tmp_path / 'cache/chest_xray')
    unpack_images(tmp_path / 'made.zip', tmp_path / 'cache/chest_xray/chest_xray')
    handles = []

    def dataset_download(handle: str) -> str:
        handles.append(handle)
        return str(tmp_path / 'cache')

    table = download(images, kaggle(dataset_download))
    assert len(table) == 4
    assert table.attrs['ignored'] == {'nested chest_xray': 4}
    assert handles == ['paultimothymooney/chest-xray-pneumonia']
    assert not Path(f'{images}.download').exists()


def test_without_kagglehub_the_error_says_how_to_get_the_images(images, kaggle):
    source = kaggle(None)
    assert_refused(images, source, re.escape('pip install "cxr_fastai[kaggle]"') + '.*archive.zip .about 2.3 GB. from')
    place = Path(f'{images}.download') / 'archive.zip'
    place.parent.mkdir()
    write_images_zip(place)
    assert len(download(images, source)) == 4


def forbidden() -> requests.HTTPError:
    response = requests.Response()
    response.status_code, response.reason = 403, 'Forbidden'
    return requests.HTTPError('403\n\nClient Error', response=response)


@pytest.mark.parametrize(
    ('error', 'match'),
    [
        (forbidden(), 'the server answers 403 Forbidden'),
        (requests.ConnectionError('x'), 'no connection'),
        (ValueError('Invalid Kaggle\ncredentials file'), 'Invalid Kaggle credentials file'),
    ],
)
def test_an_error_of_kaggle_names_the_places_for_credentials(images, kaggle, error, match):
    def refuse(_: str) -> str:
        raise error

    message = assert_refused(images, kaggle(refuse), match)
    for place in ('KAGGLE_API_TOKEN', 'KAGGLE_USERNAME', 'KAGGLE_KEY', '~/.kaggle/kaggle.json', 'archive.zip'):
        assert place in message


def test_a_full_cache_of_kagglehub_is_an_output_error(images, kaggle):
    def fill_disk(_: str) -> str:
        raise OSError(28, 'No space left on device')

    assert_refused(images, kaggle(fill_disk), 'KAGGLEHUB_CACHE', OutputError)


def test_each_source_states_its_page_its_size_and_its_licence():
    assert list(SOURCES) == ['mendeley', 'kaggle', 'medmnist']
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.page.startswith('https://')
        assert source.images == 5856
        assert source.licence == 'CC BY 4.0'

"""Downloads from a local server that fails in every way: cut, refused, wrong, absent."""

import hashlib
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from test_archives import arrays, images_zip

from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.data import sources
from cxr_fastai.data.items import ITEM_COLUMNS
from cxr_fastai.data.sources import SOURCES, download


@dataclass
class Faults:
    """What the server hands out and how it misbehaves."""

    body: bytes = b''
    etag: str = '"1"'
    type: str = 'application/zip'
    cuts: list = field(default_factory=list)
    """After how many bytes each of the next answers stops."""
    codes: list = field(default_factory=list)
    """Status of each of the next answers; 0 for a good one."""
    ranges: bool = True
    wrong_start: int = 0
    length: int | None = None
    most: int | None = None
    """Bytes in one partial answer."""
    seen: list = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        faults = self.server.faults
        faults.seen.append(self.headers)
        if faults.codes and (code := faults.codes.pop(0)):
            return self.answer(code, b'no')
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        same = self.headers.get('If-Range') in (None, faults.etag)
        if not (asked and faults.ranges and same):
            return self.answer(200, faults.body)
        start, total = int(asked[1]), len(faults.body)
        if start >= total:
            return self.answer(416, b'no', f'bytes */{total}')
        end = min(total, start + (faults.most or total))
        self.answer(206, faults.body[start:end], f'bytes {start + faults.wrong_start}-{end - 1}/{total}')

    def answer(self, status, body, place=None):
        faults = self.server.faults
        self.send_response(status)
        self.send_header('Content-Type', faults.type)
        self.send_header('Content-Length', str(faults.length or len(body)))
        self.send_header('ETag', faults.etag)
        if place:
            self.send_header('Content-Range', place)
        self.end_headers()
        self.wfile.write(body[: faults.cuts.pop(0) if faults.cuts and status in (200, 206) else None])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(sources, 'CHUNK', 1000)
    monkeypatch.setenv('NO_PROXY', '*')
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as made:
        made.faults = Faults()
        thread = threading.Thread(target=made.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def faults(server, tmp_path) -> Faults:
    server.faults.body = images_zip(tmp_path / 'made.zip', ('__MACOSX/._train', b'')).read_bytes()
    (tmp_path / 'made.zip').unlink()
    return server.faults


@pytest.fixture
def mendeley(server, faults):
    return replace(SOURCES['mendeley'], url=f'http://127.0.0.1:{server.server_port}/zip', images=4, limitation='', backoff=0)


@pytest.fixture
def images(tmp_path) -> Path:
    return tmp_path / 'images'


def refused(images, source, match, error=CXRError):
    with pytest.raises(error, match=match) as caught:
        download(images, source)
    assert '\n' not in str(caught.value)
    assert not images.exists() and not list(images.parent.glob('.*'))
    return str(caught.value)


def waiting(images):
    return sorted(path.name for path in Path(f'{images}.download').iterdir())


def test_images_arrive_in_the_kaggle_layout(images, mendeley):
    table = download(images, mendeley)
    assert table.columns.tolist() == ITEM_COLUMNS and len(table) == 4
    assert all((images / path).is_file() for path in table.path)
    assert set(table.split) == {'train', 'test'} and set(table.label) == {'NORMAL', 'PNEUMONIA'}
    assert table.attrs['ignored'] == {'__MACOSX': 1}
    assert [path.name for path in images.parent.iterdir()] == ['images']


def test_a_cut_connection_is_continued(images, mendeley, faults):
    faults.cuts = [5000]
    assert len(download(images, mendeley)) == 4
    first, second = faults.seen
    assert first['Range'] is None and second['Range'] == 'bytes=5000-' and second['If-Range'] == '"1"'
    assert first['Accept-Encoding'] == 'identity'


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(images, mendeley, faults):
    faults.cuts, faults.codes = [3000], [0, 503, 503, 503, 503]
    message = refused(images, mendeley, '503')
    assert waiting(images) == ['ChestXRay2017.zip.etag', 'ChestXRay2017.zip.part']
    assert 'Run the same command again to resume' in message
    faults.seen.clear()
    assert len(download(images, mendeley)) == 4
    assert [headers['Range'] for headers in faults.seen] == ['bytes=3000-']


def test_attempts_count_anew_while_the_download_gets_further(images, mendeley, faults):
    faults.cuts = [1000] * 6
    assert len(download(images, mendeley)) == 4
    assert len(faults.seen) == 7


def test_a_server_without_ranges_starts_again(images, mendeley, faults):
    faults.cuts, faults.ranges = [5000], False
    assert len(download(images, mendeley)) == 4
    assert len(faults.seen) == 2


def test_a_new_version_on_the_server_is_not_joined_to_the_old(images, mendeley, faults):
    part(images).write_bytes(b'old' * 1000)
    part(images).with_suffix('.etag').write_text('"0"')
    assert len(download(images, mendeley)) == 4


def part(images):
    folder = Path(f'{images}.download')
    folder.mkdir(exist_ok=True)
    return folder / 'ChestXRay2017.zip.part'


def test_a_complete_part_is_not_fetched_again(images, mendeley, faults):
    part(images).write_bytes(faults.body)
    assert len(download(images, mendeley)) == 4
    assert len(faults.seen) == 1, 'which learns that nothing is missing'


def test_a_part_that_is_too_long_starts_again(images, mendeley, faults):
    part(images).write_bytes(faults.body + b'more')
    assert len(download(images, mendeley)) == 4
    assert [headers['Range'] is None for headers in faults.seen] == [False, True]


def test_a_range_from_the_wrong_byte_starts_again(images, mendeley, faults):
    faults.cuts, faults.wrong_start = [5000], 7
    assert len(download(images, mendeley)) == 4
    assert [headers['Range'] for headers in faults.seen] == [None, 'bytes=5000-', None]


def test_partial_answers_that_stop_early_are_continued(images, mendeley, faults):
    faults.cuts, faults.most = [2000], 3000
    assert len(download(images, mendeley)) == 4
    assert [headers['Range'] for headers in faults.seen][1:3] == ['bytes=2000-', 'bytes=5000-']


def test_a_length_that_never_comes_is_given_up(images, mendeley, faults):
    faults.length, faults.ranges = len(faults.body) + 100, False
    refused(images, mendeley, 'the connection was interrupted')
    assert len(faults.seen) == 4


def test_errors_of_the_server_pass(images, mendeley, faults):
    faults.codes = [500, 429, 503]
    assert len(download(images, mendeley)) == 4


@pytest.mark.parametrize(('code', 'requests_made'), [(500, 4), (404, 1), (403, 1)])
def test_errors_that_stay_are_told_with_the_way_by_hand(images, mendeley, faults, code, requests_made):
    faults.codes = [code] * 9
    message = refused(images, mendeley, f'the server answers {code} ')
    assert f'download ChestXRay2017.zip (about 1.2 GB) from {mendeley.page}, save it as {images}.download/Ch' in message
    assert len(faults.seen) == requests_made


def test_a_page_in_place_of_the_file_spares_what_is_there(images, mendeley, faults):
    part(images).write_bytes(faults.body[:3000])
    faults.type, faults.ranges = 'text/html; charset=utf-8', False
    refused(images, mendeley, 'the server sent a web page instead of the file')
    assert part(images).read_bytes() == faults.body[:3000]


@pytest.mark.parametrize('spoil', [lambda body: b'<!doctype html>', lambda body: body[:-100]])
def test_a_damaged_zip_is_deleted(images, mendeley, faults, spoil):
    faults.body = spoil(faults.body)
    refused(images, mendeley, 'not a complete zip file .* The download was deleted. Run the same command again')
    assert waiting(images) == []


def test_an_incomplete_data_set_is_refused(images, mendeley):
    refused(images, replace(mendeley, images=5856), 'holds 4 images; expected 5,856')


def test_a_name_that_leaves_the_folder_is_refused(images, mendeley, faults, tmp_path):
    faults.body = images_zip(tmp_path / 'evil.zip', ('../evil.jpeg', b'')).read_bytes()
    refused(images, mendeley, r"'\.\./evil.jpeg' is refused")


def test_without_a_connection_the_file_can_be_put_by_hand(images, mendeley, server, faults):
    server.socket.close()
    message = refused(images, mendeley, 'no connection')
    place = Path(re.search(r' save it as (\S+) and run', message)[1])
    place.write_bytes(faults.body)
    assert len(download(images, mendeley)) == 4
    assert waiting(images) == ['ChestXRay2017.zip'], 'what the user put there stays'


def test_a_bad_file_put_by_hand_is_named_and_stays(images, mendeley):
    place = part(images).with_suffix('')
    place.write_bytes(b'no zip')
    refused(images, mendeley, f'not a complete zip file .* Delete {place} and run the same command again')
    assert place.exists()


def test_a_folder_with_something_in_it_is_refused_before_any_request(images, mendeley, faults):
    images.mkdir()
    (images / 'mine').touch()
    with pytest.raises(UsageError, match='exists already'):
        download(images, mendeley)
    assert (images / 'mine').exists() and not faults.seen


def test_an_empty_folder_is_filled(images, mendeley):
    images.mkdir()
    assert len(download(images, mendeley)) == 4


def test_a_relative_folder_works(images, mendeley, monkeypatch):
    monkeypatch.chdir(images.parent)
    download(Path('images'), mendeley)
    assert (images / 'train').is_dir()


def test_a_read_only_place_is_an_output_error(mendeley):
    if not Path('/sys').is_dir():
        pytest.skip('needs a file system that refuses new files')
    with pytest.raises(OutputError, match='cannot be written'):
        download(Path('/sys/images'), mendeley)


def test_a_full_disk_keeps_the_download(images, mendeley, faults, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    refused(images, replace(mendeley, unpack=full), 'No space left', OutputError)
    assert waiting(images) == ['ChestXRay2017.zip.etag', 'ChestXRay2017.zip.part']


def test_an_unknown_source_lists_the_known(images):
    with pytest.raises(UsageError, match='--source nih: choose mendeley, kaggle, medmnist'):
        download(images, 'nih')


def test_a_terminal_sees_bytes_rate_and_time_left(images, mendeley, terminal):
    with terminal.used():
        download(images, mendeley)
    assert re.search(r'ChestXRay2017.zip.*B/s', terminal.getvalue())


def test_elsewhere_nothing_is_shown(images, mendeley, capfd):
    download(images, mendeley)
    assert capfd.readouterr() == ('', '')


@pytest.fixture
def medmnist(server, tmp_path):
    path, _ = arrays(tmp_path / 'made.npz')
    server.faults.body, server.faults.type = path.read_bytes(), 'application/octet-stream'
    path.unlink()
    return replace(
        SOURCES['medmnist'],
        url=f'http://127.0.0.1:{server.server_port}/npz',
        images=8,
        md5=hashlib.md5(server.faults.body).hexdigest(),
        backoff=0,
    )


def test_medmnist_says_what_its_val_cannot_show(images, medmnist):
    with pytest.warns(CXRWarning, match='no patient numbers') as caught:
        table = download(images, medmnist)
    assert Counter(table.split) == {'train': 4, 'valid': 2, 'test': 2}
    assert caught[0].filename == __file__


def test_a_wrong_hash_deletes_the_download(images, medmnist):
    refused(images, replace(medmnist, md5='0' * 32), f'MD5 hash is {medmnist.md5}; expected {"0" * 32}.*was deleted')
    assert waiting(images) == []


def test_a_part_with_the_right_hash_needs_no_connection(images, medmnist, server):
    server.socket.close()
    part(images).with_name('pneumoniamnist_224.npz.part').write_bytes(server.faults.body)
    with pytest.warns(CXRWarning):
        assert len(download(images, medmnist)) == 8


@pytest.fixture
def kaggle(images, tmp_path, monkeypatch):
    """Plant a kagglehub that calls `answer` with the handle it is asked for."""

    def plant(answer):
        monkeypatch.setitem(sys.modules, 'kagglehub', answer and SimpleNamespace(dataset_download=answer))
        return replace(SOURCES['kaggle'], images=4)

    return plant


def test_kaggle_images_come_from_the_cache_of_kagglehub(images, kaggle, tmp_path):
    from cxr_fastai.data.archives import unpack_images

    unpack_images(images_zip(tmp_path / 'made.zip'), tmp_path / 'cache/chest_xray')
    unpack_images(tmp_path / 'made.zip', tmp_path / 'cache/chest_xray/chest_xray')
    asked = []
    table = download(images, kaggle(lambda handle: asked.append(handle) or str(tmp_path / 'cache')))
    assert len(table) == 4 and table.attrs['ignored'] == {'nested chest_xray': 4}
    assert asked == ['paultimothymooney/chest-xray-pneumonia'] and not Path(f'{images}.download').exists()


def test_without_kagglehub_the_error_says_how_to_get_it(images, kaggle, tmp_path):
    source = kaggle(None)
    refused(images, source, re.escape('pip install "cxr_fastai[kaggle]"') + '.*archive.zip .about 2.3 GB. from')
    place = Path(f'{images}.download') / 'archive.zip'
    place.parent.mkdir()
    images_zip(place)
    assert len(download(images, source)) == 4


def forbidden():
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
def test_a_refusal_by_kaggle_names_the_places_for_credentials(images, kaggle, error, match):
    def refuse(_):
        raise error

    message = refused(images, kaggle(refuse), match)
    for place in ('KAGGLE_API_TOKEN', 'KAGGLE_USERNAME', 'KAGGLE_KEY', '~/.kaggle/kaggle.json', 'archive.zip'):
        assert place in message


def test_a_full_cache_of_kagglehub_is_an_output_error(images, kaggle):
    def fill(_):
        raise OSError(28, 'No space left on device')

    refused(images, kaggle(fill), 'KAGGLEHUB_CACHE', OutputError)


def test_the_known_sources_say_where_they_are():
    assert list(SOURCES) == ['mendeley', 'kaggle', 'medmnist']
    for source in SOURCES.values():
        assert source.page.startswith('https://') and source.images == 5856 and source.licence == 'CC BY 4.0'

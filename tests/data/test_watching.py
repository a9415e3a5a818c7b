"""A watched folder yields each image once, when it is complete, also after a restart."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from clocks import Clock

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.data.watching import ArrivedFile, FolderWatch, Journal, JournaledRows, is_temporary, locked

SETTINGS = {'model': 'ab', 'table': None}


class Watched:
    """A folder and what a watch of it finds, poll by poll."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time = Clock(100)
        self.handled: set[ArrivedFile] = set()
        self.watch = FolderWatch(folder, self.handled.__contains__, 5, self.time, self.time.sleep)

    def poll(self) -> list[str]:
        """Poll, handle what is complete, wait for the interval, and return the names."""
        files = self.watch.poll()
        self.handled.update(files)
        self.time.sleep(5)
        return [file.path.name for file in files]


@pytest.fixture
def watched(tmp_path) -> Watched:
    folder = tmp_path / 'in'
    folder.mkdir()
    return Watched(folder)


def test_an_image_is_complete_when_it_did_not_change_for_the_interval(watched):
    image = watched.folder / 'a.dcm'
    image.write_bytes(b'1')
    assert watched.poll() == []
    image.write_bytes(b'12')
    assert watched.poll() == []
    assert watched.poll() == ['a.dcm']
    assert watched.poll() == []


def test_a_file_that_is_rewritten_at_the_same_size_is_not_complete(watched):
    image = watched.folder / 'a.dcm'
    image.write_bytes(b'1')
    watched.poll()
    os.utime(image, ns=(1, 1))
    assert watched.poll() == []
    assert watched.poll() == ['a.dcm']


def test_polls_within_the_interval_do_not_make_a_file_complete(watched):
    (watched.folder / 'a.dcm').write_bytes(b'1')
    assert watched.watch.poll() == []
    watched.time.sleep(4.9)
    assert watched.watch.poll() == []
    watched.time.sleep(0.1)
    assert [file.path.name for file in watched.watch.poll()] == ['a.dcm']


def test_an_image_that_changes_after_it_was_handled_is_handled_again(watched):
    image = watched.folder / 'a.dcm'
    image.write_bytes(b'1')
    watched.poll()
    assert watched.poll() == ['a.dcm']
    image.write_bytes(b'123')
    watched.poll()
    assert watched.poll() == ['a.dcm']


@pytest.mark.parametrize(
    'name', ['a.dcm.part', 'a.tmp', '.a.dcm', '~a.dcm', 'a.dcm~', 'a.dcm.PARTIAL', 'a.dcm.crdownload', '.sub/a.dcm']
)
def test_temporary_and_hidden_files_are_ignored_until_they_are_renamed(watched, name):
    path = watched.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'1')
    assert watched.poll() == watched.poll() == []
    path.rename(watched.folder / 'b.dcm')
    watched.poll()
    assert watched.poll() == ['b.dcm']


def test_other_files_links_and_pipes_are_ignored(watched, tmp_path):
    (watched.folder / 'notes.txt').write_text('text')
    (watched.folder / 'no_suffix').write_text('text')
    (tmp_path / 'a.dcm').write_bytes(b'1')
    (watched.folder / 'link.dcm').symlink_to(tmp_path / 'a.dcm')
    (watched.folder / 'linked').symlink_to(tmp_path)
    os.mkfifo(watched.folder / 'pipe.dcm')
    assert watched.poll() == watched.poll() == watched.poll() == []


def arrive(watched: Watched, name: str = 'a.dcm') -> ArrivedFile:
    """The file `name` as it was found."""
    path = watched.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'inside')
    watched.poll()
    (file,) = watched.watch.poll()
    assert watched.watch.read(file).read() == b'inside'
    return file


@pytest.fixture(params=['below a folder', 'by its path'])
def opening(request, monkeypatch) -> None:
    """How files are opened: as on POSIX, or as on Windows, where no function takes the descriptor of a folder."""
    if request.param == 'by its path':
        monkeypatch.setattr(os, 'supports_dir_fd', frozenset())


@pytest.mark.parametrize('name', ['a.dcm', 'sub/a.dcm'])
@pytest.mark.parametrize('part', ['file', 'folder'])
def test_a_file_that_became_a_link_to_the_outside_is_not_read(watched, tmp_path, name, part, opening):
    """Somebody exchanges the file, or its folder, after it was found; even size and time are the same."""
    file = arrive(watched, name)
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'a.dcm').write_bytes(b'secret')
    os.utime(outside / 'a.dcm', ns=(file.mtime_ns, file.mtime_ns))
    if part == 'file' or name == 'a.dcm':
        file.path.unlink()
        file.path.symlink_to(outside / 'a.dcm')
    else:
        file.path.parent.rename(tmp_path / 'away')
        file.path.parent.symlink_to(outside)
    assert file.path.read_bytes() == b'secret'
    assert watched.watch.read(file) is None
    assert watched.poll() == watched.poll() == []


def test_a_file_without_a_suffix_that_became_a_link_is_not_looked_into(watched, tmp_path, monkeypatch):
    (tmp_path / 'outside').write_bytes(b'\0' * 128 + b'DICM')
    (watched.folder / '0a1b').write_bytes(b'text')
    lstat = os.lstat
    status = lstat(watched.folder / '0a1b')
    (watched.folder / '0a1b').unlink()
    (watched.folder / '0a1b').symlink_to(tmp_path / 'outside')
    monkeypatch.setattr(os, 'lstat', lambda path: status if Path(path).name == '0a1b' else lstat(path))
    assert watched.poll() == watched.poll() == []


@pytest.mark.parametrize('change', ['removed', 'replaced', 'folder', 'pipe', 'socket'])
def test_a_file_that_is_no_longer_what_was_found_is_not_read(watched, change, opening, monkeypatch, caplog):
    file = arrive(watched)
    file.path.unlink()
    if change == 'replaced':
        file.path.write_bytes(b'another')
    if change == 'folder':
        file.path.mkdir()
    if change == 'pipe':
        os.mkfifo(file.path)
    if change == 'socket':
        monkeypatch.chdir(watched.folder)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.path.name)
    with caplog.at_level('INFO'):
        assert watched.watch.read(file) is None
    assert f'{file.path}: no longer what was found' in caplog.text


def test_a_file_that_is_exchanged_while_it_is_opened_by_its_path_is_not_read(watched, tmp_path, monkeypatch):
    """A link to the outside is there only at the moment of opening."""
    file = arrive(watched)
    (tmp_path / 'outside.dcm').write_bytes(b'secret')
    monkeypatch.setattr(os, 'supports_dir_fd', frozenset())
    monkeypatch.setattr(os, 'open', partial(open_another, os.open, tmp_path / 'outside.dcm'))
    assert watched.watch.read(file) is None


def open_another(open_file: Callable[..., int], other: Path, path: Path, *args, **options) -> int:
    return open_file(other, *args, **options)


def test_a_folder_that_is_itself_reached_over_a_link_is_read(tmp_path, opening):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    assert arrive(Watched(tmp_path / 'link'), 'sub/a.dcm')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='needs POSIX; root may read everything')
def test_a_file_that_may_not_be_read_has_the_reason(watched):
    file = arrive(watched)
    file.path.chmod(0)
    with pytest.raises(ImageError, match='Permission denied'):
        watched.watch.read(file).read()


def test_dicom_files_without_a_suffix_and_in_folders_are_found(watched):
    (watched.folder / 'x' / 'y').mkdir(parents=True)
    (watched.folder / 'x' / 'y' / '0a1b').write_bytes(b'\0' * 128 + b'DICM')
    watched.poll()
    assert watched.poll() == ['0a1b']


def test_a_growing_file_without_a_suffix_is_looked_at_again(watched):
    image = watched.folder / '0a1b'
    image.write_bytes(b'\0' * 100)
    watched.poll()
    image.write_bytes(b'\0' * 128 + b'DICM')
    watched.poll()
    assert watched.poll() == ['0a1b']


def test_a_folder_that_is_gone_for_a_while_is_no_error(watched, tmp_path):
    (watched.folder / 'a.dcm').write_bytes(b'1')
    watched.poll()
    watched.folder.rename(tmp_path / 'away')
    assert watched.poll() == []
    (tmp_path / 'away').rename(watched.folder)
    watched.poll()
    assert watched.poll() == ['a.dcm']


def test_arrivals_wait_between_polls_and_come_sorted(watched):
    def arrivals() -> Iterator[list[str]]:
        for files in watched.watch.arrivals():
            watched.handled.update(files)
            yield [file.path.name for file in files]

    for name in ('b.dcm', 'a.dcm'):
        (watched.folder / name).write_bytes(b'1')
    found = arrivals()
    assert next(found) == ['a.dcm', 'b.dcm']
    assert watched.time.now == 105
    (watched.folder / 'c.dcm').write_bytes(b'1')
    assert next(found) == ['c.dcm']


def test_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match='no such folder'):
        FolderWatch(tmp_path / 'gone', lambda file: False)


@pytest.mark.parametrize('name', ['image.dcm', 'part.dcm', 'tmp.jpeg', 'a.part.dcm'])
def test_other_names_are_not_temporary(name):
    assert not is_temporary(name)


# The journal


def arrived(path: Path, size: int = 3, mtime_ns: int = 7) -> ArrivedFile:
    return ArrivedFile(path, size, mtime_ns)


def test_a_journal_remembers_path_size_and_time_across_processes(tmp_path):
    file = arrived(tmp_path / 'é\udcff\n.dcm')
    Journal(tmp_path / 'j', SETTINGS).add([file], JournaledRows(5, 'é,1\n'))
    again = Journal(tmp_path / 'j', SETTINGS)
    assert file in again and len(again) == 1 and again.last_rows == JournaledRows(5, 'é,1\n')
    assert arrived(file.path, size=4) not in again
    assert arrived(file.path, mtime_ns=8) not in again
    assert arrived(tmp_path / 'b.dcm') not in again


def test_a_relative_and_an_absolute_path_are_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(tmp_path / 'j', SETTINGS)
    journal.add([arrived(Path('a.dcm'))], None)
    assert arrived(tmp_path / 'a.dcm') in journal


@pytest.mark.parametrize('cut', [1, 10, 40])
def test_half_a_line_that_a_crash_left_is_ignored_and_the_journal_goes_on(tmp_path, cut):
    journal = Journal(tmp_path / 'j', SETTINGS)
    for number in (1, 2):
        journal.add([arrived(tmp_path / f'{number}.dcm')], JournaledRows(number, ''))
    (tmp_path / 'j').write_bytes((tmp_path / 'j').read_bytes()[:-cut])
    again = Journal(tmp_path / 'j', SETTINGS)
    assert arrived(tmp_path / '1.dcm') in again and len(again) == again.last_rows.offset
    again.add([arrived(tmp_path / '3.dcm')], None)
    assert arrived(tmp_path / '3.dcm') in Journal(tmp_path / 'j', SETTINGS)


def test_a_journal_of_other_settings_is_refused(tmp_path):
    Journal(tmp_path / 'j', SETTINGS)
    with pytest.raises(UsageError, match='another model or with other options'):
        Journal(tmp_path / 'j', SETTINGS | {'model': 'cd'})


@pytest.mark.parametrize('text', ['', 'text', '[1]', '{"a": 1}', json.dumps({'path': 'x'})])
def test_another_file_is_not_taken_for_a_journal(tmp_path, text):
    (tmp_path / 'j').write_text(text)
    with pytest.raises(UsageError, match='not a journal'):
        Journal(tmp_path / 'j', SETTINGS)
    assert (tmp_path / 'j').read_text() == text


@pytest.mark.parametrize(('facts', 'version'), [({}, 1), ({'version': 3}, 3)])
def test_a_journal_of_another_version_is_named_as_such_and_not_changed(tmp_path, facts, version):
    text = json.dumps({**facts, 'settings': SETTINGS}) + '\n'
    (tmp_path / 'j').write_text(text)
    message = rf'another version of cxr-fastai wrote this journal \(version {version} .*Choose other outputs\.$'
    with pytest.raises(UsageError, match=message):
        Journal(tmp_path / 'j', SETTINGS)
    assert (tmp_path / 'j').read_text() == text


def test_two_processes_cannot_use_one_journal(tmp_path):
    with locked(tmp_path / 'j'), pytest.raises(UsageError, match='another process'), locked(tmp_path / 'j'):
        pass
    with locked(tmp_path / 'j'):
        pass

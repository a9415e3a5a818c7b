"""A folder in which images arrive: `FolderWatch` finds the complete ones, `Journal` remembers those already handled."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.files import atomic, writing
from cxr_fastai.core.foreign import open_below, parse_json, read_text
from cxr_fastai.core.schemas import Fields, Integer, ListOf, Text
from cxr_fastai.data.find import file_reason
from cxr_fastai.images.decode import LoadedFile, check_file

TEMPORARY_SUFFIXES = ('.part', '.partial', '.tmp', '.temp', '.filepart', '.crdownload', '.swp')
"""Suffixes, in lower case, under which programs write a file before they rename it."""
MAX_JOURNAL = 2**30
"""Largest journal that is read, in bytes."""
MAX_PATH = 2**15
"""Largest number of characters of a path in a journal."""
SIZE = Integer(0, 2**63 - 1)
FILE = Fields({'path': Text(MAX_PATH), 'size': SIZE, 'mtime_ns': Integer(-(2**63), 2**63 - 1)})
ROWS = Fields({'offset': SIZE, 'text': Text(MAX_JOURNAL)}, optional=True)
BATCH = Fields({'files': ListOf(FILE), 'rows': ROWS})
"""What a line of a journal after the first one contains: the files that were handled, and their `JournaledRows`."""
VERSION = 2
"""Version of the form of the journal."""
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EOPNOTSUPP)
"""Numbers of the errors of a path that leads to no regular file any more, or over a symbolic link.

FreeBSD reports links as EMLINK; for a socket, Linux reports ENXIO, and macOS EOPNOTSUPP.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArrivedFile:
    """A file as it was found: its `path`, its `size` in bytes, and its time of modification."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> ArrivedFile:
        """Return the file `path` that has this `status`."""
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass
class FolderWatch:
    """Finds images in `folder` and below it that are complete: unchanged for `interval` seconds.

    Links, and the names of hidden and temporary files, such as `.x` and `x.part`, are ignored. `clock` returns seconds
    and `sleep` waits for as many. `is_handled` tells which files are left out. Raises `UsageError` if `folder` is not a
    folder.
    """

    folder: Path
    is_handled: Callable[[ArrivedFile], bool]
    interval: float = 5.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _seen: dict[ArrivedFile, float] = field(default_factory=dict)
    """Image that is not handled -> time when it was first seen as it is."""
    _others: set[ArrivedFile] = field(default_factory=set)
    """Files that are no images, which need not be opened again."""

    def __post_init__(self) -> None:
        check_watched(self.folder)

    def arrivals(self) -> Iterator[list[ArrivedFile]]:
        """Yield the complete files that are new, sorted, whenever there are any. Never ends by itself.

        A file is yielded until `is_handled` is True for it, and again if it changes after that.
        """
        while True:
            complete = self.poll()
            if complete:
                yield complete
            self.sleep(self.interval)

    def poll(self) -> list[ArrivedFile]:
        """Look at the folder once, and return the files that are complete by now and not handled, sorted."""
        now = self.clock()
        files = self._list()
        self._others = {file for file in files if file in self._others or self._is_other(file)}
        waiting = [file for file in files if file not in self._others and not self.is_handled(file)]
        self._seen = {file: self._seen.get(file, now) for file in waiting}
        return [file for file, since in self._seen.items() if now - since >= self.interval]

    def _is_other(self, file: ArrivedFile) -> bool:
        is_known = file in self._seen or self.is_handled(file)
        return not is_known and file_reason(file.path, self.folder, self._open) is not None

    def read(self, file: ArrivedFile) -> LoadedFile | None:
        """Return the contents of `file`, or None if it is not, or not until the end, what was found at its path.

        It was then removed, or replaced by a folder, a link or another file, which arrives later. Links are never
        followed.
        """
        contents = self._read(file)
        if contents is None:
            log.info('%s: no longer what was found, so it was not used', file.path)
        return contents

    def _read(self, file: ArrivedFile) -> LoadedFile | None:
        try:
            with self._open(file.path) as opened:
                status = os.fstat(opened.fileno())
                check_file(status)
                contents = opened.read()
                is_unchanged = file == ArrivedFile.of(file.path, status)
                is_unchanged &= file == ArrivedFile.of(file.path, os.fstat(opened.fileno()))
            return LoadedFile(file.path, contents) if is_unchanged else None
        except ImageError as error:
            return LoadedFile(file.path, error)
        except OSError as error:
            if error.errno in GONE:
                return None
            return LoadedFile(file.path, ImageError(error.strerror or str(error), 'E_IO'))

    def _open(self, path: Path) -> BinaryIO:
        return open_below(self.folder, path)

    def _list(self) -> list[ArrivedFile]:
        """Return the regular files that are there now. A folder that is gone for now has none."""
        files = []
        for base, subfolders, names in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
            for name in sorted(names):
                path = Path(base, name)
                if is_temporary(name):
                    continue
                with suppress(OSError):  # it may be gone already
                    status = os.lstat(path)
                    if stat.S_ISREG(status.st_mode):
                        files.append(ArrivedFile.of(path, status))
        return files


def check_watched(folder: Path) -> None:
    """Raise `UsageError` if `folder` is not a folder."""
    if not folder.is_dir():
        raise UsageError(f'--watch {folder}: no such folder. Create it, or name the one where images arrive.')


def is_temporary(name: str) -> bool:
    """Return True if `name` is that of a hidden file, or of one that a program has not finished."""
    return name.startswith(('.', '~')) or name.endswith('~') or name.lower().endswith(TEMPORARY_SUFFIXES)


@dataclass(frozen=True)
class JournaledRows:
    """The `text` of the rows of some files, and the `offset` in bytes at which it belongs in the table."""

    offset: int
    text: str


class Journal:
    """The files that were handled, in a file of JSON lines, which the next process continues.

    The first line has the `settings` with which they were handled. Each further line has the files of a batch and their
    rows, and is written before these are added to the table: whatever interrupts the process, a file is either not in
    the journal and has no row, or its row can be completed from `last_rows`, those of the last line. Raises
    `UsageError` if `path` is not a journal, or one of another version or with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.last_rows: JournaledRows | None = None
        self._handled: dict[str, tuple[int, int]] = {}
        if path.exists():
            self._read(settings)
        else:
            with atomic(path) as temporary:
                temporary.write_text(json.dumps({'version': VERSION, 'settings': settings}) + '\n', encoding='ascii')

    def __len__(self) -> int:
        return len(self._handled)

    def __contains__(self, file: ArrivedFile) -> bool:
        return self._handled.get(_key(file)) == (file.size, file.mtime_ns)

    def add(self, files: Sequence[ArrivedFile], rows: JournaledRows | None) -> None:
        """Remember that `files` were handled, and their `rows`, if there is a table. Raises `OutputError`."""
        entries = [{'path': _key(file), 'size': file.size, 'mtime_ns': file.mtime_ns} for file in files]
        batch = {'files': entries, 'rows': rows and asdict(rows)}
        with writing(self.path), open(self.path, 'a', encoding='ascii') as journal:
            journal.write(json.dumps(batch) + '\n')
            journal.flush()
            os.fsync(journal.fileno())
        self._remember(batch)

    def _remember(self, batch: dict[str, Any]) -> None:
        for entry in batch['files']:
            self._handled[entry['path']] = entry['size'], entry['mtime_ns']
        self.last_rows = JournaledRows(batch['rows']['offset'], batch['rows']['text']) if batch['rows'] else None

    def _read(self, settings: dict[str, Any]) -> None:
        text = read_text(self.path, MAX_JOURNAL)
        first, *lines = text.splitlines() or ['']
        facts = self._parse(first)
        if not isinstance(facts, dict) or 'settings' not in facts:
            raise UsageError(f'{self.path}: not a journal of --watch. Move it away, or choose other outputs.')
        version = facts.get('version', 1)  # the first version did not say so
        if version != VERSION:
            raise UsageError(
                f'{self.path}: another version of cxr-fastai wrote this journal (version {version!r:.20} of its form; '
                f'{VERSION} is expected), so it cannot be continued. Choose other outputs.'
            )
        if facts['settings'] != settings:
            raise UsageError(
                f'{self.path}: files were handled with another model or with other options. Use the same ones, choose '
                'other outputs, or delete this journal to handle all files again.'
            )
        for line in lines:
            batch = self._parse(line)
            if BATCH.accepts(batch):  # a crash may have left half a line; its files are handled again
                self._remember(batch)
        if not text.endswith('\n'):
            with writing(self.path), open(self.path, 'a', encoding='ascii') as journal:
                journal.write('\n')

    def _parse(self, line: str) -> Any:
        try:
            return parse_json(line.encode(), self.path)
        except CXRError:
            return None


def _key(file: ArrivedFile) -> str:
    return str(file.path.absolute())


@contextmanager
def locked(journal: Path) -> Iterator[None]:
    """Prevent another process from using `journal`. Raises `UsageError` if one does."""
    from filelock import FileLock, Timeout

    lock = FileLock(journal.with_name(f'.{journal.name}.lock'), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f'{journal}: another process watches with this journal. Stop it, or choose others.') from None
    try:
        yield
    finally:
        lock.release()

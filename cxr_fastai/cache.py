"""Films decoded once: a memory-mapped array (n, size, size) with an index that knows when a file has changed."""
from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import features

from cxr_fastai.core import CXRError, FilmError, progress, write_json, writing
from cxr_fastai.images import Preprocessing, decode_film, read_bytes

if TYPE_CHECKING:
    from rich.console import Console

DECODER = 1
"""To be raised when the same file no longer gives the same pixels; caches of another version are made anew."""
CHUNK = 64
"""Films between two flushes to the disk: what a crash can cost."""


class Entry(NamedTuple):
    """A line of the index: the film at `row` is that of `path`, relative to the films' folder, as the file was when it
    had this modification time (ns), size (bytes) and SHA-256."""
    row: int
    path: str
    mtime: int
    size: int
    sha256: str


@dataclass(frozen=True)
class FilmCache:
    """Films that are decoded already and whose files have not changed since: `films` uint8 (n, size, size), and the row
    of each path. `load` takes them from there, and decodes others as `preprocessing` does. `find_cache` opens one."""
    preprocessing: Preprocessing
    folder: Path
    films: np.ndarray = field(repr=False)
    rows: dict[str, int] = field(repr=False)

    # Model files and other processes get the decoder alone: it gives the same pixels, and knows no paths.
    def __reduce__(self): return Preprocessing, astuple(self.preprocessing)

    def __contains__(self, path: str | Path) -> bool: return str(path) in self.rows

    def load(self, path: str | Path) -> np.ndarray:
        """What the network sees of the film `path`: grey uint8 (size, size). Raises `FilmError`."""
        row = self.rows.get(str(path))
        return self.preprocessing.load(path) if row is None else self.films[row]

    def fit(self, film: np.ndarray) -> np.ndarray:
        """`film`, grey uint8 (h, w), as grey uint8 (size, size)."""
        return self.preprocessing.fit(film)


def cache_folder(root: Path, preprocessing: Preprocessing) -> Path:
    """Where the films below `root` are cached: in CXR_CACHE, else in the user's own cache folder, for data may be read
    only. The name is that of `root`, made unique, and the preprocessing."""
    home = Path(os.environ.get('CXR_CACHE') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'cxr_fastai'))
    whole = root.resolve()
    unique = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    return home.expanduser()/f'{whole.name}-{unique}'/'-'.join(map(str, astuple(preprocessing)))


def find_cache(root: Path, preprocessing: Preprocessing) -> FilmCache | None:
    """The cache that `prepare` made of the films below `root`; None where there is none of today's decoder."""
    folder = cache_folder(root, preprocessing)
    if not _is_current(folder): return None
    n = _rows(folder, preprocessing.size)
    rows = {str(root/entry.path): entry.row for entry in _read_index(folder, n) if _is_fresh(root/entry.path, entry)}
    if not rows: return None
    films = np.memmap(folder/'films.u8', np.uint8, 'r', shape=(n, preprocessing.size, preprocessing.size))
    return FilmCache(preprocessing, folder, films, rows)


def prepare(paths: Sequence[str], root: Path, preprocessing: Preprocessing, workers: int | None = None,
            console: Console | None = None) -> tuple[Path, int, list[FilmError]]:
    """Decode the films `paths` below `root` that the cache does not hold, in `workers` threads (default: the cores).

    Returns the cache's folder, how many films were decoded, and the errors of those that could not be. Whenever it is
    stopped, what was written stays valid and the next call goes on. Raises `CXRError` where another process prepares
    the same films, `OutputError` where the disk refuses.
    """
    from filelock import FileLock, Timeout
    folder = cache_folder(root, preprocessing)
    with writing(folder, 'CXR_CACHE'): folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder/'lock', timeout=0), writing(folder, 'CXR_CACHE'):
            if not _is_current(folder): _start(folder)
            index = _read_index(folder, _rows(folder, preprocessing.size))
            known = {entry.path for entry in index if _is_fresh(root/entry.path, entry)}
            todo = [path for path in dict.fromkeys(paths) if path not in known]
            bad = list(_append(todo, folder, root, preprocessing, workers or os.cpu_count() or 1, console))
    except Timeout:
        raise CXRError(f'{folder}: another `data prepare` is at work there: wait for it to end.') from None
    return folder, len(todo) - len(bad), bad


def _append(todo: list[str], folder: Path, root: Path, preprocessing: Preprocessing, workers: int,
            console: Console | None) -> Iterator[FilmError]:
    """Decode the films `todo` and write them by chunks, the pixels always before the index; yield what failed."""
    seen = {entry.sha256: entry.row for entry in _read_index(folder, _rows(folder, preprocessing.size))}
    def decode(path: str) -> tuple | FilmError: return _decode(path, root, preprocessing, seen)
    with ThreadPoolExecutor(workers) as pool, open(folder/'films.u8', 'r+b') as films, \
            open(folder/'index.csv', 'r+b') as index:
        row = _mend(films, index, preprocessing.size**2)
        chunks = (pool.map(decode, todo[start:start + CHUNK]) for start in range(0, len(todo), CHUNK))
        decoded = iter(progress(chain.from_iterable(chunks), console, len(todo)))
        while chunk := list(islice(decoded, CHUNK)):
            yield from (result for result in chunk if isinstance(result, FilmError))
            good = [result for result in chunk if not isinstance(result, FilmError)]
            row = _write(good, row, seen, films, index)


def _write(decoded: list[tuple], row: int, seen: dict[str, int], films: BinaryIO, index: BinaryIO) -> int:
    """Write a chunk's new pixels from `row` on, then its index lines; return the next row."""
    entries = []
    for pixels, facts in decoded:
        if pixels is not None: films.write(pixels.tobytes())
        entries.append(Entry(row if pixels is not None else seen[facts[-1]], *facts))
        row += pixels is not None
    _flush(films)
    index.write(_lines(entries))
    _flush(index)
    return row


def _decode(path: str, root: Path, preprocessing: Preprocessing, seen: dict[str, int]) -> tuple | FilmError:
    """The film's pixels (None where a file of the same bytes has been `seen`) and what its index line says after the
    row; or why there are none."""
    film, suffix = root/path, Path(path).suffix.lower()
    try:
        # Asked before reading: a file that changes meanwhile is then decoded again.
        status, data = os.stat(film), read_bytes(film)
        sha256 = hashlib.sha256(data).hexdigest()
        pixels = None if sha256 in seen else preprocessing.fit(decode_film(data, preprocessing, suffix).pixels)
    except FilmError as error: return error.of(film)
    except OSError as error: return FilmError(error.strerror or str(error), 'E_IO').of(film)
    return pixels, (path, status.st_mtime_ns, status.st_size, sha256)


def _versions() -> dict:
    """What decides the pixels beside the file and the preprocessing."""
    from importlib.metadata import version
    return {'decoder': DECODER, 'pillow': PIL.__version__, 'libjpeg_turbo': features.version('libjpeg_turbo'),
            'pydicom': version('pydicom') if find_spec('pydicom') else None}


def _is_current(folder: Path) -> bool:
    try: return json.loads((folder/'decoder.json').read_text(encoding='utf-8')) == _versions()
    except (OSError, ValueError): return False


def _start(folder: Path) -> None:
    (folder/'decoder.json').unlink(missing_ok=True)  # so that no reader trusts what now becomes empty
    # Made anew and not cut: a training that has the old array mapped keeps it.
    for name in ('films.u8', 'index.csv'):
        (folder/name).unlink(missing_ok=True)
        (folder/name).touch()
    write_json(folder/'decoder.json', _versions())


def _rows(folder: Path, size: int) -> int: return (folder/'films.u8').stat().st_size//size**2


def _read_index(folder: Path, rows: int) -> list[Entry]:
    """The lines of the index about the first `rows` films, without what a crash has torn or filled with rubbish."""
    text = (folder/'index.csv').read_text(encoding='utf-8', errors='surrogateescape').rpartition('\n')[0]
    entries = map(_entry, csv.reader(StringIO(text, newline='')))
    return [entry for entry in entries if entry and entry.row < rows]


def _entry(cells: list[str]) -> Entry | None:
    try: row, path, mtime, size, sha256 = cells
    except ValueError: return None
    return Entry(int(row), path, int(mtime), int(size), sha256) if (row + mtime + size).isdecimal() else None


def _is_fresh(path: Path, entry: Entry) -> bool:
    try: status = os.stat(path)
    except OSError: return False
    return (status.st_mtime_ns, status.st_size) == (entry.mtime, entry.size)


def _mend(films: BinaryIO, index: BinaryIO, pixels: int) -> int:
    """Cut what a crash has left half-written off both files, stand at their ends, and return the next row."""
    index.truncate(index.read().rfind(b'\n') + 1)
    row = films.seek(0, os.SEEK_END)//pixels
    films.truncate(row*pixels)
    for file in (films, index): file.seek(0, os.SEEK_END)
    return row


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lines(entries: list[Entry]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator='\n').writerows(entries)
    return text.getvalue().encode('utf-8', errors='surrogateescape')

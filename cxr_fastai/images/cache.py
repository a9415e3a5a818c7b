"""Images decoded once: a memory-mapped array (n, size, size) with an index that knows when a file has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import features

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.files import atomic, write_json, writing
from cxr_fastai.core.progress import in_threads
from cxr_fastai.images.decode import decode_image, read_bytes
from cxr_fastai.images.preprocessing import Preprocessing

DECODER = 1
"""To be raised when the same file no longer gives the same pixels; caches of another version are made anew."""
FILES = ('images.u8', 'index.jsonl')
CHUNK = 64
"""Images between two flushes to the disk: what a crash can cost."""


class Entry(NamedTuple):
    """A line of the index: the image at `row` is that of `path`, relative to the images' folder, as the file was when it
    had this modification time (ns), size (bytes) and SHA-256."""

    row: int
    path: str
    mtime: int
    size: int
    sha256: str


@dataclass(frozen=True)
class ImageCache:
    """Images that are decoded already and whose files have not changed since: `images` uint8 (n, size, size), not yet
    smoothed, and the row of each path. `load` takes them from there, and decodes others as `preprocessing` does.
    `find_cache` opens one."""

    preprocessing: Preprocessing
    folder: Path
    images: np.ndarray = field(repr=False)
    rows: dict[str, int] = field(repr=False)

    # Model files get the decoder alone, which gives the same pixels and knows no paths; so do workers that are not
    # forked, which then decode: with a cache of every image there are none unless asked for.
    def __reduce__(self):
        return Preprocessing, astuple(self.preprocessing)

    def __contains__(self, path: str | Path) -> bool:
        return str(path) in self.rows

    def load(self, path: str | Path) -> np.ndarray:
        """What the network sees of the image `path`: grey uint8 (size, size). Raises `ImageError`."""
        row = self.rows.get(str(path))
        return self.preprocessing.load(path) if row is None else self.preprocessing.smooth(self.images[row])

    def fit(self, image: np.ndarray) -> np.ndarray:
        """`image`, grey uint8 (h, w), as grey uint8 (size, size)."""
        return self.preprocessing.fit(image)


def cache_folder(root: Path, preprocessing: Preprocessing) -> Path:
    """Where the images below `root` are cached: in CXR_CACHE, else in the user's own cache folder, for data may be read
    only. The name is that of `root`, made unique, and the kind of square. Raises `UsageError` without a home folder."""
    home = Path(os.environ.get('CXR_CACHE') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'cxr_fastai'))
    whole = root.resolve()
    unique = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    try:
        home = home.expanduser()
    except RuntimeError:
        raise UsageError(f'{home}: no such home folder: name one for the cache by CXR_CACHE.') from None
    return home / f'{whole.name}-{unique}' / f'{preprocessing.size}-{preprocessing.resize}'


def find_cache(root: Path, preprocessing: Preprocessing) -> ImageCache | None:
    """The cache that `prepare` made of the images below `root`; None where there is none of today's decoder."""
    try:
        folder = cache_folder(root, preprocessing)
    except UsageError:
        return None
    if not _is_current(folder):
        return None
    n = _rows(folder, preprocessing.size)
    rows = {
        str(root / entry.path): entry.row for entry in _read_index(folder, n) if _is_fresh(root / entry.path, entry)
    }
    if not rows:
        return None
    images = np.memmap(folder / 'images.u8', np.uint8, 'r', shape=(n, preprocessing.size, preprocessing.size))
    return ImageCache(preprocessing, folder, images, rows)


def prepare(
    paths: Sequence[str],
    root: Path,
    preprocessing: Preprocessing,
    workers: int | None = None,
) -> tuple[Path, int, list[ImageError]]:
    """Decode the images `paths` below `root` that the cache does not hold, in `workers` threads (default: the cores).

    Returns the cache's folder, how many images were decoded, and the errors of those that could not be. Whenever it is
    stopped, what was written stays valid and the next call goes on. Raises `CXRError` where another process prepares
    the same images, `OutputError` where the disk refuses.
    """
    from filelock import FileLock, Timeout

    folder = cache_folder(root, preprocessing)
    with writing(folder, 'CXR_CACHE'):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / 'lock', timeout=0), writing(folder, 'CXR_CACHE'):
            if not _is_current(folder):
                _start(folder)
            index = _mend(folder, preprocessing.size)
            known = {entry.path for entry in index if _is_fresh(root / entry.path, entry)}
            todo = [path for path in dict.fromkeys(paths) if path not in known]
            seen = {entry.sha256: entry.row for entry in index}

            def decode(path: str) -> tuple | ImageError:
                return _decode(path, root, preprocessing, seen)

            decoded = in_threads(decode, todo, workers)
            bad = list(_append(decoded, folder, _rows(folder, preprocessing.size)))
    except Timeout:
        raise CXRError(f'{folder}: another `data prepare` is at work there: wait for it to end.') from None
    return folder, len(todo) - len(bad), bad


def _append(decoded: Iterator[tuple | ImageError], folder: Path, row: int) -> Iterator[ImageError]:
    """Write what was `decoded`, from `row` on, by chunks, the pixels always before the index; yield what failed."""
    with open(folder / 'images.u8', 'ab') as images, open(folder / 'index.jsonl', 'ab') as index:
        while chunk := list(islice(decoded, CHUNK)):
            yield from (result for result in chunk if isinstance(result, ImageError))
            row = _write([result for result in chunk if not isinstance(result, ImageError)], row, images, index)


def _write(decoded: list[tuple[np.ndarray | None, Entry]], row: int, images: BinaryIO, index: BinaryIO) -> int:
    """Write a chunk's new pixels from `row` on, then its index lines; return the next row."""
    entries = []
    for pixels, entry in decoded:
        if pixels is not None:
            images.write(pixels.tobytes())
            entry, row = entry._replace(row=row), row + 1
        entries.append(entry)
    _flush(images)
    index.write(_lines(entries))
    _flush(index)
    return row


def _decode(path: str, root: Path, preprocessing: Preprocessing, seen: dict[str, int]) -> tuple | ImageError:
    """The image's pixels and its entry, whose row is still to be given; no pixels and the row where a file of the same
    bytes has been `seen`; or why there are none."""
    image, suffix = root / path, Path(path).suffix.lower()
    try:
        # Asked before reading: a file that changes meanwhile is then decoded again.
        status, data = os.stat(image), read_bytes(image)
        sha256 = hashlib.sha256(data).hexdigest()
        pixels = None if sha256 in seen else preprocessing.square(decode_image(data, preprocessing, suffix).pixels)
    except ImageError as error:
        return error.of(image)
    except OSError as error:
        return ImageError(error.strerror or str(error), 'E_IO').of(image)
    return pixels, Entry(seen.get(sha256, -1), path, status.st_mtime_ns, status.st_size, sha256)


def _versions() -> dict:
    """What decides the pixels beside the file and the preprocessing."""
    from importlib.metadata import version

    libraries = {name: features.version(name) for name in ('libjpeg_turbo', 'jpg_2000', 'libtiff')}
    packages = {
        name: version(name) if find_spec(module) else None
        for name, module in (('pydicom', 'pydicom'), ('pyjpegls', 'jpeg_ls'))
    }
    return {'decoder': DECODER, 'pillow': PIL.__version__, **libraries, **packages}


def _is_current(folder: Path) -> bool:
    try:
        made = json.loads((folder / 'decoder.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return made == _versions() and all((folder / name).is_file() for name in FILES)


def _start(folder: Path) -> None:
    (folder / 'decoder.json').unlink(missing_ok=True)  # so that no reader trusts what now becomes empty
    # Made anew and not cut: a training that has the old array mapped keeps it.
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        (folder / name).touch()
    write_json(folder / 'decoder.json', _versions())


def _rows(folder: Path, size: int) -> int:
    return (folder / 'images.u8').stat().st_size // size**2


def _read_index(folder: Path, rows: int) -> list[Entry]:
    """The lines of the index about the first `rows` images, without what a crash has torn or filled with rubbish."""
    entries = map(_entry, (folder / 'index.jsonl').read_bytes().splitlines())
    return [entry for entry in entries if entry and 0 <= entry.row < rows]


def _entry(line: bytes) -> Entry | None:
    try:
        row, path, mtime, size, sha256 = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    whole = all(isinstance(number, int) for number in (row, mtime, size)) and isinstance(path, str)
    return Entry(row, path, mtime, size, sha256) if whole else None


def _is_fresh(path: Path, entry: Entry) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_mtime_ns, status.st_size) == (entry.mtime, entry.size)


def _mend(folder: Path, size: int) -> list[Entry]:
    """Cut off what a crash has left half-written, so that no old line comes to mean a new row; return the index."""
    rows = _rows(folder, size)
    entries = _read_index(folder, rows)
    if (lines := _lines(entries)) != (folder / 'index.jsonl').read_bytes():
        with atomic(folder / 'index.jsonl') as temporary:
            temporary.write_bytes(lines)
    os.truncate(folder / 'images.u8', rows * size**2)
    return entries


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lines(entries: list[Entry]) -> bytes:
    return b''.join(json.dumps(entry).encode() + b'\n' for entry in entries)

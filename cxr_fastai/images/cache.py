"""A cache of decoded images: a memory-mapped array (n, size, size), and an index that detects changed files.

A folder of the cache contains three files:

- `images.u8`: the pixels, `size * size` bytes per image, without a header. New images are appended.
- `index.jsonl`: one `Entry` per line. The pixels of a line are always on the disk before the line.
- `decoder.json`: the versions of the libraries that decoded the images; with other versions the cache is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import features

from cxr_fastai.core.errors import CXRError, ImageError, OutputError, UsageError
from cxr_fastai.core.files import StrPath, atomic, write_json, writing
from cxr_fastai.core.foreign import parse_json, read_bytes, read_json
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.schemas import Integer, Text
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.decode import read_bytes as read_image_bytes
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.preprocessing import Preprocessing

DECODER = 2
"""Version of the decoder. Raise it when the same file no longer gives the same pixels; older caches are rebuilt."""
FILES = ('images.u8', 'index.jsonl')
MAX_INDEX = 2**28
"""Largest index that is read, in bytes; a line has about 200. A longer one is not ours, and the cache is rebuilt."""
CHUNK = 64
"""Number of images between two flushes to the disk, which is the most that a crash can lose."""


class Entry(NamedTuple):
    """A line of the index: the image in `row` belongs to the file `path` in the version with this time, size and hash.

    `path` is relative to the folder of the images, `mtime` is in nanoseconds, `size` in bytes; `sha256` is hexadecimal.
    """

    row: int
    path: str
    mtime: int
    size: int
    sha256: str


ENTRY_RULES = (
    Integer(0, 2**40),
    Text(10_000),
    Integer(-(2**63), 2**63),
    Integer(0, 2**63),
    Text(64, '[0-9a-f]{64}'),
)
"""What each field of an `Entry` may be."""


class Decoded(NamedTuple):
    """A decoded image and its entry. `pixels` are None if an identical file is in the cache already.

    The row of a new image is -1 until it is written.
    """

    pixels: np.ndarray | None
    entry: Entry


@dataclass(frozen=True)
class ImageCache:
    """Decoded images whose files have not changed since. `find_cache` opens one.

    `images` is uint8 (n, size, size), without the low-pass filter; `rows` maps the path of a file to its row. `load`
    decodes files that are not in the cache, with the same result.
    """

    preprocessing: Preprocessing
    folder: Path
    images: np.ndarray = field(repr=False)
    rows: dict[str, int] = field(repr=False)

    # A pickled cache becomes its `Preprocessing`, which gives the same pixels by decoding. Model files thus contain
    # no paths. Worker processes that are not forked decode; if every image is cached, there are no workers by default.
    def __reduce__(self) -> tuple[type[Preprocessing], tuple[Any, ...]]:
        return Preprocessing, astuple(self.preprocessing)

    def __contains__(self, path: str | Path) -> bool:
        return str(path) in self.rows

    def load(self, path: str | Path) -> np.ndarray:
        """Return the network's view of the image `path`: grey uint8 (size, size). Raises `ImageError`."""
        row = self.rows.get(str(path))
        if row is None:
            return self.preprocessing.load(path)
        return self.preprocessing.smooth(self.images[row])

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return the network's view of a decoded image, grey uint8 (h, w): grey uint8 (size, size)."""
        return self.preprocessing.fit(image)


def cache_root() -> Path:
    """Return the folder of all caches: `CXR_CACHE`, else `cxr_fastai` in the user's cache folder.

    Raises `UsageError` if the user has no home folder.
    """
    user_cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    folder = Path(os.environ.get('CXR_CACHE') or Path(user_cache, 'cxr_fastai'))
    try:
        return folder.expanduser()
    except RuntimeError:
        raise UsageError(f'{folder}: no such home folder. Name a folder for the cache by CXR_CACHE.') from None


def cache_folder(root: Path, preprocessing: Preprocessing) -> Path:
    """Return the folder that caches the images below `root` in the squares of `preprocessing`.

    It lies in the folder `CXR_CACHE`, or else in the user's cache folder, because the data may be read-only. Its name
    consists of the name of `root`, a hash of its full path, size and resize method, and accepted modalities. Raises
    `UsageError` if the user has no home folder.
    """
    root = root.resolve()
    path_hash = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    words = [str(preprocessing.size), preprocessing.resize, *parse_modalities(preprocessing.modality)]
    return cache_root() / f'{root.name}-{path_hash}' / '-'.join(words)


def find_cache(root: StrPath, preprocessing: Preprocessing) -> ImageCache | None:
    """Open the cache that `prepare` wrote for the images below `root`.

    Returns None if there is none, if other library versions wrote it, or if all its files have changed.
    """
    root = Path(root)
    try:
        folder = cache_folder(root, preprocessing)
    except UsageError:
        return None
    if not _is_current(folder):
        return None
    n = _count_rows(folder, preprocessing.size)
    try:
        index = _read_index(folder, n)
    except CXRError:
        return None
    rows = {str(root / entry.path): entry.row for entry in index if _is_fresh(root / entry.path, entry)}
    if not rows:
        return None
    images = np.memmap(folder / 'images.u8', np.uint8, 'r', shape=(n, preprocessing.size, preprocessing.size))
    return ImageCache(preprocessing, folder, images, rows)


def prepare(
    paths: Sequence[str],
    root: StrPath,
    preprocessing: Preprocessing,
    workers: int | None = None,
) -> tuple[Path, int, list[ImageError]]:
    """Decode the images `paths`, relative to `root`, that are not in the cache yet, in `workers` threads.

    `workers` defaults to the number of cores. Returns the folder of the cache, the number of decoded images, and the
    errors of the unreadable ones. If it is interrupted, everything written stays valid, and the next call continues.
    Raises `CXRError` if another process prepares the same images, `OutputError` if the cache cannot be written.
    """
    root = Path(root)
    from filelock import FileLock, Timeout

    folder = cache_folder(root, preprocessing)
    with writing(folder, 'CXR_CACHE'):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / 'lock', timeout=0), writing(folder, 'CXR_CACHE'):
            if not _is_current(folder):
                _start(folder)
            index = _repair(folder, preprocessing.size)
            cached = {entry.path for entry in index if _is_fresh(root / entry.path, entry)}
            missing = [path for path in dict.fromkeys(paths) if path not in cached]
            rows_by_hash = {entry.sha256: entry.row for entry in index}

            def decode(path: str) -> Decoded | ImageError:
                return _decode(path, root, preprocessing, rows_by_hash)

            results = in_threads(decode, missing, workers)
            errors = _append(results, folder, _count_rows(folder, preprocessing.size))
    except Timeout:
        raise CXRError(f'{folder}: another `data prepare` is at work there. Wait until it ends.') from None
    except OSError as error:
        raise OutputError(f'{folder / "lock"}: cannot be opened ({error.strerror}). Delete it.') from None
    return folder, len(missing) - len(errors), errors


def _append(results: Iterator[Decoded | ImageError], folder: Path, row: int) -> list[ImageError]:
    """Append decoded images to the cache from `row` on, chunk by chunk; return the errors among the `results`."""
    errors = []
    with open(folder / 'images.u8', 'ab') as images, open(folder / 'index.jsonl', 'ab') as index:
        while chunk := list(islice(results, CHUNK)):
            errors += [result for result in chunk if isinstance(result, ImageError)]
            row = _write([result for result in chunk if isinstance(result, Decoded)], row, images, index)
    return errors


def _write(chunk: list[Decoded], row: int, images: BinaryIO, index: BinaryIO) -> int:
    """Write the new pixels of a chunk from `row` on, then its lines of the index; return the next free row."""
    entries = []
    for pixels, entry in chunk:
        if pixels is not None:
            images.write(pixels.tobytes())
            entry = entry._replace(row=row)
            row += 1
        entries.append(entry)
    _flush(images)
    index.write(_lines(entries))
    _flush(index)
    return row


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _decode(path: str, root: Path, preprocessing: Preprocessing, rows_by_hash: dict[str, int]) -> Decoded | ImageError:
    """Decode the image `path`, unless an identical file is in `rows_by_hash`."""
    image = root / path
    try:
        # The status comes first: if the file changes while it is read, the entry is outdated and it is decoded again.
        status = os.stat(image)
        data = read_image_bytes(image)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = Entry(rows_by_hash.get(sha256, -1), path, status.st_mtime_ns, status.st_size, sha256)
        if sha256 in rows_by_hash:
            return Decoded(None, entry)
        pixels = decode_image(data, preprocessing, image.suffix.lower()).pixels
        return Decoded(preprocessing.square(pixels), entry)
    except ImageError as error:
        return error.with_path(image)
    except OSError as error:
        return ImageError(error.strerror or str(error), 'E_IO').with_path(image)


def _is_current(folder: Path) -> bool:
    """Return True if the cache is complete, and today's library versions decoded its images."""
    try:
        versions = read_json(folder / 'decoder.json')
        is_complete = all((folder / name).is_file() for name in FILES)
        return versions == _versions() and is_complete and (folder / 'index.jsonl').stat().st_size <= MAX_INDEX
    except (CXRError, OSError):
        return False


def _versions() -> dict[str, Any]:
    """Return the versions of everything that determines the pixels, besides the file and the preprocessing."""
    from importlib.metadata import version

    libraries = {name: features.version(name) for name in ('libjpeg_turbo', 'jpg_2000', 'libtiff')}
    packages = {
        'pydicom': version('pydicom') if find_spec('pydicom') else None,
        'pyjpegls': version('pyjpegls') if find_spec('jpeg_ls') else None,
    }
    return {'decoder': DECODER, 'pillow': PIL.__version__, **libraries, **packages}


def _start(folder: Path) -> None:
    """Create an empty cache in place of an outdated one."""
    _delete(folder / 'decoder.json')  # first, so that no reader trusts the empty files
    for name in FILES:
        # Deleted and not truncated: a training that has mapped the old array keeps it.
        _delete(folder / name)
        (folder / name).touch()
    write_json(folder / 'decoder.json', _versions())


def _delete(path: Path) -> None:
    """Delete a file, or what is there in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _count_rows(folder: Path, size: int) -> int:
    return (folder / 'images.u8').stat().st_size // size**2


def _is_fresh(path: Path, entry: Entry) -> bool:
    """Return True if the file `path` has not changed since the entry was written."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_mtime_ns, status.st_size) == (entry.mtime, entry.size)


def _read_index(folder: Path, rows: int) -> list[Entry]:
    """Return the entries of the first `rows` images; damaged lines, which a crash can leave, are skipped."""
    lines = read_bytes(folder / 'index.jsonl', MAX_INDEX).splitlines()
    entries = [_parse_entry(line) for line in lines]
    return [entry for entry in entries if entry is not None and entry.row < rows]


def _parse_entry(line: bytes) -> Entry | None:
    try:
        values = parse_json(line, 'index.jsonl')
    except CXRError:
        return None
    if not isinstance(values, list) or len(values) != len(ENTRY_RULES):
        return None
    follows = [rule.accepts(value) for rule, value in zip(ENTRY_RULES, values, strict=True)]
    return Entry(*values) if all(follows) else None


def _repair(folder: Path, size: int) -> list[Entry]:
    """Remove what a crash left half written, so that no old line can refer to a new image; return the index."""
    rows = _count_rows(folder, size)
    entries = _read_index(folder, rows)
    lines = _lines(entries)
    if lines != read_bytes(folder / 'index.jsonl', MAX_INDEX):
        with atomic(folder / 'index.jsonl') as temporary:
            temporary.write_bytes(lines)
    os.truncate(folder / 'images.u8', rows * size**2)
    return entries


def _lines(entries: list[Entry]) -> bytes:
    return b''.join(json.dumps(entry).encode() + b'\n' for entry in entries)

"""Unpack the images of a downloaded zip file, folder or array file, after checking that the archive is safe."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path, PurePosixPath
from struct import error as StructError
from typing import IO

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.files import check_new, writing
from cxr_fastai.core.progress import progress
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.zips import check_zip
from cxr_fastai.data.find import ignore_reason

MAX_ENTRIES = 200_000
"""Largest number of files in an archive."""
MAX_BYTES = 20 * 10**9
"""Largest unpacked size of an archive."""
MAX_RATIO = 200
"""Largest ratio of unpacked to packed bytes; images hardly compress."""
MAX_DIRECTORY = 32 * 2**20
"""Largest directory of an archive in bytes, which `zipfile` reads at once."""
MAX_ARRAY_IMAGES = 100_000
"""Largest number of images in one array of an array file."""
LOCAL_HEADER_BYTES = 30
"""Bytes before the name and the data of an entry."""
CHUNK = 2**20
"""Bytes read at a time."""
MEDMNIST_SIZE = 224
SPLITS = ('train', 'val', 'test')
"""The splits of an array file."""
COMPRESSION_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED_FLAG = 0x1
UNSAFE_NAME = re.compile(r'/|[A-Za-z]:|.*[\\\0]|(.*/)?\.\.(/|$)', re.DOTALL)
"""Names that can lead out of the folder: absolute, with a drive letter, a backslash, a NUL character or `..`."""
LAYOUT = re.compile(r'(?P<above>(chest_xray/){0,2})(?P<place>(train|val|test)/(NORMAL|PNEUMONIA)/[^/]+)')
"""An entry of the data set, below up to two folders `chest_xray`."""
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, StructError)
"""The exceptions that `zipfile` raises for a damaged archive."""


def unpack_images(archive: Path, folder: Path) -> Counter[str]:
    """Write the images of `archive`, a zip file or a folder, to `folder`/train|val|test/NORMAL|PNEUMONIA.

    Returns the number of ignored files by reason. Raises `CXRError` if the zip file is damaged, encrypted, expands too
    much, or has an entry that leads out of `folder`.
    """
    if archive.is_dir():
        return _copy_images(archive, folder)
    try:
        with _open_zip(archive) as file:
            entries = {entry.filename: entry for entry in file.infolist() if not entry.filename.endswith('/')}
            places, ignored = choose_images(entries)
            check_entries(archive, file.infolist(), places)
            bytes_left = MAX_BYTES
            for name, place in progress(list(places.items())):
                bytes_left -= _extract(file, entries[name], folder / place, bytes_left)
    except DAMAGED as error:
        raise CXRError(f'{archive.name}: not a complete zip file ({first_line(error)}).') from error
    return ignored


@contextmanager
def _open_zip(archive: Path) -> Iterator[zipfile.ZipFile]:
    """Open `archive`, a regular file. Raises `CXRError` if it cannot be read, or its directory is too large."""
    try:
        file = FileIO(os.open(archive, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)))
    except OSError as error:
        raise CXRError(f'{archive.name}: cannot be read ({error.strerror}).') from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CXRError(f'{archive.name}: not a regular file.')
        try:
            check_zip(file, MAX_ENTRIES, MAX_DIRECTORY)
        except ValueError as error:
            raise CXRError(f'{archive.name}: {error}, so it was not read.') from None
        with zipfile.ZipFile(file) as archive_file:
            yield archive_file


def _extract(file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, bytes_left: int) -> int:
    """Write one entry and return its size, which is counted while reading because the headers can be wrong."""
    limit = min(bytes_left, _size_limit(entry))
    written = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open(entry) as source, open(target, 'xb') as image:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > limit:
                raise CXRError(f'the entry {entry.orig_filename!r} is refused: {_describe_expansion(entry)}.')
            image.write(chunk)
    return written


def choose_images(names: Iterable[str]) -> tuple[dict[str, str], Counter[str]]:
    """Return the place in the layout of each image among `names`, and the number of other names by reason.

    Kaggle's zip file has the images twice, below chest_xray/ and below chest_xray/chest_xray/. The deeper ones are
    ignored.
    """
    matches: dict[str, re.Match[str]] = {}
    ignored: Counter[str] = Counter()
    for name in names:
        match = LAYOUT.fullmatch(name)
        reason = ignore_reason(PurePosixPath(name))
        if reason:
            ignored[reason] += 1
        elif match:
            matches[name] = match
        else:
            ignored['outside the class folders'] += 1
    top = min((len(match['above']) for match in matches.values()), default=0)
    places = {name: match['place'] for name, match in matches.items() if len(match['above']) == top}
    if len(places) < len(matches):
        ignored['nested chest_xray'] = len(matches) - len(places)
    return places, ignored


def check_entries(archive: Path, entries: list[zipfile.ZipInfo], images: Iterable[str]) -> None:
    """Raise `CXRError` if the headers of the zip file's `entries` are unsafe; `images` are the entries to unpack."""
    packed = archive.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > min(MAX_BYTES, MAX_RATIO * packed):
        raise CXRError(
            f'{archive.name}: {packed:,} bytes would unpack to {unpacked:,}; at most {MAX_BYTES:,} bytes and '
            f'{MAX_RATIO} times the packed size are allowed.'
        )
    names_to_unpack = set(images)
    names: set[str] = set()
    for entry in entries:
        name = entry.filename.casefold()  # some file systems treat `A` and `a` as the same name
        problem = _find_problem(entry)
        if problem is None and name in names:
            problem = 'its name occurs twice'
        if problem is None and entry.filename in names_to_unpack and entry.file_size > _size_limit(entry):
            problem = _describe_expansion(entry)
        if problem:
            raise CXRError(f'{archive.name}: the entry {entry.orig_filename!r} is refused: {problem}.')
        names.add(name)
    _check_overlap(archive, entries)


def _check_overlap(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise `CXRError` if two entries share data, by which a small file can hold many large ones."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise CXRError(
                f'{archive.name}: the entry {entry.orig_filename!r} is refused: its data are also those of another.'
            )
        end = entry.header_offset + LOCAL_HEADER_BYTES + entry.compress_size


def _find_problem(entry: zipfile.ZipInfo) -> str | None:
    file_type = stat.S_IFMT(entry.external_attr >> 16)
    # Newer versions of Python can take `filename` from an extra field, so both names are checked.
    if UNSAFE_NAME.match(entry.orig_filename) or UNSAFE_NAME.match(entry.filename):
        return 'its name can lead out of the folder'
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        return 'it is a link or a device'
    if entry.header_offset < 0:
        return 'its data are missing'
    if entry.flag_bits & ENCRYPTED_FLAG:
        return 'it is encrypted'
    if entry.compress_type not in COMPRESSION_METHODS:
        return f'compression method {entry.compress_type} is not supported'
    return None


def _size_limit(entry: zipfile.ZipInfo) -> int:
    return MAX_RATIO * entry.compress_size


def _describe_expansion(entry: zipfile.ZipInfo) -> str:
    return f'{entry.compress_size:,} bytes unpack to more than {MAX_RATIO} times as many'


def _copy_images(source: Path, folder: Path) -> Counter[str]:
    """Copy the images of the folder `source`. Links are not followed."""
    paths = [Path(base, name) for base, _, names in os.walk(source) for name in sorted(names)]
    files = [path.relative_to(source).as_posix() for path in paths if path.is_file() and not path.is_symlink()]
    places, ignored = choose_images(files)
    if len(files) < len(paths):
        ignored['link'] = len(paths) - len(files)
    for name, place in progress(list(places.items())):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / place)
    return ignored


def unpack_arrays(archive: Path, folder: Path) -> Counter[str]:
    """Write the images in MedMNIST's array file `archive` as numbered grey PNG files; nothing is ignored.

    Raises `CXRError` unless it holds uint8 images (n, 224, 224) and labels (n, 1) for train, val and test.
    """
    try:
        with _open_zip(archive) as file:
            names = [f'{split}_{kind}.npy' for split in SPLITS for kind in ('images', 'labels')]
            check_entries(archive, file.infolist(), names)
            for split in SPLITS:
                with file.open(f'{split}_images.npy') as images, file.open(f'{split}_labels.npy') as labels:
                    _write_split(archive, split, images, labels, folder / split)
    except (KeyError, *DAMAGED) as error:
        raise CXRError(f'{archive.name}: not the arrays of MedMNIST ({first_line(error)}).') from error
    return Counter()


def _write_split(archive: Path, split: str, images: IO[bytes], labels: IO[bytes], folder: Path) -> None:
    """Write the images of one split, which are read one at a time."""
    shape, dtype = _read_array_header(images)
    labels_shape, labels_dtype = _read_array_header(labels)
    n = shape[0] if shape else 0
    if shape != (n, MEDMNIST_SIZE, MEDMNIST_SIZE) or labels_shape != (n, 1) or dtype != np.uint8:
        raise CXRError(
            f'{archive.name}: {split} holds {dtype} images {shape} and labels {labels_shape}; '
            f'expected uint8 (n, {MEDMNIST_SIZE}, {MEDMNIST_SIZE}) and (n, 1).'
        )
    if n > MAX_ARRAY_IMAGES:
        raise CXRError(f'{archive.name}: {split} holds {n:,} images; at most {MAX_ARRAY_IMAGES:,} are allowed.')
    classes = np.frombuffer(_read_values(labels, n * labels_dtype.itemsize), labels_dtype)
    if labels_dtype.kind not in 'iu' or not np.isin(classes, range(len(VOCAB))).all():
        raise CXRError(f'{archive.name}: {split} holds labels other than 0 for {VOCAB[0]} and 1 for {VOCAB[1]}.')
    for name in VOCAB:
        (folder / name).mkdir(parents=True)
    for i in progress(range(n)):
        pixels = np.frombuffer(_read_values(images, MEDMNIST_SIZE**2), np.uint8)
        path = folder / VOCAB[classes[i]] / f'medmnist-{split}-{i + 1:05d}.png'
        Image.fromarray(pixels.reshape(MEDMNIST_SIZE, MEDMNIST_SIZE)).save(path, compress_level=1)


def _read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and the type of an array. Raises `ValueError` for a damaged one, objects and columns first."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, is_by_columns, dtype = read_header(file)
    except DAMAGED:
        raise
    # NumPy reads a header as an expression of Python, so TokenError, SyntaxError and others are possible.
    except Exception as error:
        raise ValueError(f'damaged header of an array, {type(error).__name__}') from error
    if dtype.hasobject:
        raise ValueError('objects are not read: allow_pickle is off')
    if is_by_columns and len(shape) > 1 and shape[1] > 1:
        raise ValueError('the array is stored by columns')
    return shape, dtype


def _read_values(file: IO[bytes], size: int) -> bytes:
    values = file.read(size)
    if len(values) < size:
        raise EOFError('an array ends early')
    return values


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, and rename it to `folder` at the end; after an error delete it.

    Raises `UsageError` if `folder` is not empty, `OutputError` if it cannot be written.
    """
    temporary = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            check_new(folder)
            if folder.exists():
                folder.rmdir()  # Windows cannot rename to an existing folder, even if it is empty
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_md5(archive: Path, md5: str) -> None:
    """Raise `CXRError` if the MD5 hash of `archive` is not `md5`. An empty `md5` is not checked."""
    if not md5:
        return
    actual = hash_file(archive)
    if actual != md5:
        raise CXRError(f'{archive.name}: the MD5 hash is {actual}; expected {md5}.')


def hash_file(path: Path) -> str:
    """Return the MD5 hash of a file in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()

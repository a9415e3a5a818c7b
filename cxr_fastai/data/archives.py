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
from pathlib import Path, PurePosixPath
from struct import error as StructError

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.files import check_new, writing
from cxr_fastai.core.progress import progress
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.find import ignore_reason

MAX_ENTRIES = 200_000
MAX_BYTES = 20 * 10**9
"""Largest unpacked size of an archive."""
MAX_RATIO = 200
"""Largest ratio of unpacked to packed bytes; images hardly compress."""
CHUNK = 2**20
"""Bytes read at a time."""
MEDMNIST_SIZE = 224
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
            entries = {entry.filename: entry for entry in file.infolist() if not entry.is_dir()}
            places, ignored = choose_images(entries)
            check_entries(archive, file.infolist(), places)
            bytes_left = MAX_BYTES
            for name, place in progress(list(places.items())):
                bytes_left -= _extract(file, entries[name], folder / place, bytes_left)
    except DAMAGED as error:
        raise CXRError(f'{archive.name}: not a complete zip file ({error}).') from error
    return ignored


def _open_zip(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except OSError as error:
        raise CXRError(f'{archive.name}: cannot be read ({error.strerror}).') from error


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
    if len(entries) > MAX_ENTRIES:
        raise CXRError(f'{archive.name}: {len(entries):,} entries; at most {MAX_ENTRIES:,} are allowed.')
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
        with open(archive, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
            for split in ('train', 'val', 'test'):
                images = arrays[f'{split}_images']
                labels = arrays[f'{split}_labels']
                _check_arrays(archive, split, images, labels)
                for name in VOCAB:
                    (folder / split / name).mkdir(parents=True)
                for i in progress(range(len(images))):
                    path = folder / split / VOCAB[labels[i, 0]] / f'medmnist-{split}-{i + 1:05d}.png'
                    Image.fromarray(images[i]).save(path, compress_level=1)
    except (KeyError, *DAMAGED) as error:
        raise CXRError(f'{archive.name}: not the arrays of MedMNIST ({error}).') from error
    return Counter()


def _check_arrays(archive: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    n = len(images) if images.ndim else 0
    if images.shape != (n, MEDMNIST_SIZE, MEDMNIST_SIZE) or labels.shape != (n, 1) or images.dtype != np.uint8:
        raise CXRError(
            f'{archive.name}: {split} holds {images.dtype} images {images.shape} and labels {labels.shape}; '
            f'expected uint8 (n, {MEDMNIST_SIZE}, {MEDMNIST_SIZE}) and (n, 1).'
        )
    if labels.dtype.kind not in 'iu' or not np.isin(labels, range(len(VOCAB))).all():
        raise CXRError(f'{archive.name}: {split} holds labels other than 0 for {VOCAB[0]} and 1 for {VOCAB[1]}.')


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

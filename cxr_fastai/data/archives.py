"""Images out of a zip, a folder or arrays that others packed: checked before anything is written, junk passed over."""

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
from cxr_fastai.data.find import junk

MAX_ENTRIES = 200_000
MAX_BYTES = 20 * 10**9
"""Of an archive, unpacked."""
MAX_RATIO = 200
"""Bytes unpacked for each byte packed; images hardly shrink at all."""
CHUNK = 2**20
SIDE = 224
"""Of MedMNIST's images, in pixels."""
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1
"""The bit of a zip entry's flags."""
UNSAFE = re.compile(r'/|[A-Za-z]:|.*[\\\0]|(.*/)?\.\.(/|$)', re.DOTALL)
"""Names that could leave the target: absolute, with a drive, with backslashes, with `..`."""
LAYOUT = re.compile(r'(?P<above>(chest_xray/){0,2})(?P<place>(train|val|test)/(NORMAL|PNEUMONIA)/[^/]+)')
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, StructError)
"""What `zipfile` lets out for an archive that is not whole."""


def unpack_images(archive: Path, folder: Path) -> Counter:
    """Write the images of `archive`, a zip or a folder, to `folder`/train|val|test/NORMAL|PNEUMONIA.

    Returns a count of what was passed over, by reason; shows the progress. Raises
    `CXRError` for a zip that is damaged, encrypted, a bomb or has a name that leaves `folder`.
    """
    if archive.is_dir():
        return _copy_images(archive, folder)
    try:
        with _open(archive) as file:
            entries = {entry.filename: entry for entry in file.infolist() if not entry.is_dir()}
            images, skipped = choose_images(entries)
            check_entries(archive, file.infolist(), images)
            room = MAX_BYTES
            for name, place in progress(list(images.items())):
                room -= _extract(file, entries[name], folder / place, room)
    except DAMAGE as error:
        raise CXRError(f'{archive.name}: not a whole zip ({error}).') from error
    return skipped


def choose_images(names: Iterable[str]) -> tuple[dict[str, str], Counter]:
    """The images among `names` with their places in the layout, and a count of the other names by reason.

    Where the images lie both below chest_xray/ and below chest_xray/chest_xray/, as in the Kaggle zip, the deeper ones
    are second copies.
    """
    found, skipped = {}, Counter()
    for name in names:
        if reason := _reason(name):
            skipped[reason] += 1
        else:
            found[name] = LAYOUT.fullmatch(name)
    top = min((len(match['above']) for match in found.values()), default=0)
    images = {name: match['place'] for name, match in found.items() if len(match['above']) == top}
    if len(images) < len(found):
        skipped['nested chest_xray'] = len(found) - len(images)
    return images, skipped


def check_entries(archive: Path, entries: list[zipfile.ZipInfo], images: Iterable[str]) -> None:
    """Raise `CXRError`, naming the entry, unless all of the zip's `entries` are harmless by what its headers say."""
    size, unpacked = archive.stat().st_size, sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES:
        raise CXRError(f'{archive.name}: {len(entries):,} entries, and {MAX_ENTRIES:,} are allowed.')
    if unpacked > min(MAX_BYTES, MAX_RATIO * size):
        raise CXRError(
            f'{archive.name}: {size:,} bytes would unpack to {unpacked:,}; allowed are {MAX_BYTES:,} and '
            f'{MAX_RATIO} times its size.'
        )
    seen, wanted = set(), set(images)
    for entry in entries:
        # Folded, since some file systems take `A` and `a` for one name.
        fault = _fault(entry) or ('its name occurs twice' if entry.filename.casefold() in seen else None)
        if not fault and entry.filename in wanted and entry.file_size > _room(entry):
            fault = _bomb(entry)
        if fault:
            raise CXRError(f'{archive.name}: the entry {entry.orig_filename!r} is refused: {fault}.')
        seen.add(entry.filename.casefold())


def draw_images(archive: Path, folder: Path) -> Counter:
    """Write the arrays of MedMNIST's `archive` as grey PNGs, numbered as they lie there. Passes nothing over.

    Raises `CXRError` unless it holds, for train, val and test, uint8 images (n, 224, 224) and labels (n, 1).
    """
    try:
        with open(archive, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
            for split in ('train', 'val', 'test'):
                images, labels = arrays[f'{split}_images'], arrays[f'{split}_labels']
                _check_arrays(archive, split, images, labels)
                for label in VOCAB:
                    (folder / split / label).mkdir(parents=True)
                for i in progress(range(len(images))):
                    place = folder / split / VOCAB[labels[i, 0]] / f'medmnist-{split}-{i + 1:05d}.png'
                    Image.fromarray(images[i]).save(place, compress_level=1)
    except (KeyError, *DAMAGE) as error:
        raise CXRError(f'{archive.name}: not the arrays of MedMNIST ({error}).') from error
    return Counter()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `folder` to fill, then rename it to `folder`; after an exception nothing is left.

    Raises `UsageError` where something is in the folder, `OutputError` where it cannot be written.
    """
    temporary = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            check_new(folder)
            if folder.exists():
                folder.rmdir()  # Windows renames onto no folder, not even an empty one
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_hash(archive: Path, md5: str) -> None:
    """Raise `CXRError` unless `archive` has the MD5 `md5`; an empty one is not checked."""
    if md5 and (found := hash_file(archive)) != md5:
        raise CXRError(f'{archive.name}: the MD5 is {found}, and {md5} is expected.')


def hash_file(path: Path) -> str:
    """The MD5 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except OSError as error:
        raise CXRError(f'{archive.name}: cannot be read ({error.strerror}).') from error


def _fault(entry: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    # Both, since newer Pythons may take the second from an extra field.
    if UNSAFE.match(entry.orig_filename) or UNSAFE.match(entry.filename):
        return 'its name may lead out of the folder'
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return 'it is a link or a device'
    if entry.header_offset < 0:
        return 'its data are missing'
    if entry.flag_bits & ENCRYPTED:
        return 'it is encrypted'
    return None if entry.compress_type in PLAIN else f'compression method {entry.compress_type} is not read'


def _room(entry: zipfile.ZipInfo) -> int:
    return MAX_RATIO * entry.compress_size


def _bomb(entry: zipfile.ZipInfo) -> str:
    return f'{entry.compress_size:,} bytes unpack to over {MAX_RATIO} times as many'


def _extract(file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, room: int) -> int:
    """Write one entry and return its bytes, counted again while reading, since headers may lie."""
    room, written = min(room, _room(entry)), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open(entry) as source, open(target, 'xb') as image:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > room:
                raise CXRError(f'{entry.orig_filename!r} is refused: {_bomb(entry)}.')
            image.write(chunk)
    return written


def _check_arrays(archive: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise `CXRError` unless the arrays are what `draw_images` expects."""
    n = len(images) if images.ndim else 0
    if images.shape != (n, SIDE, SIDE) or labels.shape != (n, 1) or images.dtype != np.uint8:
        raise CXRError(
            f'{archive.name}: {split} holds {images.dtype} images {images.shape} and labels {labels.shape}; '
            f'uint8 (n, {SIDE}, {SIDE}) and (n, 1) are expected.'
        )
    if labels.dtype.kind not in 'iu' or not np.isin(labels, range(len(VOCAB))).all():
        raise CXRError(f'{archive.name}: {split} holds labels other than 0 for {VOCAB[0]} and 1 for {VOCAB[1]}.')


def _copy_images(source: Path, folder: Path) -> Counter:
    """Copy the images of the folder `source`; links are not followed."""
    paths = [Path(base, name) for base, _, names in os.walk(source) for name in sorted(names)]
    names = [path.relative_to(source).as_posix() for path in paths if path.is_file() and not path.is_symlink()]
    images, skipped = choose_images(names)
    if len(names) < len(paths):
        skipped['link'] = len(paths) - len(names)
    for name, place in progress(list(images.items())):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / place)
    return skipped


def _reason(name: str) -> str | None:
    """Why the file `name` is no image of the data set; None where it is one."""
    return junk(PurePosixPath(name)) or (None if LAYOUT.fullmatch(name) else 'outside the class folders')

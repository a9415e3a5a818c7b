"""Find images in folders and among command-line arguments."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.folders import describe_own_folder
from cxr_fastai.core.foreign import read_bytes
from cxr_fastai.core.paths import correct_path, correct_paths
from cxr_fastai.data.listings import MAX_LISTING, read_listing, read_names
from cxr_fastai.images.decode import SUFFIXES, sniff
from cxr_fastai.images.formats import FORMATS, HEAD_BYTES, name_foreign_format, name_own_picture

NOT_AN_IMAGE = 'not an image'
TABLE_SUFFIXES = ('.csv', '.tsv', '.xlsx', '.xls', '.ods')
LIST_SUFFIXES = ('.txt', '.lst', '.list')
"""Suffixes of files that list images: as a table (the error about a spreadsheet says how to save one), or in lines."""
LINK = 'link out of the folder or in a circle'
"""Reasons for leaving files out."""


def list_images(sources: StrPath | Iterable[StrPath]) -> list[Path]:
    """Return the images that `sources` name, one or several paths, as the arguments of a command do.

    Each source is an image file, a folder (all images below it, sorted), a table `.csv` or `.tsv` (the images in its
    column `path`), a list `.txt` (one path per line), or `-` (such a list or table on standard input). Paths in files
    are relative to the folder of the file; `correct_paths` says which spellings are understood. Warns of files in
    folders that are left out, with counts by reason. Raises `UsageError` for a source without images.
    """
    images = []
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        images += _list_source(os.fspath(source))
    return images


def _list_source(source: str) -> list[Path]:
    if source == '-':
        images = _read_list(sys.stdin.buffer.read(), Path(), source)
        return _checked(images, 'standard input')
    path = correct_path(source)
    suffix = path.suffix.lower()
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return _list_folder(path)
    if suffix in TABLE_SUFFIXES:
        names = correct_paths(path.parent, read_listing(path, ('path',)).path)
        return _checked([path.parent / name for name in names], source)
    if suffix in LIST_SUFFIXES:
        return _checked(_read_list(read_bytes(path, MAX_LISTING), path.parent, source), source)
    return [path]


def _read_list(data: bytes, folder: Path, source: str) -> list[Path]:
    return [folder / name for name in correct_paths(folder, read_names(data, folder, source))]


def _checked(images: list[Path], source: str) -> list[Path]:
    if not images:
        raise UsageError(f'{source}: the list of images is empty. Write the path of an image in each line.')
    return images


def _list_folder(folder: Path) -> list[Path]:
    images, ignored = find_images(folder)
    if not images:
        raise UsageError(f'{folder}: {_describe_no_images(folder, ignored)}')
    if ignored:
        warnings.warn(f'{folder}: files left out: {describe_ignored(ignored)}', CXRWarning, stacklevel=4)
    return images


def _describe_no_images(folder: Path, ignored: Counter[str]) -> str:
    """Return why the `folder` has no images, and what to name instead."""
    kind = describe_own_folder(folder)
    if kind:
        return f'{kind}, which contains no images. Name the model first, then the images.'
    if not ignored:
        return 'no images found. Name a folder with images.'
    advice = ' A link is followed if you name the link itself.' if LINK in ignored else ''
    return f'no images found, but {describe_ignored(ignored)}.{advice or " Name a folder with images."}'


def find_images(folder: StrPath) -> tuple[list[Path], Counter[str]]:
    """Return the images below `folder`, sorted, and the number of ignored files by reason.

    A file without a known suffix is an image if its content begins like one. Symbolic links are followed if they lead
    to a place below `folder` that is not above the link; others are ignored: they can form a cycle or lead out.
    """
    folder = Path(folder)
    images: list[Path] = []
    ignored: Counter[str] = Counter()
    followed: set[str] = set()
    for base, subfolders, names in os.walk(folder, followlinks=True):
        links = [name for name in subfolders if _is_stray_link(Path(base, name), folder, followed)]
        ignored[LINK] += len(links)
        subfolders[:] = sorted(set(subfolders) - set(links))
        for name in sorted(names):
            path = Path(base, name)
            reason = LINK if _is_stray_link(path, folder, followed) else file_reason(path, folder)
            if reason:
                ignored[reason] += 1
            else:
                images.append(path)
    return images, +ignored


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return the counts of ignored files by reason as a text."""
    return ', '.join(f'{n:,} {reason}' for reason, n in ignored.items())


def _is_stray_link(path: Path, folder: Path, followed: set[str]) -> bool:
    """Return whether `path` is a link that leads out of `folder`, to a folder above it, or where another link led.

    Another link to a folder is added to `followed`. `path` may itself be below a link that was followed.
    """
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    above = [
        os.path.realpath(parent) for parent in (path.parent, *path.parent.parents) if parent.is_relative_to(folder)
    ]
    if any(os.path.commonpath([target, parent]) == target for parent in above):
        return True
    if os.path.commonpath([target, above[-1]]) != above[-1] or target in followed:
        return True
    if os.path.isdir(target):
        followed.add(target)
    return False


def _open(path: Path) -> BinaryIO:
    return path.open('rb')


def file_reason(path: Path, folder: Path, open_file: Callable[[Path], BinaryIO] = _open) -> str | None:
    """Return why the file `path` below `folder` is not an image to read; None if it is one.

    `open_file` opens it for reading, or raises `OSError`.
    """
    reason = ignore_reason(path.relative_to(folder))
    if reason in (None, NOT_AN_IMAGE):
        reason = _reason_by_content(path, open_file)
    return reason


def _reason_by_content(path: Path, open_file: Callable[[Path], BinaryIO]) -> str | None:
    """Return why the file `path` is not an image to read; None if it is one.

    A file whose suffix is that of an image counts as one, whatever it contains, unless this package drew it.
    """
    has_image_suffix = path.suffix.lower() in SUFFIXES
    if has_image_suffix and path.suffix.lower() not in FORMATS['PNG']:
        return None
    if not path.is_file():
        return None if has_image_suffix else NOT_AN_IMAGE
    try:
        with open_file(path) as file:
            start = file.read(HEAD_BYTES)
    except OSError:
        return None if has_image_suffix else 'unreadable'
    drawn = name_own_picture(start)
    if drawn:
        return drawn
    if has_image_suffix or sniff(start) != '?':
        return None
    form = name_foreign_format(start)
    return f'in the format {form}' if form else NOT_AN_IMAGE


def ignore_reason(path: PurePath) -> str | None:
    """Return why a file cannot be an image, judged by its `path` alone; None if it can be one."""
    if '__MACOSX' in path.parts:
        return '__MACOSX'
    if path.name.startswith('._'):
        return '._*'
    if path.name == '.DS_Store':
        return '.DS_Store'
    if path.suffix.lower() not in SUFFIXES:
        return NOT_AN_IMAGE
    return None


def shown_path(path: str, number: int, hide_names: bool = False) -> str:
    """Return the name of an image on a page that may be shared: its short path, or with `hide_names` its number.

    A file or folder name can contain a patient's name. `image-12.jpeg` stands for the image number 12.
    """
    if not hide_names:
        return short_path(path)
    suffix = PurePosixPath(path).suffix
    if suffix.lower() not in SUFFIXES:
        suffix = ''  # part of a name that contains a full stop
    return f'image-{number}{suffix}'


def short_path(path: str) -> str:
    """Return `path` if it is relative to the data root, else its last three parts.

    Absolute paths and paths that leave the data root would show folder names of the computer.
    """
    parts = PurePosixPath(path).parts
    if path.startswith('/') or '..' in parts:
        return '/'.join(parts[-3:])
    return path

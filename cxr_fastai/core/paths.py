"""Paths as users, other systems and programs write them: which existing file they mean, and names that are no paths."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath

PRETRAINED = 'pretrained'
"""The name of the model in the package, in every command and function that takes a model."""
HUB_PREFIX = 'hf:'
"""The start of the name of a bundle on the Hugging Face Hub."""
QUOTES = ('"', "'")
WINDOWS_PATH = re.compile(r'(^|/)"?([A-Za-z]:[\\/]|\\\\\w)')
"""A path with a drive, or one of a network share, perhaps after the folder that it was taken as relative to."""
FOREIGN_PATH = 'a path of Windows, but this computer does not run Windows. Name the file by its path here'

Listings = dict[Path, dict[str, str]]
"""Folder to its entries: composed (NFC) form of a name to the name."""


def correct_paths(folder: Path, names: Iterable[str]) -> list[str]:
    """Return for each of `names` the spelling, relative to `folder`, under which its file or folder exists.

    A name that does not exist may be quoted, may have spaces around it, separators of Windows, accents composed (NFC)
    or decomposed (NFD) in another way than on the disk, or the encoding Windows-1252. If none of these spellings
    exists, the name is returned as it is.
    """
    listings: Listings = {}
    return [_correct(folder, name, listings) for name in names]


def correct_path(path: str | os.PathLike[str]) -> Path:
    """Return the existing path that `path` means, as `correct_paths` does."""
    [name] = correct_paths(Path(), [os.fspath(path)])
    return Path(name)


def _correct(folder: Path, name: str, listings: Listings) -> str:
    if os.path.lexists(folder / name):
        return name
    for spelling in _spellings(name):
        match = _match(folder, spelling, listings)
        if match is not None:
            return match
    return name


def _spellings(name: str) -> Iterator[str]:
    yield name
    plain = name.strip()
    if len(plain) > 1 and plain[0] in QUOTES and plain[-1] == plain[0]:
        plain = plain[1:-1]
    yield plain
    if os.sep == '/' and '\\' in plain and not WINDOWS_PATH.search(plain):
        yield plain.replace('\\', '/')
    if not _is_unicode(plain):
        with suppress(UnicodeError):
            yield os.fsencode(plain).decode('cp1252')


def _is_unicode(name: str) -> bool:
    """Return whether `name` has no bytes that could not be decoded."""
    return not any('\ud800' <= char <= '\udfff' for char in name)


def _match(folder: Path, name: str, listings: Listings) -> str | None:
    """Return the existing name that has the same letters as `name`, whatever their Unicode form; None for none."""
    if name and os.path.lexists(folder / name):
        return name
    if name.isascii():
        return None
    match = PurePath()
    for part in PurePath(name).parts:
        here = folder / match
        if not os.path.lexists(here / part):
            part = _list_names(here, listings).get(unicodedata.normalize('NFC', part), '')
            if not part:
                return None
        match /= part
    return match.as_posix()


def _list_names(folder: Path, listings: Listings) -> dict[str, str]:
    if folder not in listings:
        names: list[str] = []
        with suppress(OSError, ValueError):
            names = os.listdir(folder)
        listings[folder] = {unicodedata.normalize('NFC', name): name for name in names}
    return listings[folder]


def is_windows_path(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is absolute on Windows, and this computer does not run Windows."""
    return os.sep == '/' and bool(WINDOWS_PATH.search(os.fspath(path)))

"""Folders that commands write: what they are, their replacement as a whole, and the removal of what crashes left."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.files import sync, writing

LEFTOVER = r'\.{name}\.(?P<pid>[0-9]{{1,10}})\.(?P<kind>tmp|new|old)'
"""Name of the temporary file or folder of the process `pid`: half of a file, a new folder, or the old one."""
OWN_FOLDERS = {'recipe.json': 'a run folder', 'manifest.json': 'a bundle'}
"""File to the kind of folder that it makes of the folder in which it lies."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Constants of `renameat2` of Linux."""
RENAME_SWAP = 2
"""Constant of `renamex_np` of macOS."""


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder next to `out`, which takes the place of `out` when the block ends.

    Whoever looks at `out`, also after a crash, sees the old folder or the new one. If the block raises, the old one
    stays. What killed processes left is removed before. Raises `OutputError`.
    """
    with temporary_folder(out) as new:
        yield new
        with writing(out):
            for file in new.iterdir():
                sync(file)
            replace_folder(new, out)


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Yield a new hidden folder next to `out`, and delete it when the block ends. Raises `OutputError`."""
    sweep(out)
    new = _temporary(out, 'new')
    try:
        with writing(out):
            new.mkdir(parents=True)
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _temporary(out: Path, kind: str) -> Path:
    return out.with_name(f'.{out.name}.{os.getpid()}.{kind}')


def final_name(folder: Path) -> str:
    """Return the name that `folder` has in the end: that of `out` for a folder of `temporary_folder`, else its own."""
    temporary = re.fullmatch(rf'\.(.+)\.{os.getpid()}\.new', folder.name)
    return temporary[1] if temporary else folder.name


def replace_folder(new: Path, out: Path) -> None:
    """Rename the folder `new` to `out`. An existing `out` is exchanged with it and deleted. Raises `OSError`.

    Where the system cannot exchange two folders, `out` is missing for a moment; `sweep` then repairs what a crash left.
    """
    if not out.exists():
        os.replace(new, out)
        return
    if exchange(new, out):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = _temporary(out, 'old')
    os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:  # also an interrupt
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step. Returns False where the system cannot."""
    paths = os.fsencode(first), os.fsencode(second)
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        if sys.platform == 'linux':
            return not library.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE)
        if sys.platform == 'darwin':
            return not library.renamex_np(*paths, RENAME_SWAP)
    return False


def sweep(path: Path) -> None:
    """Delete the temporary files and folders for `path` of processes that do not run any more.

    If `path` is missing because a process was killed while it replaced a folder, the old folder returns to its place.
    Only files that this module and `files.atomic` name are touched. Does nothing outside the main process.
    """
    if not is_main_process() or not path.parent.is_dir():
        return
    for leftover, kind in _leftovers(path):
        with suppress(OSError):
            if kind == 'old' and not path.exists():
                os.replace(leftover, path)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _leftovers(path: Path) -> list[tuple[Path, str]]:
    """Return the leftovers of `path` of processes that do not run, with their kind."""
    pattern = re.compile(LEFTOVER.format(name=re.escape(path.name)))
    leftovers = []
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match and not is_running(int(match['pid'])):
            leftovers.append((other, match['kind']))
    return leftovers


def describe_own_folder(path: Path) -> str | None:
    """Return what the folder `path` is if a command of this package wrote it as a model; None for any other folder."""
    for name, kind in OWN_FOLDERS.items():
        if (path / name).is_file():
            return kind
    return None


def is_running(pid: int) -> bool:
    """Return whether a process with the number `pid` runs on this computer; True where that is unknown."""
    if sys.platform == 'win32':
        return True  # there, `os.kill` would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True

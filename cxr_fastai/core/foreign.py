"""Readers of files that somebody else may have written: only regular files, of limited size, and strict JSON."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from cxr_fastai.core.errors import CXRError, UsageError

MAX_JSON = 2**24
"""Largest JSON file that is read, in bytes."""
MAX_DEPTH = 32
"""Largest depth of nested lists and objects in a JSON file."""
MAX_DIGITS = 400
"""Largest number of digits of a number in a JSON file. Python needs quadratic time to read a whole number."""
TEXT_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""A text, which may lack its end, or a bracket. It matches in linear time."""
FIX = 'Get the file again from its source.'
"""The default advice about a damaged file."""
LFS_POINTER = b'version https://git-lfs'
"""How the small file starts that Git LFS leaves in place of a large one until `git lfs pull` gets it."""
IS_LFS_POINTER = 'a pointer of Git LFS, not the file itself. Run `git lfs pull` in its folder'
# O_BINARY exists on Windows, the other two on POSIX.
READ_FLAGS = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_NOCTTY', 0)
"""How a file is opened for reading; a pipe without waiting for a writer."""
KINDS = (
    (stat.S_ISDIR, 'a folder'),
    (stat.S_ISFIFO, 'a pipe'),
    (stat.S_ISSOCK, 'a socket'),
    (stat.S_ISCHR, 'a device'),
    (stat.S_ISBLK, 'a device'),
)
"""Test of the mode of a file -> what the file is, for everything that is not a regular file."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open the regular file `path` for reading. Never waits, as opening a pipe would.

    Raises `UsageError` if it is missing, not readable, not a regular file, such as a pipe or a device, or a pointer
    that Git LFS left in place of the file.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise UsageError(f'{path}: no such file. Check the name.') from None
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(f'{path}: cannot be read ({reason}). Name a file that you may read.') from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UsageError(f'{path}: {_describe_kind(mode)}, not a file. Name a regular file.')
    file = os.fdopen(descriptor, 'rb')
    if _starts_as_pointer(file):
        file.close()
        raise UsageError(f'{path}: {IS_LFS_POINTER}.')
    return file


def open_below(folder: Path, path: Path) -> BufferedReader:
    """Open the regular file `path` below `folder` for reading, without following a link below `folder`.

    Never waits. Raises `OSError`, with the number ENXIO if `path` is not a regular file, such as a folder or a pipe.
    """
    if os.open not in os.supports_dir_fd:
        return _open_and_compare(folder, path)
    *subfolders, name = path.relative_to(folder).parts
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for subfolder in subfolders:
            opened = os.open(subfolder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = opened
        return _open_descriptor(os.open(name, READ_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor))
    finally:
        os.close(descriptor)


def _open_and_compare(folder: Path, path: Path) -> BufferedReader:
    """Open `path` as `open_below` does, where the system can follow links only, such as those and junctions of Windows.

    Nothing is read until the open file was compared with the one that `path` leads to without a link.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise _not_regular()
    file = _open_descriptor(os.open(path, READ_FLAGS))
    try:
        direct = os.path.join(os.path.realpath(folder), path.relative_to(folder))
        is_direct = os.path.realpath(path) == direct
        if is_direct and os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
            return file
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except BaseException:
        file.close()
        raise


def _open_descriptor(descriptor: int) -> BufferedReader:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular()
    return os.fdopen(descriptor, 'rb')


def _not_regular() -> OSError:
    return OSError(errno.ENXIO, 'not a regular file')


def _starts_as_pointer(file: BufferedReader) -> bool:
    try:
        return file.peek(len(LFS_POINTER)).startswith(LFS_POINTER)
    except OSError:  # whoever reads the file gets the same error
        return False


def _describe_kind(mode: int) -> str:
    for is_kind, kind in KINDS:
        if is_kind(mode):
            return kind
    return 'a special file'


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Return the contents of the regular file `path`.

    Raises `UsageError` as `open_regular` does, and `CXRError` if the file has more than `max_bytes` bytes, of which no
    more are read then.
    """
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise UsageError(f'{path}: cannot be read ({error.strerror}). Name a file that you may read.') from None
    if len(data) > max_bytes:
        raise CXRError(f'{path}: larger than {max_bytes:,} bytes, so it was not read. Name a smaller file.')
    return data


def read_text(path: str | os.PathLike[str], max_bytes: int, fix: str = FIX) -> str:
    """Return the contents of the UTF-8 file `path`, without a byte order mark.

    Raises what `read_bytes` raises, and `CXRError`, which advises `fix`, if it is not UTF-8.
    """
    data = read_bytes(path, max_bytes)
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise CXRError(f'{path}: not UTF-8 (byte {error.start}). {fix}') from None


def read_json(
    path: str | os.PathLike[str], max_bytes: int = MAX_JSON, fix: str = FIX, error: type[CXRError] = CXRError
) -> Any:
    """Return the value in the JSON file `path`. Raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(path, max_bytes), path, fix, error)


def parse_json(
    text: str | bytes, source: str | os.PathLike[str], fix: str = FIX, error: type[CXRError] = CXRError
) -> Any:
    """Return the value of the JSON `text`, which the file `source` contains.

    Stricter than the `json` module: NaN, infinity, repeated keys, numbers of more than `MAX_DIGITS` digits and a depth
    of more than `MAX_DEPTH` are refused, so every program reads the same. Raises `error`, which advises `fix`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode('utf-8-sig')
        _check_depth(text)
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except UnicodeDecodeError as problem:
        raise error(f'{source}: damaged (not UTF-8 at byte {problem.start}). {fix}') from None
    except (ValueError, RecursionError) as problem:
        raise error(f'{source}: damaged ({problem}). {fix}') from None


def _check_depth(text: str) -> None:
    """Raise `ValueError` if lists and objects are nested deeper than `MAX_DEPTH`. Brackets in texts do not count."""
    depth = 0
    for token in TEXT_OR_BRACKET.finditer(text):
        first = token.group()[0]
        if first in '[{':
            depth += 1
        elif first in ']}':
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f'nested deeper than {MAX_DEPTH} levels')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'the key {repeated!r:.80} occurs twice')
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not a value of JSON')


def _parse_float(digits: str) -> float:
    _check_digits(digits)
    value = float(digits)
    if value in (float('inf'), float('-inf')):
        raise ValueError(f'the number {digits:.20} is too large')
    return value


def _parse_int(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


def _check_digits(digits: str) -> None:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f'a number has {len(digits)} digits')

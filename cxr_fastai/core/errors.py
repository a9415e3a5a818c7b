"""The exceptions of the package, each with its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class CXRError(Exception):
    """An expected failure, told in one line."""

    exit_code = 1


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message, or at most so many letters of it; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


REJECTED = ('E_TOO_SMALL', 'E_TOO_LARGE', 'E_BLANK', 'E_MULTIFRAME', 'E_DICOM_MODALITY')
"""Codes of files that may be whole, but are no image to judge."""


class ImageError(CXRError):
    """An image that cannot be used; `code` is a stable name, the message names the file."""

    def __init__(self, message: str, code: str = 'E_IO'):
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> str:
        """`rejected` where the file may be whole but is no image to judge, `error` where it cannot be read."""
        return 'rejected' if self.code in REJECTED else 'error'

    def __reduce__(self):
        return type(self), (str(self), self.code)

    def of(self, path: str | Path) -> ImageError:
        """The same error with the name of the image `path` and the code before its message."""
        return ImageError(f'{path}: {self.code}: {self}'.replace('\n', ' '), self.code)


class UsageError(CXRError):
    """What was asked for does not fit together."""

    exit_code = 2


class OutputError(CXRError):
    """The disk refuses, or training produced no finite number."""

    exit_code = 6


class Stopped(CXRError):
    """The signal `number` ended a training that can go on."""

    def __init__(self, number: int, message: str = 'stopped'):
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class CXRWarning(UserWarning):
    """Something the user should know before believing a figure."""


def visible(text: str) -> str:
    """`text` with escapes for what commands a terminal, turns the direction of writing, breaks a line, or is a byte of
    a file's name that is no text."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)

"""The exceptions of the package, the warning category, and the exit code of the command line for each exception.

This is the whole tree. A module in brackets defines the class; the others are defined here::

    CXRError                  1    an expected failure, explained in one line
    ├── UsageError            2    the arguments do not fit together, or do not fit the files
    ├── ImageError            1    an image cannot be used; a command that skips such images exits with 3
    ├── OutputError           6    a file cannot be written
    │   └── Diverged          6    the training loss became NaN or infinite (training.training)
    ├── UntrustedError        4    a pickled model file is not trusted (inference.pickles)
    ├── ParityError           5    a model does not reproduce its reference predictions (inference.selftest)
    ├── Busy                  1    the service has too many images waiting (serving.service)
    └── Stopped         128 + n    signal number n interrupted a training, which can be resumed

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

REJECTED = ('E_TOO_SMALL', 'E_TOO_LARGE', 'E_BLANK', 'E_MULTIFRAME', 'E_DICOM_MODALITY')
"""Codes of files that are intact, but do not contain a usable chest X-ray image."""


class CXRError(Exception):
    """An expected failure. The message is one line: what failed, why, and how to fix it."""

    exit_code = 1


class ImageError(CXRError):
    """An image that cannot be used.

    `code` is a stable name for programs, such as `E_TRUNCATED`. The message is complete only after `with_path`.
    """

    def __init__(self, message: str, code: str = 'E_IO') -> None:
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> str:
        """`rejected` if the file is intact but not a usable image (a code in `REJECTED`), otherwise `error`."""
        return 'rejected' if self.code in REJECTED else 'error'

    def with_path(self, path: str | Path) -> ImageError:
        """Return the same error with the path of the image and the code in front of its message."""
        return ImageError(f'{path}: {self.code}: {self}'.replace('\n', ' '), self.code)

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (str(self), self.code)


class UsageError(CXRError):
    """The arguments do not fit together, or do not fit the files they name."""

    exit_code = 2


class OutputError(CXRError):
    """A file cannot be written, or training produced NaN or infinite values."""

    exit_code = 6


class Stopped(CXRError):
    """The signal `number` interrupted a training, which can be resumed."""

    def __init__(self, number: int, message: str = 'stopped') -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class CXRWarning(UserWarning):
    """A condition that makes a result less reliable."""


def first_line(error: BaseException, max_length: int | None = None) -> str:
    """Return the first line of the message of `error`, cut to `max_length` characters, or its class name if empty."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line[:max_length]


def visible(text: str) -> str:
    """Return `text` with every unprintable character escaped.

    This makes file names safe to print: terminal commands, line breaks, changes of the writing direction and bytes that
    are not valid text appear as escape sequences.
    """
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` (did you mean X?)` with the one of `names` that is most like `name`; empty if none is."""
    from difflib import get_close_matches

    similar = get_close_matches(name, list(names), 1)
    return f' (did you mean {similar[0]}?)' if similar else ''

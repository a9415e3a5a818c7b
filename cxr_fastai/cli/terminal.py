"""What a command says: results on one stream, errors and warnings on the other, from several processes only once."""
from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from cxr_fastai.core.files import CXRError, UsageError, leads, visible

out, err = Console(quiet=not leads()), Console(stderr=True)


def say(text: str) -> None:
    """Print `text` on a line that no console breaks."""
    out.print(visible(text), soft_wrap=True, markup=False)


def complain(text: str) -> None:
    """Print `text` for errors and warnings."""
    err.print(visible(text), soft_wrap=True, markup=False, highlight=False)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In the place of `warnings.showwarning`: one line."""
    if leads(): complain(f'warning: {message}')


def last_line(error: CXRError) -> str:
    """An error's message; a worker process hands it over as the last line of its traceback, a callback indented."""
    last = str(error).strip().splitlines()[-1].strip()
    return last.removeprefix(f'{type(error).__module__}.{type(error).__name__}: ')


def one_of(folder: Path | None, csv: Path | None) -> Path | None:
    """The one of two places that was named, if any. Raises `UsageError` for both."""
    if folder and csv: raise UsageError(f'{folder} and --csv {csv}: name one of them.')
    return folder or csv


def free(path: Path) -> Path:
    """`path`, or the first free of path-2, path-3 and so on."""
    tries = (path.with_name(f'{path.name}-{i}') for i in range(2, sys.maxsize))
    return path if not path.exists() else next(p for p in tries if not p.exists())

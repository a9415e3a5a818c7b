"""The consoles for stdout and stderr, which print in one process only and do not end with their reader.

With `--json`, stdout is reserved for `document`, and what `out` prints goes to stderr.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from cxr_fastai.core.environment import is_main_process


class LastingConsole(Console):
    """A console that prints nothing more once its reader has gone, as in `cxr-fastai train | head`.

    The command goes on: what it writes to files may have taken hours.
    """

    def on_broken_pipe(self) -> None:
        """Drop this and all further output. Called by rich, whose own method would end the program."""
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())  # also for what the stream has not written yet
        os.close(null)


class MainConsole(LastingConsole):
    """A console that prints only in the main process of a distributed run."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console.print` does, or nothing in another process."""
        if is_main_process():
            super().print(*objects, **options)


out = MainConsole()
document = MainConsole()
err = LastingConsole(stderr=True)


def move_messages_to_stderr() -> None:
    """Print to stderr what `out` would print to stdout, until the end of `restored_consoles`."""
    out.stderr = True
    out.no_color = True  # the colors were chosen for stdout; stderr may be a file


@contextmanager
def restored_consoles() -> Iterator[None]:
    """Restore at the end of the block what a command has changed in `out`."""
    stderr, no_color, quiet = out.stderr, out.no_color, out.quiet
    try:
        yield
    finally:
        out.stderr, out.no_color, out.quiet = stderr, no_color, quiet

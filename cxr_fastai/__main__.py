"""Run the command line, by `python -m cxr_fastai` or as the console script.

A prediction starts ONNX Runtime before the command line is imported, and the process that decodes images after it, so
that their imports run beside others.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cxr_fastai.core.environment import paused_collector
from cxr_fastai.core.workers import open_standard_streams

NEEDS_TORCH = ('--engine', '--device', '--precision', '--explain')
"""Options after which the command itself decides what it starts."""
HELP = ('-h', '--help')


def run() -> None:
    """Run the command line with the arguments and exit code of this process."""
    open_standard_streams()
    try:
        _run()
    except KeyboardInterrupt:  # during the imports; after them, the command line reports it
        print('error: stopped by SIGINT', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _run() -> None:
    is_prediction = _start_onnx(sys.argv[1:])
    with paused_collector():
        from cxr_fastai.cli import run

    if is_prediction:  # not before, because two cores are busy with the other imports
        _start_decoder()
    try:
        run()
    finally:
        if is_prediction:
            gc.freeze()  # the search for garbage among all modules would take 35 ms at the exit


def _start_onnx(words: Sequence[str]) -> bool:
    """Start ONNX Runtime if the `words` are `predict BUNDLE IMAGE...`, and return whether it was started.

    This is a guess from the words, which nothing has checked yet: a process that is not needed ends with this one.
    """
    names_model = len(words) > 2 and words[0] == 'predict' and not words[1].startswith('-')
    if not names_model or any(word.startswith(NEEDS_TORCH) or word in HELP for word in words):
        return False
    from cxr_fastai.inference.onnx_start import start_onnx

    try:
        return start_onnx(Path(words[1]))
    except OSError:  # the command reports it
        return False


def _start_decoder() -> None:
    from cxr_fastai.images.decoder_start import start_decoder

    with suppress(OSError):  # the first image reports it
        start_decoder()


if __name__ == '__main__':
    run()

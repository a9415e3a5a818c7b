"""The start of a process that decodes images, perhaps before it is needed, so that its imports run beside others.

This module imports little itself: neither NumPy nor Pillow.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys

from cxr_fastai.core.workers import QUIET_BLAS, import_path

DECODE_MEMORY = 3 * 2**29
"""Default limit of the memory of a process, 1.5 GiB (not on macOS and Windows)."""
MODULE = 'cxr_fastai.images.decoder_process'
SINGLE_THREADED = QUIET_BLAS | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
"""Environment of the processes: threads of BLAS would only reserve memory."""

Decoder = subprocess.Popen[bytes]

_started_ahead: dict[tuple[str, ...], Decoder] = {}


def start_decoder(memory: int = DECODE_MEMORY, priority: int = 0, *modules: str) -> None:
    """Start a process that `take_decoder` with these arguments will return. If nothing does, it ends with this one.

    If it was started already, nothing is done.
    """
    arguments = str(memory), str(priority), *modules
    if arguments not in _started_ahead:
        _started_ahead[arguments] = process = _open(*arguments)
        atexit.register(process.kill)


def take_decoder(memory: int, priority: int, *modules: str) -> Decoder:
    """Return a process that runs `decoder_process.main` with these arguments: the one of `start_decoder`, or a new one.

    Raises `OSError` if the system does not start it.
    """
    arguments = str(memory), str(priority), *modules
    process = _started_ahead.pop(arguments, None)
    if process is None or process.poll() is not None:
        return _open(*arguments)
    return process


def _open(*arguments: str) -> Decoder:
    return subprocess.Popen(
        [sys.executable, '-P', '-m', MODULE, *arguments],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # decoders may quote the file
        env=os.environ | {'PYTHONPATH': import_path()} | SINGLE_THREADED,
    )

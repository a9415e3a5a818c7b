"""Processes for work on foreign data, which are ended when they take too long or too much memory.

A `Worker` starts a Python process that calls `serve` with a function. Requests and answers are lists of bytes, which
are sent through pipes without pickle, so neither side can make the other run code.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

import cxr_fastai
from cxr_fastai.core.errors import first_line

Parts = list[bytes]
"""A request or an answer."""

REQUEST = struct.Struct('<dQI')
"""Head of a request: seconds until the deadline, bytes of memory (0: not limited), and number of parts."""
ANSWER = struct.Struct('<BI')
"""Head of an answer: whether the work failed, and the number of parts."""
LENGTH = struct.Struct('<Q')
"""Head of a part: its bytes."""
MAX_PARTS = 16
GRACE_SECONDS = 1
"""Time after the deadline at which a process ends itself, if the one that started it is gone."""
QUIET_BLAS = {'OPENBLAS_NUM_THREADS': '1'}
"""Environment in which NumPy computes in one thread. The threads that OpenBLAS would start wait actively: when NumPy is
imported for 65 ms of CPU time, and after each product of the input gate, which itself takes less than 1 ms.
"""
CODE = (
    'import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); '
    'from {module} import {function}; {function}(*sys.argv[1:])'
)
"""What the process runs. It ignores Ctrl-C, which reaches all processes, before it imports: the other side decides."""


class WorkerError(Exception):
    """The work failed, and the worker can do more. The message is one line."""


class WorkerTimeout(Exception):
    """The work took longer than its deadline, so the process was ended."""


class WorkerCrash(Exception):
    """The process ended during the work, for example because it needed too much memory."""


class Worker:
    """A process that calls `function` of `module` with the texts `arguments`; that function must call `serve`.

    The process ends with this object, at `close`, or when this process ends. It can be used from several threads, one
    request at a time.
    """

    def __init__(self, module: str, function: str, *arguments: str) -> None:
        # -P: no module of the current folder is imported.
        command = [sys.executable, '-P', '-W', 'ignore', '-c', CODE.format(module=module, function=function)]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries may quote the data
            env=QUIET_BLAS | os.environ | {'PYTHONPATH': import_path()},
        )
        self.lock = threading.Lock()
        self.close = weakref.finalize(self, _end, self.process)

    @classmethod
    def take(cls, module: str, function: str, *arguments: str) -> Worker:
        """Return the process that `start_ahead` started with these arguments, or a new one."""
        worker = _started_ahead.pop((module, function, *arguments), None)
        return worker if worker and worker.is_alive else cls(module, function, *arguments)

    @property
    def is_alive(self) -> bool:
        """Whether the process can answer requests."""
        return self.close.alive and self.process.poll() is None

    def ask(self, parts: Sequence[bytes], seconds: float, memory: int = 0, max_answer: int = 2**31) -> Parts:
        """Return the answer to the request `parts`, at most `max_answer` bytes, within `seconds`.

        `memory` limits the memory of the process, in bytes, where the system can (Linux); 0 means no limit. Raises
        `WorkerError`, or `WorkerTimeout` and `WorkerCrash`, after which the process is gone.
        """
        with self.lock:
            timer = threading.Timer(seconds, self.process.kill)
            timer.daemon = True
            timer.start()
            try:
                return self._exchange(parts, seconds, memory, max_answer)
            except (OSError, ValueError, EOFError):
                is_late = timer.finished.is_set()
                self.close()
                if is_late:
                    raise WorkerTimeout(f'it took longer than {seconds:g} s') from None
                raise WorkerCrash(_describe_end(self.process.returncode)) from None
            except WorkerError:
                raise
            except BaseException:  # an interrupt: the answer would be taken for that of the next request
                self.close()
                raise
            finally:
                timer.cancel()

    def _exchange(self, parts: Sequence[bytes], seconds: float, memory: int, max_answer: int) -> Parts:
        sending, receiving = self.process.stdin, self.process.stdout
        if not sending or not receiving or not self.close.alive:
            raise EOFError
        sending.write(REQUEST.pack(seconds, memory, len(parts)))
        _write_parts(sending, parts)
        failed, count = ANSWER.unpack(_read_exactly(receiving, ANSWER.size))
        answer = _read_parts(receiving, count, max_answer)
        if failed:
            raise WorkerError(answer[0].decode(errors='replace'))
        return answer


_started_ahead: dict[tuple[str, ...], Worker] = {}


def start_ahead(module: str, function: str, *arguments: str) -> None:
    """Start a process that `Worker.take` will return, so that its imports run beside those of this process.

    If it was started already, nothing is done.
    """
    key = (module, function, *arguments)
    if key not in _started_ahead:
        _started_ahead[key] = Worker(*key)


def quiet_blas() -> None:
    """Let NumPy, if it is not loaded yet, compute in one thread in this process, or in the number the user chose."""
    for name, value in QUIET_BLAS.items():
        os.environ.setdefault(name, value)


def import_path() -> str:
    """Return the folders from which this process imports, without the current folder, as a value for PYTHONPATH."""
    package_folder = str(Path(cxr_fastai.__file__).parents[1])
    return os.pathsep.join([package_folder, *(path for path in sys.path if os.path.isabs(path))])


def open_standard_streams() -> None:
    """Connect streams that the caller closed to the null device, so that no file of this program takes their place."""
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is `number`
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, 'w' if number else 'r', encoding='utf-8', closefd=False))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(OSError):
                pipe.close()


def _describe_end(code: int | None) -> str:
    if code is not None and code < 0:
        return f'its process ended with signal {-code}'
    return f'its process ended with exit code {code}'


def serve(handle: Callable[[Parts], Parts]) -> NoReturn:
    """Answer requests with `handle` until the other side is gone. Call it in the process of a `Worker`.

    An exception of `handle` is the answer `WorkerError` with its first line. Whatever libraries print is discarded.
    """
    receiving = os.fdopen(os.dup(0), 'rb')
    sending = os.fdopen(os.dup(1), 'wb')
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    while True:
        try:
            seconds, memory, count = REQUEST.unpack(_read_exactly(receiving, REQUEST.size))
            _limit(seconds, memory)
            answer = _handle(handle, _read_parts(receiving, count, sys.maxsize))
            _limit(0, 0)
            failed, parts = answer
            sending.write(ANSWER.pack(failed, len(parts)))
            _write_parts(sending, parts)
        except (EOFError, OSError):
            os._exit(0)


def _handle(handle: Callable[[Parts], Parts], parts: Parts) -> tuple[bool, Parts]:
    try:
        return False, handle(parts)
    except MemoryError:
        return True, [b'it needs too much memory']
    except Exception as error:  # foreign data can raise any exception in a library
        return True, [first_line(error, 200).encode(errors='replace')]


def _limit(seconds: float, memory: int) -> None:
    """Let the system end this process after some `seconds`, and limit its `memory`; 0 means no limit.

    The alarm ends the process even if a library never returns to Python, and the other side is gone.
    """
    with suppress(AttributeError):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS if seconds else 0)
    with suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory or maximum, maximum))


def _write_parts(file: IO[bytes], parts: Sequence[bytes]) -> None:
    for part in parts:
        file.write(LENGTH.pack(len(part)))
        file.write(part)
    file.flush()


def _read_parts(file: IO[bytes], count: int, max_bytes: int) -> Parts:
    if count > MAX_PARTS:
        raise ValueError('too many parts')
    parts = []
    for _ in range(count):
        (length,) = LENGTH.unpack(_read_exactly(file, LENGTH.size))
        max_bytes -= length
        if max_bytes < 0:
            raise ValueError('too many bytes')
        parts.append(_read_exactly(file, length))
    return parts


def _read_exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data

"""A process that serves, and one beside it that starts it anew when it is killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.serving.service import Settings

if TYPE_CHECKING:
    import uvicorn

BACKLOG = 128
"""Connections that wait for the process to take them."""
FORMAT = '%(asctime)s %(levelname)s %(name)s %(message)s'
SPEAKERS = ('cxr_fastai', 'uvicorn', 'asyncio')
"""Whose words are logged: a package that reads images might quote them."""
QUICK, TRIES = 10, 3
"""Seconds within which an end counts as one at the start; of so many in a row it is not started again."""
GRACE = 1
"""Seconds beyond `Settings.drain` until a process that does not end is killed."""
HEADERS = 2**14
"""Bytes of a request before its body."""
ENDS = (signal.SIGTERM, signal.SIGINT)


def serve(settings: Settings, say: Callable[[str], None] = lambda text: None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0 for these too, since that is how a service ends.

    The listening socket outlives a killed process, so that callers wait for the next one instead of being turned away.
    Raises `UsageError` where the place is taken."""
    listening = listen(settings.host, settings.port)
    port = listening.getsockname()[1]
    say(f'serving {settings.bundle} at http://{_shown(settings.host)}:{port} (Ctrl-C ends it)')
    with listening, _ending(settings.drain + GRACE) as told:
        quick = 0
        while True:
            began, process = time.monotonic(), _start(settings, listening)
            if told:
                process.terminate()  # while it started
            process.join()
            if told or process.exitcode >= 0:
                return max(process.exitcode, 0)
            quick = quick + 1 if time.monotonic() - began < QUICK else 0
            if quick > TRIES:
                raise CXRError(
                    f'the serving process ends by signal {-process.exitcode} as soon as it '
                    'starts: is there enough memory?'
                )
            say(f'the serving process was ended by signal {-process.exitcode}: a new one starts')


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UsageError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f'--host {host} --port {port}: {first_line(error)}: choose another.') from None


def work(settings: Settings, listening: socket.socket) -> None:
    """Serve in this process until it is told to stop; exit with the code of a bundle that cannot be opened."""
    _speak()
    _end_with_parent()
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    server = make_server(settings, fail)
    server.run(sockets=[listening])
    for error in failures:
        if not isinstance(error, CXRError):
            raise error
        logging.getLogger('cxr_fastai.serving.server').error('%s', first_line(error))
        raise SystemExit(error.exit_code)


def make_server(settings: Settings, failed: Callable[[Exception], None] = lambda error: None) -> uvicorn.Server:
    """What serves the app of `settings` on sockets that it is given; `failed` is told why there is nothing to serve."""
    import uvicorn

    from cxr_fastai.serving.app import make_app
    from cxr_fastai.serving.protocol import PromptProtocol

    return uvicorn.Server(
        uvicorn.Config(
            make_app(settings, failed),
            http=partial(PromptProtocol, seconds=settings.sending),
            log_config=None,
            access_log=False,
            server_header=False,
            ws='none',
            proxy_headers=False,
            lifespan='on',
            timeout_graceful_shutdown=settings.drain,
            h11_max_incomplete_event_size=HEADERS,
        )
    )


def _start(settings: Settings, listening: socket.socket) -> multiprocessing.Process:
    """A process that serves. It never sees the SIGINT of a terminal's Ctrl-C: the one beside it tells it to end."""
    process = multiprocessing.get_context('spawn').Process(target=work, args=(settings, listening))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


@contextmanager
def _ending(seconds: float) -> Iterator[list[int]]:
    """The signals by which this process was told to end. It hands that on, and kills who has not ended in `seconds`."""
    told: list[int] = []

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    def end(number: int, _: object) -> None:
        told.append(number)
        for child in multiprocessing.active_children():
            child.terminate()
        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, end) for number in ENDS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _speak() -> None:
    """Log what `SPEAKERS` say, and nothing of others."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name.partition('.')[0] in SPEAKERS)
    logging.basicConfig(format=FORMAT, level=logging.INFO, handlers=[handler])
    warnings.simplefilter('ignore')


def _end_with_parent() -> None:
    """End this process when the one beside it is gone, also if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def _shown(host: str) -> str:
    return f'[{host}]' if ':' in host else host

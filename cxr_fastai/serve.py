"""A process that serves, and one beside it that starts it anew when it is killed."""
from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

from cxr_fastai.core import CXRError, UsageError, first_line
from cxr_fastai.settings import Settings

BACKLOG = 128
"""Connections that wait for the process to take them."""
FORMAT = '%(asctime)s %(levelname)s %(name)s %(message)s'


def serve(settings: Settings, say: Callable[[str], None] = lambda text: None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code. The listening socket outlives a killed process, so that
    callers wait for the next one instead of being turned away. Raises `UsageError` where the place is taken."""
    listening = listen(settings.host, settings.port)
    port = listening.getsockname()[1]
    say(f'serving {settings.bundle} at http://{_shown(settings.host)}:{port} (Ctrl-C ends it)')
    spawn, stopped = multiprocessing.get_context('spawn'), threading.Event()
    with listening:
        while True:
            process = spawn.Process(target=work, args=(settings, listening), name='cxr-fastai-serve')
            process.start()
            code = _wait(process, stopped)
            if stopped.is_set() or code >= 0: return max(code, 0)
            say(f'the serving process was ended by signal {-code}: a new one starts')


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UsageError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f'--host {host} --port {port}: {first_line(error)}: choose another.') from None


def work(settings: Settings, listening: socket.socket) -> None:
    """Serve in this process until it is told to stop; exit with the code of a bundle that cannot be opened."""
    import uvicorn

    from cxr_fastai.protocol import PromptProtocol
    from cxr_fastai.web import make_app
    logging.basicConfig(format=FORMAT, level=logging.INFO)
    _end_with_parent()
    failures: list[CXRError] = []

    def fail(error: CXRError) -> None:
        failures.append(error)
        server.should_exit = True
    config = uvicorn.Config(make_app(settings, fail), http=partial(PromptProtocol, seconds=settings.sending),
                            log_config=None, access_log=False, server_header=False, ws='none', proxy_headers=False,
                            timeout_graceful_shutdown=int(settings.drain), lifespan='on')
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    for error in failures:
        logging.getLogger('cxr_fastai.serve').error('%s', first_line(error))
        raise SystemExit(error.exit_code)


def _wait(process: multiprocessing.Process, stopped: threading.Event) -> int:
    """Wait for `process` to end, and hand on what ends this one."""
    def hand_on(number: int, _: FrameType | None) -> None:
        stopped.set()
        process.terminate()
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try: process.join()
    finally:
        for number, told in before.items(): signal.signal(number, told)
    return process.exitcode or 0


def _end_with_parent() -> None:
    """End this process when the one beside it is gone, also if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
    if parent: threading.Thread(target=watch, daemon=True).start()


def _shown(host: str) -> str: return f'[{host}]' if ':' in host else host

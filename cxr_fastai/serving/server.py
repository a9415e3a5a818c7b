"""The HTTP server of one bundle: Hypercorn in this process, with its socket, signals, log and shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from hypercorn.asyncio import serve as serve_app
from hypercorn.config import Config
from hypercorn.typing import Framework
from starlette.types import ASGIApp

from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.config import WEIGHTS
from cxr_fastai.inference.onnx_start import ONNX
from cxr_fastai.serving.app import Settings, make_app
from cxr_fastai.serving.service import find_bundle

BACKLOG = 128
"""Number of connections that may wait to be accepted."""
MAX_HEADER_BYTES = 2**14
SHUTDOWN_MARGIN = 1
"""Seconds after `Settings.drain_seconds` when requests that still run are cancelled."""
UNREAD_FACTOR = 3
"""A connection is closed if a client reads nothing of its response for this many times `Settings.send_seconds`."""
LOG_FORMAT = '%(asctime)s %(levelname)s %(name)s %(message)s'
LOGGERS = ('cxr_fastai.serving', 'hypercorn.error', 'asyncio')


def serve(settings: Settings, announce: Callable[[str], None] | None = None) -> None:
    """Serve `settings.bundle` until SIGTERM or SIGINT, and log to stderr.

    `announce` is called with a line that contains the address. Raises `UsageError` if the address cannot be used, or if
    there is no bundle; `ParityError` if the bundle fails its self-test; and `CXRError` if it is damaged.
    """
    bundle = Bundle.open(find_bundle(settings.bundle))
    bundle.read(ONNX if settings.device == 'cpu' else WEIGHTS)  # before anything is announced
    server = Server(settings)
    with _log_to_stderr(), _stop_on_signals(server):
        if announce:
            announce(f'serving {bundle.shown} at {server.url} (stop with Ctrl-C)')
        server.run()


class Server:
    """A server with its socket. `run` serves until `stop` is called, from another thread or a signal handler.

    `app` is the ASGI app, and `url` its address. Raises `UsageError` if the address cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app: ASGIApp = make_app(settings, self._fail)
        self.socket = listen(settings.host, settings.port, UNREAD_FACTOR * settings.send_seconds)
        self.port: int = self.socket.getsockname()[1]
        host = f'[{settings.host}]' if ':' in settings.host else settings.host
        self.url = f'http://{host}:{self.port}'
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Exception | None = None

    def run(self) -> None:
        """Serve until `stop`. Raises what prevented the model from being loaded."""
        with self.socket:
            asyncio.run(self._run())
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Accept no more requests, and end `run` when the open ones are finished."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._stopping.set)
        else:
            self._stopping.set()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.stop()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_unless_disconnected)
        serving = asyncio.create_task(
            serve_app(cast(Framework, self.app), self._config(), shutdown_trigger=self._stopping.wait)
        )
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # Hypercorn waits for clients that read nothing, and in Python 3.12 and later for all clients. The requests that
        # are still open after the margin are cancelled when this function returns.
        await asyncio.wait({serving}, timeout=self.settings.drain_seconds + SHUTDOWN_MARGIN)
        self._loop = None
        if serving.done():
            serving.result()

    def _config(self) -> Config:
        config = Config()
        config.bind = [f'fd://{self.socket.detach()}']  # Hypercorn closes it
        config.backlog = BACKLOG
        config.keep_alive_timeout = self.settings.send_seconds  # from connecting to the end of the headers
        config.read_timeout = None  # `BodyDeadline` limits the time for the whole body
        config.graceful_timeout = self.settings.drain_seconds
        config.h11_max_incomplete_size = MAX_HEADER_BYTES
        config.h2_max_header_list_size = MAX_HEADER_BYTES
        config.h2_max_concurrent_streams = 1  # `RequestFraming` rejects HTTP/2, which Hypercorn cannot turn off
        config.include_server_header = False
        config.errorlog = logging.getLogger('hypercorn.error')
        return config


def _log_unless_disconnected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that nobody handled, but not those of connections that were closed or cancelled."""
    if not isinstance(context.get('exception'), OSError | asyncio.CancelledError):
        loop.default_exception_handler(context)


def listen(host: str, port: int, unread_seconds: float) -> socket.socket:
    """Return a listening socket. Raises `UsageError` if the address is unknown or in use.

    The kernel closes accepted connections whose client reads nothing for `unread_seconds` (Linux only).
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f'--host {host} --port {port}: {first_line(error)}. Choose another address.') from None
    if hasattr(socket, 'TCP_USER_TIMEOUT'):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unread_seconds))
    return listening


@contextmanager
def _stop_on_signals(server: Server) -> Iterator[None]:
    def stop(*_: object) -> None:
        server.stop()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Write the log of `LOGGERS` to stderr, and nothing of other packages: those that read images might quote them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    silent = logging.NullHandler()
    logging.getLogger().addHandler(silent)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger('hypercorn.error').setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.getLogger().removeHandler(silent)
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True

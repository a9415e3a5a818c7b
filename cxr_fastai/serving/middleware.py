"""ASGI middleware: request limits, host and origin checks, security headers, the access log and the metrics."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_fastai.serving.uploads import APIError

log = logging.getLogger('cxr_fastai.serving')

PREDICT = '/v1/predict'
PROBES = ('/health', '/ready')
"""Paths that tell whether the service runs, for load balancers and orchestrators."""
POLLED = (*PROBES, '/metrics')
"""Routes that monitoring polls. They are logged at DEBUG level."""
METHODS = ('GET', 'HEAD', 'OPTIONS', 'POST', 'PUT', 'PATCH', 'DELETE')
"""Methods that the log repeats. Clients can send any word as a method, such as a name."""
SECURITY_HEADERS = {
    'content-security-policy': (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cross-origin-opener-policy': 'same-origin',
    'cross-origin-resource-policy': 'same-origin',
    'permissions-policy': 'camera=(), microphone=(), geolocation=()',
    'cache-control': 'no-store',
}
SHUTTING_DOWN = APIError(503, 'E_ENDING', 'the service is shutting down: try again later.', {'retry-after': '5'})
SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def error_response(error: APIError) -> JSONResponse:
    """Return the response to `error`: JSON with `code` and `message`."""
    return JSONResponse({'code': error.code, 'message': error.message}, error.status, error.headers)


def internal_error(request_id: str) -> APIError:
    """Return the response to a failure that the service did not expect; its cause is in the log only."""
    message = f'internal error; contact the operator, with the request id {request_id}.'
    return APIError(503, 'E_INTERNAL', message, {'retry-after': '1'})


class Metrics:
    """Prometheus metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._make(Counter, 'cxr_requests', 'Requests for predictions, by status', labels=['status'])
        self.images = self._make(Counter, 'cxr_images', 'Images, by status and code', labels=['status', 'code'])
        self.seconds = self._make(
            Histogram,
            'cxr_request_seconds',
            'Seconds from the complete request to its response',
            buckets=SECONDS_BUCKETS,
        )
        self.batch = self._make(Histogram, 'cxr_batch_images', 'Images per batch', buckets=BATCH_BUCKETS)
        self.waiting = self._make(Gauge, 'cxr_requests_waiting', 'Requests that are being answered')
        self.ready = self._make(Gauge, 'cxr_ready', '1 after the model has passed its self-test')

    def _make(self, kind: Any, name: str, description: str, labels: Sequence[str] = (), **options: Any) -> Any:
        return kind(name, description, labels, registry=self.registry, **options)

    def count_response(self, path: str, status: int) -> None:
        """Count the response to a request for predictions; `status` 0 means that the client had left."""
        if path == PREDICT:
            self.requests.labels(status or 'gone').inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class AccessLog:
    """Adds a request id and `SECURITY_HEADERS` to every response, and logs one line per request.

    The line has the id, method, route, size, status and milliseconds, but no file name, address, header or content.
    An exception of `app` becomes a 503 response. `observe` is called with the path and the status of every request.
    WebSockets are rejected.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[str, int], None] | None = None) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope['type'] == 'websocket':
            return await send({'type': 'websocket.close'})
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        start = time.monotonic()
        request_id = uuid.uuid4().hex[:12]
        status = 0
        scope.setdefault('state', {})['id'] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers['x-request-id'] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except (Exception, asyncio.CancelledError) as error:
            log.error('%s %s at %s', request_id, type(error).__name__, _origin(error))
            if status == 0:
                shutting_down = isinstance(error, asyncio.CancelledError)
                response = error_response(SHUTTING_DOWN if shutting_down else internal_error(request_id))
                await response(scope, receive, send_with_headers)
        finally:
            if self.observe:
                self.observe(scope['path'], status)
            _log_request(scope, status, time.monotonic() - start)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    state = scope['state']
    route = getattr(scope.get('route'), 'path', '-')
    log.log(
        logging.DEBUG if route in POLLED else logging.INFO,
        'id=%s method=%s route=%s bytes=%s images=%s formats=%s status=%s ms=%.0f',
        state['id'],
        scope['method'] if scope['method'] in METHODS else '-',
        route,
        state.get('bytes', 0),
        state.get('images', 0),
        state.get('formats', '-'),
        status or 'gone',
        1000 * seconds,
    )


def _origin(error: BaseException) -> str:
    """Return the file name and line that raised `error`. Its message is not logged: it may quote a request."""
    trace = error.__traceback__
    if trace is None:
        return 'unknown'
    while trace.tb_next:
        trace = trace.tb_next
    return f'{trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1]}:{trace.tb_lineno}'


class BodyDeadline:
    """Gives a client `seconds` to send the body of a request, counted from the end of its headers.

    `app` gets an `APIError` 408 when it reads a body that is late. The end of a response is held back until the client
    has sent its whole body, or is late: a server closes the connection after a response to an incomplete request, and a
    client that is still sending would lose the response.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope['type'] != 'http' or not _has_body(scope):
            return await self.app(scope, receive, send)
        body = _Body(receive, asyncio.get_running_loop().time() + self.seconds, self.seconds)

        async def send_after_body(message: Message) -> None:
            is_last = message['type'] == 'http.response.body' and not message.get('more_body', False)
            if not is_last or body.is_complete:
                return await send(message)
            await send({**message, 'more_body': True})
            with suppress(APIError):
                while not body.is_complete:
                    await body.receive()
            # The server may be waiting for its queue of body parts to be read before it closes the connection.
            discarding = asyncio.create_task(body.discard())
            await send({'type': 'http.response.body', 'body': b''})
            discarding.cancel()

        await self.app(scope, body.receive, send_after_body)


def _has_body(scope: Scope) -> bool:
    """Return False for a request without a body. A body in HTTP/2 needs no header that announces it."""
    headers = Headers(scope=scope)
    return scope['http_version'] == '2' or 'content-length' in headers or 'transfer-encoding' in headers


class _Body:
    """The messages of one request body until the time `deadline` of the event loop."""

    def __init__(self, receive: Receive, deadline: float, seconds: float) -> None:
        self.receive_message = receive
        self.deadline = deadline
        self.seconds = seconds
        self.is_complete = False

    async def receive(self) -> Message:
        """Return the next message. Raises `APIError` 408 after the deadline, unless the body is complete."""
        if self.is_complete:
            return await self.receive_message()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive_message()
        except TimeoutError:
            problem = f'the request was not complete after {self.seconds:g} s: send less, or use a faster connection.'
            raise APIError(408, 'E_SLOW', problem) from None
        self.is_complete = not message.get('more_body', False)
        return message

    async def discard(self) -> None:
        """Read and drop all further messages until the client disconnects."""
        while (await self.receive_message())['type'] != 'http.disconnect':
            pass


class ErrorResponses:
    """Sends the response to an `APIError` of the middleware inside it; those of the routes have FastAPI's handlers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        try:
            await self.app(scope, receive, send)
        except APIError as error:
            await error_response(error)(scope, receive, send)


class TrustedHosts:
    """Accepts requests for the host names `hosts` only, which stops DNS rebinding. Raises `APIError` 400.

    Probes are accepted under any name: orchestrators use the IP address, and the answers contain nothing about images.
    Starlette's `TrustedHostMiddleware` makes the check; its own response would not be JSON.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        is_checked = scope['type'] == 'http' and scope['path'] not in PROBES
        if is_checked and not await self._is_trusted(scope):
            raise APIError(400, 'E_HOST', 'the Host header is not a name of this service: add it with --allow-host.')
        await self.app(scope, receive, send)

    async def _is_trusted(self, scope: Scope) -> bool:
        trusted = False

        async def accept(*_: Any) -> None:
            nonlocal trusted
            trusted = True

        async def ignore(*_: Any) -> Any:
            pass

        await TrustedHostMiddleware(accept, self.hosts, www_redirect=False)(scope, ignore, ignore)
        return trusted and len(Headers(scope=scope).getlist('host')) == 1


class SameOrigin:
    """Rejects POST requests from pages of other sites, so that they cannot use a reader's network access.

    Raises `APIError` 400.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope['type'] == 'http' and scope['method'] == 'POST':
            headers = Headers(scope=scope)
            origin = headers.get('origin')
            other_origin = origin is not None and origin.partition('://')[2] != headers.get('host')
            if other_origin or headers.get('sec-fetch-site') == 'cross-site':
                raise APIError(400, 'E_ORIGIN', 'pages of other sites may not send images to this service.')
        await self.app(scope, receive, send)


class RequestFraming:
    """Rejects requests whose end a proxy and this service might see in different places, and closes their connection.

    These have the headers Content-Length and Transfer-Encoding at once (RFC 9112, section 6.3). HTTP/2, for which
    browsers need TLS, is rejected too. Raises `APIError` 400 or 505.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        if scope['http_version'].startswith('2'):
            raise APIError(505, 'E_HTTP_VERSION', 'the service speaks HTTP/1.1 only: let a proxy translate HTTP/2.')
        headers = Headers(scope=scope)
        if 'transfer-encoding' in headers and 'content-length' in headers:
            problem = 'the headers give two lengths of the body: send Content-Length or Transfer-Encoding.'
            raise APIError(400, 'E_FRAMING', problem, {'connection': 'close'})
        await self.app(scope, receive, send)


class ConcurrencyLimit:
    """Allows `max_requests` POST requests at a time, because each keeps its body in memory. Raises `APIError` 503.

    The server has no such limit of its own.
    """

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self.app = app
        self.max_requests = max_requests
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope['type'] != 'http' or scope['method'] != 'POST':
            return await self.app(scope, receive, send)
        if self.requests >= self.max_requests:
            message = f'{self.requests} requests are open already: try again in a moment.'
            raise APIError(503, 'E_BUSY', message, {'retry-after': '1'})
        self.requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests -= 1

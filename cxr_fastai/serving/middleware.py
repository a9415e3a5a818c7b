"""What every request passes before it is answered, and every answer on its way out: plain ASGI, one duty each."""

from __future__ import annotations

import asyncio
import collections
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_fastai.serving.uploads import Refusal

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

PREDICT = '/v1/predict'
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Counts:
    """The figures of one service, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter('cxr_requests', 'Requests for predictions, by status', ['status'], registry=registry)
        self.images = Counter('cxr_images', 'Images, by status and code', ['status', 'code'], registry=registry)
        self.seconds = Histogram(
            'cxr_request_seconds', 'Seconds from the whole request to its answer', buckets=SECONDS, registry=registry
        )
        self.batch = Histogram('cxr_batch_images', 'Images computed together', buckets=BATCHES, registry=registry)
        self.waiting = Gauge('cxr_requests_waiting', 'Requests that are being answered', registry=registry)
        self.ready = Gauge('cxr_ready', '1 once the canary images agree', registry=registry)

    def answered(self, path: str, status: int) -> None:
        """Count a request for predictions by its status; others are not counted."""
        if path == PREDICT:
            self.requests.labels(status or 'gone').inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)


log = logging.getLogger('cxr_fastai.serving.server')
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    'content-security-policy': POLICY,
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cross-origin-opener-policy': 'same-origin',
    'cross-origin-resource-policy': 'same-origin',
    'permissions-policy': 'camera=(), microphone=(), geolocation=()',
    'cache-control': 'no-store',
}
OPEN = ('/', '/health', '/ready', '/card', '/docs', '/openapi.json', '/favicon.ico')
"""What needs no token: the page itself, what it is about, and whether it lives."""
POLLED = ('/health', '/ready', '/metrics')
"""What is asked over and over."""
METHODS = ('GET', 'HEAD', 'OPTIONS', 'POST', 'PUT', 'PATCH', 'DELETE')
"""What a log repeats; any other word may be a name."""


def answer(refusal: Refusal) -> JSONResponse:
    """A refusal as JSON `{code, message}`."""
    return JSONResponse({'code': refusal.code, 'message': refusal.message}, refusal.status, refusal.headers)


ENDING = Refusal(503, 'E_ENDING', 'the service ends, and can wait no longer: try again.', retry_after='5')


def is_open(scope: Scope) -> bool:
    """Whether a request is for what needs no token."""
    return scope['path'] in OPEN or scope['path'].startswith('/static/')


class Guard:
    """What `app` is asked, and what it says, unless `check` refuses the request."""

    def __init__(self, app: ASGIApp):
        self.app = app

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise `Refusal` for a request that goes no further."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] == 'http':
            try:
                self.check(scope, Headers(scope=scope))
            except Refusal as refusal:
                return await answer(refusal)(scope, receive, send)
        await self.app(scope, receive, send)


class KnownHosts(Guard):
    """Refuses requests for other names than `hosts`, such as a page of elsewhere whose name was pointed here."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        super().__init__(app)
        self.hosts = {host.lower() for host in hosts}

    def check(self, scope: Scope, headers: Headers) -> None:
        told = headers.getlist('host')
        try:
            name = urlsplit(f'//{told[0]}').hostname if len(told) == 1 else None
        except ValueError:
            name = None
        if '*' not in self.hosts and name not in self.hosts:
            raise Refusal(400, 'E_HOST', 'this service does not go by that name: --allow-host adds one.')


class SameOrigin(Guard):
    """Refuses what another site's page sends: no such page may use a reader's network to get here."""

    def check(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get('origin')
        elsewhere = origin is not None and origin.partition('://')[2] != headers.get('host')
        if scope['method'] == 'POST' and (elsewhere or headers.get('sec-fetch-site') == 'cross-site'):
            raise Refusal(400, 'E_ORIGIN', 'pages of other sites may not send images here.')


class Token(Guard):
    """Refuses requests without the bearer `token`, but for what is `OPEN` and static."""

    def __init__(self, app: ASGIApp, token: str):
        super().__init__(app)
        self.token = f'Bearer {token}'.encode()

    def check(self, scope: Scope, headers: Headers) -> None:
        if not is_open(scope) and not hmac.compare_digest(headers.get('authorization', '').encode(), self.token):
            raise Refusal(401, 'E_TOKEN', 'send the header `Authorization: Bearer TOKEN`.', www_authenticate='Bearer')


class PerClient(Guard):
    """Refuses more than `most` requests at a time from one address; what is open to all is not counted."""

    refusal = 429, 'E_TOO_OFTEN', '{} of your requests wait already.'

    def who(self, scope: Scope) -> str:
        """Whom a request counts for."""
        return (scope['client'] or ('',))[0]

    def __init__(self, app: ASGIApp, most: int):
        super().__init__(app)
        self.most, self.open = most, collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http' or is_open(scope) or scope['path'] in POLLED:
            return await self.app(scope, receive, send)
        client, (status, code, words) = self.who(scope), self.refusal
        if self.open[client] >= self.most:
            return await answer(Refusal(status, code, words.format(self.most), retry_after='1'))(scope, receive, send)
        self.open[client] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open[client] -= 1
            if not self.open[client]:
                del self.open[client]


class Crowd(PerClient):
    """Refuses more than `most` requests at a time from all together: each holds what it has sent in memory."""

    refusal = 503, 'E_BUSY', '{} requests are under way already: try again in a moment.'

    def who(self, scope: Scope) -> str:
        """All are one."""
        return ''


class Record:
    """Gives each answer an id and the safe `HEADERS`, turns what nobody foresaw into a 503, and logs a line: id,
    method, route, size, status, milliseconds. No name, address, header or body gets into the log. `watch` is told the
    path and the status of each."""

    def __init__(self, app: ASGIApp, watch: Callable[[str, int], None] = lambda path, status: None):
        self.app, self.watch = app, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        began, name, status = time.monotonic(), uuid.uuid4().hex[:12], 0
        scope.setdefault('state', {})['id'] = name

        async def sending(message: Message) -> None:
            nonlocal status
            if message['type'] == 'http.response.start':
                status, headers = message['status'], MutableHeaders(scope=message)
                for header, value in (HEADERS | {'x-request-id': name}).items():
                    headers.setdefault(header, value)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except (Exception, asyncio.CancelledError) as error:
            log.error('%s %s at %s', name, type(error).__name__, _place(error))
            told = ENDING if isinstance(error, asyncio.CancelledError) else internal(name)
            if not status:
                await answer(told)(scope, receive, sending)
        finally:
            self.watch(scope['path'], status)
            _note(scope, status, time.monotonic() - began)


def internal(name: str) -> Refusal:
    """What is said of the request `name` when something failed that nobody foresaw."""
    return Refusal(503, 'E_INTERNAL', f'it failed here: tell the operator {name}.', retry_after='1')


def _note(scope: Scope, status: int, seconds: float) -> None:
    """Log a request; what is polled is no news."""
    state, route = scope['state'], getattr(scope.get('route'), 'path', '-')
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


def _place(error: BaseException) -> str:
    """Where an error arose: file and line, without what was being handled."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f'{trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1]}:{trace.tb_lineno}' if trace else '?'

"""A bundle becomes an ASGI app: its settings, its guards, its life from opening to closing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from cxr_fastai import __version__
from cxr_fastai.serving.api import NOTICE, TOLD, rest
from cxr_fastai.serving.middleware import Counts, Crowd, KnownHosts, PerClient, Record, SameOrigin, Token
from cxr_fastai.serving.pages import site
from cxr_fastai.serving.service import Service, Settings

LOCAL = ('127.0.0.1', 'localhost', '::1')


def make_app(settings: Settings, failed: Callable[[Exception], None] = lambda error: None) -> ASGIApp:
    """The ASGI app of `settings`. It answers at once and opens its bundle meanwhile; `failed` is told why it cannot."""
    app = FastAPI(
        title='cxr_fastai',
        version=__version__,
        docs_url=None,
        redoc_url=None,
        summary='Chest images in, the probability of pneumonia out.',
        description=NOTICE,
        lifespan=lambda app: _living(app, settings, failed),
    )
    app.state.service, app.state.counts, app.state.settings = None, Counts(), settings
    app.include_router(rest)
    site(app)
    for error, told in TOLD.items():
        app.add_exception_handler(error, told)
    return _guarded(app, settings, app.state.counts)


def _guarded(app: ASGIApp, settings: Settings, counts: Counts) -> ASGIApp:
    """`app` behind all guards; the first to ask is the last here."""
    if settings.token:
        app = Token(app, settings.token)
    app = Crowd(app, 2 * settings.queue)  # as many may still be sending as are being answered
    if settings.per_client:
        app = PerClient(app, settings.per_client)
    return Record(KnownHosts(SameOrigin(app), {*LOCAL, settings.host, *settings.hosts}), counts.answered)


@asynccontextmanager
async def _living(app: FastAPI, settings: Settings, failed: Callable[[Exception], None]) -> AsyncIterator[None]:
    async with AsyncExitStack() as held:
        opening = asyncio.create_task(_open(app, settings, failed, held))
        yield
        opening.cancel()


async def _open(app: FastAPI, settings: Settings, failed: Callable[[Exception], None], held: AsyncExitStack) -> None:
    counts = app.state.counts
    try:
        service = await asyncio.to_thread(
            Service.open,
            settings.bundle,
            queue=settings.queue,
            batch=settings.batch,
            wait=settings.wait,
            watch=counts.batch.observe,
        )
    except Exception as error:
        return failed(error)  # of any kind: it would start for ever
    app.state.service = await held.enter_async_context(service.running())
    counts.waiting.set_function(lambda: service.waiting)
    counts.ready.set(1)

"""The ASGI app of one bundle: its settings, its middleware, and the loading of its model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from cxr_fastai import __version__
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.images.decoder_pool import DECODE_SECONDS
from cxr_fastai.images.decoder_start import DECODE_MEMORY
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.serving.api import ERROR_HANDLERS, NOTICE, check_token, protected_routes, public_routes
from cxr_fastai.serving.middleware import (
    AccessLog,
    BodyDeadline,
    ConcurrencyLimit,
    ErrorResponses,
    Metrics,
    RequestFraming,
    SameOrigin,
    TrustedHosts,
)
from cxr_fastai.serving.pages import add_pages
from cxr_fastai.serving.service import Service
from cxr_fastai.serving.uploads import Limits

LOCAL_HOSTS = ('127.0.0.1', 'localhost', '::1')


@dataclass(frozen=True)
class Settings:
    """How a bundle is served. All times are in seconds.

    Parameters
    ----------
    bundle
        Folder or zip file, the `model.onnx` in a folder, or the text `pretrained` or `hf:USER/NAME` (see `find_model`).
    host, port
        Address to listen on; port 0 picks a free port.
    limits
        Limits of one request.
    max_requests
        Number of requests that are answered at a time. Twice as many may be sending their bodies.
    answer_seconds
        Time limit for answering a request.
    send_seconds
        Time limit for a client to send the headers of a request, and then its body.
    drain_seconds
        Time that open requests have to finish when the service is shut down.
    decode_seconds, decode_memory
        Deadline and memory in bytes of the process that decodes an image.
    max_batch, batch_delay
        Largest number of images per batch, and how long its first image waits at most for others.
    token
        Access token that clients must send, or None.
    hosts
        Additional host names that requests may use; `*.example.org` allows all subdomains, `*` every name.
    device
        Where the network computes. ONNX Runtime serves on `cpu`, torch on a GPU (see `models.devices`).
    modality
        Codes of DICOM modalities, such as `RG,CT`, that are accepted besides those of the training.
    """

    bundle: StrPath
    host: str = '127.0.0.1'
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    max_requests: int = 32
    answer_seconds: float = 30
    send_seconds: float = 10
    drain_seconds: float = 8
    decode_seconds: float = DECODE_SECONDS
    decode_memory: int = DECODE_MEMORY
    max_batch: int = 16
    batch_delay: float = 0.004
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    device: str = 'cpu'
    modality: str = ''

    def __post_init__(self) -> None:
        parse_modalities(self.modality)
        for name in self.hosts:
            if '*' in name.removeprefix('*.') and name != '*':
                raise UsageError(f'--allow-host {name}: not a host name. Give a name, *.NAME or *.')

    @property
    def trusted_hosts(self) -> list[str]:
        """The names that the Host header of a request may have; IPv6 addresses are in brackets."""
        names = [*LOCAL_HOSTS, self.host, *self.hosts]
        return [f'[{name}]' if ':' in name else name for name in names]


def make_app(settings: Settings, on_failure: Callable[[Exception], None] | None = None) -> ASGIApp:
    """Return the ASGI app of `settings`.

    The app responds at once and loads its model in the background. If that fails, it calls `on_failure` with the
    exception and is never ready.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            loading = asyncio.create_task(_load_service(app, settings, stack, on_failure))
            yield
            loading.cancel()

    app = FastAPI(
        title='cxr_fastai',
        version=__version__,
        docs_url=None,
        redoc_url=None,
        summary='Predicts the probability of pneumonia from chest X-ray images.',
        description=NOTICE,
        lifespan=lifespan,
    )
    app.state.service = None
    app.state.metrics = Metrics()
    app.state.settings = settings
    app.include_router(public_routes)
    app.include_router(protected_routes, dependencies=[Depends(check_token)] if settings.token else [])
    add_pages(app)
    for exception, handler in ERROR_HANDLERS.items():
        app.add_exception_handler(exception, handler)
    return _add_middleware(app, settings, app.state.metrics)


def _add_middleware(app: ASGIApp, settings: Settings, metrics: Metrics) -> ASGIApp:
    """Wrap `app` in its middleware, from the inside to the outside."""
    app = ConcurrencyLimit(app, 2 * settings.max_requests)
    app = SameOrigin(app)
    app = TrustedHosts(app, settings.trusted_hosts)
    app = RequestFraming(app)
    app = ErrorResponses(app)
    app = BodyDeadline(app, settings.send_seconds)
    return AccessLog(app, metrics.count_response)


async def _load_service(
    app: FastAPI, settings: Settings, stack: AsyncExitStack, on_failure: Callable[[Exception], None] | None
) -> None:
    """Load the model, start the service until `stack` is closed, and put it into the state of `app`."""
    metrics = app.state.metrics
    try:
        service = await asyncio.to_thread(
            Service.open,
            settings.bundle,
            device=settings.device,
            modality=settings.modality,
            max_requests=settings.max_requests,
            max_batch=settings.max_batch,
            max_delay=settings.batch_delay,
            decode_seconds=settings.decode_seconds,
            decode_memory=settings.decode_memory,
            observe=metrics.batch.observe,
        )
    except Exception as error:  # of any kind: the service would otherwise load for ever
        if on_failure:
            on_failure(error)
        return
    app.state.service = await stack.enter_async_context(service.running())
    metrics.waiting.set_function(lambda: service.active_requests)
    metrics.ready.set(1)

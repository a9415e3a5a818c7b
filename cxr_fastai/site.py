"""The pages for people: films in, decisions out; the model card; the REST interface in words. No CDN, one script."""
from __future__ import annotations

from io import BytesIO
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image

from cxr_fastai import __version__
from cxr_fastai.answers import NOTICE
from cxr_fastai.bundle import CARD
from cxr_fastai.pages import fill, markdown
from cxr_fastai.rest import service_of
from cxr_fastai.uploads import Refusal

pages = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def site(app: FastAPI) -> None:
    """Add the pages, and what they need, to `app`."""
    app.include_router(pages)
    app.mount('/static', StaticFiles(packages=[('cxr_fastai', 'static')]))


@pages.get('/')
async def home(request: Request) -> str:
    """Drop films, see decisions. While the model is opened it says so, and looks again."""
    service = request.app.state.service
    examples = range(len(service.bundle.canary.films)) if service else ()
    return fill('serve.html', **_frame(request), limits=request.app.state.settings.limits, examples=examples)


@pages.get('/card')
async def card(request: Request) -> str:
    """The model card of the bundle."""
    return fill('card.html', **_frame(request), card=markdown(service_of(request).bundle.read(CARD).decode()))


@pages.get('/docs')
async def docs(request: Request) -> str:
    """The REST interface, from its own OpenAPI document."""
    return fill('api.html', **_frame(request), api=request.app.openapi())


@pages.get('/examples/{number}.png')
async def example(request: Request, number: int) -> Response:
    """A synthetic film to try: one of the bundle's canary films."""
    films = service_of(request).bundle.canary.films
    if not 0 <= number < len(films): raise Refusal(404, 'E_NOT_FOUND', f'there are {len(films)} examples.')
    buffer = BytesIO()
    Image.fromarray(films[number]).save(buffer, 'PNG')
    return Response(buffer.getvalue(), media_type='image/png')


def _frame(request: Request) -> dict[str, Any]:
    """What every page says at its foot; `model` is None while it is opened."""
    service = request.app.state.service
    return {'version': __version__, 'notice': NOTICE, 'model': service and service.facts()}

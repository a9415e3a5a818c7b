"""The pages for people: images in, decisions out; the model card; the REST interface in words. No CDN, one script."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from markupsafe import Markup
from PIL import Image

from cxr_fastai import __version__
from cxr_fastai.core.templates import data_uri, fill, markdown
from cxr_fastai.inference.bundle import CARD
from cxr_fastai.inference.predictor import COLUMNS
from cxr_fastai.serving.api import NOTICE, service_of
from cxr_fastai.serving.uploads import Refusal

THUMB = 96
"""Pixels a side of an example that is offered."""
FRONT_MATTER = re.compile(r'\A---\n.*?^---\n', re.DOTALL | re.MULTILINE)
"""What a card tells programs."""
WORDS = {
    'queued': 'Waits for its turn.',
    'uploading': 'Being sent.',
    'working': 'Being read and judged.',
    'E_OUT_OF_DISTRIBUTION': 'This does not look like the chest images that the model was trained on. It gives no '
    'probability, since it would mean nothing.',
    'E_BLANK': 'The picture is blank: there is nothing to see in it.',
    'E_TOO_SMALL': 'The picture is too small, or too narrow, for a chest image.',
    'E_TOO_LARGE': 'The picture has more pixels than the service reads.',
    'E_MULTIFRAME': 'The file holds several pictures. Send one image a file.',
    'E_BITDEPTH': 'The pixels are stored in a way that is not read. Store it as grey of 8 or 16 bits.',
    'E_FORMAT': 'This is no image file: JPEG, PNG, TIFF and DICOM are read.',
    'E_EMPTY': 'The file is empty.',
    'E_TRUNCATED': 'The file is damaged, or only a part of it arrived.',
    'E_TIMEOUT': 'Reading it would take too long.',
    'E_IO': 'The file cannot be read.',
    'E_NOT_REGULAR': 'This is no file.',
    'E_DICOM_CORRUPT': 'The DICOM file is damaged.',
    'E_DICOM_MODALITY': 'The DICOM file is no radiograph: CR and DX are read.',
    'E_DICOM_NOPIXEL': 'The DICOM file has no picture in it.',
    'E_DICOM_SYNTAX': 'The DICOM file is compressed in a way that is not read here.',
    'E_BODY': 'The file is larger than the service takes.',
    'E_UNREADABLE': 'The browser cannot read this file: was it moved, or is it a folder?',
    'E_BUSY': 'The service is busy.',
    'E_STARTING': 'The model is being opened.',
    'E_TOO_OFTEN': 'Many of your images are under way already.',
    'E_INTERNAL': 'The service failed.',
    'E_TOKEN': 'An access token is needed.',
    'E_WRONG_TOKEN': 'The service does not know this access token. Enter it again.',
    'E_OFFLINE': 'The service cannot be reached: it may have ended, or the image took too long to send.',
    'E_ALONE': 'The service cannot be reached: this computer is offline.',
    'E_HOST': 'The service does not go by this address. Its operator can allow it.',
    'E_ORIGIN': 'The service takes images from its own page alone.',
}
"""What the page says of an image on its way, and of each code, beside the service's own message."""
pages = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def site(app: FastAPI) -> None:
    """Add the pages, and what they need, to `app`."""
    app.include_router(pages)
    app.mount('/static', StaticFiles(packages=[('cxr_fastai.serving', 'static')]))


@pages.get('/')
def home(request: Request) -> str:
    """Drop images, see decisions. While the model is opened it says so, and looks again."""
    service = request.app.state.service
    examples = [_thumbnail(image) for image in service.bundle.canary.images] if service else []
    return fill(
        'serve.html',
        **_frame(request),
        limits=request.app.state.settings.limits,
        examples=examples,
        words=WORDS,
        columns=COLUMNS,
    )


@pages.get('/card')
def card(request: Request) -> HTMLResponse:
    """The model card of the bundle."""
    service = request.app.state.service
    text = service and FRONT_MATTER.sub('', service.bundle.read(CARD).decode().replace('\r\n', '\n'))
    return HTMLResponse(
        fill('card.html', **_frame(request), card=text and _scrolling(markdown(text))),
        200 if service else 503,
        {} if service else {'retry-after': '1'},
    )


@pages.get('/docs')
def docs(request: Request) -> str:
    """The REST interface, from its own OpenAPI document."""
    settings = request.app.state.settings
    return fill(
        'api.html',
        **_frame(request),
        api=request.app.openapi(),
        markdown=markdown,
        limits=settings.limits,
        token=settings.token is not None,
        address=str(request.base_url).rstrip('/'),
    )


@pages.get('/examples/{number}.png')
async def example(request: Request, number: int) -> Response:
    """A synthetic image to try: one of the bundle's canary images."""
    images = service_of(request).bundle.canary.images
    if not 0 <= number < len(images):
        raise Refusal(404, 'E_NOT_FOUND', f'there are {len(images)} examples.')
    buffer = BytesIO()
    Image.fromarray(images[number]).save(buffer, 'PNG')
    return Response(buffer.getvalue(), media_type='image/png')


@pages.get('/favicon.ico')
async def favicon() -> RedirectResponse:
    """Where browsers look for an icon that no page told them of."""
    return RedirectResponse('static/icon.svg')


def short(p: float) -> str:
    """A probability as the pages write it, such as .57."""
    return f'{p:.4g}'.removeprefix('0') or '0'


def _frame(request: Request) -> dict[str, Any]:
    """What every page says at its foot; `model` is None while it is opened."""
    service = request.app.state.service
    return {'version': __version__, 'notice': NOTICE, 'model': service and service.facts(), 'short': short}


def _thumbnail(image: np.ndarray) -> str:
    """`image`, grey uint8 (h, w), as the address of a small picture: in the page, so that it needs no token."""
    buffer, small = BytesIO(), Image.fromarray(image)
    small.thumbnail((THUMB, THUMB))
    small.save(buffer, 'JPEG', quality=80)
    return data_uri(buffer.getvalue(), 'image/jpeg')


def _scrolling(page: Markup) -> Markup:
    """`page` with tables and commands that scroll on narrow screens, also by keyboard; aligned by class, since the
    policy of these pages forbids styles."""
    text = re.sub(r' style="text-align:(\w+)"', r' class="\1"', page)
    return Markup(
        text.replace('<table>', '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
        .replace('</table>', '</table></div>')
        .replace('<pre>', '<pre tabindex="0">')
    )

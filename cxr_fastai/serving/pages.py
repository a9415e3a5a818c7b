"""The web pages: images in, predictions out; the model card; and the documentation of the REST API."""

from __future__ import annotations

import re
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from markupsafe import Markup
from PIL import Image

from cxr_fastai import __version__
from cxr_fastai.core.templates import data_uri, markdown, render_template
from cxr_fastai.inference.bundle import CARD
from cxr_fastai.inference.predictor import COLUMNS
from cxr_fastai.serving.api import NOTICE, check_token, get_service
from cxr_fastai.serving.uploads import APIError

THUMBNAIL_SIDE = 96
"""Longer side of the pictures of the examples, in pixels."""
FRONT_MATTER = re.compile(r'\A---\n.*?^---\n', re.DOTALL | re.MULTILINE)
"""The YAML at the top of a model card, which is meant for programs."""
HEADING = re.compile('<h2>(.*?)</h2>')
"""A heading of a model card that its table of contents lists."""
MAX_CARD = 50_000
"""Longest model card that is converted from Markdown, in characters. The conversion can take 20 µs for each."""
MESSAGES = {
    'queued': 'Waiting.',
    'uploading': 'Uploading.',
    'working': 'Computing the prediction.',
    'E_OUT_OF_DISTRIBUTION': 'This image does not look like the chest X-ray images that the model was trained on, so a '
    'probability would be meaningless.',
    'E_ARRAY': 'The image is not an array of grey levels.',
    'E_BLANK': 'The image is blank.',
    'E_TYPE': 'This is not an image.',
    'E_TOO_SMALL': 'The image is too small or too narrow for a chest X-ray.',
    'E_TOO_LARGE': 'The image has more pixels than the service accepts.',
    'E_MULTIFRAME': 'The file contains several images. Send one image per file.',
    'E_BITDEPTH': 'The pixel format is not supported. Convert the image to grey with 8 or 16 bits.',
    'E_FORMAT': 'This is not an image file. Supported formats: JPEG, PNG, TIFF and DICOM.',
    'E_EMPTY': 'The file is empty.',
    'E_TRUNCATED': 'The file is damaged or incomplete.',
    'E_TIMEOUT': 'The image takes too long to read.',
    'E_IO': 'The file cannot be read.',
    'E_NOT_REGULAR': 'This is not a regular file.',
    'E_DICOM_CORRUPT': 'The DICOM file is damaged.',
    'E_DICOM_MODALITY': 'The DICOM file is not a radiograph. Supported modalities: CR and DX.',
    'E_DICOM_NOPIXEL': 'The DICOM file contains no image.',
    'E_DICOM_SYNTAX': 'The compression of the DICOM file is not supported.',
    'E_BODY': 'The file is larger than the service accepts.',
    'E_SLOW': 'The upload took too long.',
    'E_UNREADABLE': 'The browser cannot read this file. It may have been moved, or it is a folder.',
    'E_BUSY': 'The service is busy.',
    'E_STARTING': 'The model is still loading.',
    'E_ENDING': 'The service is shutting down.',
    'E_INTERNAL': 'Internal error; contact the operator.',
    'E_TOKEN': 'An access token is required.',
    'E_WRONG_TOKEN': 'The access token is wrong. Enter it again.',
    'E_OFFLINE': 'The service cannot be reached. It may have stopped, or the upload took too long.',
    'E_NO_NETWORK': 'The service cannot be reached: this computer is offline.',
    'E_HOST': 'The service does not accept requests for this address. Its operator can allow it.',
    'E_ORIGIN': 'The service accepts images from its own page only.',
}
"""What the page shows for each state of an image, and for each error code."""

pages = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def add_pages(app: FastAPI) -> None:
    """Add the pages and their static files to `app`."""
    app.include_router(pages)
    app.mount('/static', StaticFiles(packages=[('cxr_fastai.serving', 'static')]))


@pages.get('/')
def home(request: Request) -> str:
    """Return the page that predicts images. While the model is loading, the page says so and reloads itself later."""
    service = request.app.state.service
    examples = []
    if service:
        examples = [_thumbnail(image) for image in service.bundle.selftest.images]
    return render_template(
        'serve.html',
        **_page_values(request),
        limits=request.app.state.settings.limits,
        examples=examples,
        messages=MESSAGES,
        columns=COLUMNS,
    )


@pages.get('/card')
def card(request: Request) -> HTMLResponse:
    """Return the model card of the bundle."""
    service = request.app.state.service
    if service is None:
        return HTMLResponse(render_template('card.html', **_page_values(request), card=None), 503, {'retry-after': '1'})
    text = service.bundle.read(CARD).decode('utf-8-sig', 'replace').replace('\r\n', '\n')
    html, contents = _render_card(text)
    return HTMLResponse(render_template('card.html', **_page_values(request), card=html, contents=contents))


@lru_cache(maxsize=1)
def _render_card(text: str) -> tuple[Markup, dict[str, str]]:
    """Return the Markdown `text` as HTML, and its table of contents: titles by the ids of their headings.

    A text that is too long to be converted in a short time stays as it is, without contents.
    """
    if len(text) > MAX_CARD:
        return Markup('<pre tabindex="0">{}</pre>').format(text), {}
    return _add_contents(_make_scrollable(markdown(FRONT_MATTER.sub('', text))))


def _add_contents(page: Markup) -> tuple[Markup, dict[str, str]]:
    """Give each heading of `page` an id, and return the page with the titles by these ids."""
    contents: dict[str, str] = {}

    def add_id(heading: re.Match[str]) -> str:
        name = f'section-{len(contents) + 1}'
        contents[name] = Markup(heading[1]).striptags()
        return f'<h2 id="{name}">{heading[1]}</h2>'

    return Markup(HEADING.sub(add_id, str(page))), contents


@pages.get('/docs')
def docs(request: Request) -> str:
    """Return the documentation of the REST API, made from its OpenAPI document."""
    settings = request.app.state.settings
    return render_template(
        'api.html',
        **_page_values(request),
        api=request.app.openapi(),
        markdown=markdown,
        limits=settings.limits,
        token=settings.token is not None,
        address=str(request.base_url).rstrip('/'),
    )


@pages.get('/examples/{number}.png', dependencies=[Depends(check_token)])
async def example(request: Request, number: int) -> Response:
    """Return a synthetic image to try: one of the reference images of the bundle."""
    images = get_service(request).bundle.selftest.images
    if not 0 <= number < len(images):
        raise APIError(404, 'E_NOT_FOUND', f'example {number} does not exist: there are {len(images)}.')
    buffer = BytesIO()
    Image.fromarray(images[number]).save(buffer, 'PNG')
    return Response(buffer.getvalue(), media_type='image/png')


@pages.get('/favicon.ico')
async def favicon() -> RedirectResponse:
    """Redirect browsers that look for an icon at the usual address."""
    return RedirectResponse('static/icon.svg')


def _page_values(request: Request) -> dict[str, Any]:
    """Return the values that every page needs; `model` is None while the model is loading."""
    service = request.app.state.service
    model = service.model_facts() if service else None
    return {'version': __version__, 'notice': NOTICE, 'model': model}


def _thumbnail(image: np.ndarray) -> str:
    """Return `image`, grey uint8 (h, w), as a small JPEG in a data URI, which needs no access token to load."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    picture.save(buffer, 'JPEG', quality=80)
    return data_uri(buffer.getvalue(), 'image/jpeg')


def _make_scrollable(page: Markup) -> Markup:
    """Make wide tables and code scroll on narrow screens, also by keyboard.

    Table cells are aligned by a class, because the content security policy forbids inline styles.
    """
    # As a plain text, because `Markup` would escape what is inserted.
    html = re.sub(r' style="text-align:(\w+)"', r' class="\1"', str(page))
    html = html.replace('<table>', '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
    html = html.replace('</table>', '</table></div>')
    return Markup(html.replace('<pre>', '<pre tabindex="0">'))

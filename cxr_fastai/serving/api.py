"""What programs ask, and how refusals are told: REST in front of a `Service`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cxr_fastai import __version__
from cxr_fastai.images.decode import sniff
from cxr_fastai.serving.middleware import CONTENT_TYPE, PREDICT, answer, internal
from cxr_fastai.serving.service import Busy, Service
from cxr_fastai.serving.uploads import FIELD, Refusal, read_images


class Picture(BaseModel):
    """What a file was, and the image as the reader sees it."""

    format: str = Field(description='JPEG, PNG, TIFF or DICOM, by content', examples=['JPEG'])
    mode: str = Field(description='how its pixels are stored', examples=['L'])
    width: int = Field(description='pixels, as stored')
    height: int = Field(description='pixels, as stored')
    image: str | None = Field(description='the image as PNG in base64, its longer side at most 640 px')
    overlay: str | None = Field(
        description='the image under its Grad-CAM map, as PNG in base64: what influenced the '
        'score; not a lesion outline'
    )
    note: str | None = Field(description='why a picture is missing')


class Row(BaseModel):
    """One image: the prediction row of every table that this program writes."""

    path: str = Field(description='image-1 and so on, in the order sent; file names are not repeated')
    status: Literal['ok', 'rejected', 'error']
    p_pneumonia: float | None = Field(ge=0, le=1)
    prediction: Literal['NORMAL', 'PNEUMONIA'] | None
    threshold: float = Field(description='from what probability on an image is called PNEUMONIA')
    code: str | None = Field(description='a stable name of what is wrong', examples=['E_OUT_OF_DISTRIBUTION'])
    message: str | None = Field(description='what is wrong, or what reading the image took, such as its window')
    explanation: Picture | None = Field(None, description='only with explain=true')


class Answer(BaseModel):
    """Rows in the order of the images."""

    images: list[Row]


class Problem(BaseModel):
    """Why there is no answer."""

    code: str = Field(examples=['E_BODY'])
    message: str


class State(BaseModel):
    """Whether the service lives, or is ready."""

    status: Literal['ok', 'starting']


class Model(BaseModel):
    """What predicts."""

    arch: str
    size: int = Field(description='pixels a side that the network sees')
    threshold: float
    threshold_rule: str
    sha256: str = Field(description="of the bundle's manifest, which has the hash of every file")
    gate: bool = Field(description='whether pictures that are no chest image are turned away')
    version: str = Field(description='of the program')
    notice: str


NOTICE = 'Research software, not a medical device.'
WORDS = {
    400: 'not a request, or not a multipart form',
    401: 'no token',
    413: 'too large, or too many images',
    415: 'not multipart/form-data',
    422: 'no images, or an option that does not exist',
    429: 'too many of your requests wait',
    503: 'busy or not ready: try again after Retry-After seconds',
}


def problems(*statuses: int) -> dict[int, dict]:
    """The OpenAPI entries of these refusals."""
    return {status: {'model': Problem, 'description': WORDS[status]} for status in statuses}


FORM = {
    'required': True,
    'content': {
        'multipart/form-data': {
            'schema': {
                'type': 'object',
                'required': [FIELD],
                'properties': {
                    FIELD: {'type': 'array', 'minItems': 1, 'items': {'type': 'string', 'format': 'binary'}}
                },
            }
        }
    },
}
"""What a request for predictions holds. `uploads` reads it: FastAPI would keep images on the disk."""
rest = APIRouter()


def service_of(request: Request) -> Service:
    """The service behind the app. Raises `Refusal` 503 while it starts."""
    service = request.app.state.service
    if service is None:
        raise Refusal(503, 'E_STARTING', 'the model is being opened: try again.', retry_after='1')
    return service


@rest.post(
    PREDICT,
    response_model_exclude_unset=True,
    openapi_extra={'requestBody': FORM},
    responses=problems(400, 401, 413, 415, 422, 429, 503),
    tags=['predict'],
)
async def predict(request: Request, explain: bool = False) -> Answer:
    """The probability of pneumonia in each image: a form with one or more files in the field `images` (JPEG, PNG, TIFF or
    DICOM). An image that cannot be used gets a row that says why. `explain` adds what the file was, the image, and the
    image under a map of what influenced its score."""
    state, counts = request.scope['state'], request.app.state.counts
    service, settings = service_of(request), request.app.state.settings
    images = await read_images(request, settings.limits)
    state.update(bytes=sum(map(len, images)), images=len(images), formats=','.join(sorted({*map(sniff, images)})))
    began = time.monotonic()
    with service.admitted():
        rows = await _unless_gone(request, service.predict(images, explain), settings.seconds)
    counts.seconds.observe(time.monotonic() - began)
    for row in rows:
        counts.images.labels(row['status'], row['code'] or '').inc()
    return Answer(images=rows)


@rest.get('/health', tags=['operate'])
async def health() -> State:
    """Whether the process answers."""
    return State(status='ok')


@rest.get('/ready', responses=problems(503), tags=['operate'])
async def ready(request: Request) -> State:
    """Whether the model is open, and has predicted the canary images as when it was exported."""
    service_of(request)
    return State(status='ok')


@rest.get('/metrics', responses=problems(401), tags=['operate'], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and timings for Prometheus."""
    return Response(request.app.state.counts.text(), media_type=CONTENT_TYPE)


@rest.get('/v1/model', responses=problems(401, 429, 503), tags=['predict'])
async def model(request: Request) -> Model:
    """What predicts, and with which threshold."""
    return Model(**service_of(request).facts(), version=__version__, notice=NOTICE)


async def _unless_gone(request: Request, work: Any, seconds: float) -> Any:
    """What `work` gives, unless the client leaves or it takes longer than `seconds`: it is given up then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
    if working.done() and not working.cancelled():
        return working.result()
    if leaving.done() and not leaving.cancelled():
        raise Refusal(400, 'E_CUT', 'the client left.')
    raise Refusal(503, 'E_TIMEOUT', f'it took over {seconds:g} s: send fewer images at a time.', retry_after='5')


async def _gone(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
    return answer(refusal)


async def _busy(request: Request, error: Busy) -> JSONResponse:
    return answer(Refusal(503, 'E_BUSY', str(error), retry_after='1'))


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    wrong = '; '.join(f'{".".join(map(str, one["loc"][1:]))}: {one["msg"]}' for one in error.errors())
    return answer(Refusal(422, 'E_OPTION', wrong))


async def _other(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: 'E_NOT_FOUND', 405: 'E_METHOD'}.get(error.status_code, 'E_HTTP')
    return answer(Refusal(error.status_code, code, str(error.detail), **(error.headers or {})))


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    return answer(internal(request.scope['state']['id']))


TOLD = {Refusal: _refused, Busy: _busy, RequestValidationError: _invalid, HTTPException: _other, Exception: _unforeseen}
"""What is said of each error."""

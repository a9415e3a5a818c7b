"""The REST API: routes, response schemas, the access token, and the response to each kind of error."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cxr_fastai import __version__
from cxr_fastai.images.decode import sniff
from cxr_fastai.serving.middleware import PREDICT, error_response, internal_error
from cxr_fastai.serving.reports import MULTIPART, Reports, encode_reports, wants_dicom
from cxr_fastai.serving.service import Busy, Service
from cxr_fastai.serving.uploads import FIELD, APIError, read_images

NOTICE = 'Research software, not a medical device.'
MAX_OPTION = 50
"""Largest number of characters of an unknown option that a response repeats."""


class ExplainedImage(BaseModel):
    """Facts about the file of an image, and the image without and with its Grad-CAM map."""

    format: str = Field(description='file format, detected from the content', examples=['JPEG'])
    mode: str = Field(description='pixel mode as stored', examples=['L'])
    width: int = Field(description='width in pixels, as stored')
    height: int = Field(description='height in pixels, as stored')
    image: str | None = Field(description='the image as PNG in base64; its longer side is at most 640 px')
    overlay: str | None = Field(
        description='the image under its Grad-CAM map, as PNG in base64. The map shows what influenced the score; '
        'it is not a lesion outline'
    )
    note: str | None = Field(description='why `image` or `overlay` is missing')


class PredictionRow(BaseModel):
    """The prediction for one image, with the columns of the table that `cxr-fastai predict` writes."""

    path: str = Field(description='`image-1`, `image-2`, ... in the order of the request, instead of the file name')
    status: Literal['ok', 'rejected', 'error'] = Field(
        description='`rejected`: intact, but not a usable chest X-ray image; `error`: cannot be read'
    )
    p_pneumonia: float | None = Field(ge=0, le=1, description='probability of pneumonia')
    prediction: Literal['NORMAL', 'PNEUMONIA'] | None = Field(description='class; null without a probability')
    threshold: float = Field(description='an image is classified as PNEUMONIA at this probability or above')
    code: str | None = Field(description='stable name of the problem', examples=['E_OUT_OF_DISTRIBUTION'])
    message: str | None = Field(description='the problem, or a note on how the image was read, such as its window')
    explanation: ExplainedImage | None = Field(None, description='only with `explain=true`')


class PredictionRows(BaseModel):
    """One row per image, in the order of the images in the request."""

    images: list[PredictionRow] = Field(description='rows')


class ErrorBody(BaseModel):
    """Why a request failed."""

    code: str = Field(description='stable name of the problem', examples=['E_BODY'])
    message: str = Field(description='the problem and how to solve it')


class Status(BaseModel):
    """State of the service."""

    status: Literal['ok'] = Field(description='always `ok`; otherwise the request fails')


class ModelFacts(BaseModel):
    """The served model."""

    arch: str = Field(description='architecture of the network')
    size: int = Field(description='side of the square input of the network, in pixels')
    threshold: float = Field(description='an image is classified as PNEUMONIA at this probability or above')
    threshold_rule: str = Field(description='rule by which the threshold was chosen')
    tta: bool = Field(description='True if each probability is the mean over the image and its mirror image')
    sha256: str = Field(description='SHA-256 of the manifest of the bundle, which has the hash of every file')
    gate: bool = Field(description='True if an input gate (out-of-distribution check) rejects unusual images')
    version: str = Field(description='version of cxr_fastai')
    notice: str = Field(description='intended use')


ERROR_DESCRIPTIONS = {
    400: 'invalid request, or not a multipart form',
    401: 'missing or wrong access token',
    406: 'a DICOM answer, which this service cannot write',
    408: 'the request was not complete in time',
    413: 'request too large, or too many images',
    415: 'not multipart/form-data, or compressed',
    422: 'no images, images in another field than `images`, an unknown or invalid option, or no image for DICOM',
    503: 'busy, starting, or failed; try again after `Retry-After` seconds',
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the error responses with these `statuses`."""
    return {status: {'model': ErrorBody, 'description': ERROR_DESCRIPTIONS[status]} for status in statuses}


DICOM_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        'description': 'The predictions, as JSON or as DICOM files',
        'content': {
            MULTIPART: {
                'schema': {
                    'type': 'string',
                    'format': 'binary',
                    'description': 'Structured Reports and Secondary Captures, each a part of type `application/dicom`',
                }
            }
        },
    }
}
# FastAPI would write uploads to the disk, so `uploads` parses the form, and the schema is written by hand.
FORM_SCHEMA = {
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
bearer = HTTPBearer(auto_error=False, description='The access token that the operator has set with `--token-file`.')


async def check_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    """Raise `APIError` 401 if the service has an access token and the request does not."""
    token = request.app.state.settings.token
    if token is None:
        return
    sent = credentials.credentials if credentials else ''
    if not secrets.compare_digest(sent.encode(), token.encode()):
        message = 'the access token is missing or wrong: send the header `Authorization: Bearer TOKEN`.'
        raise APIError(401, 'E_TOKEN', message, {'www-authenticate': 'Bearer'})


async def check_options(request: Request) -> None:
    """Raise `APIError` 422 for a query option that the route does not have, or that is given twice."""
    known = [field.alias for field in request.scope['route'].dependant.query_params]
    names = [name for name, _ in request.query_params.multi_items()]
    choice = f'the options of this address are: {", ".join(known)}.' if known else 'this address has no options.'
    for name in names:
        shown = repr(name[:MAX_OPTION])
        if name not in known:
            raise APIError(422, 'E_OPTION', f'{shown}: unknown option; {choice}')
        if names.count(name) > 1:
            raise APIError(422, 'E_OPTION', f'{shown}: given {names.count(name)} times: send it once.')


public_routes = APIRouter(tags=['operate'])
protected_routes = APIRouter()
"""Routes that need the access token, if there is one."""


def get_service(request: Request) -> Service:
    """Return the service. Raises `APIError` 503 while it loads the model."""
    service: Service | None = request.app.state.service
    if service is None:
        raise APIError(503, 'E_STARTING', 'the model is being loaded: try again in a moment.', {'retry-after': '1'})
    return service


@protected_routes.post(
    PREDICT,
    dependencies=[Depends(check_options)],
    response_model=PredictionRows,
    response_model_exclude_unset=True,
    openapi_extra={'requestBody': FORM_SCHEMA},
    responses=DICOM_RESPONSE | error_responses(400, 401, 406, 408, 413, 415, 422, 503),
    tags=['predict'],
)
async def predict(request: Request, explain: bool = False) -> PredictionRows | Response:
    """Predict the probability of pneumonia for each image.

    The body is a form with one or more files in the field `images`: JPEG, PNG, TIFF or DICOM. An image that cannot be
    used gets a row with the reason, and the other images are still predicted. With `explain=true`, each row also has
    facts about the file, the image, and a map of what influenced its score.

    With the header `Accept: multipart/related; type="application/dicom"`, the answer consists of DICOM files instead:
    for each DICOM image a Structured Report, and with `explain=true` a Secondary Capture of its map, in the study of
    the image. `Content-Location` is `image-1/report` or `image-1/map`. The header `Warning` names images without one.
    """
    as_dicom = wants_dicom(request.headers.get('accept', ''))
    service = get_service(request)
    settings = request.app.state.settings
    metrics = request.app.state.metrics
    images = await read_images(request, settings.limits)
    formats = sorted({sniff(image) for image in images})
    request.scope['state'].update(bytes=sum(map(len, images)), images=len(images), formats=','.join(formats))
    start = time.monotonic()
    with service.admit_request():
        answer = _answer(service, images, explain, as_dicom)
        rows, reports = await _finish_in_time(request, answer, settings.answer_seconds)
    metrics.seconds.observe(time.monotonic() - start)
    for row in rows:
        metrics.images.labels(row['status'], row['code'] or '').inc()
    if as_dicom:
        body, headers = encode_reports(reports)
        return Response(body, headers=headers)
    return PredictionRows(images=[PredictionRow(**row) for row in rows])


async def _answer(
    service: Service, images: list[bytes], explain: bool, as_dicom: bool
) -> tuple[list[dict[str, Any]], list[Reports]]:
    rows = await service.predict(images, explain)
    reports = await service.report(images, rows) if as_dicom else []
    return rows, reports


async def _finish_in_time(request: Request, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Return the result of `work`, which is cancelled after `seconds` or when the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
    if working.done() and not working.cancelled():
        return working.result()
    if leaving.done() and not leaving.cancelled():
        raise APIError(400, 'E_CUT', 'the client closed the connection.')
    message = f'no prediction within {seconds:g} s: send fewer images per request.'
    raise APIError(503, 'E_TIMEOUT', message, {'retry-after': '5'})


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


@protected_routes.get(
    '/v1/model',
    dependencies=[Depends(check_options)],
    responses=error_responses(401, 422, 503),
    tags=['predict'],
)
async def model(request: Request) -> ModelFacts:
    """Describe the model and its threshold."""
    return ModelFacts(**get_service(request).model_facts(), version=__version__, notice=NOTICE)


TEXT_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {'content': {'text/plain': {'schema': {'type': 'string'}}}},
}


@protected_routes.get(
    '/metrics',
    responses=TEXT_RESPONSE | error_responses(401),
    tags=['operate'],
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """Return counters and timings for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@public_routes.head('/health', include_in_schema=False)
@public_routes.get('/health')
async def health() -> Status:
    """Return `ok` if the process runs."""
    return Status(status='ok')


@public_routes.head('/ready', include_in_schema=False)
@public_routes.get('/ready', responses=error_responses(503))
async def ready(request: Request) -> Status:
    """Return `ok` if the model is loaded and has passed its self-test on reference images."""
    get_service(request)
    return Status(status='ok')


async def _handle_api_error(request: Request, error: APIError) -> JSONResponse:
    return error_response(error)


async def _handle_busy(request: Request, error: Busy) -> JSONResponse:
    return error_response(APIError(503, 'E_BUSY', str(error), {'retry-after': '1'}))


async def _handle_invalid_option(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = []
    for problem in error.errors():
        name = '.'.join(str(part) for part in problem['loc'][1:])
        problems.append(f'{name}: {problem["msg"]}')
    return error_response(APIError(422, 'E_OPTION', '; '.join(problems)))


async def _handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
    codes = {404: 'E_NOT_FOUND', 405: 'E_METHOD'}
    code = codes.get(error.status_code, 'E_HTTP')
    return error_response(APIError(error.status_code, code, str(error.detail), dict(error.headers or {})))


async def _handle_unexpected(request: Request, error: Exception) -> JSONResponse:
    return error_response(internal_error(request.scope['state']['id']))


ERROR_HANDLERS: dict[type[Exception], Any] = {
    APIError: _handle_api_error,
    Busy: _handle_busy,
    RequestValidationError: _handle_invalid_option,
    HTTPException: _handle_http_error,
    Exception: _handle_unexpected,
}
"""The handler that turns each exception of a route into a response."""

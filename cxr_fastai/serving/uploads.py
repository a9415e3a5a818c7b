"""The body of a request becomes images in memory, or a `Refusal` that says which limit it breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from cxr_fastai.serving.service import Limits

FIELD = 'images'
"""The name of the form's field."""
FIELDS = 16
"""Fields beside the images that are passed over; a form with more is refused."""


class Refusal(Exception):
    """A request that gets no answer: the HTTP `status`, a stable `code`, a message, and what to say in headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace('_', '-'): value for name, value in headers.items()}


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """The images of a multipart form's field `images`. Raises `Refusal` 400, 413, 415 or 422."""
    check_headers(request)
    async with _form(request, await _read(request, limits.body), limits.images) as form:
        images = form.getlist(FIELD)
        if not images or not all(isinstance(image, UploadFile) for image in images):
            raise Refusal(422, 'E_NO_IMAGES', f'no image in the field {FIELD!r}: send each image as a file in it.')
        return [await image.read() for image in images]


async def _read(request: Request, most: int) -> bytes:
    """The body. Raises `Refusal` 413 before the rest of one that is too large is taken."""
    over = Refusal(413, 'E_BODY', f'the request is over {most:,} bytes: send fewer images at a time.')
    told, parts, size = request.headers.get('content-length', ''), [], 0
    if told.isdecimal() and int(told) > most:
        raise over
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise over
            parts.append(part)
    except ClientDisconnect:
        raise Refusal(400, 'E_CUT', 'the request ended early.') from None
    return b''.join(parts)


@asynccontextmanager
async def _form(request: Request, body: bytes, most: int) -> AsyncIterator[FormData]:
    async def once() -> AsyncIterator[bytes]:
        yield body
        if body and not parser.ended:
            raise Refusal(422, 'E_CUT', 'the form ends in the middle of a part.')

    parser = _InMemory(request.headers, once(), max_files=most, max_fields=FIELDS)
    try:
        form = await parser.parse()
    except Refusal:
        raise
    except MultiPartException as error:
        many = error.message.startswith('Too many')
        raise Refusal(413 if many else 400, 'E_TOO_MANY' if many else 'E_FORM', error.message) from None
    except Exception as error:  # a parser's own errors, such as of a header that is no text
        raise Refusal(400, 'E_FORM', f'no multipart form ({type(error).__name__}).') from None
    try:
        yield form
    finally:
        await form.close()


class _InMemory(MultiPartParser):
    """Keeps every part in memory: it is there already, and is gone with the request."""

    spool_max_size = 2**40
    ended = False

    def on_end(self) -> None:
        self.ended = True


def check_headers(request: Request) -> None:
    """Raise `Refusal` for a body that is no plain multipart form."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'multipart/form-data':
        raise Refusal(415, 'E_MEDIA_TYPE', 'send a form as multipart/form-data.')
    if request.headers.get('content-encoding', 'identity').lower() != 'identity':
        raise Refusal(415, 'E_ENCODING', 'compressed requests are not read: images are compressed already.')
    if 'boundary=' not in request.headers['content-type'].lower():
        raise Refusal(400, 'E_FORM', 'the content type names no boundary.')

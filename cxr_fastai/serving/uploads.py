"""Reading of uploaded images: the multipart form of a request is parsed in memory, within limits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

FIELD = 'images'
"""The name of the form field that contains the images."""
MAX_OTHER_FIELDS = 16
"""Maximum number of form fields that are not files. They are ignored."""
IN_MEMORY = 2**40
"""Size in bytes from which Starlette would write a part to the disk; larger than any body."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request: `body` is its size in bytes, `images` the number of its files."""

    body: int = 20 * 2**20
    images: int = 64


class APIError(Exception):
    """An error response: the HTTP `status`, a stable `code` for programs, a message for people, and extra headers."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """Return the files in the form field `images`, in their order. Raises `APIError` 400, 413, 415 or 422."""
    check_headers(request)
    body = await _read_body(request, limits.body)
    async with _parsed_form(request, body, limits.images) as form:
        images = [image for image in form.getlist(FIELD) if isinstance(image, UploadFile)]
        if not images or len(images) < len(form.getlist(FIELD)):
            raise APIError(422, 'E_NO_IMAGES', f'no image in the field {FIELD!r}: send each image as a file in it.')
        return [await image.read() for image in images]


def check_headers(request: Request) -> None:
    """Raise `APIError` unless the headers announce an uncompressed multipart form."""
    content_type = request.headers.get('content-type', '')
    media_type = content_type.partition(';')[0].strip().lower()
    if media_type != 'multipart/form-data':
        raise APIError(415, 'E_MEDIA_TYPE', 'the body is not a form: send the images as multipart/form-data.')
    if request.headers.get('content-encoding', 'identity').lower() != 'identity':
        raise APIError(415, 'E_ENCODING', 'the body is compressed: send it without a content encoding.')
    if 'boundary=' not in content_type.lower():
        raise APIError(400, 'E_FORM', 'the content type has no boundary: multipart/form-data needs one.')


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body. Raises `APIError` 413 as soon as it is known to be too large, without reading the rest."""
    too_large = APIError(413, 'E_BODY', f'the request is over {max_bytes:,} bytes: send fewer images per request.')
    length = request.headers.get('content-length', '')
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    chunks = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise APIError(400, 'E_CUT', 'the client closed the connection before the request was complete.') from None
    return b''.join(chunks)


@asynccontextmanager
async def _parsed_form(request: Request, body: bytes, max_files: int) -> AsyncIterator[FormData]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        if body and not parser.is_complete:
            raise APIError(422, 'E_CUT', 'the form ends in the middle of a part: send all of it.')

    parser = _InMemoryParser(request.headers, stream(), max_files=max_files, max_fields=MAX_OTHER_FIELDS)
    try:
        form = await parser.parse()
    except APIError:
        raise
    except MultiPartException as error:
        if error.message.startswith('Too many'):
            raise APIError(413, 'E_TOO_MANY', error.message) from None
        raise APIError(400, 'E_FORM', error.message) from None
    except Exception as error:  # python-multipart has other exceptions, such as for a header that is not text
        raise APIError(400, 'E_FORM', f'the body is not a multipart form ({type(error).__name__}).') from None
    try:
        yield form
    finally:
        await form.close()


class _InMemoryParser(MultiPartParser):
    """A parser that keeps every part in memory, where the body already is, and knows if the form was complete."""

    spool_max_size = IN_MEMORY
    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True

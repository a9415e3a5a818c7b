"""Reading of uploaded images: the multipart form of a request is parsed in memory, within limits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

FIELD = 'images'
"""The name of the form field that contains the images."""
MAX_OTHER_FIELDS = 16
"""Maximum number of form fields that are not files. They are ignored."""
MAX_FIELD = 50
"""Largest number of characters of the name of an unknown field that a response repeats."""
MAX_OTHER_BYTES = 2**16
"""Maximum size of a form field that is not a file."""
BOUNDARY = re.compile(rb"[0-9a-zA-Z'()+_,\-./:=? ]{1,70}")
"""A boundary of multipart parts, as RFC 2046 defines it."""
CHUNK = 2**18
"""Number of bytes that are parsed before other requests have a turn."""
IN_MEMORY = 2**40
"""Size in bytes from which Starlette would write a part to the disk; larger than any body."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request: the size of its `body` in bytes, the number of its `images`, the time to parse its form.

    A form of 20 MB is parsed in less than 0.2 s.
    """

    body: int = 20 * 2**20
    images: int = 64
    parse_seconds: float = 5


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
    boundary = check_headers(request)
    body = await _read_body(request, limits.body)
    async with _parsed_form(boundary, body, limits) as form:
        _check_fields(form)
        images = [image for image in form.getlist(FIELD) if isinstance(image, UploadFile)]
        if not images or len(images) < len(form.getlist(FIELD)):
            raise APIError(422, 'E_NO_IMAGES', f'no image in the field {FIELD!r}: send each image as a file in it.')
        return [await image.read() for image in images]


def _check_fields(form: FormData) -> None:
    """Raise `APIError` 422 for a file in another field, which would otherwise get no row in the response."""
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name != FIELD:
            message = f'a file in the field {name[:MAX_FIELD]!r}: send each image in the field {FIELD!r}.'
            raise APIError(422, 'E_FIELD', message)


def check_headers(request: Request) -> bytes:
    """Return the boundary of the parts. Raises `APIError` unless the body is an uncompressed multipart form."""
    content_type = request.headers.get('content-type', '')
    media_type = content_type.partition(';')[0].strip().lower()
    if media_type != 'multipart/form-data':
        raise APIError(415, 'E_MEDIA_TYPE', 'the body is not a form: send the images as multipart/form-data.')
    if request.headers.get('content-encoding', 'identity').lower() != 'identity':
        raise APIError(415, 'E_ENCODING', 'the body is compressed: send it without a content encoding.')
    _, options = parse_options_header(content_type)
    boundary = options.get(b'boundary', b'')
    if not BOUNDARY.fullmatch(boundary):
        message = 'the content type has no valid boundary: multipart/form-data needs one of 1 to 70 characters.'
        raise APIError(400, 'E_FORM', message)
    return boundary


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
async def _parsed_form(boundary: bytes, body: bytes, limits: Limits) -> AsyncIterator[FormData]:
    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), CHUNK):
            yield body[start : start + CHUNK]
            await asyncio.sleep(0)  # other requests have a turn
        if body and not parser.is_complete:
            raise APIError(422, 'E_CUT', 'the form ends in the middle of a part: send all of it.')

    # Only the boundary is used: some of the character sets that a content type may name take quadratic time.
    headers = Headers({'content-type': f'multipart/form-data; boundary="{boundary.decode()}"'})
    parser = _InMemoryParser(
        headers, stream(), max_files=limits.images, max_fields=MAX_OTHER_FIELDS, max_part_size=MAX_OTHER_BYTES
    )
    try:
        async with asyncio.timeout(limits.parse_seconds):
            form = await parser.parse()
    except APIError:
        raise
    except TimeoutError:
        raise APIError(413, 'E_FORM', 'the form takes too long to parse: send fewer images per request.') from None
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

"""Multipart forms through the reader of uploads. The first line of an input is its content type, the rest its body."""

import asyncio
import logging
import random

from starlette.requests import Request

from cxr_fastai.serving.uploads import APIError, Limits, read_images

logging.getLogger('python_multipart').setLevel(logging.CRITICAL)  # it logs each error
DEADLINE = 5
LIMITS = Limits(body=2**20, images=8)
DOCUMENTED = (400, 413, 415, 422)
CONTENT_TYPE = b'multipart/form-data; boundary=b'
PIECES = (
    b'\r\n--b\r\n',
    b'\r\n--b--\r\n',
    b'\r\n\r\n',
    b'--b',
    b'; charset=punycode',
    b'; filename="f"',
    b"; filename*=utf-8''%e2%82%ac",
    b'Content-Disposition: form-data; name="images"',
    b'Content-Type: multipart/mixed; boundary=c\r\n',
    b'Content-Transfer-Encoding: base64\r\n',
    b'\r' * 500,
    b'\r\n--' * 200,
    b'"\\' * 300,
    b';' * 3000,
    b'\0',
)


def seeds() -> list[bytes]:
    """Return valid forms: images, a field, quoted and long names, and an epilogue."""
    image = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n\x89PNG\r\n\r\n'
    typed = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="\xc3\xa9;\\"x"\r\nContent-Type: image/png\r\n'
    )
    field = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nvalue\r\n'
    end = b'--b--\r\n'
    bodies = (image + end, field + image * 3 + end, typed + b'\r\n\xff\xd8\r\n' + end, image + end + b'epilogue', end)
    quoted = CONTENT_TYPE.replace(b'=b', b'="b"') + b'; charset=utf-8\n' + image + end
    return [*(CONTENT_TYPE + b'\n' + body for body in bodies), quoted]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Insert some pieces of the syntax, or move a part to another place."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(data))
        if draw.random() < 0.7:
            piece = draw.choice(PIECES)
        else:
            begin = draw.randint(0, len(data))
            piece = data[begin : begin + draw.randint(1, 200)] * draw.choice((1, 2, 50))
        data = data[:place] + piece + data[place:]
    return data


def check(data: bytes) -> None:
    """Read the images of a request; an error response is expected."""
    content_type, _, body = data.partition(b'\n')
    request = Request({'type': 'http', 'method': 'POST', 'path': '/', 'headers': [(b'content-type', content_type)]})
    try:
        images = asyncio.run(read_images(_with_body(request, body), LIMITS))
    except APIError as error:
        assert error.status in DOCUMENTED and '\n' not in error.message
        return
    assert 1 <= len(images) <= LIMITS.images
    assert sum(map(len, images)) <= len(body)


def _with_body(request: Request, body: bytes) -> Request:
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def receive() -> dict:
        return messages.pop()

    return Request(request.scope, receive)

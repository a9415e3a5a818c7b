"""DICOM answers of the service: which requests ask for them, their files, and the multipart body (extra `dicom`)."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from python_multipart.multipart import parse_options_header

from cxr_fastai.core.environment import is_installed
from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.dicom import is_dicom
from cxr_fastai.publishing.dicom_source import NOT_DICOM
from cxr_fastai.serving.uploads import APIError

if TYPE_CHECKING:
    from cxr_fastai.publishing.dicom_reports import Algorithm

MULTIPART = 'multipart/related'
DICOM = 'application/dicom'


@dataclass(frozen=True)
class Part:
    """A DICOM file in an answer. `location` tells what it is, such as `image-1/report` or `image-1/map`."""

    location: str
    content: bytes


@dataclass(frozen=True)
class Reports:
    """The DICOM files of one image, and the `code` that says why one is missing."""

    path: str
    parts: tuple[Part, ...] = ()
    code: str = ''


def wants_dicom(accept: str) -> bool:
    """Return True if the header Accept of a request names `multipart/related` with the type `application/dicom`.

    Raises `APIError` 406 if the answer cannot be given, because highdicom is not installed.
    """
    for choice in accept.split(','):
        media_type, options = parse_options_header(choice.strip())
        is_multipart = media_type == MULTIPART.encode() and options.get(b'type', DICOM.encode()) == DICOM.encode()
        if is_multipart and options.get(b'q') not in (b'0', b'0.0', b'0.00', b'0.000'):
            if not is_installed('highdicom'):
                message = 'this service cannot write DICOM: its operator has not installed cxr_fastai[dicom].'
                raise APIError(406, 'E_DICOM', message)
            return True
    return False


def make_reports(data: bytes, row: dict[str, Any], algorithm: Algorithm) -> Reports:
    """Return the Structured Report of the image file `data` with the prediction `row`.

    If the row has an explanation with an overlay, that is returned as Secondary Capture too. An error of one of them is
    the code of the result.
    """
    from cxr_fastai.publishing.dicom_reports import encode_dicom, make_report
    from cxr_fastai.publishing.dicom_source import read_source

    path = row['path']
    if not is_dicom(data):
        return Reports(path, code=NOT_DICOM)
    parts = []
    code = ''
    try:
        source = read_source(data)
        parts.append(Part(f'{path}/report', encode_dicom(make_report(source, row, algorithm))))
        overlay = (row.get('explanation') or {}).get('overlay')
        if overlay:  # only then, because it loads matplotlib, which a service without maps does not have
            from cxr_fastai.publishing.dicom_captures import make_capture

            capture = make_capture(source, _decode_png(overlay), row, algorithm)
            parts.append(Part(f'{path}/map', encode_dicom(capture)))
    except ImageError as error:
        code = error.code
    return Reports(path, tuple(parts), code)


def _decode_png(text: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(text))))


def encode_reports(reports: Sequence[Reports]) -> tuple[bytes, dict[str, str]]:
    """Return the body of a `multipart/related` answer and its headers.

    The header Warning names each image of which a file is missing, with its code. Raises `APIError` 422 if no image has
    one.
    """
    missing = [f'{image.path}: {image.code}' for image in reports if image.code]
    if not any(image.parts for image in reports):
        message = f'no image gets a DICOM report ({", ".join(missing)}): send DICOM files, or ask for JSON.'
        raise APIError(422, NOT_DICOM, message)
    boundary = secrets.token_hex(16)
    chunks = []
    for part in (part for image in reports for part in image.parts):
        head = f'--{boundary}\r\nContent-Type: {DICOM}\r\nContent-Location: {part.location}\r\n\r\n'
        chunks += [head.encode(), part.content, b'\r\n']
    body = b''.join([*chunks, f'--{boundary}--\r\n'.encode()])
    headers = {'content-type': f'{MULTIPART}; type="{DICOM}"; boundary={boundary}'}
    if missing:
        headers['warning'] = ', '.join(f'299 - "{text}"' for text in missing)
    return body, headers

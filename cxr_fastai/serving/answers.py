"""What the service answers, field by field: the types that its OpenAPI document shows."""
from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Picture(BaseModel):
    """What a file was, and the film as the reader sees it."""
    format: str = Field(description='JPEG, PNG, TIFF or DICOM, by content', examples=['JPEG'])
    mode: str = Field(description='how its pixels are stored', examples=['L'])
    width: int = Field(description='pixels, as stored')
    height: int = Field(description='pixels, as stored')
    film: str | None = Field(description='the film as PNG in base64, its longer side at most 640 px')
    overlay: str | None = Field(description='the film under its Grad-CAM map, as PNG in base64: what influenced the '
                                            'score; not a lesion outline')
    note: str | None = Field(description='why a picture is missing')


class Row(BaseModel):
    """One film: the prediction row of every table that this program writes."""
    path: str = Field(description='film-1 and so on, in the order sent; file names are not repeated')
    status: Literal['ok', 'rejected', 'error']
    p_pneumonia: float | None = Field(ge=0, le=1)
    prediction: Literal['NORMAL', 'PNEUMONIA'] | None
    threshold: float = Field(description='from what probability on a film is called PNEUMONIA')
    code: str | None = Field(description='a stable name of what is wrong', examples=['E_OUT_OF_DISTRIBUTION'])
    message: str | None = Field(description='what is wrong, or what reading the film took, such as its window')
    image: Picture | None = Field(None, description='only with explain=true')


class Answer(BaseModel):
    """Rows in the order of the films."""
    films: list[Row]


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
    gate: bool = Field(description='whether pictures that are no chest film are turned away')
    version: str = Field(description='of the program')
    notice: str


NOTICE = 'Research software, not a medical device.'
WORDS = {400: 'not a request, or not a multipart form', 401: 'no token', 413: 'too large, or too many films',
         415: 'not multipart/form-data', 422: 'no films, or an option that does not exist',
         429: 'too many of your requests wait', 503: 'busy or not ready: try again after Retry-After seconds'}


def problems(*statuses: int) -> dict[int, dict]:
    """The OpenAPI entries of these refusals."""
    return {status: {'model': Problem, 'description': WORDS[status]} for status in statuses}

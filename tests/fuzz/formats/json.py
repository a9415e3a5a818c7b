"""JSON text through the strict reader, which every foreign JSON file passes."""

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.foreign import parse_json

DEADLINE = 5


def seeds() -> list[bytes]:
    """Return valid JSON texts."""
    return [b'{"a": [1, 2.5e3, null, true, "x\\u0041"], "b": {"c": {}}}', b'[]', b'"text"', b'-0.1', b'[[[[1]]]]']


def check(data: bytes) -> None:
    """Parse `data`; an error of one line is expected."""
    try:
        parse_json(data, 'file.json')
    except CXRError as error:
        assert '\n' not in str(error)

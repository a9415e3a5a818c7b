"""safetensors files: writing arrays, and reading files of others, whose header is checked before the library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.foreign import FIX, parse_json
from cxr_fastai.core.schemas import Choice, Integer, ListOf, Rule, Table, Text, check_object

MAX_HEADER = 2**22
"""Largest header of a safetensors file, in bytes. The header of a ResNet50 has about 2**15."""
MAX_TENSORS = 2**14
"""Largest number of tensors in a file."""
MAX_AXES = 8
"""Largest number of axes of a tensor."""
MAX_BYTES = 2**31
"""Largest model file that is read, in bytes."""
TYPES = {
    'BOOL': ('bool', 1),
    'U8': ('uint8', 1),
    'I8': ('int8', 1),
    'I16': ('int16', 2),
    'U16': ('uint16', 2),
    'F16': ('float16', 2),
    'BF16': ('bfloat16', 2),
    'I32': ('int32', 4),
    'U32': ('uint32', 4),
    'F32': ('float32', 4),
    'I64': ('int64', 8),
    'U64': ('uint64', 8),
    'F64': ('float64', 8),
}
"""Type in a safetensors file -> its name in torch and NumPy, and the bytes of an element."""
TENSOR: dict[str, Rule] = {
    'dtype': Choice(tuple(TYPES)),
    'shape': ListOf(Integer(0, MAX_BYTES), MAX_AXES),
    'data_offsets': ListOf(Integer(0, MAX_BYTES), 2),
}
METADATA = Table(Text(10_000), max_length=100)
"""The texts that a header may contain in addition to the tensors."""


class TensorFacts(NamedTuple):
    """The type of a tensor, such as `float32`, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def tensor_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as the bytes of a safetensors file."""
    from safetensors.numpy import save

    # For a view, `save` would write the memory behind it.
    return save({name: np.asarray(array, order='C') for name, array in tensors.items()})


def load_tensors(data: bytes, path: StrPath) -> dict[str, np.ndarray]:
    """Return the arrays in the bytes `data` of the safetensors file `path`. Raises `CXRError` if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    read_header(data, path)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # also for types that NumPy does not have
        raise CXRError(f'{path}: damaged ({first_line(error)}). {FIX}') from None


def read_header(data: bytes, path: StrPath) -> dict[str, TensorFacts]:
    """Return the facts about each tensor in the bytes `data` of the safetensors file `path`.

    Raises `CXRError` unless the header is a strict JSON object, every tensor has a known type and as many bytes as its
    shape needs, and the tensors fill the rest of the file without a gap or an overlap.
    """
    length = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise CXRError(f'{path}: not a safetensors file (a header of {length:,} bytes in a file of {len(data):,}).')
    header = parse_json(data[8 : 8 + length], path)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CXRError(f'{path}: damaged (its header is not an object of at most {MAX_TENSORS:,} tensors). {FIX}')
    if not METADATA.accepts(header.pop('__metadata__', {})):
        raise CXRError(f'{path}: damaged (its metadata are not texts). {FIX}')
    entries = {name: check_object(entry, TENSOR, f'{path}: the tensor {name!r:.80}') for name, entry in header.items()}
    _check_offsets(entries, len(data) - 8 - length, path)
    return {name: TensorFacts(TYPES[entry['dtype']][0], tuple(entry['shape'])) for name, entry in entries.items()}


def _check_offsets(entries: dict[str, dict[str, Any]], size: int, path: StrPath) -> None:
    """Raise `CXRError` unless the tensors fill exactly `size` bytes, one after the other."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]['data_offsets']):
        _, item_bytes = TYPES[entry['dtype']]
        end = position + item_bytes * math.prod(entry['shape'])
        if entry['data_offsets'] != [position, end]:
            raise CXRError(
                f'{path}: damaged (the tensor {name!r:.80} is at {entry["data_offsets"]} and not at '
                f'{[position, end]}). {FIX}'
            )
        position = end
    if position != size:
        raise CXRError(f'{path}: damaged (its tensors have {position:,} bytes, but the file has {size:,}). {FIX}')

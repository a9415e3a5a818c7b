"""safetensors files: what is written is read again, and a header must describe the file exactly."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.tensors import TensorFacts, load_tensors, read_header, tensor_bytes

PATH = Path('w.safetensors')
ARRAYS = {
    'a scalar': np.array(3),
    'no element': np.zeros((0, 4), np.float32),
    'a view': np.arange(12, dtype=np.float32).reshape(3, 4).T[:, ::2],
    'bytes': np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
}


def file_of(header: object, size: int = 8) -> bytes:
    """A safetensors file with `header` and `size` bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + bytes(size)


def tensor(dtype: object = 'F32', shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


def test_arrays_keep_their_shape_type_and_values():
    loaded = load_tensors(tensor_bytes(ARRAYS), PATH)
    for name, array in ARRAYS.items():
        assert loaded[name].shape == array.shape and loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)


def test_the_header_says_what_the_tensors_are():
    facts = read_header(tensor_bytes(ARRAYS), PATH)
    assert facts['a view'] == TensorFacts('float32', (4, 2))
    assert facts['a scalar'] == TensorFacts('int64', ())


def test_texts_about_a_file_are_allowed():
    data = file_of({'__metadata__': {'format': 'pt'}, 'w': tensor()})
    assert list(load_tensors(data, PATH)) == ['w']


@pytest.mark.parametrize(
    'header',
    [
        {'w': tensor(offsets=(0, 4))},
        {'w': tensor(offsets=(4, 8))},
        {'w': tensor(offsets=(8, 0))},
        {'w': tensor(offsets=(0, 8, 16))},
        {'w': tensor(offsets=(0, 2**64))},
        {'w': tensor(shape=(1,))},
        {'w': tensor(shape=(2**31, 2**31, 2**31, 2**31))},
        {'w': tensor(shape=(True, 2))},
        {'w': tensor(shape=(2.0,))},
        {'w': tensor(shape=(1,) * 9)},
        {'w': tensor(dtype='F4')},
        {'w': tensor(dtype='F8_E4M3')},
        {'w': tensor(dtype=None)},
        {'v': tensor(), 'w': tensor()},
        {'v': tensor(offsets=(0, 4), shape=(1,)), 'w': tensor(offsets=(2, 6), shape=(1,))},
        {'w': {'dtype': 'F32', 'shape': [2]}},
        {'w': []},
        {'__metadata__': {'a': 1}, 'w': tensor()},
        {},
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": 1}',
        b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        b'[' * 10**6,
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(header):
    with pytest.raises(CXRError, match=r'^w\.safetensors') as caught:
        read_header(file_of(header), PATH)
    assert '\n' not in str(caught.value)

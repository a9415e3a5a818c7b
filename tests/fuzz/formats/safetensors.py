"""safetensors files: the weights of a network, and the arrays of a bundle."""

import json
import random
import struct
from functools import cache
from pathlib import Path

import numpy as np

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.networks import load_network
from cxr_fastai.inference.tensors import load_tensors, tensor_bytes

DEADLINE = 10
PATH = Path('model.safetensors')
CONFIG = ModelConfig('baseline', 32, 0.5)
VALUES = (0, -1, 1, 2**31, 2**63 - 1, 2**64, True, 0.5, None, '0', [], [0], [0, 0], {}, 'F32', 'U8', 'BOOL', 'X')
"""What a field of a header is replaced by."""


@cache  # safetensors writes the tensors in a random order
def seeds() -> list[bytes]:
    """Return small files of several types and shapes."""
    rng = np.random.default_rng(0)
    weights = {'0.0.0.weight': rng.random((4, 3, 3, 3), np.float32), 'n': np.array(3), 'none': np.zeros((0, 5))}
    selftest = {'images': np.zeros((2, 8, 8), np.uint8), 'p': np.full(2, 0.5)}
    return [tensor_bytes(tensors) for tensors in ({}, selftest, weights)]


def check(data: bytes) -> None:
    """Read `data` as arrays and as weights; an error of one line is expected."""
    for read in (load_tensors, lambda data, path: load_network(CONFIG, data, path)):
        try:
            read(data, PATH)
        except CXRError as error:
            assert '\n' not in str(error)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change a field of the header, which stays valid JSON."""
    length = int.from_bytes(data[:8], 'little')
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return data
    tensors = [tensor for tensor in header.values() if tensor]
    if not tensors:
        return data
    tensor = draw.choice(tensors)
    field = draw.choice(sorted(tensor))
    value = draw.choice(VALUES)
    if isinstance(tensor[field], list) and tensor[field] and draw.random() < 0.7:
        tensor[field][draw.randrange(len(tensor[field]))] = value
    else:
        tensor[field] = value
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + length :]

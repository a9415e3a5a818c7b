"""Exported learners, read with `read_learner`. Each input is trusted before."""

import hashlib
import json
import os
import pickle
import random
import tempfile
import warnings
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.learner_files import read_learner
from cxr_fastai.inference.selftest import SelfTest
from cxr_fastai.models.architectures import add_arch

DEADLINE = 10
SIZE = 8
OPCODES = b'(.012NKMJXcR\x81}])\x85\x86\x87ue' + b'asbqrhjQtlIFVSBCG\x88\x89\x8a\x80\x8c\x94'
"""Instructions of pickles that a change inserts."""


def fuzzed_network() -> nn.Sequential:
    """Return a network of a few weights."""
    body = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.BatchNorm2d(2))
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)))


@cache
def folder() -> Path:
    """Return the folder in which the checked files are, one for the process."""
    return Path(tempfile.mkdtemp())


@cache
def seeds() -> list[bytes]:
    """Return a small learner, in the memory formats that occur."""
    learners = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = fuzzed_network().eval()
        selftest = SelfTest.create(TorchEngine(model), SIZE)
        config = vars(ModelConfig('fuzzed-network', SIZE, 0.5)) | {'schema': 2, 'selftest': selftest.as_dict()}
        learner = SimpleNamespace(config=config, model=model.to(memory_format=memory_format))
        learners.append(save(learner))
    return learners


def save(learner: Any) -> bytes:
    """Return `learner` as the bytes of a file."""
    buffer = BytesIO()
    torch.save(learner, buffer, pickle_module=pickle)
    return buffer.getvalue()


def check(data: bytes) -> None:
    """Read `data` as a learner; an error of one line is expected. The name of its network is registered."""
    add_arch('fuzzed-network', fuzzed_network)
    path, store = folder() / 'model.pkl', folder() / 'trust.json'
    path.write_bytes(data)
    store.write_text(json.dumps({hashlib.sha256(data).hexdigest(): {'since': '2026-01-01', 'why': 'test'}}))
    os.environ['CXR_TRUST'] = str(store)
    try:
        read_learner(path)
    except CXRError as error:
        assert '\n' not in str(error)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change the pickle inside the zip, which stays valid: its bytes, or its instructions."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as old:
            files = {name: old.read(name) for name in old.namelist()}
    except Exception:
        return data
    (name,) = [name for name in files if name.endswith('data.pkl')] or [next(iter(files))]
    content = bytearray(files[name])
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        match draw.randrange(4):
            case 0:
                content[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                content[place:place] = bytes(draw.choice(OPCODES) for _ in range(draw.randint(1, 8)))
            case 2:
                content[place : place + draw.randint(1, 16)] = b''
            case 3:
                start = draw.randrange(len(content) + 1)
                content[place:place] = content[start : start + draw.randint(1, 64)]
    files[name] = bytes(content)
    buffer = BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, 'w') as new:
        warnings.simplefilter('ignore')
        for file, inside in files.items():
            new.writestr(file, inside)
    return buffer.getvalue()

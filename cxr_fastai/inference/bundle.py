"""A bundle: a folder, or one zip of it, with all that prediction needs and nothing that runs code by being opened.

config.json         what the network is, sees, and how its probability becomes a decision
model.safetensors   its weights
model.onnx          the same, images in, probabilities out (where the extra onnx is installed)
model.int8.onnx     the same in 8 bits, where that was asked for and costs no accuracy
canary.safetensors  eight synthetic images, and what the network says of them
gate.safetensors    what tells chest images from other pictures
MODEL_CARD.md       what is known about it
manifest.json       SHA-256 and size of each of these files
learner.pkl         for fastai's own `load_learner`; never opened unless its hash is trusted
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.core.environment import process_count
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, check_header, load_network
from cxr_fastai.inference.selftest import Canary, Engine

SCHEMA = 1
CONFIG, MANIFEST, ONNX, INT8 = 'config.json', 'manifest.json', 'model.onnx', 'model.int8.onnx'
CANARY, GATE, CARD = 'canary.safetensors', 'gate.safetensors', 'MODEL_CARD.md'
FILES = (CONFIG, WEIGHTS, ONNX, INT8, CANARY, GATE, CARD, LEARNER)
"""What a manifest may name."""
MAX_BYTES, MAX_TEXT = 2**31, 2**20
"""Bytes of a file, and of JSON, above which it is refused."""
ENGINES = ('auto', 'onnx', 'int8', 'torch')
QUICK = 2
"""Canary images that are predicted whenever a bundle is opened: one of each class."""


@dataclass(frozen=True)
class Bundle:
    """The bundle in a folder or a zip `path`. Every file is checked against the manifest before it is used."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """The bundle `path`. Raises `UsageError` where there is none, `CXRError` for one that is damaged."""
        if not is_bundle(path):
            raise UsageError(f'{path}: no bundle: `cxr-fastai export RUN` makes one.')
        bundle = cls(path)
        if bundle.facts.get('schema') != SCHEMA:
            raise CXRError(
                f'{path}: a bundle of the schema {bundle.facts.get("schema")}; {SCHEMA} is meant here: '
                'export it again, or install the version of cxr-fastai that made it.'
            )
        return bundle

    @cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """File -> its `sha256` and `size`."""
        found = self._json(self._bytes(MANIFEST, MAX_TEXT), MANIFEST).get('files')
        if (
            not isinstance(found, dict)
            or not set(found) <= set(FILES)
            or not all(isinstance(facts, dict) and {'sha256', 'size'} <= set(facts) for facts in found.values())
        ):
            raise CXRError(f'{self.path / MANIFEST}: no manifest of a bundle.')
        return found

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of its manifest, which has that of every file."""
        return hashlib.sha256(self._bytes(MANIFEST, MAX_TEXT)).hexdigest()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that `config.json` says."""
        return self._json(self.read(CONFIG), CONFIG)

    @property
    def config(self) -> ModelConfig:
        """What prediction has to know."""
        return ModelConfig.from_dict(self.facts, self.path / CONFIG)

    @property
    def canary(self) -> Canary:
        """Its canary images."""
        return self.canary_of()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`. Raises `CXRError` where they are not those that the manifest tells of."""
        if name not in self:
            raise CXRError(f'{self.path}: the bundle has no {name}.')
        data = self._bytes(name, MAX_BYTES)
        if hashlib.sha256(data).hexdigest() != self.manifest[name]['sha256']:
            raise CXRError(
                f'{self.path / name}: not the bytes that its manifest tells of: it was damaged or changed. Get it anew.'
            )
        return data

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The arrays in the safetensors file `name`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data = self.read(name)
        check_header(data, self.path / name)
        try:
            return load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CXRError(f'{self.path / name}: damaged ({error}).') from None

    def engine(self, kind: str = 'auto') -> Engine:
        """What computes: `onnx`, `int8`, `torch`, or `auto`: ONNX Runtime where it is installed and the bundle has its
        file. Raises `ParityError` where it does not predict of the first canary images what it should."""
        if kind not in ENGINES:
            raise UsageError(f'--engine {kind}: choose {", ".join(ENGINES)}.')
        if kind == 'auto':
            kind = 'onnx' if ONNX in self and find_spec('onnxruntime') else 'torch'
        made = self._torch() if kind == 'torch' else self._onnx(INT8 if kind == 'int8' else ONNX)
        self.canary_of(kind).check(made, self.path, QUICK, self.config.threshold)
        return made

    def canary_of(self, kind: str = 'torch') -> Canary:
        """Its canary images, and what an engine of this kind says of them: in 8 bits something else."""
        found, size = self.tensors(CANARY), self.config.size
        p = 'p_int8' if kind == 'int8' and 'p_int8' in found else 'p'
        if {'images', p} - set(found):
            raise CXRError(f'{self.path / CANARY}: its canary images are damaged.')
        canary = Canary.checked(found['images'], found[p], self.path / CANARY)
        if (side := canary.images.shape[-1]) != size:
            raise CXRError(
                f'{self.path / CANARY}: canary images of {side} px, for a network of {size} px: the bundle is damaged.'
            )
        return canary

    def _onnx(self, name: str) -> Engine:
        from cxr_fastai.inference.engines import OnnxEngine

        if not find_spec('onnxruntime'):
            raise UsageError('--engine onnx needs pip install "cxr_fastai[onnx]".')
        here = int(os.environ.get('LOCAL_WORLD_SIZE', process_count()))  # processes of this machine
        threads = max((os.cpu_count() or 1) // here, 1) if here > 1 else None
        return OnnxEngine(self.read(name), self.path / name, threads)

    def _torch(self) -> Engine:
        from cxr_fastai.inference.engines import TorchEngine

        return TorchEngine(load_network(self.config.arch, self.read(WEIGHTS), self.path / WEIGHTS))

    def _bytes(self, name: str, most: int) -> bytes:
        try:
            if self.path.is_dir():
                if not (self.path / name).is_file():
                    raise OSError('no regular file')  # a pipe would wait for ever
                self._limit((self.path / name).stat().st_size, name, most)
                return (self.path / name).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                self._limit(archive.getinfo(name).file_size, name, most)
                return archive.read(name)
        except CXRError:
            raise
        except Exception as error:  # what a broken zip raises is up to its bytes
            raise CXRError(f'{self.path}: {name} cannot be read from the bundle ({error}).') from None

    def _limit(self, size: int, name: str, most: int) -> None:
        if size > most:
            raise CXRError(f'{self.path / name}: {size:,} bytes; at most {most:,} are read.')

    def _json(self, data: bytes, name: str) -> dict[str, Any]:
        try:
            found = json.loads(data) if len(data) <= MAX_TEXT else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CXRError(f'{self.path / name}: not a JSON object: the bundle is damaged.')
        return found


def manifest_text(files: dict[str, dict[str, Any]]) -> str:
    """The manifest of `files`, name -> `sha256` and `size`."""
    return json.dumps({'schema': SCHEMA, 'files': files}, indent=2) + '\n'


def is_bundle(path: Path) -> bool:
    """Whether `path` is the folder or the zip of a bundle."""
    return (path / MANIFEST).is_file() or path.suffix == '.zip' and path.is_file()

"""The bundle: a folder, or one zip file, with everything that prediction needs. Opening it never runs code from it.

config.json           architecture, image size, threshold, temperature
model.safetensors     weights; missing after `export --half`
model.onnx            the same network for ONNX Runtime, if the extra `onnx` was installed at export
selftest.safetensors  eight reference images and the probabilities that the network predicted for them
gate.safetensors      input gate (out-of-distribution check)
MODEL_CARD.md         model card
manifest.json         SHA-256 and size of each of these files
learner.pkl           for `load_learner` of fastai; only opened if its hash is trusted
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, BinaryIO

import numpy as np

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, UsageError, did_you_mean, first_line
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.foreign import FIX, IS_LFS_POINTER, LFS_POINTER, open_regular, parse_json
from cxr_fastai.core.paths import PRETRAINED
from cxr_fastai.core.run import Run
from cxr_fastai.core.schemas import Fields, Integer, Table, Text
from cxr_fastai.core.zips import check_zip
from cxr_fastai.inference.config import LEARNER, RECIPE, SCHEMA, WEIGHTS, ModelConfig, check_schema, find_network
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine, check_precision
from cxr_fastai.inference.networks import load_network
from cxr_fastai.inference.onnx_start import GPU, ONNX, onnx_threads
from cxr_fastai.inference.pretrained import find_model, name_model
from cxr_fastai.inference.selftest import SelfTest
from cxr_fastai.inference.tensors import MAX_BYTES, load_tensors
from cxr_fastai.models.devices import choose_device, may_have_gpu

CONFIG = 'config.json'
MANIFEST = 'manifest.json'
BUNDLE = 'bundle'
"""The folder of the bundle in a run folder."""
SELFTEST = 'selftest.safetensors'
GATE = 'gate.safetensors'
CARD = 'MODEL_CARD.md'
TEXTS = (CONFIG, CARD)
"""Files that also count as unchanged with the line ends of Windows."""
FILES = (CONFIG, WEIGHTS, ONNX, SELFTEST, GATE, CARD, LEARNER)
"""The file names that a manifest may contain."""

MAX_JSON_BYTES = 2**20
"""Largest JSON file that is read, in bytes."""
MAX_RATIO = 100
"""Largest factor by which a file in a zip may grow when it is unpacked. That of weights is below 2."""
MAX_ENTRIES = 100
"""Largest number of files in a zip: those of a bundle, and what systems add to a zip file that was made by hand."""
MAX_DIRECTORY = 2**16
"""Largest list of files at the end of a zip, in bytes."""
MANIFEST_FILES = Table(
    Fields({'sha256': Text(64, '[0-9a-f]{64}'), 'size': Integer(0, MAX_BYTES)}), '|'.join(map(re.escape, FILES))
)
"""What a manifest may contain as its `files`."""
FOREIGN = '__MACOSX/'
"""The folder that macOS adds to zip files."""
ENGINES = ('auto', 'onnx', 'torch')
IMAGES_AT_OPEN = 2
"""Number of reference images, one of each class, that are predicted whenever a bundle is opened."""


@dataclass(frozen=True)
class Bundle:
    """The bundle in the folder or zip file `path`. Every file is checked against the manifest before it is used."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, 'path', Path(self.path))

    @classmethod
    def open(cls, path: StrPath) -> Bundle:
        """Open the bundle `path`, `pretrained` or `hf:USER/NAME` (see `find_model`).

        Raises `UsageError` if there is none, and `CXRError` if it is damaged or outdated.
        """
        path = find_model(path)
        if not path.exists():
            similar = did_you_mean(str(path), [PRETRAINED])
            raise UsageError(
                f'{path}: no such file or folder{similar}. Name a bundle, which `cxr-fastai export RUN` makes.'
            )
        if not is_bundle(path):
            raise _explain_other(path)
        bundle = cls(path)
        check_schema(bundle.schema, bundle.shown)
        check_schema(bundle.facts.get('schema'), bundle.shown_file(CONFIG))
        return bundle

    @property
    def shown(self) -> str:
        """The bundle as messages name it (see `name_model`)."""
        return name_model(self.path)

    def shown_file(self, name: str) -> str:
        """Return the file `name` of the bundle as messages name it, on every system."""
        return f'{self.shown}/{name}'

    @property
    def schema(self) -> Any:
        """The version of the format, as the manifest states it."""
        return self._manifest_json.get('schema')

    @cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """The files of the bundle: name -> `sha256` and `size`."""
        files: Any = self._manifest_json.get('files')
        if not MANIFEST_FILES.accepts(files):
            raise CXRError(
                f'{self.shown_file(MANIFEST)}: not the manifest of a bundle, because files is not '
                f'{MANIFEST_FILES.words}. {FIX}'
            )
        entries: dict[str, dict[str, Any]] = files
        return entries

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of the manifest, which identifies the contents of all files."""
        return hashlib.sha256(self._manifest_bytes).hexdigest()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return self._parse_json(self.read(CONFIG), CONFIG)

    @property
    def config(self) -> ModelConfig:
        """The settings of the model."""
        return ModelConfig.from_dict(self.facts, self.shown_file(CONFIG))

    @property
    def selftest(self) -> SelfTest:
        """The reference images and their stored probabilities. Raises `CXRError` if they are damaged."""
        source = self.shown_file(SELFTEST)
        tensors = self.tensors(SELFTEST)
        if not {'images', 'p'} <= tensors.keys():
            raise CXRError(f'{source}: the reference images of its self-test are damaged.')
        selftest = SelfTest.from_arrays(tensors['images'], tensors['p'], source)
        side = selftest.images.shape[-1]
        if side != self.config.size:
            raise CXRError(
                f'{source}: the reference images have {side} px, but the network takes {self.config.size} px. '
                'The bundle is damaged. Get it again from its source.'
            )
        return selftest

    def __contains__(self, name: str) -> bool:
        return name in self.manifest

    def read(self, name: str) -> bytes:
        """Return the bytes of the file `name`. Raises `CXRError` if they do not match the hash in the manifest."""
        if name not in self:
            raise CXRError(f'{self.shown}: the bundle has no {name}. Export the run again.')
        size = self.manifest[name]['size']
        data = self._read_bytes(name, size)
        if self._matches(name, data):
            return data
        if data.startswith(LFS_POINTER):
            raise CXRError(f'{self.shown_file(name)}: {IS_LFS_POINTER}.')
        if name in TEXTS:  # Git and editors may have changed its line ends to those of Windows
            data = self._read_bytes(name, 2 * size).replace(b'\r\n', b'\n')
            if self._matches(name, data):
                return data
        raise CXRError(
            f'{self.shown_file(name)}: does not match its hash in the manifest, so it was damaged or changed. '
            'Get the bundle again from its source.'
        )

    def _matches(self, name: str, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self.manifest[name]['sha256']

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of the safetensors file `name`. Raises `CXRError` if it is damaged."""
        return load_tensors(self.read(name), self.shown_file(name))

    def engine(self, kind: str = 'auto', device: str = 'auto', precision: str = 'fp32') -> TorchEngine | OnnxEngine:
        """Return the engine `onnx` or `torch` on a `device` of `models.devices`, with a `precision` of `PRECISIONS`.

        `auto` is torch on a GPU or with another precision than fp32; else ONNX Runtime, if it is installed and the
        bundle has its file. A bundle of `export --half` has no other engine than ONNX Runtime. Raises `ParityError` if
        the engine does not reproduce the first reference images (in fp32), `UsageError` if device, precision and engine
        do not fit each other or the bundle.
        """
        check_precision(precision)
        if kind not in ENGINES:
            raise UsageError(f'--engine {kind}: unknown. Choose one of {", ".join(ENGINES)}.')
        if kind == 'auto':
            has_onnx = ONNX in self and find_spec('onnxruntime') is not None
            kind = 'onnx' if has_onnx and precision == 'fp32' and not self._computes_on_gpu(device) else 'torch'
            if not self.has_weights and precision == 'fp32':
                kind = 'onnx'
        if kind == 'onnx' and precision != 'fp32':
            raise UsageError(f'--engine onnx --precision {precision}: ONNX files compute in fp32. Use --engine torch.')
        if precision != 'fp32':
            self.check_weights(f'--precision {precision}')
        engine = self._onnx_engine(device) if kind == 'onnx' else self._torch_engine(device)
        self.selftest.check(engine, self.shown, IMAGES_AT_OPEN)
        if isinstance(engine, TorchEngine):
            engine.precision = precision
        return engine

    @property
    def has_weights(self) -> bool:
        """Return whether the bundle has the weights for torch, and not only an ONNX file, as after `export --half`."""
        return WEIGHTS in self or ONNX not in self

    def check_weights(self, feature: str) -> None:
        """Raise `UsageError`, which says that the `feature` needs them, if the bundle has no weights for torch."""
        if not self.has_weights:
            raise UsageError(
                f'{feature} needs the weights for torch ({WEIGHTS}), but {self.shown} has only {ONNX}, for '
                'predictions by ONNX Runtime in fp32. Name a run of `cxr-fastai train`, or a bundle that `cxr-fastai '
                'export RUN` makes of one without --half.'
            )

    @staticmethod
    def _computes_on_gpu(device: str) -> bool:
        if device == 'auto':
            return may_have_gpu() and choose_device().type != 'cpu'
        return device != 'cpu'

    def _onnx_engine(self, device: str) -> OnnxEngine:
        feature = '--engine onnx' if self.has_weights else f'{self.shown}, which has only {ONNX},'
        require_package('onnxruntime', feature, 'onnx')
        if device not in ('auto', 'cpu', 'cuda'):
            raise UsageError(
                f'--engine onnx --device {device}: ONNX Runtime computes on cpu or cuda. Use --engine torch.'
            )
        if device == 'cuda':
            _check_gpu_build()
        return OnnxEngine(
            self.read(ONNX), self.shown_file(ONNX), onnx_threads(), self.config.size, gpu=device == 'cuda'
        )

    def _torch_engine(self, device: str) -> TorchEngine:
        self.check_weights('--engine torch')
        return TorchEngine(load_network(self.config, self.read(WEIGHTS), self.shown_file(WEIGHTS)), device)

    @cached_property
    def _manifest_bytes(self) -> bytes:
        return self._read_bytes(MANIFEST, MAX_JSON_BYTES)

    @cached_property
    def _manifest_json(self) -> dict[str, Any]:
        return self._parse_json(self._manifest_bytes, MANIFEST)

    def _read_bytes(self, name: str, max_bytes: int) -> bytes:
        """Return the first `max_bytes` + 1 bytes of a file, so that the caller notices if it is longer."""
        if self.path.is_dir():
            if not os.path.lexists(self.path / name):
                raise UsageError(f'{self.shown}: the bundle lacks its file {name}. Copy or download all of its files.')
            with open_regular(self.path / name) as file:
                return file.read(max_bytes + 1)
        try:
            with open_regular(self.path) as file, zipfile.ZipFile(self._check_directory(file)) as archive:
                entry = archive.getinfo(self._find_entry(archive.namelist(), name))
                self._check_ratio(entry)
                with archive.open(entry) as member:
                    return member.read(max_bytes + 1)
        except CXRError:
            raise
        except Exception as error:  # a damaged zip file can raise any exception
            raise CXRError(f'{self.path}: {name} cannot be read from the bundle ({first_line(error)}). {FIX}') from None

    def _find_entry(self, entries: list[str], name: str) -> str:
        """Return the one of the `entries` of the zip file that is the file `name`. Raises `UsageError` for two bundles.

        `export` puts the files at the top. Zip files that were made by hand can have them in a folder, perhaps with
        backslashes, beside files of the system that made them, such as the folder `__MACOSX`.
        """
        paths = {entry.replace('\\', '/'): entry for entry in entries}
        manifests = [path for path in paths if PurePosixPath(path).name == MANIFEST and not path.startswith(FOREIGN)]
        if MANIFEST in manifests:
            return name
        if not manifests:
            raise UsageError(
                f'{self.path}: a zip file without a bundle in it (no {MANIFEST}). Name one that `cxr-fastai export RUN '
                '--zip --out FILE.zip` wrote.'
            )
        if len(manifests) > 1:
            folders = ', '.join(str(PurePosixPath(path).parent) for path in manifests)
            raise UsageError(
                f'{self.path}: contains {len(manifests)} bundles ({folders:.100}). Unpack it, and name one of them.'
            )
        path = manifests[0].removesuffix(MANIFEST) + name
        return paths.get(path, path)

    def _check_directory(self, file: BinaryIO) -> BinaryIO:
        """Return the zip `file`. Raises `CXRError` if its list of files is too long; `zipfile` would read all of it."""
        try:
            check_zip(file, MAX_ENTRIES, MAX_DIRECTORY)
        except ValueError as error:
            raise CXRError(f'{self.path}: not the zip file of a bundle ({error}). {FIX}') from None
        return file

    def _check_ratio(self, entry: zipfile.ZipInfo) -> None:
        """Raise `CXRError` if a file in the zip claims to grow by more than `MAX_RATIO` when it is unpacked."""
        if entry.file_size > max(MAX_RATIO * entry.compress_size, MAX_JSON_BYTES):
            raise CXRError(
                f'{self.path / entry.filename}: {entry.compress_size:,} bytes would become {entry.file_size:,}, more '
                f'than {MAX_RATIO} times as many. {FIX}'
            )

    def _parse_json(self, data: bytes, name: str) -> dict[str, Any]:
        if len(data) > MAX_JSON_BYTES:
            raise CXRError(f'{self.shown_file(name)}: larger than {MAX_JSON_BYTES:,} bytes, so it was not read. {FIX}')
        facts = parse_json(data, self.shown_file(name))
        if not isinstance(facts, dict):
            raise CXRError(f'{self.shown_file(name)}: not a JSON object, so the bundle is damaged. {FIX}')
        return facts


def _explain_other(path: Path) -> UsageError:
    """Return the error about a file or folder that is not a bundle; for a run folder, with the commands that help.

    Raises `UsageError` if the training of the run has not finished.
    """
    if not (path / RECIPE).is_file():
        return UsageError(f'{path}: not a bundle. `cxr-fastai export RUN` makes one.')
    find_network(path)
    bundle = path / BUNDLE
    if is_bundle(bundle):
        return UsageError(f'{path}: a run folder, not a bundle. Name the bundle in it: {quote(str(bundle))}.')
    run = Run(path)
    first = '' if (run / 'metrics.json').is_file() else f'`{run.first_evaluation()}`, then '
    return UsageError(
        f'{path}: a run folder, not a bundle. Make a bundle by {first}`cxr-fastai export {quote(str(path))}`, and name '
        f'{quote(str(bundle))}.'
    )


def _check_gpu_build() -> None:
    """Raise `UsageError` if ONNX Runtime is installed without the part that computes on a GPU."""
    import onnxruntime

    if GPU not in onnxruntime.get_available_providers():
        raise UsageError(
            '--engine onnx --device cuda: this build of ONNX Runtime computes on processors only. Install the package '
            'onnxruntime-gpu in its place, or use --engine torch.'
        )


def manifest_text(files: dict[str, dict[str, Any]]) -> str:
    """Return the text of the manifest of `files`, name -> `sha256` and `size`."""
    return json.dumps({'schema': SCHEMA, 'files': files}, indent=2) + '\n'


def is_bundle(path: Path) -> bool:
    """Return True if `path` is a folder with a manifest, or a zip file."""
    if path.suffix.lower() == '.zip' and path.is_file():
        return True
    return (path / MANIFEST).exists()

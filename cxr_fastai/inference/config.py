"""The settings and the weights that every model file contains: `ModelConfig`, safetensors files, SHA-256 hashes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.files import atomic
from cxr_fastai.core.recipe import VOCAB, Recipe

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 2
"""Version of the format of bundles and exported learners. Schema 1 was used before version 0.1.0."""
WEIGHTS = 'model.safetensors'
LEARNER = 'learner.pkl'

MAX_THRESHOLD = math.nextafter(1, 2)
"""Largest threshold: no image is classified as pneumonia."""
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 1e3
MAX_SIZE = 2**12
"""Largest side of an image, in px, that a model file may ask for."""
MAX_HEADER = 2**22
"""Largest header of a safetensors file, in bytes. The header of a ResNet50 has about 2**15."""
EDGE = 1e-15
"""Probabilities are clipped to [EDGE, 1 - EDGE] before the logit, which is infinite at 0 and 1."""


@dataclass(frozen=True)
class ModelConfig:
    """The settings that prediction needs in addition to the weights. Every model file contains them.

    `size` is in pixels, `low_pass` a fraction of the side. `temperature` is None before the run was evaluated.
    """

    arch: str
    size: int
    threshold: float
    threshold_rule: str = 'fixed:0.5'
    resize: str = 'squish'
    low_pass: float = 0.0
    temperature: float | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ModelConfig:
        """Return the settings of a network trained with `recipe`, before `evaluate` chose a threshold."""
        return cls(
            arch=recipe.arch,
            size=recipe.size,
            threshold=recipe.threshold,
            threshold_rule=f'fixed:{recipe.threshold:g}',
            resize=recipe.resize,
            low_pass=recipe.low_pass,
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any], source: Path) -> ModelConfig:
        """Return the settings that the file `source` contains as `facts`; other keys are ignored.

        Raises `CXRError` if a setting is missing, has another type, is out of range, or if the classes differ.
        """
        check_vocab(facts.get('vocab', VOCAB), source)
        settings = {field.name: facts[field.name] for field in fields(cls) if field.name in facts}
        try:
            config = cls(**settings)
            invalid = config._invalid_settings()
        except (TypeError, AttributeError) as error:
            raise CXRError(f'{source}: not the settings of a model ({error}). Export the model again.') from None
        if invalid:
            name = invalid[0]
            raise CXRError(f'{source}: {name} {settings[name]!r:.80} is not valid. Export the model again.')
        return config

    def _invalid_settings(self) -> list[str]:
        """Return the names of the settings with an impossible value."""
        valid = {
            'arch': self.arch.isprintable(),
            'size': type(self.size) is int and 0 < self.size <= MAX_SIZE,
            'resize': isinstance(self.resize, str),
            'threshold': 0 <= self.threshold <= MAX_THRESHOLD,
            'low_pass': self.low_pass >= 0,
            'temperature': self.temperature is None or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
        }
        return [name for name, is_valid in valid.items() if not is_valid]


def check_vocab(vocab: Any, source: Path) -> None:
    """Raise `CXRError` unless `vocab`, which the file `source` contains, are the classes of this package in order."""
    if not isinstance(vocab, list | tuple) or tuple(vocab) != VOCAB:
        raise CXRError(
            f'{source}: made for the classes {vocab!r:.80}, but {", ".join(VOCAB)} are expected, in this order.'
        )


def check_schema(schema: Any, source: Path) -> None:
    """Raise `CXRError` unless `schema`, which the file `source` contains, is the format of this version."""
    if schema == SCHEMA:
        return
    if schema == 1:
        raise CXRError(f'{source}: made before version 0.1.0 (schema 1), which cannot be read. Export it again.')
    raise CXRError(
        f'{source}: has the schema {schema!r:.80}, but {SCHEMA} is expected. '
        'Export it again, or install the version of cxr-fastai that made it.'
    )


def config_text(config: ModelConfig, **extra: Any) -> str:
    """Return `config`, the classes, the schema and `extra` facts as JSON text."""
    facts = {'schema': SCHEMA, **asdict(config), 'vocab': list(VOCAB), **extra}
    return json.dumps(facts, indent=2, allow_nan=False) + '\n'


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of `model` to `path` as safetensors, atomically. Reading such a file never runs code."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(state))


def load_network(arch: str, data: bytes, path: Path) -> nn.Module:
    """Return the network `arch` with the weights `data`, which `save_weights` wrote to `path`.

    Raises `CXRError` if the bytes are damaged or belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from cxr_fastai.models.architectures import build_model

    check_header(data, path)
    model = build_model(arch)
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CXRError(f'{path}: not the weights of the network {arch} ({first_line(error)}).') from None
    return model


def tensor_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """Return arrays as the bytes of a safetensors file."""
    from safetensors.numpy import save

    # For a view, `save` would write the memory behind it.
    return save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def check_header(data: bytes, path: Path) -> None:
    """Raise `CXRError` if the safetensors header in `data` is longer than the file or than `MAX_HEADER`."""
    header = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or header > min(MAX_HEADER, len(data) - 8):
        raise CXRError(f'{path}: not a safetensors file (a header of {header:,} bytes in a file of {len(data):,}).')


def find_network(run: Path) -> Path:
    """Return the file in the run folder `run` that contains the network. Raises `UsageError` if there is none."""
    for name in (WEIGHTS, LEARNER):
        if (run / name).is_file():
            return run / name
    raise UsageError(
        f'{run}: no model there. Name a run folder that `cxr-fastai train` finished, a bundle that '
        '`cxr-fastai export` made, or a .pkl file.'
    )


def identify_network(run: Path) -> str:
    """Return the SHA-256 of the network file of a run. Decisions and metrics store it to name their network."""
    return sha256(find_network(run))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@overload
def temper(p: float, temperature: float) -> float: ...
@overload
def temper(p: np.ndarray, temperature: float) -> np.ndarray: ...
def temper(p: np.ndarray | float, temperature: float) -> np.ndarray | float:
    """Return probabilities (n,) with their logits divided by `temperature` (Guo et al. 2017). The order stays."""
    if temperature == 1:
        return p
    scaled = 1 / (1 + np.exp(-logits(p) / temperature))
    return scaled if isinstance(p, np.ndarray) else float(scaled)


def logits(p: np.ndarray | float) -> np.ndarray:
    """Return the logits of probabilities, which are clipped to [EDGE, 1 - EDGE] before."""
    clipped = np.clip(p, EDGE, 1 - EDGE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))

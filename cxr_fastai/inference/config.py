"""The settings and the weights that every model file contains: `ModelConfig`, safetensors files, SHA-256 hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError, did_you_mean
from cxr_fastai.core.files import StrPath, atomic
from cxr_fastai.core.foreign import open_regular
from cxr_fastai.core.paths import PRETRAINED
from cxr_fastai.core.recipe import VOCAB, Recipe
from cxr_fastai.core.run_files import MAX_TEMPERATURE, MAX_THRESHOLD, MIN_TEMPERATURE
from cxr_fastai.core.schemas import Choice, Flag, Integer, Number, Rule, Text, check_object
from cxr_fastai.images.dicom_header import MODALITY_LIST
from cxr_fastai.images.preprocessing import MAX_LOW_PASS, RESIZES

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 2
"""Version of the format of bundles and exported learners. Schema 1 was used before version 0.1.0."""
WEIGHTS = 'model.safetensors'
LEARNER = 'learner.pkl'

RECIPE = 'recipe.json'
MODELS = 'run folder that `cxr-fastai train` finished, a bundle that `cxr-fastai export` made, or a .pkl file'
"""What the commands that predict take as a model."""
MAX_SIZE = 2**12
"""Largest side of an image, in px, that a model file may ask for."""
FIELDS: dict[str, Rule] = {
    'arch': Text(200, r'\w[\w.-]*'),
    'size': Integer(1, MAX_SIZE),
    'threshold': Number(0, MAX_THRESHOLD),
    'threshold_rule': Text(200, '[ -~]*', required=False),
    'resize': Choice(tuple(RESIZES), required=False),
    'low_pass': Number(0, MAX_LOW_PASS, required=False),
    'modality': Text(200, MODALITY_LIST, required=False),
    'temperature': Number(MIN_TEMPERATURE, MAX_TEMPERATURE, optional=True, required=False),
    'tta': Flag(required=False),
}
"""The fields of `ModelConfig` in a file, and their permitted values. ASCII, because they are printed."""
EDGE = 1e-15
"""Probabilities are clipped to [EDGE, 1 - EDGE] before the logit, which is infinite at 0 and 1."""


@dataclass(frozen=True)
class ModelConfig:
    """The settings that prediction needs in addition to the weights. Every model file contains them.

    `size` is in pixels, `low_pass` a fraction of the side; `modality` has the codes of DICOM modalities that are
    accepted besides those of radiographs. `temperature` is None before the run was evaluated. `tta` says whether
    threshold and temperature were chosen on means over test-time views (see `Predictor`).
    """

    arch: str
    size: int
    threshold: float
    threshold_rule: str = 'fixed:0.5'
    resize: str = 'squish'
    low_pass: float = 0.0
    modality: str = ''
    temperature: float | None = None
    tta: bool = False

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
            modality=recipe.modality,
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any], source: StrPath) -> ModelConfig:
        """Return the settings that the file `source` contains as `facts`; other keys are ignored.

        Raises `CXRError` if a setting is missing, has another type, is out of range, or if the classes differ.
        """
        check_vocab(facts.get('vocab', VOCAB), source)
        return cls(**check_object(facts, FIELDS, source, 'Export the model again.'))


def check_vocab(vocab: Any, source: StrPath) -> None:
    """Raise `CXRError` unless `vocab`, which the file `source` contains, are the classes of this package in order."""
    if not isinstance(vocab, list | tuple) or tuple(vocab) != VOCAB:
        raise CXRError(
            f'{source}: made for the classes {vocab!r:.80}, but {", ".join(VOCAB)} are expected, in this order.'
        )


def check_schema(schema: Any, source: StrPath) -> None:
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


def find_network(run: Path) -> Path:
    """Return the file in the run folder `run` that contains the network. Raises `UsageError` if there is none."""
    for name in (WEIGHTS, LEARNER):
        if (run / name).exists():
            return run / name
    if not run.exists():
        raise UsageError(f'{run}: no such file or folder{did_you_mean(str(run), [PRETRAINED])}. Name a {MODELS}.')
    if (run / 'state.pt').exists():
        raise UsageError(
            f'{run}: its training was interrupted, so it has no network yet. `cxr-fastai train --resume '
            f'{quote(str(run))}` continues it.'
        )
    if (run / RECIPE).is_file():
        raise UsageError(f'{run}: no model there, because its training has not finished. Name a {MODELS}.')
    raise UsageError(f'{run}: no model there. Name the model first, then the images; a model is a {MODELS}.')


def identify_network(run: Path) -> str:
    """Return the SHA-256 of the network file of a run. Decisions and metrics store it to name their network."""
    return sha256(find_network(run))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex. Raises `UsageError` for a pipe or a device."""
    with open_regular(path) as file:
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

"""What every model file has to say, and its weights: `ModelConfig`, safetensors, SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.files import atomic
from cxr_fastai.core.recipe import VOCAB, Recipe

if TYPE_CHECKING:
    from torch import nn

WEIGHTS, LEARNER = 'model.safetensors', 'learner.pkl'
ABOVE_ALL = math.nextafter(1, 2)
"""The threshold that calls no image pneumonia."""
COLDEST, HOTTEST = 1e-3, 1e3
"""Temperatures beyond which none is believed."""
MAX_HEADER = 2**22
"""Bytes of a safetensors header above which the file is refused; a ResNet50's has 2^15."""
MAX_SIZE = 2**12
"""Side of an image, in px, above which no network is believed to want it."""


@dataclass(frozen=True)
class ModelConfig:
    """What prediction has to know beside the weights; it travels in every model file."""

    arch: str
    size: int
    threshold: float
    threshold_rule: str = 'fixed:0.5'
    resize: str = 'squish'
    low_pass: float = 0.0
    temperature: float | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> ModelConfig:
        """That of a network trained by `recipe`, before anything was decided on validation images."""
        return cls(
            recipe.arch, recipe.size, recipe.threshold, f'fixed:{recipe.threshold:g}', recipe.resize, recipe.low_pass
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any], source: Path) -> ModelConfig:
        """The inverse of `asdict`, of what the file `source` says; other keys are let be. Raises `CXRError` where
        something is missing, of another kind, or of other classes."""
        vocab = facts.get('vocab', VOCAB)
        if not isinstance(vocab, list | tuple) or tuple(vocab) != VOCAB:
            raise CXRError(
                f'{source}: made for the classes {vocab!r:.80}, in this order; {", ".join(VOCAB)} are meant here.'
            )
        known = {field.name: facts[field.name] for field in fields(cls) if field.name in facts}
        try:
            config = cls(**known)
            whole = (
                0 < config.size <= MAX_SIZE,
                type(config.size) is int,
                isinstance(config.resize, str),
                0 <= config.threshold <= ABOVE_ALL,
                config.low_pass >= 0,
                config.arch.isprintable(),
                config.temperature is None or COLDEST <= config.temperature <= HOTTEST,
            )
        except (TypeError, AttributeError) as error:
            raise CXRError(f'{source}: not a model of ours ({error}).') from None
        if not all(whole):
            raise CXRError(f'{source}: size, resize, threshold, low_pass or temperature cannot be: {known!r:.300}.')
        return config


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of `model` to `path` as safetensors, atomically: it holds numbers and names, and runs nothing."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(state))


def load_network(arch: str, data: bytes, path: Path) -> nn.Module:
    """The network `arch` with the bytes of what `save_weights` wrote to `path`. Raises `CXRError` where they are
    damaged or of another network."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from cxr_fastai.models.architectures import build_model

    check_header(data, path)
    model = build_model(arch)
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CXRError(f'{path}: not the weights of this network ({first_line(error)}).') from None
    return model


def tensor_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """Arrays as safetensors. (Its own `save` writes the memory behind a view, not the view.)"""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def check_header(data: bytes, path: Path) -> None:
    """Raise `CXRError` where the header of the safetensors `data` is longer than any of ours, or than the file."""
    length = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise CXRError(f'{path}: no safetensors file (a header of {length:,} bytes in a file of {len(data):,}).')


def find_network(model: Path) -> Path:
    """The file that holds the network of the run folder `model`, by whose SHA-256 it is known."""
    for name in (WEIGHTS, LEARNER):
        if (model / name).is_file():
            return model / name
    raise UsageError(
        f'{model}: no model there: name a run folder that `cxr-fastai train` finished, a bundle that '
        '`cxr-fastai export` made, or a .pkl file.'
    )


def identify_network(model: Path) -> str:
    """The SHA-256 of `find_network`, by which a run's decision and figures know what they are of."""
    return sha256(find_network(model))


def sha256(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def config_text(config: ModelConfig, **more: Any) -> str:
    """`config` and what `more` is known as JSON."""
    return json.dumps({**asdict(config), 'vocab': list(VOCAB), **more}, indent=2, allow_nan=False) + '\n'


EDGE = 1e-15
"""Probabilities nearer to 0 and 1 than this count as this far: double precision has no logit for 1."""


def temper(p: np.ndarray | float, temperature: float) -> np.ndarray | float:
    """Probabilities (n,) with their logits divided by `temperature` (Guo et al. 2017); their order stays."""
    return p if temperature == 1 else 1 / (1 + np.exp(-logits(p) / temperature))


def logits(p: np.ndarray | float) -> np.ndarray | float:
    """The logits of probabilities, those of 0 and 1 cut to what double precision tells from them."""
    cut = np.clip(p, EDGE, 1 - EDGE)
    return np.log(cut) - np.log1p(-cut)

"""Networks of model files. One is built only if its architecture has exactly the tensors that the file has.

A model file names its architecture, and the largest ones need many gigabytes. The names, types and shapes of the
tensors are therefore compared before memory for the weights is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.foreign import FIX
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.tensors import TensorFacts, read_header

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cxr_fastai.models.registry import Arch

MAX_LISTED = 3
"""Number of differences that an error message lists."""


def load_network(config: ModelConfig, data: bytes, path: StrPath) -> nn.Module:
    """Return the network of `config` with the weights `data`, which `save_weights` wrote to `path`.

    Raises `CXRError` if the bytes are damaged or belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    model = build_network(config, read_header(data, path), path)
    try:
        state = load(data)
    except SafetensorError as error:
        raise CXRError(f'{path}: damaged ({first_line(error)}). {FIX}') from None
    return fill_network(model, state, config.arch, path)


def build_network(config: ModelConfig, tensors: Mapping[str, TensorFacts], path: StrPath) -> nn.Module:
    """Return the network of `config` with random weights, if its state dict has exactly the `tensors`.

    Raises `UsageError` if no architecture has this name here, and `CXRError` if the tensors, which the file `path`
    contains, or the image size are those of another network.
    """
    from cxr_fastai.models.architectures import build_model, find_arch

    try:
        facts = find_arch(config.arch)
    except UsageError as error:
        raise UsageError(f'{path}: its network cannot be built by its name. {error}') from None
    if facts.size not in (None, config.size):
        raise CXRError(
            f'{path}: made for images of {config.size} px, but {config.arch} accepts only {facts.size}. '
            'Export the model again.'
        )
    _check_tensors(config.arch, facts, tensors, path)
    return build_model(config.arch)


def _check_tensors(arch: str, facts: Arch, tensors: Mapping[str, TensorFacts], path: StrPath) -> None:
    """Raise `CXRError` if the network `arch` has other tensors. The builder of a registered network is trusted."""
    import torch

    from cxr_fastai.models.catalog import torchvision_facts
    from cxr_fastai.models.ensembles import split_name
    from cxr_fastai.models.registry import registered_names

    number, member = split_name(arch)
    if member in registered_names():
        return
    try:
        with torch.device('meta'):  # tensors without contents
            expected = tensor_facts(facts.build().state_dict())
    except RuntimeError:  # it computes with numbers, which this device does not have
        published = number * torchvision_facts(member).get('num_params', 0)
        weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
        if weights < published / 2:
            _refuse(arch, [f'it has {weights:,} numbers, and the network about {published:,}'], path)
        return
    differences = [f'{name!r:.80} is missing' for name in expected.keys() - tensors.keys()]
    differences += [f'{name!r:.80} is not part of it' for name in tensors.keys() - expected.keys()]
    differences += [
        f'{name} is {_describe(tensors[name])}, expected {_describe(expected[name])}'
        for name in expected.keys() & tensors.keys()
        if tensors[name] != expected[name]
    ]
    if differences:
        _refuse(arch, differences, path)


def tensor_facts(state: Mapping[str, Tensor]) -> dict[str, TensorFacts]:
    """Return the type and the shape of each tensor of a state dict."""
    return {
        name: TensorFacts(str(tensor.dtype).removeprefix('torch.'), tuple(tensor.shape))
        for name, tensor in state.items()
    }


def _describe(tensor: TensorFacts) -> str:
    return f'{tensor.dtype} {list(tensor.shape)}'


def _refuse(arch: str, differences: list[str], path: StrPath) -> None:
    listed = '; '.join(sorted(differences)[:MAX_LISTED])
    if len(differences) > MAX_LISTED:
        listed += f' and {len(differences) - MAX_LISTED} more'
    raise CXRError(f'{path}: not the weights of the network {arch} ({listed}). {FIX}')


def fill_network(model: nn.Module, state: Mapping[str, Tensor], arch: str, path: StrPath) -> nn.Module:
    """Load `state`, from the file `path`, into `model` and return it. Raises `CXRError` if it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # a registered network, which was not compared before
        raise CXRError(f'{path}: not the weights of the network {arch} ({first_line(error)}). {FIX}') from None
    return model

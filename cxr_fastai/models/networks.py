"""`create_network` turns what a user may pass as an architecture into a network, its name, and that of its weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.models.architectures import ARCHS, build_model, check_weights, find_arch
from cxr_fastai.models.bodies import loses_head, split_network
from cxr_fastai.models.libraries import TORCHVISION
from cxr_fastai.models.registry import (
    OWN_WEIGHTS,
    Arch,
    call_builder,
    describe_builder,
    is_timm_name,
    registered_name,
    registered_names,
)
from cxr_fastai.models.weights import fill

Builder = Callable[..., nn.Module]


class Network(NamedTuple):
    """A network with the name of its architecture and of its first weights, as `Recipe` has them.

    `weights` is `own` for those that the network has from its own code.
    """

    model: nn.Sequential
    arch: str
    weights: str


def unwrap_network(model: nn.Module) -> nn.Module:
    """Return the network in `model`, without the wrapper that it has in distributed training."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return model


def create_network(arch: str | Builder | nn.Module, pretrained: Any = True, size: int | None = None) -> Network:
    """Return the network `arch` as `Sequential(body, head)`: input (n, 3, h, w), output logits (n, 2).

    `arch` is a name that `find_arch` knows, a function of torchvision or timm such as `torchvision.models.resnet34`,
    any function or class that returns a module without arguments, or a module. A module keeps its weights, and is cut
    by `split_network` where it is no `Sequential(body, head)`.

    `pretrained` is True for the default weights of the architecture, False for random ones, a name of its weights, a
    member of torchvision's enumerations of weights, or the file of a state dict. `size` is the side in pixels of the
    images, for a module that accepts no other. Raises `CXRError` for unknown names, for networks that cannot be cut,
    and for weights that are not available or do not fit.
    """
    if isinstance(arch, nn.Module):
        kept = OWN_WEIGHTS if isinstance(pretrained, bool) else pretrained
        return _adopt(arch, type(arch), kept, size)
    name = arch if isinstance(arch, str) else _find_name(arch)
    if name is None:
        built = {True: OWN_WEIGHTS, False: 'none'}.get(pretrained, pretrained)
        return _adopt(_call(arch), arch, built, size)
    weights = _choose_weights(name, find_arch(name), pretrained)
    return Network(build_model(name, weights), name, weights)


def _adopt(model: nn.Module, source: Any, weights: Any, size: int | None) -> Network:
    """Return a module of the user as a network. `source` is its class, or the function that built it.

    `weights` is the name of the weights that it has, or a file to load.
    """
    name = _own_name(source)
    network = split_network(model, name, size)
    known = _find_name(source)
    if known is None and _plain_name(source) in registered_names():
        known = _plain_name(source)
    if known and _same_shapes(network, build_model(known)):
        name = known
    if loses_head(model, network, size):
        warnings.warn(
            f'{name}: its layers after the last pooling cannot be used as a head, and were replaced by a new one. To '
            'keep them, pass nn.Sequential(body, head).',
            CXRWarning,
            stacklevel=3,
        )
    if weights not in (OWN_WEIGHTS, 'none'):
        weights = check_weights(name, {}, str(weights))
        fill(network, f'file:{weights}', weights)
    return Network(network, name, weights)


def _find_name(builder: Any) -> str | None:
    """Return the name by which `find_arch` knows the function or class `builder`, or None."""
    for name, facts in ARCHS.items():
        if facts.build is builder:
            return name
    name = getattr(builder, '__name__', '')
    package = getattr(builder, '__module__', None) or ''
    if package.startswith('torchvision.models.') and _is_torchvision(name, builder):
        return name if name in ARCHS else TORCHVISION + name
    if package.startswith('timm.models.') and is_timm_name(name):
        return name
    return registered_name(builder)


def _is_torchvision(name: str, builder: Any) -> bool:
    from torchvision import models

    return getattr(models, name, None) is builder and name in models.list_models(module=models)


def _plain_name(source: Any) -> str:
    """Return the name of the function or class `source`."""
    function = source.func if isinstance(source, partial) else source
    return getattr(function, '__name__', type(function).__name__).strip('<>')


def _own_name(source: Any) -> str:
    """Return a name for the function or class `source` that no known architecture has."""
    name = _plain_name(source)
    if name in ARCHS or name in registered_names() or is_timm_name(name):
        return f'own.{name}'
    return name


def _call(builder: Any) -> nn.Module:
    """Call `builder` without arguments. Raises `UsageError` if it needs some, or returns something else."""
    if not callable(builder):
        raise UsageError(
            f'architecture {builder!r:.80}: a name, a function or class that returns a network, or a torch.nn.Module '
            'is needed.'
        )
    needed = [parameter.name for parameter in inspect.signature(builder).parameters.values() if _is_required(parameter)]
    if needed:
        raise UsageError(
            f'{describe_builder(builder)}: needs the arguments {", ".join(needed)}. Pass the network that it returns, '
            'or functools.partial with these arguments.'
        )
    return call_builder(builder)


def _is_required(parameter: inspect.Parameter) -> bool:
    optional = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in optional


def _same_shapes(network: nn.Module, other: nn.Module) -> bool:
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (network, other)]
    return shapes[0] == shapes[1]


def _choose_weights(name: str, facts: Arch, pretrained: Any) -> str:
    """Return the name of the weights, or their file, that `pretrained` means for the architecture `name`."""
    if pretrained is True:
        return facts.default_weights
    if pretrained is False:
        return 'none'
    member = f'torchvision:{type(pretrained).__name__}.{getattr(pretrained, "name", "")}'
    for weights, source in facts.weights.items():
        if source == member:
            return weights
    return check_weights(name, facts.weights, str(pretrained))

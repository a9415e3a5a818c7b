"""`Arch`, the facts about an architecture, and the registry of architectures that other packages define.

Model files contain tensors and the name of an architecture, and never code. A program that opens one therefore has to
know how to build the network of this name. `add_arch` registers an architecture in this process. The environment
variable `CXR_ARCHS` and the entry points in the group `cxr_fastai.archs` register some for every command::

    CXR_ARCHS=mine=package.module:function,other=package.module:Class
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from torch import nn

from cxr_fastai.core.environment import is_installed
from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.models.bodies import split_network
from cxr_fastai.models.phases import FROM_SCRATCH, PRETRAINED, PhaseShare

VARIABLE = 'CXR_ARCHS'
GROUP = 'cxr_fastai.archs'
OWN_WEIGHTS = 'own'
"""Name of the weights that a network has from its own code, which this package did not load."""
NAME = re.compile(r'[A-Za-z0-9][\w.-]*', re.ASCII)
LIBRARIES = ('torchvision', 'vision_learner')
"""Prefixes of names that `models.libraries` looks up."""
ENSEMBLE_NAME = re.compile(r'ensemble(\d+)\.(.+)', re.ASCII)
"""The name of an ensemble: the number of its members and their architecture (see `models.ensembles`)."""


@dataclass(frozen=True)
class Arch:
    """Facts about an architecture.

    `phases` maps the name of a recipe to its phases. `weights` maps a value of `--weights` to its source, as
    `read_weights` expects it; the first is the default. `size` is the only side in pixels that the network accepts, or
    None if it accepts any. `parameters` is their number, or None if it was not counted.
    """

    build: Callable[[], nn.Sequential]
    phases: dict[str, tuple[PhaseShare, ...]]
    weights: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    parameters: int | None = None

    @property
    def default_weights(self) -> str:
        """The name of the weights from which training starts by default."""
        names = [*self.weights, 'none']
        return names[0]


class Registered(NamedTuple):
    """A registered architecture: the function or class that builds it, and the facts about it."""

    builder: Callable[..., nn.Module]
    arch: Arch


_registered: dict[str, Registered] = {}


def register(
    name: str,
    build: Callable[..., nn.Module],
    reserved: Collection[str],
    weights: dict[str, str] | None = None,
    size: int | None = None,
    phases: dict[str, tuple[PhaseShare, ...]] | None = None,
) -> None:
    """Register the architecture `name`, as `architectures.add_arch` describes it.

    Raises `UsageError` for names that are `reserved`, of a library, or registered for another network.
    """
    where = f'{name}={describe_builder(build)}'
    _check_name(name, reserved, where)
    _check_timm(name, where)
    known = _registered.get(name)
    if known and not _same_definition(known.builder, build):
        raise UsageError(f'{where}: registered already, as {describe_builder(known.builder)}. Choose another name.')
    if phases is None:
        phases = PRETRAINED if weights else FROM_SCRATCH
    sources = {**(weights or {}), OWN_WEIGHTS: f'{OWN_WEIGHTS}:{describe_builder(build)}'}
    _registered[name] = Registered(build, Arch(partial(_build_split, name, build, size), phases, sources, size))


def find_registered(name: str, reserved: Collection[str]) -> Arch | None:
    """Return the facts about the registered architecture `name`, or None. Imports its module if necessary.

    Raises `UsageError` if a declaration in `CXR_ARCHS` or in an entry point is wrong, or cannot be imported.
    """
    references = _references()
    for declared, reference in references.items():
        _check_name(declared, reserved, f'{declared}={reference}')
    if name in references and name not in _registered:
        target = _load(name, references[name])
        if isinstance(target, Arch):
            register(name, target.build, reserved, target.weights, target.size, target.phases)
        else:
            register(name, target, reserved)
    registered = _registered.get(name)
    return registered.arch if registered else None


def registered_names() -> list[str]:
    """Return the names of all registered architectures, sorted."""
    return sorted({*_registered, *_references()})


def registered_name(builder: Any) -> str | None:
    """Return the name under which `builder`, a function or class, is registered, or None. Imports no module."""
    for name, registered in _registered.items():
        if registered.builder is builder:
            return name
    for name, reference in _references().items():
        module, _, attribute = reference.partition(':')
        target = getattr(sys.modules.get(module), attribute, None)
        if isinstance(target, Arch):
            target = target.build
        if target is not None and target is builder:
            return name
    return None


def check_declared(name: str) -> None:
    """Raise `UsageError` if `name` is registered in this process only, so that a new process could not build it."""
    if name in _registered and name not in _references():
        raise UsageError(
            f'{name}: registered by add_arch in this process only, but a new process has to build it. Declare it: '
            f'{VARIABLE}={name}=package.module:function.'
        )


def describe_builder(builder: Any) -> str:
    """Return the module and the name of a function or class."""
    name = getattr(builder, '__qualname__', type(builder).__qualname__)
    return f'{getattr(builder, "__module__", "?")}.{name}'


def call_builder(builder: Callable[..., Any]) -> nn.Module:
    """Return the network that `builder` returns without arguments. Raises `UsageError` if it returns something else."""
    model = builder()
    if not isinstance(model, nn.Module):
        raise UsageError(f'{describe_builder(builder)}: returned {type(model).__name__}, not a torch.nn.Module.')
    return model


def _build_split(name: str, builder: Callable[..., nn.Module], size: int | None) -> nn.Sequential:
    return split_network(call_builder(builder), name, size)


def _check_name(name: str, reserved: Collection[str], where: str) -> None:
    """Raise `UsageError`, which starts with `where` the name is declared, if no architecture can have this `name`."""
    if not NAME.fullmatch(name):
        raise UsageError(f'{where}: {name!r} is no name of an architecture. Use letters, digits, dots, - and _.')
    if name in reserved or name.split('.')[0] in LIBRARIES or ENSEMBLE_NAME.fullmatch(name):
        raise UsageError(f'{where}: {name} is an architecture of this package already. Choose another name.')


def _check_timm(name: str, where: str) -> None:
    if is_timm_name(name):
        raise UsageError(f'{where}: {name} is an architecture of timm already. Choose another name.')


def is_timm_name(name: str) -> bool:
    """Return True if timm is installed and knows the architecture `name`."""
    if not is_installed('timm'):
        return False
    import timm

    return timm.is_model(name)


def _same_definition(builder: Any, other: Any) -> bool:
    """Return True if both are one function or class, perhaps defined again by running a notebook cell twice."""
    if builder is other:
        return True
    name = describe_builder(builder)
    return name == describe_builder(other) and '<' not in name


def _references() -> dict[str, str]:
    """Return the declared architectures: name to `module:attribute`. `CXR_ARCHS` replaces entry points."""
    references = dict(_installed_references(tuple(sys.path)))
    for text in filter(None, map(str.strip, os.environ.get(VARIABLE, '').split(','))):
        name, _, reference = text.partition('=')
        if not re.fullmatch(r'[\w.]+:\w+', reference.strip()):
            raise UsageError(f'{VARIABLE}: {text}: NAME=package.module:function is needed.')
        references[name.strip()] = reference.strip()
    return references


@cache
def _installed_references(path: tuple[str, ...]) -> dict[str, str]:
    """Return the entry points of the packages on the `path`, which takes tens of milliseconds to search."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def _load(name: str, reference: str) -> Any:
    """Return the object that `reference`, a text `module:attribute`, names."""
    module, _, attribute = reference.partition(':')
    try:
        target = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f'{name}={reference}: cannot be imported ({first_line(error)}). Install the package, or name its folder in '
            'PYTHONPATH.'
        ) from error
    if isinstance(target, Arch) or callable(target):
        return target
    raise UsageError(f'{name}={reference}: this is {type(target).__name__}, not a function or class.')

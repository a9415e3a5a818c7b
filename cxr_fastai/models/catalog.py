"""The names of all architectures, and their parameters, input size and weights, without building their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from cxr_fastai.core.environment import is_installed
from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.models.architectures import ARCHS, find_arch
from cxr_fastai.models.ensembles import split_name
from cxr_fastai.models.libraries import NOT_CUT_BY_FASTAI, TORCHVISION, VISION_LEARNER, torchvision_names
from cxr_fastai.models.registry import is_timm_name, registered_names
from cxr_fastai.models.weights import timm_body

DEFAULT_SIZE = 224
MAX_PARAMETERS = 200_000_000
"""Networks with more parameters are not built to count them."""


@dataclass(frozen=True)
class ArchFacts:
    """What is known about an architecture.

    `parameters` is their number with a head for two classes; None if they cannot be counted. `size` is the side in
    pixels of the images of its pretrained weights, or 224, and `fixed_size` whether the network accepts no other.
    `weights` are the names that `--weights` accepts besides `none`. `problem` says why it cannot be built.
    """

    name: str
    parameters: int | None
    size: int
    fixed_size: bool
    weights: tuple[str, ...]
    problem: str = ''


def list_archs(pattern: str | None = None) -> list[str]:
    """Return the names of architectures that match `pattern`: those of this package, registered ones, then libraries.

    `pattern` may contain `*` and `?`; without them, it matches names that contain it. None returns the names of this
    package and registered ones. Those of fastai's `vision_learner` match only patterns that begin with its name.
    """
    own = [*ARCHS, *registered_names()]
    if pattern is None:
        return own
    torchvision = [TORCHVISION + name for name in torchvision_names()]
    names = [*own, *torchvision, *(name for name in timm_names() if name not in own)]
    if pattern.startswith(VISION_LEARNER.rstrip('.')):
        names = [VISION_LEARNER + name for name in torchvision_names() if not name.startswith(NOT_CUT_BY_FASTAI)]
        names += [f'{VISION_LEARNER}timm.{name}' for name in timm_names()]
    return _match(names, pattern)


def _match(names: Iterable[str], pattern: str) -> list[str]:
    if not set(pattern) & set('*?['):
        pattern = f'*{pattern}*'
    return [name for name in names if fnmatchcase(name, pattern)]


def timm_names() -> list[str]:
    """Return the names of timm's networks, sorted; empty if timm is not installed."""
    if not is_installed('timm'):
        return []
    import timm

    return list(timm.list_models())


def describe_arch(name: str) -> ArchFacts:
    """Return the facts about the architecture `name`.

    Raises `UsageError` if it is unknown. If its network cannot be built, the facts say why.
    """
    if name not in list_archs():
        find_arch(name)
    try:
        facts = find_arch(name)
        parameters = count_parameters(name)
    except UsageError as error:
        return ArchFacts(name, None, DEFAULT_SIZE, False, (), first_line(error))
    size = facts.size or _pretrained_size(name)
    return ArchFacts(name, parameters, size, facts.size is not None, tuple(facts.weights))


def count_parameters(name: str) -> int | None:
    """Return the number of parameters of the architecture `name` with a head for two classes; None if unknown.

    Networks of libraries are built without memory for their weights, on torch's device `meta`, where that is possible.
    """
    facts = find_arch(name)
    if facts.parameters is not None:
        return facts.parameters
    if name in registered_names():
        return _count(facts.build())
    if is_timm_name(name):
        return _count_timm(name)
    try:
        with torch.device('meta'):
            return _count(facts.build())
    except (RuntimeError, NotImplementedError):  # it computes with numbers, which this device does not have
        if torchvision_facts(name).get('num_params', MAX_PARAMETERS) >= MAX_PARAMETERS:
            return None
        return _count(facts.build())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_timm(name: str) -> int:
    """Return the parameters of timm's `name` without running it, which takes seconds also on the device `meta`."""
    with torch.device('meta'):
        body: Any = timm_body(name, pooled=True)
    features = getattr(body, 'head_hidden_size', None) or body.num_features
    return _count(body) + _count(nn.Linear(features, len(VOCAB)))


def torchvision_facts(name: str) -> dict[str, Any]:
    """Return what torchvision publishes about the default weights of `name`; empty for networks of other libraries."""
    library, _, rest = name.partition('.')
    if library not in ('torchvision', 'vision_learner') or rest not in torchvision_names():
        return {}
    from torchvision.models import get_model_weights

    weights = get_model_weights(rest)['DEFAULT']
    return {**weights.meta, 'size': weights.transforms().crop_size[0]}


def _pretrained_size(name: str) -> int:
    """Return the side in pixels of the images for which the default weights of `name` were trained, or 224."""
    _, name = split_name(name)
    size = torchvision_facts(name).get('size')
    if size is not None or name in ARCHS or name in registered_names():
        return size or DEFAULT_SIZE
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(f'{VISION_LEARNER}timm.'))
    return config.input_size[-1] if config else DEFAULT_SIZE

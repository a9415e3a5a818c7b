"""Networks of torchvision and timm by name, as `Sequential(body, head)`, and the facts about them.

`torchvision.NAME` and the names of timm have our head, average pooling and one linear layer. `vision_learner.NAME` (of
torchvision) and `vision_learner.timm.NAME` are the networks that fastai's `vision_learner` builds, with the same names
in the state dict, so that the network of a stock fastai `Learner` can be loaded.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.models.bodies import (
    TimmFeatures,
    count_features,
    cut_body,
    evaluating,
    linear_head,
    vision_learner_head,
)
from cxr_fastai.models.phases import FROM_SCRATCH, PRETRAINED
from cxr_fastai.models.registry import Arch
from cxr_fastai.models.weights import timm_body

TORCHVISION = 'torchvision.'
VISION_LEARNER = 'vision_learner.'
TIMM = 'timm.'
NOT_CUTTABLE = ('googlenet', 'inception_', 'maxvit_', 'vit_')
"""First letters of the networks in torchvision whose `forward` does more than to call their children in order."""
NOT_CUT_BY_FASTAI = ('mnasnet', 'mobilenet_v2', 'shufflenet_')
"""First letters of those that pool in `forward`, so that fastai finds no layer to cut at, or a wrong one."""


def find_library_arch(arch: str) -> Arch | None:
    """Return the facts about `torchvision.NAME` or `vision_learner.NAME`; None for other names.

    Raises `UsageError` if the library does not know the name, or if its network cannot be cut.
    """
    if arch.startswith(TORCHVISION):
        name = arch.removeprefix(TORCHVISION)
        _check_torchvision(arch, name)
        return Arch(partial(torchvision_model, name), PRETRAINED, _torchvision_weights(name))
    if arch.startswith(VISION_LEARNER + TIMM):
        name = arch.removeprefix(VISION_LEARNER + TIMM)
        facts = find_timm_arch(name)
        return Arch(partial(timm_vision_learner, name), facts.phases, facts.weights, facts.size)
    if arch.startswith(VISION_LEARNER):
        name = arch.removeprefix(VISION_LEARNER)
        _check_torchvision(arch, name)
        if name.startswith(NOT_CUT_BY_FASTAI):
            raise UsageError(f"--arch {arch}: fastai's vision_learner cannot cut this network. Use torchvision.{name}.")
        return Arch(partial(vision_learner_model, name), PRETRAINED, _torchvision_weights(name))
    return None


def _check_torchvision(arch: str, name: str) -> None:
    """Raise `UsageError` if torchvision has no classifier `name`, or if it cannot be cut."""
    from torchvision import models

    if name in torchvision_names():
        return
    if name in models.list_models(module=models):
        raise UsageError(
            f'--arch {arch}: cannot be cut into body and head, because its forward does more than to call its layers '
            'in order. Choose a network of timm instead.'
        )
    similar = get_close_matches(name, torchvision_names())
    examples = f', such as {", ".join(similar)}' if similar else ''
    raise UsageError(f'--arch {arch} is unknown: choose a classifier in torchvision.models{examples}.')


def torchvision_names() -> list[str]:
    """Return the names of the classifiers in torchvision that can be cut, sorted."""
    from torchvision import models

    return [name for name in models.list_models(module=models) if not name.startswith(NOT_CUTTABLE)]


def _torchvision_weights(name: str) -> dict[str, str]:
    """Return torchvision's weights of `name`, name to source: `imagenet` for its default, and all by their names."""
    from torchvision import models

    enum = models.get_model_weights(name)
    sources = {member.name.lower(): f'torchvision:{enum.__name__}.{member.name}' for member in enum}
    return {'imagenet': sources[enum['DEFAULT'].name.lower()], **sources}


def torchvision_model(name: str) -> nn.Sequential:
    """Return torchvision's network `name`, cut into body and a new head; the layers of the body are numbered."""
    from torchvision import models

    body = cut_body(models.get_model(name, weights=None))
    return nn.Sequential(body, linear_head(count_features(body)))


def vision_learner_model(name: str) -> nn.Sequential:
    """Return the network that fastai's `vision_learner` builds for torchvision's `name`."""
    from torchvision import models

    body = cut_body(models.get_model(name, weights=None))
    return nn.Sequential(body, vision_learner_head(count_features(body)))


def timm_vision_learner(name: str) -> nn.Sequential:
    """Return the network that fastai's `vision_learner` builds for timm's `name`."""
    model: Any = timm_body(name, pooled=True)
    pooled = model.default_cfg.get('pool_size') is None
    return nn.Sequential(TimmFeatures(model, pooled), vision_learner_head(model.num_features, pooled))


def timm_model(name: str) -> nn.Sequential:
    """Return timm's network `name` with a new head; the layers of the body keep timm's names.

    If the body returns feature maps (n, c, h, w), the head is average pooling and Linear, otherwise Linear alone.
    Raises `UsageError` if the body returns neither maps nor vectors.
    """
    body = timm_body(name)
    features = _features(body)
    if isinstance(features, Tensor) and features.ndim == 4 and features.shape[2] == features.shape[3]:
        return nn.Sequential(body, linear_head(features.shape[1]))
    body = timm_body(name, pooled=True)
    features = _features(body)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(f'--arch {name}: this network of timm returns no features (n, c). Choose another network.')
    return nn.Sequential(body, nn.Sequential(nn.Linear(features.shape[1], len(VOCAB))))


def _features(body: Any) -> Any:
    """Return the output of a network of timm for one image of its default size."""
    with evaluating(body):
        return body(torch.zeros(1, *body.default_cfg['input_size']))


def similar_in_timm(arch: str) -> str:
    """Return the words `, such as NAME, NAME` with names of timm that contain `arch` or are like it; empty if none."""
    import timm

    similar = timm.list_models(f'*{arch}*')[:3] or get_close_matches(arch, timm.list_models())
    return f', such as {", ".join(similar)}' if similar else ''


def find_timm_arch(arch: str) -> Arch:
    """Return the facts about timm's network `arch`. Raises `UsageError` if timm is missing or does not know it."""
    require_package('timm', f'--arch {arch}', 'timm')
    import timm

    if not timm.is_model(arch):
        raise UsageError(f'--arch {arch} is unknown: choose a name that timm knows{similar_in_timm(arch)}.')
    try:
        config = timm.get_pretrained_cfg(arch)
    except RuntimeError as error:  # `NAME.TAG` with an unknown tag
        raise UsageError(f'--arch {arch} is unknown: {first_line(error)} Choose a name that timm knows.') from None
    size = config.input_size[-1] if config and config.fixed_input_size else None
    if config and timm.is_model_pretrained(arch):
        return Arch(partial(timm_model, arch), PRETRAINED, {'imagenet': f'timm:{arch}'}, size)
    return Arch(partial(timm_model, arch), FROM_SCRATCH, {}, size)

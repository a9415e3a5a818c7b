"""Ensembles: trained networks of one architecture in one `Sequential(body, head)` that returns their mean logits.

An ensemble has a name, `ensembleN.NAME`, so that a new process can build it: `ensemble3.resnet50` is three networks of
the architecture `resnet50`. Its body concatenates the feature maps of the members along the channels, and its head
applies to each part the head of its member. So evaluation, maps, bundles and ONNX files need no code of their own.

Grad-CAM weights each channel by its mean gradient. The gradient of the mean logit is that of the member's logit divided
by the number of members, so that the map of an ensemble, before negative values are removed, is the mean of the maps of
its members.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.models.bodies import POOLINGS
from cxr_fastai.models.registry import ENSEMBLE_NAME, Arch

MIN_MEMBERS = 2
MAX_MEMBERS = 20
"""Largest number of networks in an ensemble: prediction takes as many times as long as with one."""
MAX_NAME = 80
"""Number of characters of a name that an error repeats."""


class ConcatenatedMaps(nn.ModuleList):
    """Bodies of the members: images (n, 3, h, w) to feature maps (n, m * c, h, w) of m bodies with c channels each."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute the feature maps of each body and concatenate them along the channels."""
        return torch.cat([body(images) for body in self], dim=1)


class MeanLogits(nn.ModuleList):
    """Heads of the members: feature maps (n, m * c, h, w) to the mean (n, 2) of the logits of m heads."""

    def forward(self, maps: Tensor) -> Tensor:
        """Apply each head to the channels of its member, and average the logits."""
        parts = maps.chunk(len(self), dim=1)
        logits = [head(part.clone()) for head, part in zip(self, parts, strict=True)]  # a head may work in place
        return torch.stack(logits).mean(dim=0)


def make_ensemble(members: Sequence[nn.Module]) -> nn.Sequential:
    """Return the ensemble of copies of the `members`, each a `Sequential(body, head)` of one architecture.

    Its logits (n, 2) are the means of those of the members. A pooling layer at the end of the bodies, where maps would
    have a lower resolution, is applied after the concatenation, which gives the same values. Raises `UsageError` unless
    there are `MIN_MEMBERS` to `MAX_MEMBERS` members.
    """
    check_number(len(members), 'the ensemble')
    bodies, heads = [], []
    for member in members:
        body, head = copy.deepcopy(member).children()
        bodies.append(body)
        heads.append(head)
    poolings = [_take_last_pooling(body) for body in bodies]
    # `maps` computes nothing: it is the layer that maps are computed from.
    layers: OrderedDict[str, nn.Module] = OrderedDict(members=ConcatenatedMaps(bodies), maps=nn.Identity())
    if poolings[0] is not None:
        layers['pooling'] = poolings[0]
    return nn.Sequential(nn.Sequential(layers), MeanLogits(heads))


def _take_last_pooling(body: nn.Module) -> nn.Module | None:
    """Replace the pooling layer that `body` ends in by an identity and return it; None if it ends in another layer."""
    parent = body
    while isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward and len(parent) > 0:
        last = parent[-1]
        if isinstance(last, POOLINGS):
            parent[-1] = nn.Identity()
            return last
        parent = last
    return None


def name_ensemble(number: int, arch: str) -> str:
    """Return the name of the ensemble of `number` networks of the architecture `arch`."""
    return f'ensemble{number}.{arch}'


def split_name(arch: str) -> tuple[int, str]:
    """Return the number of members of the ensemble `arch` and their architecture; 1 and `arch` for another name.

    Raises `UsageError` for a number that is not from `MIN_MEMBERS` to `MAX_MEMBERS`, and for an ensemble of ensembles.
    """
    match = ENSEMBLE_NAME.fullmatch(arch)
    if not match:
        return 1, arch
    digits, member = match.groups()
    shown = arch[:MAX_NAME]  # a model file can contain any text
    if digits.startswith('0'):
        raise UsageError(f'--arch {shown}: write the number of members without a zero at the start.')
    check_number(int(digits), f'--arch {shown}')
    if ENSEMBLE_NAME.fullmatch(member):
        raise UsageError(f'--arch {shown}: an ensemble of ensembles. Combine the runs of single networks instead.')
    return int(digits), member


def check_number(number: int, where: str) -> None:
    """Raise `UsageError`, which starts with `where`, unless an ensemble can have `number` members."""
    if not MIN_MEMBERS <= number <= MAX_MEMBERS:
        raise UsageError(f'{where}: {counted(number, "member")}, but {MIN_MEMBERS} to {MAX_MEMBERS} are possible.')


def ensemble_arch(number: int, member: Arch) -> Arch:
    """Return the facts about the ensemble of `number` networks of the architecture with the facts `member`.

    It has no phases and no initial weights, because the members are trained and not the ensemble.
    """
    parameters = None if member.parameters is None else number * member.parameters
    return Arch(partial(_build, number, member.build), {}, size=member.size, parameters=parameters)


def _build(number: int, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    """Return an ensemble of copies of one network, whose weights are meant to be replaced."""
    return make_ensemble([build()] * number)


def check_not_ensemble(arch: str) -> None:
    """Raise `UsageError` if `arch` is an ensemble, which cannot be trained."""
    number, member = split_name(arch)
    if number > 1:
        raise UsageError(
            f'--arch {arch}: an ensemble is made of trained networks. Train {number} runs with --arch {member}, for '
            f'example with --seeds {number}, and combine them: `cxr-fastai combine RUN... --out RUN`.'
        )

"""The phases of the named recipes: which part of a network is trained, for how long and at which learning rate.

They depend on whether training starts from pretrained weights. This module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import EXTENSION, Phase


class PhaseShare(NamedTuple):
    """A phase of a recipe whose number of epochs is not fixed yet: `share` is its fraction of all epochs."""

    name: str
    share: float
    lr: float
    frozen: bool


FROM_SCRATCH: dict[str, tuple[PhaseShare, ...]] = {
    'reference': (PhaseShare('train', 1, 1e-3, frozen=False),),
    'tuned': (PhaseShare('train', 1, 3e-3, frozen=False),),
}
"""Name of a recipe to its phases, for networks with random weights."""
PRETRAINED: dict[str, tuple[PhaseShare, ...]] = {
    'reference': (
        PhaseShare('frozen', 1 / 3, 1e-3, frozen=True),
        PhaseShare('fine-tune', 2 / 3, 1e-5, frozen=False),
    ),
    'tuned': (PhaseShare('train', 1, 1e-3, frozen=False),),
}
"""Name of a recipe to its phases, for networks with pretrained weights."""
EPOCHS = {'reference': 15, 'tuned': 6}
"""Default number of epochs of each recipe."""


def distribute(epochs: int, shares: Sequence[PhaseShare], lr_factor: float = 1) -> tuple[Phase, ...]:
    """Distribute the `epochs` over the phases, and multiply their learning rates by `lr_factor`.

    Every phase but the last gets at least one epoch, the last one the rest. A phase without epochs is omitted.
    """
    counts = [max(1, round(phase.share * epochs)) for phase in shares[:-1]]
    counts.append(epochs - sum(counts))
    return tuple(
        Phase(phase.name, count, phase.lr * lr_factor, phase.frozen)
        for phase, count in zip(shares, counts, strict=True)
        if count > 0
    )


def divide(
    epochs: int, shares: Sequence[PhaseShare], lr: float | None = None, frozen_epochs: int | None = None
) -> tuple[Phase, ...]:
    """Distribute the `epochs` over the phases, with the learning rate `lr` and `frozen_epochs` in the first of them.

    By default both are those of the `shares`. Raises `UsageError` as `freeze_first`.
    """
    if frozen_epochs is not None:
        shares = freeze_first(epochs, shares, frozen_epochs)
    return distribute(epochs, shares, 1 if lr is None else lr / shares[0].lr)


def scale_rates(phases: Sequence[Phase], lr: float) -> tuple[Phase, ...]:
    """Return the `phases` with the learning rate `lr` in the first one; the others keep their ratio to it."""
    return tuple(replace(phase, lr=lr * (phase.lr / phases[0].lr)) for phase in phases)


def find_frozen_epochs(phases: Sequence[Phase], shares: Sequence[PhaseShare]) -> int | None:
    """Return the frozen epochs with which `phases` begin; None if there are none, or as many as the `shares` give."""
    planned = [phase for phase in phases if not phase.name.startswith(EXTENSION)]
    if not planned or not planned[0].frozen or not shares[0].frozen:
        return None
    default, *_ = distribute(sum(phase.epochs for phase in planned), shares)
    return None if planned[0].epochs == default.epochs else planned[0].epochs


def are_divided(phases: Sequence[Phase], shares: Sequence[PhaseShare]) -> bool:
    """Return whether `phases` are the `shares` for some number of epochs, of frozen epochs, and some learning rate."""
    epochs = sum(phase.epochs for phase in phases)
    divided = divide(epochs, shares, phases[0].lr, find_frozen_epochs(phases, shares))
    return len(phases) == len(divided) and all(
        math.isclose(phase.lr, other.lr) and replace(phase, lr=other.lr) == other
        for phase, other in zip(phases, divided, strict=True)
    )


def freeze_first(epochs: int, shares: Sequence[PhaseShare], frozen_epochs: int) -> tuple[PhaseShare, ...]:
    """Return the `shares` with exactly `frozen_epochs` of all `epochs` in the first phase, whose body is frozen.

    The other phases keep their ratio. Raises `UsageError` if the first phase is not frozen, and for a number below 1 or
    above `epochs`.
    """
    first, *others = shares
    if not first.frozen:
        raise UsageError(
            f'--freeze-epochs {frozen_epochs}: this training has no frozen phase, but {describe_shares(shares)}. Omit '
            '--freeze-epochs, or choose a pretrained network with --recipe reference, such as --arch resnet50.'
        )
    if not 1 <= frozen_epochs <= epochs:
        raise UsageError(
            f'--freeze-epochs {frozen_epochs}: the training has {counted(epochs, "epoch")}. Choose a number from 1 to '
            f'{epochs}, or more --epochs.'
        )
    share = frozen_epochs / epochs
    rescaled = [other._replace(share=other.share * (1 - share) / (1 - first.share)) for other in others]
    return first._replace(share=share), *rescaled


def describe_shares(shares: Sequence[PhaseShare]) -> str:
    """Return the phases of a recipe as text, such as `frozen at 0.001 for 1/3 of the epochs, then train at 1e-05`."""
    texts = [
        f'{phase.name} at {phase.lr:g} for {Fraction(phase.share).limit_denominator(100)} of the epochs'
        for phase in shares[:-1]
    ]
    return ', then '.join([*texts, f'{shares[-1].name} at {shares[-1].lr:g}'])

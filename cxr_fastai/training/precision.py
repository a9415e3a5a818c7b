"""Mixed precision: fastai's callback on any device, and the choice of a precision by measurement.

Precision affects training steps only, so validation and the exported learner compute exactly what a `Predictor`
computes.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.foundation import L
from torch.nn.functional import cross_entropy

from cxr_fastai.core.hardware import bf16_instructions
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import VOCAB, Recipe, check_choice
from cxr_fastai.models.networks import create_network
from cxr_fastai.training.depthwise import DepthwiseGradients

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}
AUTO = 'auto'
MIN_STEPS = 200
"""Training steps from which a trial is worth its time: it takes as long as about a dozen of them."""
MIN_GAIN = 1.2
"""How many times as fast training must be for a lower precision to be chosen."""
ROUNDS = 3
"""Timed steps with each precision; the fastest counts, because other programs can only slow a step down."""

log = logging.getLogger(__name__)


class Precision(MixedPrecision):
    """fastai's `MixedPrecision` for training steps on any device. It saves the scale of the loss in checkpoints.

    On a processor the gradients of depthwise convolutions are computed in fp32, see `DepthwiseGradients`; not if the
    steps are compiled.
    """

    def __init__(self, precision: str) -> None:
        super().__init__(amp_mode=AMPMode(precision))
        self.entered = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return self.learn.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learn.scaler.load_state_dict(state)

    def before_fit(self) -> None:
        """Replaces fastai's method, which supports CUDA only."""
        device = self.dls.device.type
        dtype = DTYPES[self.amp_mode.value]
        self.autocast = torch.autocast(device, dtype=dtype)
        self.learn.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
        self.scales = L()

    def before_batch(self) -> None:
        """Enter autocast. Replaces fastai's method, which leaves it only after a step that succeeds."""
        if not self.training:
            return
        self.entered.enter_context(self.autocast)
        if self.dls.device.type == 'cpu' and not hasattr(self.learn, 'compile_steps'):
            self.entered.enter_context(DepthwiseGradients())

    def after_loss(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave autocast, if it is entered. The learner calls this also when an exception ended the step."""
        self.entered.close()


def check_precision(precision: str) -> None:
    """Raise `UsageError` if `precision` is neither `auto` nor one that a recipe may have."""
    check_choice('precision', precision, AUTO)


def choose_precision(recipe: Recipe, device: torch.device, n_images: int, compiled: bool = False) -> dict[str, Any]:
    """Choose the precision in which `recipe` trains fastest on `device`, with `n_images` training images.

    A lower one is chosen if the processor or GPU has instructions for it, and if a trial of a few steps of this network
    is at least `MIN_GAIN` times as fast. A short training on a processor is not worth a trial, and is done in fp32.
    The steps of the trial are not compiled, but compute what a `compiled` training does.

    Returns:
        Facts for the journal: the `precision`, the `reason`, and the milliseconds of a step in each.
    """
    candidate = lower_precision(device)
    n_steps = sum(phase.epochs for phase in recipe.phases) * math.ceil(n_images / recipe.batch_size)
    if candidate is None:
        return _decide('fp32', f'{device.type} computes no faster in a lower one')
    if n_steps < MIN_STEPS:
        short = f'a training of {counted(n_steps, "step")} is too short for a trial'
        return _decide('fp32' if device.type == 'cpu' else candidate, short)
    times = time_steps(recipe, device, ('fp32', candidate), compiled)
    gain = times['fp32'] / times[candidate]
    measured = f'a step in {candidate} is {gain:.2f} times as fast as in fp32'
    return _decide(candidate if gain >= MIN_GAIN else 'fp32', measured, times)


def _decide(precision: str, reason: str, times: dict[str, float] | None = None) -> dict[str, Any]:
    log.info('precision %s: %s', precision, reason)
    milliseconds = {name: round(1000 * seconds, 1) for name, seconds in (times or {}).items()}
    return {'precision': precision, 'reason': reason, 'milliseconds': milliseconds}


def lower_precision(device: torch.device) -> str | None:
    """Return the precision below fp32 for which `device` has instructions; None if it has none."""
    if device.type == 'cuda':
        return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    if device.type == 'cpu' and bf16_instructions():
        return 'bf16'
    return None


def time_steps(
    recipe: Recipe, device: torch.device, precisions: tuple[str, ...], compiled: bool = False
) -> dict[str, float]:
    """Return the seconds of a training step of `recipe` in each of `precisions`, on random images.

    The steps alternate, after one of each that is not counted. Random numbers of the training are not used up. As in
    `Precision`, the gradients of depthwise convolutions are computed in fp32 unless the training is `compiled`.
    """
    gradients = nullcontext if compiled else DepthwiseGradients
    with torch.random.fork_rng():
        network = create_network(recipe.arch, False, recipe.size).model
        network = network.to(device).to(memory_format=torch.channels_last).train()
        images = torch.rand(recipe.batch_size, 3, recipe.size, recipe.size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.arange(recipe.batch_size, device=device) % len(VOCAB)
        times: dict[str, list[float]] = {name: [] for name in precisions}
        for _ in range(ROUNDS + 1):
            for name in precisions:
                autocast = torch.autocast(device.type, dtype=DTYPES.get(name), enabled=name in DTYPES)
                start = time.perf_counter()
                with autocast, gradients():
                    loss = cross_entropy(network(images), targets)
                loss.backward()
                if device.type == 'cuda':
                    torch.cuda.synchronize(device)
                times[name].append(time.perf_counter() - start)
                network.zero_grad(set_to_none=True)
    return {name: min(seconds[1:]) for name, seconds in times.items()}

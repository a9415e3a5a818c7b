"""Mixed precision, `torch.compile` and a description of the processor.

Precision and compilation affect training steps only, so validation and the exported learner compute exactly what a
`Predictor` computes.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.foundation import L
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cxr_fastai.core.errors import CXRWarning, UsageError, first_line
from cxr_fastai.core.recipe import CHOICES
from cxr_fastai.training.learner import network

COMPILE = ('on', 'off')
"""Values of `--compile`."""
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def choose_precision(precision: str) -> str:
    """Return the `precision` to train with; `auto` is replaced by the best one of this machine.

    That is bf16 on a GPU that supports it, fp16 on another GPU, and fp32 on a CPU. Raises `UsageError` for another
    name.
    """
    if precision in CHOICES['precision']:
        return precision
    if precision != 'auto':
        raise UsageError(f'--precision {precision}: choose auto or {" or ".join(CHOICES["precision"])}.')
    if not torch.cuda.is_available():
        return 'fp32'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def describe_hardware(device: torch.device) -> str:
    """Return the model of the processor or GPU that trains, without the name of the host."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{_cpu_model()}, {os.cpu_count()} cores'


def _cpu_model() -> str:
    try:
        cpuinfo = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        cpuinfo = ''
    match = re.search(r'^model name\s*:\s*(.+)$', cpuinfo, re.MULTILINE)
    if match:
        return match[1].strip()
    return platform.processor() or platform.machine() or 'unknown processor'


class Precision(MixedPrecision):
    """fastai's `MixedPrecision` for training steps on any device. It saves the scale of the loss in checkpoints."""

    def __init__(self, precision: str) -> None:
        super().__init__(amp_mode=AMPMode(precision))

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
        if self.training:
            super().before_batch()

    def after_loss(self) -> None:
        if self.training:
            super().after_loss()


def check_compile(compile: str) -> None:
    """Raise `UsageError` if `compile` is not a value of `--compile`."""
    if compile not in COMPILE:
        raise UsageError(f'--compile {compile}: choose {" or ".join(COMPILE)}.')


def can_compile(device: torch.device) -> bool:
    """Return True if `torch.compile` has the compiler that it needs for `device`; warn if not."""
    compiler = 'triton' if device.type == 'cuda' else 'C++ compiler'
    if device.type == 'cuda':
        installed = find_spec('triton') is not None
    else:
        names = (os.environ.get('CXX'), 'g++', 'clang++', 'cl')
        installed = any(name and shutil.which(name) for name in names)
    if not installed:
        warnings.warn(
            f'no {compiler} was found, so training is not compiled. Install one, or pass --compile off.',
            CXRWarning,
            stacklevel=2,
        )
    return installed


class CompileSteps(Callback):
    """Run training steps through `torch.compile`, if the batch is full and its images have `size` pixels per side.

    Other batches and validation are not compiled, because every other shape would be compiled separately. The compiled
    function replaces `forward` only during the step, so that state dicts, hooks and pickles do not change. If the
    compilation fails, a warning is issued and training continues without it.
    """

    order = 12

    def __init__(self, size: int) -> None:
        self.size = size
        self.compiled: Any = None
        self.failed = False

    def before_fit(self) -> None:
        self.network = network(self.learn)
        if self.compiled is None:
            # With `fallback_random` dropout draws the same numbers as without compilation, and after a resume.
            self.compiled = torch.compile(self.network.forward, dynamic=False, options={'fallback_random': True})

    def before_batch(self) -> None:
        images = self.xb[0]
        full_batch = len(images) == self.dls.train.bs
        full_size = images.shape[-1] == self.size
        if self.training and full_batch and full_size and not self.failed:
            self.network.__dict__['forward'] = self._compiled_forward

    def after_pred(self) -> None:
        self._restore_forward()

    def after_cancel_batch(self) -> None:
        self._restore_forward()

    def _restore_forward(self) -> None:
        self.network.__dict__.pop('forward', None)

    def _compiled_forward(self, images: Tensor) -> Tensor:
        self._restore_forward()  # the compiled function calls the original one
        try:
            return self.compiled(images)
        except TorchDynamoException as error:
            self.failed = True
            warnings.warn(
                f'compiling failed ({first_line(error)}). Training continues without it.', CXRWarning, stacklevel=2
            )
            return self.network(images)

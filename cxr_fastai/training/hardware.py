"""What suits the device and the length of a training: mixed precision and compiled steps, both in training alone, so
that validation and the exported learner are always what a `Predictor` gives."""

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
from cxr_fastai.core.recipe import CHOICES, Recipe
from cxr_fastai.models.architectures import find_arch
from cxr_fastai.training.learner import network

COMPILE = ('auto', 'on', 'off')
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def choose_precision(asked: str) -> str:
    """The precision that `asked` means on this machine: for `auto`, bf16 on a GPU that has it, fp16 on another, fp32 on
    a CPU."""
    if asked in CHOICES['precision']:
        return asked
    if asked != 'auto':
        raise UsageError(f'--precision {asked}: choose auto or {" or ".join(CHOICES["precision"])}.')
    if not torch.cuda.is_available():
        return 'fp32'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def describe_hardware(device: torch.device) -> str:
    """The processor that trains, in words that name no host."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        facts = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        facts = ''
    named = re.search(r'^model name\s*:\s*(.+)$', facts, re.MULTILINE)
    name = named[1].strip() if named else platform.processor() or platform.machine() or 'unknown processor'
    return f'{name}, {os.cpu_count()} cores'


def check_compile(asked: str) -> None:
    """Raise `UsageError` where `asked` is no way to compile."""
    if asked not in COMPILE:
        raise UsageError(f'--compile {asked}: choose {" or ".join(COMPILE)}.')


def choose_compile(asked: str, recipe: Recipe, images: int, device: torch.device) -> bool:
    """Whether to compile the steps of a training on `images`: where `auto` was `asked`, only if it was measured to repay
    its own time, which depends on network, device and length. Warns where no compiler is found."""
    if asked == 'off' or (asked == 'auto' and not _repays(recipe, images, device)):
        return False
    if missing := _missing_compiler(device):
        warnings.warn(
            f'no {missing} was found, so training is not compiled: install it, or pass --compile off.',
            CXRWarning,
            stacklevel=2,
        )
    return not missing


class Precision(MixedPrecision):
    """fastai's mixed precision on any device, in training alone; it goes on after a stop with the same scale of the
    loss."""

    def __init__(self, precision: str):
        super().__init__(amp_mode=AMPMode(precision))

    def state_dict(self) -> dict[str, Any]:
        return self.learn.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learn.scaler.load_state_dict(state)

    def before_fit(self):  # fastai's takes the device to be CUDA
        device, dtype = self.dls.device.type, DTYPES[self.amp_mode.value]
        self.autocast, self.scales = torch.autocast(device, dtype=dtype), L()
        self.learn.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    def before_batch(self):
        if self.training:
            super().before_batch()

    def after_loss(self):
        if self.training:
            super().after_loss()


class CompileSteps(Callback):
    """Train whole batches of images of the full `size` through `torch.compile`; the rest, and validation, as they are,
    which saves compiling again for each other shape. Keys of the state, hooks and pickles know nothing of it.

    Where compiling fails, training goes on without it, after a warning.
    """

    order = 12

    def __init__(self, size: int):
        self.size, self.compiled, self.failed = size, None, False

    def before_fit(self):
        self.plain = network(self.learn)
        # Dropout as without compiling; and one that another process, or a resumed run, draws again.
        self.compiled = self.compiled or torch.compile(
            self.plain.forward, dynamic=False, options={'fallback_random': True}
        )

    def before_batch(self):
        images = self.xb[0]
        whole = len(images) == self.dls.train.bs and images.shape[-1] == self.size
        if self.training and whole and not self.failed:
            self.plain.forward = self._forward

    def after_pred(self):
        self._stop()

    def after_cancel_batch(self):
        self._stop()

    def _stop(self):
        self.plain.__dict__.pop('forward', None)

    def _forward(self, images: Tensor) -> Tensor:
        self._stop()  # what is compiled is the class's own
        try:
            return self.compiled(images)
        except TorchDynamoException as error:
            self.failed = True
            warnings.warn(
                f'compiling failed ({first_line(error)}), so training goes on without it.', CXRWarning, stacklevel=2
            )
            return self.plain(images)


def _repays(recipe: Recipe, images: int, device: torch.device) -> bool:
    least = find_arch(recipe.arch).compile_repaid.get(device.type)
    seen = images * recipe.epochs * (recipe.size / 224) ** 2
    return least is not None and recipe.start_size == 1 and recipe.precision == 'fp32' and seen >= least


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == 'cuda':
        return None if find_spec('triton') else 'triton'
    compilers = (os.environ.get('CXX'), 'g++', 'clang++', 'cl')
    return None if any(name and shutil.which(name) for name in compilers) else 'C++ compiler'

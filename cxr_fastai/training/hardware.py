"""`torch.compile`, the memory of the process, and a description of the processor.

Compilation affects training steps only, so validation and the exported learner compute exactly what a `Predictor`
computes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from cxr_fastai.core.errors import CXRWarning, UsageError, first_line
from cxr_fastai.models.devices import describe_device

COMPILE = ('on', 'off')
"""Values of `--compile`."""
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Parameters of glibc's `mallopt`, from malloc.h."""
PACKAGES = ('cxr_fastai', 'fastai', 'torch', 'torchvision')
"""Packages that are recorded with their version at the start of a training."""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the facts about the computer and the packages that can change the last digits of a training."""
    facts = {
        'device': str(device),
        'hardware': describe_device(device),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
    }
    return facts | {name: version(name) for name in PACKAGES}


def check_compile(compile: str) -> None:
    """Raise `UsageError` if `compile` is not a value of `--compile`."""
    if compile not in COMPILE:
        raise UsageError(f'--compile {compile}: choose {" or ".join(COMPILE)}.')


def can_compile(device: torch.device) -> bool:
    """Return whether `torch.compile` has the compiler that it needs for `device`; warn if not."""
    installed = has_compiler(device)
    if not installed:
        compiler = 'triton' if device.type == 'cuda' else 'C++ compiler'
        warnings.warn(
            f'no {compiler} was found, so training is not compiled. Install one, or pass --compile off.',
            CXRWarning,
            stacklevel=2,
        )
    return installed


def has_compiler(device: torch.device) -> bool:
    """Return whether `torch.compile` has the compiler that it needs for `device`."""
    if device.type == 'cuda':
        return find_spec('triton') is not None
    names = (os.environ.get('CXX'), 'g++', 'clang++', 'cl')
    return any(name and shutil.which(name) for name in names)


class CompileSteps(Callback):
    """Run training steps through `torch.compile`, if the batch is full and its images have `size` pixels per side.

    Other batches and validation are not compiled, because every other shape would be compiled separately. The compiled
    network takes the place of `Learner.model` only during the step, so that state dicts, hooks and pickles do not
    change. If the compilation fails, a warning is issued and training continues without it.
    """

    order = 12

    def __init__(self, size: int) -> None:
        self.size = size
        self.plain: nn.Module | None = None
        self.compiled: Any = None
        self.failed = False

    def before_fit(self) -> None:
        if self.compiled is None:
            # With `fallback_random` dropout draws the same numbers as without compilation, and after a resume.
            self.compiled = torch.compile(self.learn.model, dynamic=False, options={'fallback_random': True})

    def before_batch(self) -> None:
        images = self.xb[0]
        full_batch = len(images) == self.dls.train.bs
        full_size = images.shape[-1] == self.size
        if self.training and full_batch and full_size and not self.failed:
            self.plain = self.learn.model
            self.learn.model = self._compiled_step

    def after_pred(self) -> None:
        self._restore_model()

    def after_cancel_batch(self) -> None:
        self._restore_model()

    def _restore_model(self) -> None:
        if self.plain is not None:
            self.learn.model = self.plain
            self.plain = None

    def _compiled_step(self, images: Tensor) -> Tensor:
        assert self.plain is not None  # it is called only in the place of the plain network
        try:
            return self.compiled(images)
        except TorchDynamoException as error:
            self.failed = True
            warnings.warn(
                f'compiling failed ({first_line(error)}). Training continues without it.', CXRWarning, stacklevel=2
            )
            return self.plain(images)


def reuse_memory() -> bool:
    """Make glibc keep freed memory for the next step. Returns True if it took effect (Linux with glibc).

    By default glibc returns every freed block of more than 32 MB to the system, and the next step has to map its pages
    again. On two cores this takes half of a training step of the baseline at 224 px, as
    `benchmarks/train_throughput.py` measures. The process then keeps its peak memory until it ends.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))

"""The device on which a network computes, chosen by name: the processor, an NVIDIA GPU or that of a Mac.

This module imports torch only when it is needed: prediction with ONNX Runtime starts without it.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import UsageError, first_line
from cxr_fastai.core.hardware import available_cores, limit_torch_threads, processor
from cxr_fastai.core.progress import counted

if TYPE_CHECKING:
    import torch

DEVICES = 'auto, cpu, cuda, cuda:N or mps'
"""The values of `--device`."""
DRIVERS = (
    Path('/proc/driver/nvidia/version'),
    Path('/dev/dxg'),
    Path(os.environ.get('SYSTEMROOT', '/'), 'System32', 'nvcuda.dll'),
)
"""Files that exist where a driver of NVIDIA is installed, on Linux, in WSL, and on Windows."""

log = logging.getLogger(__name__)


def choose_device(name: str | torch.device = 'auto') -> torch.device:
    """Return the device `name`, one of `DEVICES`. `auto` is the best one that works, and the log says which and why.

    Raises `UsageError` for another name, and if the device is missing, with what to install.
    """
    import torch

    limit_torch_threads()
    text = str(name)
    if text == 'auto':
        return _best_device()
    if not re.fullmatch(r'cpu|cuda(:\d{1,3})?|mps', text):
        raise UsageError(f'--device {text}: unknown. Choose {DEVICES}.')
    device = torch.device(text)
    problem = _find_problem(device)
    if problem:
        raise UsageError(f'--device {text}: {problem}')
    return device


@cache
def _best_device() -> torch.device:
    import torch

    reasons = []
    for name in ('cuda', 'mps'):
        device = torch.device(name)
        problem = _find_problem(device)
        if not problem:
            log.info('computing on %s: %s', name, describe_device(device))
            return device
        reasons.append(problem.split('.')[0])
    log.debug('computing on the processor: %s', '; '.join(reasons))
    return torch.device('cpu')


def _find_problem(device: torch.device) -> str:
    """Return why `device` cannot be used, and what to do about it; empty if it works."""
    import torch

    if device.type == 'cuda':
        if not torch.backends.cuda.is_built():
            return (
                f'torch {torch.__version__} is built without CUDA. Install a build with it, as '
                'https://pytorch.org/get-started/locally describes.'
            )
        if not torch.cuda.is_available():
            return (
                'no NVIDIA GPU with a driver was found. Install its driver (nvidia-smi tests it), or use --device cpu.'
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            return f'this machine has {count} of them, numbered from cuda:0. Choose another.'
    if device.type == 'mps' and not torch.backends.mps.is_available():
        return 'it needs a Mac with Apple silicon and macOS 14 or later. Use --device cpu.'
    try:
        torch.ones(1, device=device).add_(1).cpu()
    except RuntimeError as error:
        return f'it does not compute ({first_line(error)}). Update its driver, or use --device cpu.'
    return ''


def may_have_gpu() -> bool:
    """Return False where a GPU is out of the question, without the seconds that importing torch takes."""
    if sys.platform == 'darwin':
        return platform.machine() == 'arm64'
    return any(path.exists() for path in DRIVERS)


def describe_device(device: torch.device) -> str:
    """Return the model of the processor or GPU, without the name of the host."""
    import torch

    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{processor()}, {counted(available_cores(), "core")}'

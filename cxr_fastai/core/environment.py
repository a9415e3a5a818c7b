"""Information about the running process: its rank in distributed runs, and the optional packages that are installed.

`accelerate launch` and `torchrun` set the environment variables `WORLD_SIZE` (number of processes) and `RANK` (index of
this process). They are read here directly, so that this module does not have to import torch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from cxr_fastai.core.errors import UsageError


def process_count() -> int:
    """Return the number of processes of this run; 1 unless it was started by a launcher."""
    return int(os.environ.get('WORLD_SIZE', 1))


def is_main_process() -> bool:
    """Return True in the only process of a run, or in the first of several. Only this process writes and prints."""
    return process_count() < 2 or int(os.environ.get('RANK', 0)) == 0


def part_of(n: int, rank: int, world: int) -> slice:
    """Return the slice of `n` items that the process `rank` of `world` processes handles.

    The slices are contiguous. Their sizes differ by at most one, and the first ones are the larger.
    """
    size, remainder = divmod(n, world)
    start = rank * size + min(rank, remainder)
    if rank < remainder:
        size += 1
    return slice(start, start + size)


def is_installed(package: str) -> bool:
    """Return True if `package` can be imported."""
    return find_spec(package) is not None


def require_package(package: str, feature: str, extra: str) -> None:
    """Raise `UsageError` if `package`, which the `feature` needs, is not installed.

    The message starts with `feature`, a noun phrase such as `--track wandb`, and names the `extra` that installs it.
    """
    if not is_installed(package):
        raise UsageError(
            f'{feature} needs the package {package}, which is not installed. '
            f'Install it: pip install "cxr_fastai[{extra}]".'
        )

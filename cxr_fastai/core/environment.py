"""Information about the running process: its rank in distributed runs, and the optional packages that are installed.

`accelerate launch` and `torchrun` set the environment variables `WORLD_SIZE` (number of processes) and `RANK` (index of
this process). They are read here directly, so that this module does not have to import torch. They may also be left
over from another program, so they count only in a process that works together with others: see `join_launch`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from cxr_fastai.core.errors import UsageError

ADDRESS = ('MASTER_ADDR', 'MASTER_PORT')
"""Environment variables by which the processes find each other."""
LAUNCH_VARIABLES = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', *ADDRESS)
LAUNCH_ADVICE = 'Start the command by `accelerate launch` or `torchrun`, or unset WORLD_SIZE to run one process.'


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that a launcher started: its `rank`, and the number of `processes`."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def from_environment(cls) -> Launch:
        """Return what the environment variables of the launcher say; a single process if there are none.

        Raises `UsageError` if a variable has an impossible value, or if `WORLD_SIZE` was set without a launcher.
        """
        forget_blank_variables()
        processes = read_integer('WORLD_SIZE', default=1)
        if processes < 2:
            return cls()
        missing = [name for name in ('RANK', *ADDRESS) if not os.environ.get(name, '').strip()]
        if missing:
            raise UsageError(f'WORLD_SIZE={processes}: {missing[0]} is not set. {LAUNCH_ADVICE}')
        rank = read_integer('RANK', default=0)
        if rank >= processes:
            raise UsageError(f'RANK={rank}: not below WORLD_SIZE={processes}. {LAUNCH_ADVICE}')
        return cls(rank, processes)


def forget_blank_variables() -> None:
    """Remove launch variables without a value, such as `WORLD_SIZE=`, from this process: fastai expects numbers."""
    for name in LAUNCH_VARIABLES:
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]


def read_integer(variable: str, default: int) -> int:
    """Return the environment variable as a number from 0, or `default` if it is empty or not set.

    Raises `UsageError` for any other value.
    """
    text = os.environ.get(variable, '').strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f'{variable}={text}: not a number of processes. {LAUNCH_ADVICE}')
    return int(text)


_launches = [Launch()]
"""The place of this process, the last element. A list, because it changes when the process joins others."""


def join_launch(launch: Launch) -> None:
    """Make this process the one of `launch` until it ends: `is_main_process` and `process_count` follow from it."""
    _launches[-1] = launch


def process_count() -> int:
    """Return the number of processes that this one works together with, itself included; 1 if it is alone."""
    return _launches[-1].processes


def is_main_process() -> bool:
    """Return True in the only process of a run, or in the first of several. Only this process writes and prints."""
    return _launches[-1].rank == 0


def part_of(n: int, rank: int, world: int) -> slice:
    """Return the slice of `n` items that the process `rank` of `world` processes handles.

    The slices are contiguous. Their sizes differ by at most one, and the first ones are the larger.
    """
    size, remainder = divmod(n, world)
    start = rank * size + min(rank, remainder)
    if rank < remainder:
        size += 1
    return slice(start, start + size)


@contextmanager
def paused_collector() -> Iterator[None]:
    """Do not collect garbage in this context, which imports modules: it takes 7% of that time, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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

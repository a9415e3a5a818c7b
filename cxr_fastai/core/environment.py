"""Facts about this process: optional packages, and its rank among several processes."""

from __future__ import annotations

import os
from importlib.util import find_spec

from cxr_fastai.core.errors import UsageError


def is_main_process() -> bool:
    """True in the process that writes and speaks: the only one, or the first of several that `accelerate launch` or
    `torchrun` started."""
    return int(os.environ.get('WORLD_SIZE', 1)) < 2 or int(os.environ.get('RANK', 0)) == 0


def process_count() -> int:
    """How many processes there are."""
    return int(os.environ.get('WORLD_SIZE', 1))


def part_of(n: int, rank: int, world: int) -> slice:
    """Which of `n` images the process `rank` of `world` takes; sizes differ by one at most, and the first have more."""
    few, more = divmod(n, world)
    start = rank * few + min(rank, more)
    return slice(start, start + few + (rank < more))


def require_package(package: str, what: str, extra: str) -> None:
    """Raise `UsageError` where the optional `package` is not installed."""
    if find_spec(package) is None:
        raise UsageError(f'{what} needs the package {package}: pip install "cxr_fastai[{extra}]".')

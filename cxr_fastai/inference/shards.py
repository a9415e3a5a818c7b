"""Several processes, started by `accelerate launch` or `torchrun`, share a list: each works on a part of it, and the
one that leads gets all in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

from cxr_fastai.core.environment import is_main_process, part_of, process_count

S, T = TypeVar('S'), TypeVar('T')
ROUND = 256
"""What a process works on before the results of all are brought together."""


@contextmanager
def gathered() -> Iterator[None]:
    """Join the other processes, if there are any. One that fails leaves at once, and its launcher ends the others."""
    if process_count() < 2:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group('gloo')
    yield
    dist.barrier()
    dist.destroy_process_group()


def told(value: T) -> T:
    """`value` as the process that leads has it."""
    if process_count() < 2:
        return value
    import torch.distributed as dist

    dist.broadcast_object_list(box := [value])
    return box[0]


def shared(work: Callable[[Sequence[S]], Iterable[T]], things: Sequence[S], each: int = ROUND) -> Iterator[T]:
    """What `work` makes of `things`, in their order, as it comes; every process does a part, and only the one that
    leads gets any."""
    if process_count() < 2:
        yield from work(things)
        return
    import torch.distributed as dist

    for start in range(0, len(things), each * process_count()):
        here = things[start : start + each * process_count()]
        mine = list(work(here[part_of(len(here), int(os.environ['RANK']), process_count())]))
        dist.gather_object(mine, parts := [None] * process_count() if is_main_process() else None)
        yield from chain.from_iterable(parts or ())

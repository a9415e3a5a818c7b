"""Work in several processes, which `accelerate launch` or `torchrun` starts: joining them, and sharing a list.

With one process nothing is shared, and neither torch nor accelerate is imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from cxr_fastai.core.environment import (
    LAUNCH_ADVICE,
    Launch,
    is_main_process,
    join_launch,
    process_count,
    require_package,
)
from cxr_fastai.core.errors import CXRError, first_line

S = TypeVar('S')
T = TypeVar('T')

ROUND = 256
"""Number of items that each process works on before the results are gathered. It bounds the memory for results."""
JOIN_TIMEOUT = 120
"""Seconds within which all processes must have started."""
MAX_REASON = 100
"""Largest number of characters that an error quotes from torch."""


@contextmanager
def process_group(
    feature: str = 'prediction in several processes', cpu: bool = True, timeout: float = JOIN_TIMEOUT
) -> Iterator[None]:
    """Join the other processes within the block, if there are any; accelerate chooses the device and the backend.

    With `cpu` the processes compute on the CPU only. If this process raises, it ends without waiting for the others,
    and the launcher ends these. Raises `UsageError` if accelerate, which the `feature` needs, is not installed, or if
    the environment variables of the launcher are wrong; and `CXRError` if the others do not join within `timeout`
    seconds.
    """
    launch = Launch.from_environment()
    if launch.processes < 2:
        yield
        return
    require_package('accelerate', feature, 'scale')
    join_launch(launch)
    with _ended_by_signals():
        state = _join(launch, cpu, timeout)
    yield
    state.wait_for_everyone()
    state.destroy_process_group()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process at once: Python cannot handle them while torch waits for other processes.

    Nothing is lost, because a process that has not joined has not written anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _join(launch: Launch, cpu: bool, timeout: float) -> Any:
    """Return the state of accelerate after all processes of `launch` have joined. Raises `CXRError`."""
    from accelerate import PartialState
    from torch.distributed import rendezvous

    try:
        # torch waits for the other processes for 30 minutes, which suits their work, but not their start.
        store, rank, processes = next(
            rendezvous('env://', launch.rank, launch.processes, timeout=timedelta(seconds=timeout))
        )
        return PartialState(cpu=cpu, store=store, rank=rank, world_size=processes)
    except (RuntimeError, ValueError) as error:
        place = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        raise CXRError(
            f'process {launch.rank} of {launch.processes}: the others did not join at {place} within {timeout:g} s '
            f'({first_line(error, MAX_REASON)}). {LAUNCH_ADVICE}'
        ) from None


def broadcast(value: T) -> T:
    """Return the `value` of the main process in every process."""
    if process_count() < 2:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def map_in_processes(
    func: Callable[[Sequence[S]], Iterable[T]], items: Sequence[S], per_round: int = ROUND
) -> Iterator[T]:
    """Yield the results of `func`, which returns one result for each of the items it is given, in the order of `items`.

    Each process calls `func` with `per_round` items at a time. Only the main process yields results; in the others the
    iterator is empty, but must be consumed too. With one process `func` is called once, with all items.
    """
    if process_count() < 2:
        yield from func(items)
        return
    from accelerate import PartialState
    from accelerate.utils import gather_object

    round_size = per_round * process_count()
    for start in range(0, len(items), round_size):
        round_items = list(items[start : start + round_size])
        with PartialState().split_between_processes(round_items) as own_items:
            results = gather_object(list(func(own_items)))
        if is_main_process():
            # Some versions of accelerate give the last item to every process that has no other.
            yield from results[: len(round_items)]

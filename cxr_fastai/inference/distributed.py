"""Work in several processes, which `accelerate launch` or `torchrun` starts: joining them, and sharing a list.

With one process nothing is shared, and neither torch nor accelerate is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from cxr_fastai.core.environment import is_main_process, process_count, require_package

S = TypeVar('S')
T = TypeVar('T')

ROUND = 256
"""Number of items that each process works on before the results are gathered. It bounds the memory for results."""


@contextmanager
def process_group(feature: str = 'prediction in several processes', cpu: bool = True) -> Iterator[None]:
    """Join the other processes within the block, if there are any; accelerate chooses the device and the backend.

    With `cpu` the processes compute on the CPU only. If this process raises, it ends without waiting for the others,
    and the launcher ends these. Raises `UsageError` if accelerate, which the `feature` needs, is not installed.
    """
    if process_count() < 2:
        yield
        return
    require_package('accelerate', feature, 'scale')
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    yield
    state.wait_for_everyone()
    state.destroy_process_group()


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

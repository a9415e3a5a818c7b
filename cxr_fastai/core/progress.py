"""Work in threads, with progress."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

S, T = TypeVar('S'), TypeVar('T')
UNDER_WAY = 64
"""Images read in threads that nobody has asked for yet."""
SILENCE = 30
"""Seconds between two lines of progress where there is no terminal."""


def progress(steps: Iterable[T], console: Console | None, total: int | None = None) -> Iterator[T]:
    """`steps`, one an image and `total` in all (default: their length), with a bar that vanishes at the end on a
    `console` that is a terminal, and a line every half minute on another."""
    total = len(steps) if total is None else total
    if console and console.is_terminal:
        yield from _with_bar(steps, console, total)
    else:
        yield from _with_lines(steps, console, total)


def in_threads(
    func: Callable[[S], T], images: Sequence[S], workers: int | None = None, console: Console | None = None
) -> Iterator[T]:
    """`func` of each of the `images`, in their order, from `workers` threads (default: the cores), with `progress`.

    Only some are under way at a time, so that results which nobody has taken yet do not fill the memory.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from progress(_ahead(pool, func, images), console, len(images))


def _ahead(pool: ThreadPoolExecutor, func: Callable[[S], T], images: Iterable[S]) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for image in images:
        waiting.append(pool.submit(func, image))
        if len(waiting) == UNDER_WAY:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _with_bar(steps: Iterable[T], console: Console, total: int) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f'{task.speed:,.0f}/s' if task.speed else '')

    columns = ('images', BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(steps, total)


def _with_lines(steps: Iterable[T], console: Console | None, total: int) -> Iterator[T]:
    told = time.monotonic()
    for done, step in enumerate(steps, 1):
        yield step
        if console and time.monotonic() - told > SILENCE:
            told = time.monotonic()
            console.print(f'{done:,} of {total:,} images', highlight=False)

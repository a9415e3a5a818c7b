"""Progress of long work, and threads that read ahead.

On a terminal or in a notebook `tqdm` draws a bar. Elsewhere, for example in a log file, a line is logged every
`LOG_SECONDS` seconds.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cxr_fastai.core.environment import is_main_process

S, T = TypeVar('S'), TypeVar('T')
READ_AHEAD = 64
"""Largest number of results that threads compute before they are consumed."""
LOG_SECONDS = 30
"""Seconds between two log lines where no bar is drawn."""

log = logging.getLogger(__name__)


def progress_bar(total: int | None, description: str = '', **options: Any) -> Any:
    """A `tqdm` bar that is removed when it ends; it draws only on a terminal or in a notebook, and only in the first
    of several processes. `options` are those of `tqdm`."""
    from tqdm.auto import tqdm

    hidden = None if is_main_process() else True  # None: tqdm decides by whether its output is a terminal
    return tqdm(total=total, desc=description or None, leave=False, disable=hidden, **options)


def progress(steps: Iterable[T], total: int | None = None, unit: str = 'image') -> Iterator[T]:
    """Yield `steps`, of which there are `total` (default: their length), and show how many are done."""
    if total is None:
        total = len(steps)  # type: ignore[arg-type]
    last_line = time.monotonic()
    with progress_bar(total, unit=unit) as bar:
        for done, step in enumerate(steps, 1):
            yield step
            bar.update()
            if bar.disable and time.monotonic() - last_line > LOG_SECONDS:
                last_line = time.monotonic()
                log.info('%s of %s %ss', f'{done:,}', f'{total:,}', unit)


def in_threads(
    func: Callable[[S], T], items: Sequence[S], workers: int | None = None, unit: str = 'image'
) -> Iterator[T]:
    """Yield `func(item)` for each of the `items`, in their order, computed by `workers` threads (default: the number of
    cores), and show the progress. At most `READ_AHEAD` results wait in memory."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from progress(_read_ahead(pool, func, items), len(items), unit)


def _read_ahead(pool: ThreadPoolExecutor, func: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(func, item))
        if len(waiting) == READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

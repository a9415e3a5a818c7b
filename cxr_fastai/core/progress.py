"""Progress of long loops, and parallel loops in threads that show their progress.

On a terminal or in a notebook `tqdm` draws a bar. Elsewhere, for example in a log file, a line is logged every
`LOG_SECONDS` seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.hardware import available_cores

S = TypeVar('S')
T = TypeVar('T')

READ_AHEAD = 64
"""Maximum number of results that threads compute before they are consumed."""
LOG_SECONDS = 30
"""Seconds between two log lines where no bar is drawn."""

log = logging.getLogger(__name__)


def progress_bar(total: int | None, description: str = '', **options: Any) -> Any:
    """Return a `tqdm` bar that disappears when it is closed; `options` are passed to `tqdm`.

    The bar is drawn only on a terminal or in a notebook, and only in the main process of a distributed run.
    """
    if 'IPython' in sys.modules:
        from tqdm.auto import tqdm  # a widget in a notebook; it loads asyncio, which slows the start of a command
    else:
        from tqdm import tqdm

    # With None, tqdm draws the bar if its output is a terminal.
    disable = None if is_main_process() else True
    return tqdm(total=total, desc=description or None, leave=False, disable=disable, **options)


def progress(steps: Iterable[T], total: int | None = None, unit: str = 'image') -> Iterator[T]:
    """Yield the `steps` and show how many of `total` are done. `total` may be omitted if `steps` has a length."""
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    goal = '?' if total is None else f'{total:,}'
    last_line = time.monotonic()
    with progress_bar(total, unit=unit) as bar:
        for done, step in enumerate(steps, 1):
            yield step
            bar.update()
            if bar.disable and time.monotonic() - last_line > LOG_SECONDS:
                last_line = time.monotonic()
                log.info('%s of %s %ss', f'{done:,}', goal, unit)


def in_threads(
    func: Callable[[S], T], items: Sequence[S], workers: int | None = None, unit: str = 'image'
) -> Iterator[T]:
    """Yield `func(item)` for each item in order, computed by `workers` threads, and show the progress.

    `workers` defaults to the number of cores. At most `READ_AHEAD` results wait in memory.
    """
    pool = ThreadPoolExecutor(workers or available_cores())
    try:
        yield from progress(_read_ahead(pool, func, items), len(items), unit)
    finally:
        # After an interrupt nobody needs the items that are not computed yet.
        pool.shutdown(wait=False, cancel_futures=True)


def _read_ahead(pool: ThreadPoolExecutor, func: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(func, item))
        if len(waiting) == READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

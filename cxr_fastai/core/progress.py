"""Progress of long loops, and parallel loops in threads that show their progress.

On a terminal or in a notebook `tqdm` draws a bar. Elsewhere, for example in a log file, a line is logged every
`LOG_SECONDS` seconds, so that nobody has to wonder whether a long epoch still runs.
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

    The bar is drawn only on a terminal or in a notebook, and only in the main process of a distributed run. None is
    drawn if the level of the logger `cxr_fastai` is WARNING or higher, as with `--quiet`.
    """
    if 'IPython' in sys.modules:
        from tqdm.auto import tqdm  # a widget in a notebook; it loads asyncio, which slows the start of a command
    else:
        from tqdm import tqdm

    # With None, tqdm draws the bar if its output is a terminal.
    is_quiet = logging.getLogger('cxr_fastai').level >= logging.WARNING
    disable = None if is_main_process() and not is_quiet else True
    return tqdm(total=total, desc=description or None, leave=False, disable=disable, **options)


class ShownProgress:
    """How many of `total` steps of a long loop are done, as a bar, or as lines in the log where no bar is drawn.

    A line has the rate and the time that is left. Call `update` after each step and `close` at the end.
    """

    def __init__(self, total: int | None, description: str = '', unit: str = 'image') -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.bar = progress_bar(total, description, unit=unit)
        self.steps = self.images = 0
        self.start = self.last_line = time.monotonic()

    def update(self, images: int = 1) -> None:
        """Count a step, in which that many `images` were used."""
        self.steps += 1
        self.images += images
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and is_main_process() and now - self.last_line > LOG_SECONDS:
            self.last_line = now
            log.info(self.describe(now - self.start))

    def describe(self, seconds: float) -> str:
        """Return a line about what was done in that many `seconds`."""
        goal = f'? {plural(self.unit)}' if self.total is None else counted(self.total, self.unit)
        line = f'{self.steps:,} of {goal}, {self.images / seconds:.3g} images/s'
        if self.total is not None:
            line += f', {format_seconds(seconds * (self.total / self.steps - 1))} left'
        return f'{self.description}: {line}' if self.description else line

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


def plural(unit: str) -> str:
    """Return the plural of a word such as `image` or `batch`.

    >>> plural('epoch'), plural('batch'), plural('probability')
    ('epochs', 'batches', 'probabilities')
    """
    if unit.endswith('y'):
        return f'{unit[:-1]}ies'
    return f'{unit}es' if unit == 'batch' else f'{unit}s'


def counted(number: int, unit: str = 'image') -> str:
    """Return a number with its word, such as `image` or `batch`, in the singular or plural.

    >>> counted(1), counted(0), counted(2000, 'batch')
    ('1 image', '0 images', '2,000 batches')
    """
    return f'{number:,} {unit if number == 1 else plural(unit)}'


def are(number: int) -> str:
    """Return the verb that follows `counted(number, ...)`: `is` or `are`."""
    return 'is' if number == 1 else 'are'


def format_seconds(seconds: float) -> str:
    """Return a time in words.

    >>> format_seconds(42.4), format_seconds(125), format_seconds(7260)
    ('42 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60} s'
    return f'{whole // 3600} h {whole % 3600 // 60} min'


def progress(steps: Iterable[T], total: int | None = None, unit: str = 'image') -> Iterator[T]:
    """Yield the `steps` and show how many of `total` are done. `total` may be omitted if `steps` has a length."""
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    if total is not None and total <= 1:  # nothing to show, and importing tqdm takes 10 ms
        yield from steps
        return
    shown = ShownProgress(total, unit=unit)
    try:
        for step in steps:
            yield step
            shown.update()
    finally:
        shown.close()


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

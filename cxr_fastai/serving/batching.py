"""Films that arrive one by one are computed together: each waits a few milliseconds for others."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

import numpy as np

Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Films, grey uint8 (n, s, s), become probabilities (n,) and distances (n,): `Predictor.judge`."""


class Batcher:
    """Gives films to `judge` in batches of at most `most`, in a thread of `pool`, one batch at a time.

    The first film waits `wait` seconds for others, while nothing is computed; films that arrive during a batch make the
    next. A film whose request is gone is left out; where a batch fails, each of its films is tried alone.
    """

    def __init__(self, judge: Judge, pool: Executor, most: int = 16, wait: float = 0.004,
                 watch: Callable[[int], None] = lambda size: None):
        self.judge, self.pool, self.most, self.wait, self.watch = judge, pool, most, wait, watch
        self.waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()

    async def submit(self, film: np.ndarray) -> tuple[float, float]:
        """The probability and the distance of the film, grey uint8 (s, s). Raises what `judge`
        raises."""
        found = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((film, found))
        return await found

    async def run(self) -> None:
        """Compute what is submitted, until cancelled."""
        while True:
            batch = [(film, found) for film, found in await self._gather() if not found.done()]
            if batch: await self._compute(*zip(*batch, strict=True))

    async def _gather(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        batch = [await self.waiting.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait):
                while len(batch) < self.most: batch.append(await self.waiting.get())
        return batch

    async def _compute(self, films: tuple[np.ndarray, ...], found: tuple[asyncio.Future, ...]) -> None:
        self.watch(len(films))
        try:
            loop = asyncio.get_running_loop()
            p, distances = await loop.run_in_executor(self.pool, self.judge, np.stack(films))
        except Exception as error:  # a film's, not the end of all others
            if len(films) == 1: return None if found[0].done() else found[0].set_exception(error)
            for film, one in zip(films, found, strict=True):
                if not one.done(): await self._compute((film,), (one,))
            return
        for one, score, distance in zip(found, p, distances, strict=True):
            if not one.done(): one.set_result((float(score), float(distance)))

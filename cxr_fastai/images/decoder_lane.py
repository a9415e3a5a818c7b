"""`Lane`, a queue of images with the processes that decode them, which end an image whose time is over."""

from __future__ import annotations

import heapq
import math
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Event, Thread, current_thread
from typing import Any

from cxr_fastai.core.errors import CXRError, ImageError
from cxr_fastai.images.decoder_worker import NOT_STARTED, DecoderWorker
from cxr_fastai.images.limits import DecodedImage

BUSY_FACTOR = 3
"""How many times longer than its CPU time an image of usual size may take on a busy machine."""
CANCELLED_SECONDS = 1.0
"""An image that nobody waits for any more is decoded for at most this long."""
IDLE_SECONDS = 60.0
"""A process that had nothing to do for so long ends."""
START_SECONDS = 60.0
"""Longest time until a new process is ready."""
TICK_SECONDS = 0.05
"""Interval at which the deadlines of running images are checked."""
Fingerprint = tuple[int, bytes, bytes]
"""The size of a file, its first and its last bytes."""
MAX_REMEMBERED = 1000
"""Number of slow files that are recognised when they come again."""


@dataclass(order=True)
class Task:
    """One image that waits for a process, or is in one. Tasks are sorted by their `turn`, then by their number."""

    turn: float
    number: int
    data: bytes = field(compare=False, repr=False)
    request: dict[str, Any] = field(compare=False)
    fingerprint: Fingerprint = field(compare=False, repr=False)
    result: Future[DecodedImage] = field(compare=False, default_factory=Future)

    def drop_data(self) -> None:
        """Release the contents of the file, also while the task still waits."""
        self.data = b''

    def fail(self, error: Exception) -> None:
        """Let the result raise `error`, unless it is cancelled."""
        with suppress(InvalidStateError):
            self.result.set_exception(error)

    def finish(self, image: DecodedImage) -> None:
        """Set the result to `image`, unless it is cancelled."""
        with suppress(InvalidStateError):
            self.result.set_result(image)


class Lane:
    """A queue, and the processes that decode its images, each with its own thread here.

    A task that takes longer than `quick_seconds` while others wait moves to the lane `slow`, and so does the same file
    from then on. A task for which `max_waiting` others wait fails. A thread that ticks ends the processes whose time is
    over.
    """

    def __init__(
        self,
        workers: int,
        seconds: float,
        memory: int,
        priority: int = 0,
        slow: Lane | None = None,
        quick_seconds: float = math.inf,
        max_waiting: float = math.inf,
    ) -> None:
        self.workers = workers
        self.seconds = seconds
        self.memory = memory
        self.priority = priority
        self.slow = slow
        self.quick_seconds = quick_seconds
        self.max_waiting = max_waiting
        self.slow_files: dict[Fingerprint, None] = {}
        self.changed = Condition()
        self.tasks: list[Task] = []
        self.running: dict[DecoderWorker, Task] = {}
        self.is_busy = Event()
        self.threads: set[Thread] = set()
        self.watcher = Thread(target=self._watch, daemon=True, name='decoder-watch')
        self.idle = 0
        """Threads without a task, also those that have just been started."""
        self.closed = False

    def start(self, count: int) -> None:
        """Start up to `count` processes before there are tasks for them."""
        with self.changed:
            for _ in range(min(count, self.workers - len(self.threads))):
                self._start_thread(with_process=True)

    def put(self, task: Task) -> None:
        """Queue a task. It is cancelled if the lane is closed, and fails if too many wait."""
        with self.changed:
            if self.closed:
                task.result.cancel()
                return
            if len(self.tasks) >= self.max_waiting:
                self.tasks = [waiting for waiting in self.tasks if not waiting.result.done()]
                heapq.heapify(self.tasks)
            if len(self.tasks) >= self.max_waiting:
                message = f'slow to decode, and {self.max_waiting} such images wait already: send it later'
                task.fail(ImageError(message, 'E_TIMEOUT'))
                return
            heapq.heappush(self.tasks, task)
            self.changed.notify()
            if len(self.tasks) > self.idle and len(self.threads) < self.workers:
                self._start_thread()

    def _start_thread(self, with_process: bool = False) -> None:
        if not self.watcher.is_alive():
            self.watcher.start()
        thread = Thread(target=self._work, args=(with_process,), daemon=True, name='decoder')
        thread.start()  # it counts itself out under the lock, which this thread holds
        self.threads.add(thread)
        self.idle += 1

    def close(self) -> None:
        """End all processes and threads, and cancel all tasks. The lane `slow` is closed too."""
        with self.changed:
            self.closed = True
            waiting = [*self.tasks, *self.running.values()]
            for worker in self.running:
                worker.stop(CancelledError())
            self.changed.notify_all()
            threads = tuple(self.threads)
        self.is_busy.set()  # wakes the watcher
        for task in waiting:
            task.result.cancel()
        for thread in threads:
            thread.join()
        if self.slow:
            self.slow.close()

    def _work(self, with_process: bool) -> None:
        """Decode images until there are none for `IDLE_SECONDS`; runs in a thread.

        The process is started `with_process` at once, otherwise at the first task.
        """
        worker = None
        try:
            if with_process:
                with suppress(OSError):  # the first task reports it
                    worker = self._start_process()
            while task := self._next_task():
                if worker is None or not worker.is_usable:
                    try:
                        worker = self._start_process()
                    except OSError as error:  # a limit of processes or memory, or a Python that may not be executed
                        worker = None
                        task.fail(CXRError(f'{NOT_STARTED} The system says: {error.strerror}.'))
                        self._become_idle()
                        continue
                self._decode(worker, task)
                if not worker.is_usable:
                    worker.end()
                self._become_idle()
        finally:
            if worker:
                worker.end()

    def _start_process(self) -> DecoderWorker:
        return DecoderWorker(self.memory, self.priority, self.slow is not None)

    def _become_idle(self) -> None:
        with self.changed:
            self.idle += 1

    def _next_task(self) -> Task | None:
        """Wait for the next task. Returns None if this thread is to end. It was idle, and then no longer is."""
        with self.changed:
            try:
                while self.changed.wait_for(self._has_news, IDLE_SECONDS) and not self.closed:
                    task = heapq.heappop(self.tasks)
                    if self.slow and task.fingerprint in self.slow_files:
                        self.slow.put(task)
                    elif not task.result.done():
                        return task
                self.threads.discard(current_thread())
                return None
            finally:
                self.idle -= 1

    def _has_news(self) -> bool:
        return bool(self.tasks) or self.closed

    def _decode(self, worker: DecoderWorker, task: Task) -> None:
        with self.changed:
            if self.closed:  # while the process started
                task.result.cancel()
                return
            self.running[worker] = task
        self.is_busy.set()
        try:
            image = worker.decode(task.request, task.data)
        except _MoveToSlowLane as move:
            assert self.slow
            if move.is_certain:
                self._remember(task.fingerprint)
            self.slow.put(task)
        except Exception as error:
            task.fail(error)
        else:
            task.finish(image)
        finally:
            with self.changed:
                del self.running[worker]

    def _remember(self, file: Fingerprint) -> None:
        """Remember a slow file, and forget the oldest if they are many."""
        with self.changed:
            self.slow_files[file] = None
            if len(self.slow_files) > MAX_REMEMBERED:
                del self.slow_files[next(iter(self.slow_files))]

    def _watch(self) -> None:
        """Stop processes whose time is over; runs in a thread until the lane is closed."""
        while not self.closed:
            self.is_busy.wait()
            time.sleep(TICK_SECONDS)
            with self.changed:
                if not self.running:
                    self.is_busy.clear()
                for worker, task in self.running.items():
                    reason = self._reason_to_stop(worker, task)
                    if reason:
                        worker.stop(reason)

    def _reason_to_stop(self, worker: DecoderWorker, task: Task) -> Exception | None:
        seconds = worker.decoding_seconds
        if worker.starting_seconds > START_SECONDS:
            return CXRError(NOT_STARTED)
        if seconds > self.seconds or (seconds > CANCELLED_SECONDS and task.result.cancelled()):
            return ImageError(f'not decoded after {self.seconds:g} s', 'E_TIMEOUT')
        if not self.tasks or seconds <= self.quick_seconds:
            return None
        # On a busy machine an ordinary image waits for a core.
        is_certain = worker.cpu_seconds > self.quick_seconds
        if is_certain or seconds > BUSY_FACTOR * self.quick_seconds:
            return _MoveToSlowLane(is_certain)
        return None


class _MoveToSlowLane(Exception):  # noqa: N818, it is no failure
    """An image takes long, and others wait. It is certain that its file is slow if it took that much CPU time."""

    def __init__(self, is_certain: bool) -> None:
        super().__init__()
        self.is_certain = is_certain

"""A worker answers requests in a process of its own, and is ended when it takes too long."""

import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from cxr_fastai.core import workers
from cxr_fastai.core.workers import Worker, WorkerCrash, WorkerError, WorkerTimeout, start_ahead

HERE = Path(__file__).parent


@pytest.fixture
def worker(monkeypatch):
    """A worker that knows the actions of `workers_under_test.py`."""
    monkeypatch.syspath_prepend(str(HERE))
    worker = Worker('workers_under_test', 'answer')
    yield worker
    worker.close()


def test_answers_have_the_bytes_of_the_request(worker):
    parts = [b'', b'abc', bytes(range(256)) * 4096]
    assert worker.ask([b'echo', *parts], 30) == parts
    assert worker.ask([b'print'], 30) == [b'quiet']


def test_a_worker_that_was_started_ahead_is_taken_once(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    words = ('workers_under_test', 'answer')
    start_ahead(*words)
    first, second = Worker.take(*words), Worker.take(*words)
    assert first.process.pid != second.process.pid
    assert first.ask([b'echo', b'x'], 30) == second.ask([b'echo', b'x'], 30) == [b'x']
    start_ahead(*words)
    (started,) = workers._started_ahead.values()
    started.process.kill()
    started.process.wait()
    assert Worker.take(*words).ask([b'echo', b'y'], 30) == [b'y']


def test_a_failure_is_one_line_and_the_worker_goes_on(worker):
    with pytest.raises(WorkerError, match='^first line$'):
        worker.ask([b'fail'], 30)
    assert worker.is_alive
    assert worker.ask([b'echo', b'x'], 30) == [b'x']


def test_a_worker_that_takes_too_long_is_ended(worker):
    worker.ask([b'echo'], 30)
    with pytest.raises(WorkerTimeout, match='longer than 0.2 s'):
        worker.ask([b'sleep'], 0.2)
    assert not worker.is_alive
    with pytest.raises(WorkerCrash):
        worker.ask([b'echo'], 30)


def test_a_worker_that_ends_is_a_crash(worker):
    with pytest.raises(WorkerCrash, match='exit code 7'):
        worker.ask([b'exit'], 30)


@pytest.mark.skipif(sys.platform != 'linux', reason='the limit of memory applies on Linux')
def test_memory_is_limited_for_one_request(worker):
    size = str(2**30).encode()
    with pytest.raises(WorkerError, match='too much memory'):
        worker.ask([b'allocate', size], 30, memory=2**29)
    assert worker.ask([b'allocate', size], 30) == [b'\0\0\0']


def test_an_answer_that_is_too_long_is_not_read(worker):
    with pytest.raises(WorkerCrash):
        worker.ask([b'echo', bytes(1000)], 30, max_answer=999)


def test_requests_of_several_threads_get_their_own_answers(worker):
    answers = {}

    def ask(number):
        answers[number] = worker.ask([b'echo', bytes([number]) * 100_000], 30)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [bytes([number]) * 100_000] for number in range(8)}


@pytest.mark.skipif(not hasattr(os, 'pidfd_open'), reason='waits for a process by a function of Linux')
def test_a_worker_ends_when_its_owner_is_killed(worker):
    code = (
        f'import os, sys; sys.path.append({str(HERE)!r}); from cxr_fastai.core.workers import Worker;'
        'worker = Worker("workers_under_test", "answer"); worker.ask([b"echo"], 30);'
        'print(worker.process.pid, flush=True); os.kill(os.getpid(), 9)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, timeout=60)
    with suppress(ProcessLookupError):  # it has ended already
        process = os.pidfd_open(int(done.stdout))
        readable, _, _ = select.select([process], [], [], 30)
        os.close(process)
        assert readable, 'the worker is still running'

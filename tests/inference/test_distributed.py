"""Sharing a list between processes. `tests/training/test_distributed.py` predicts in two processes."""

import sys
from contextlib import contextmanager

import pytest

from cxr_fastai.core import environment
from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.distributed import broadcast, map_in_processes, process_group


def test_one_process_maps_all_items_in_one_call():
    calls = []

    def double(items: list[int]) -> list[int]:
        calls.append(list(items))
        return [2 * item for item in items]

    with process_group():
        assert broadcast('value') == 'value'
        assert list(map_in_processes(double, [1, 2, 3], per_round=1)) == [2, 4, 6]
    assert calls == [[1, 2, 3]]


def test_results_are_yielded_while_the_rest_is_computed():
    started = []

    def work(items: list[int]):
        for item in items:
            started.append(item)
            yield item

    results = map_in_processes(work, [1, 2, 3])
    assert next(results) == 1
    assert started == [1]


def test_several_processes_need_accelerate(monkeypatch):
    for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, 'find_spec', lambda _: None)
    with pytest.raises(UsageError, match=r'pip install "cxr_fastai\[scale\]"'), process_group():
        pass


def test_several_processes_share_the_items_in_rounds(monkeypatch, first_process):
    """With the functions of accelerate replaced by those of process 0 of 2, whose partner returns the same numbers."""
    accelerate = pytest.importorskip('accelerate', reason='needs pip install "cxr_fastai[scale]"')
    rounds = []

    class State:
        def split_between_processes(self, items: list[int]):
            rounds.append(items)
            return split(items)

    @contextmanager
    def split(items: list[int]):
        yield items[: (len(items) + 1) // 2]

    def gather(results: list[int]) -> list[int]:
        others = rounds[-1][len(results) :] or rounds[-1][-1:]  # an idle process gets the last item again
        return results + others

    monkeypatch.setattr(accelerate, 'PartialState', State)
    monkeypatch.setattr(sys.modules['accelerate.utils'], 'gather_object', gather)
    assert list(map_in_processes(list, [1, 2, 3, 4, 5], per_round=2)) == [1, 2, 3, 4, 5]
    assert rounds == [[1, 2, 3, 4], [5]]

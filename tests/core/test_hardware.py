"""The cores and the memory that a process may use, by the scheduler, its container and its environment."""

import os

import pytest
import torch

from cxr_fastai.core import hardware
from cxr_fastai.core.hardware import available_cores, available_memory, bf16_instructions, processor, thread_limit


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Pretend to be in groups of processes with these files; `write(line, files)`, on a machine of 8 cores."""
    monkeypatch.setattr(hardware, 'CGROUPS', tmp_path / 'cgroup')
    monkeypatch.setattr(hardware, 'OWN_GROUPS', tmp_path / 'own')
    monkeypatch.setattr(hardware, '_assigned_cores', lambda: 8)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / 'own').write_text(own)
        for name, text in files.items():
            path = tmp_path / 'cgroup' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


QUOTAS = {
    'none': ('0::/', {}, 8),
    'unlimited': ('0::/', {'cpu.max': 'max 100000\n'}, 8),
    'two cores': ('0::/', {'cpu.max': '200000 100000\n'}, 2),
    'one and a half': ('0::/', {'cpu.max': '150000 100000'}, 2),
    'a tenth': ('0::/', {'cpu.max': '10000 100000'}, 1),
    'the group above': ('0::/a/b', {'a/cpu.max': '300000 100000', 'a/b/cpu.max': 'max 100000'}, 3),
    'more than there are': ('0::/', {'cpu.max': '6400000 100000'}, 8),
    'version 1': (
        '4:cpu,cpuacct:/a\n3:memory:/',
        {'cpu/a/cpu.cfs_quota_us': '400000', 'cpu/a/cpu.cfs_period_us': '100000'},
        4,
    ),
    'version 1 without a limit': ('4:cpu:/', {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, 8),
    'nonsense': ('0::/\n\nx:y', {'cpu.max': 'a b c'}, 8),
    'an empty file': ('0::/', {'cpu.max': ''}, 8),
    'a period of 0': ('0::/', {'cpu.max': '100000 0'}, 8),
}


@pytest.mark.parametrize(('own', 'files', 'cores'), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_a_container_limits_the_cores(own, files, cores, container):
    container(own, files)
    assert available_cores() == cores
    assert thread_limit() == (None if cores == 8 else cores)


@pytest.mark.parametrize(('value', 'cores'), [('3', 3), ('3,1', 3), ('', 8), ('0', 8), ('x', 8), ('99', 8), ('-1', 8)])
def test_omp_num_threads_limits_the_cores(value, cores, container, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', value)
    assert available_cores() == cores


def test_processes_share_the_cores(container):
    assert [thread_limit(n) for n in (1, 2, 3, 20)] == [None, 4, 2, 1]


def test_memory_is_that_of_the_machine_or_of_the_container(container):
    machine = available_memory()
    assert machine > 2**28
    container('0::/a', {'memory.max': 'max', 'a/memory.max': '100000000'})
    assert available_memory() == 100_000_000
    container('5:memory:/', {'memory/memory.limit_in_bytes': '9223372036854771712'})
    assert available_memory() == machine


def test_without_a_container_the_scheduler_decides(monkeypatch):
    monkeypatch.setattr(hardware, 'OWN_GROUPS', hardware.Path('/nowhere'))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert available_cores() == len(os.sched_getaffinity(0))


def test_torch_computes_with_no_more_threads_than_cores(container):
    before = torch.get_num_threads()
    container('0::/', {'cpu.max': '100000 100000'})
    try:
        hardware.limit_torch_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_processor_and_its_instructions_are_read(tmp_path, monkeypatch):
    info = tmp_path / 'cpuinfo'
    info.write_text('processor\t: 0\nmodel name\t: Fast CPU 3\nflags\t\t: fpu avx512_bf16 amx_bf16_x\n')
    monkeypatch.setattr(hardware, 'CPU_INFO', info)
    hardware._cpu_info.cache_clear()
    assert processor() == 'Fast CPU 3' and bf16_instructions() == ['avx512_bf16']
    monkeypatch.setattr(hardware, 'CPU_INFO', tmp_path / 'missing')
    hardware._cpu_info.cache_clear()
    assert processor() and bf16_instructions() == []
    hardware._cpu_info.cache_clear()

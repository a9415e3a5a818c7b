"""What this machine lets the process use: cores, memory, and the instructions of its processor.

A container or a batch system often permits less than the machine has. Everything that starts threads or processes asks
here how many, so that they are neither too many nor different from command to command.
"""

from __future__ import annotations

import math
import os
import platform
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

CGROUPS = Path('/sys/fs/cgroup')
"""Where Linux shows the limits of groups of processes, such as a container."""
OWN_GROUPS = Path('/proc/self/cgroup')
CPU_INFO = Path('/proc/cpuinfo')
BF16_FLAGS = ('amx_bf16', 'avx512_bf16')
"""Instructions that multiply numbers of the type bfloat16, by their names in `/proc/cpuinfo`."""
UNLIMITED = 2**60
"""Limits of memory from this number of bytes on mean that there is none."""


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    It is the smallest of those that the scheduler assigns to the process, the quota of its container (rounded up), and
    `OMP_NUM_THREADS`.
    """
    limits = [_assigned_cores(), math.ceil(_quota()), _omp_threads()]
    return max(int(min(limit for limit in limits if limit)), 1)


def thread_limit(processes: int = 1) -> int | None:
    """Return the number of threads of each of `processes` that share the cores; None for a library's own choice.

    That is one per physical core, which is right unless a container has less time than that.
    """
    cores = available_cores()
    if processes == 1 and cores == _assigned_cores():
        return None
    return max(cores // processes, 1)


def limit_torch_threads() -> None:
    """Let torch compute with at most `available_cores` threads. More would wait for each other in a container."""
    import torch

    cores = available_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _assigned_cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _omp_threads() -> int:
    """Return the number in `OMP_NUM_THREADS`, which may be a list by level; 0 if there is none."""
    first = os.environ.get('OMP_NUM_THREADS', '').split(',')[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and len(first) < 6 else 0


def _quota() -> float:
    """Return the cores' worth of time that the container may use; 0 if it is not limited."""
    quotas = []
    for folder in _group_folders('cpu'):
        quota, period = _read_words(folder / 'cpu.max', 2)  # version 2: `150000 100000`, or `max 100000`
        if quota is None:
            (quota,) = _read_words(folder / 'cpu.cfs_quota_us', 1)
            (period,) = _read_words(folder / 'cpu.cfs_period_us', 1)
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=0)


def available_memory() -> int | None:
    """Return the bytes of memory that this process may use: those of the machine or its container; None if unknown."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    for folder in _group_folders('memory'):
        for name in ('memory.max', 'memory.limit_in_bytes'):
            (limit,) = _read_words(folder / name, 1)
            if limit and limit < UNLIMITED:
                limits.append(limit)
    return min(limits, default=None)


def _group_folders(controller: str) -> list[Path]:
    """Return the folders with the limits of this process by `controller`: that of its own group and of all above."""
    folders = []
    try:
        lines = OWN_GROUPS.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return []
    for line in lines:  # `0::/path` in version 2, `4:cpu,cpuacct:/path` in version 1
        number, _, rest = line.partition(':')
        controllers, _, path = rest.partition(':')
        if number == '0' and not controllers:
            root = CGROUPS
        elif controller in controllers.split(','):
            root = CGROUPS / controller
        else:
            continue
        group = root / path.strip('/')
        folders += [folder for folder in (group, *group.parents) if folder == root or root in folder.parents]
    return folders


def _read_words(file: Path, count: int) -> list[int | None]:
    """Return the first `count` words of `file` as numbers; None for a word that is missing or no positive number."""
    words: list[str] = []
    with suppress(OSError):
        words = file.read_text(encoding='utf-8', errors='replace').split()
    numbers = [int(word) if word.isascii() and word.isdecimal() else None for word in words[:count]]
    return numbers + [None] * (count - len(numbers))


@cache
def _cpu_info() -> str:
    try:
        return CPU_INFO.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def processor() -> str:
    """Return the model of the processor."""
    match = re.search(r'^model name\s*:\s*(.+)$', _cpu_info(), re.MULTILINE)
    if match:
        return match[1].strip()
    return platform.processor() or platform.machine() or 'unknown processor'


def bf16_instructions() -> list[str]:
    """Return which of `BF16_FLAGS` the processor has; none where that is unknown (only Linux tells)."""
    match = re.search(r'^flags\s*:\s*(.+)$', _cpu_info(), re.MULTILINE)
    flags = match[1].split() if match else []
    return [flag for flag in BF16_FLAGS if flag in flags]

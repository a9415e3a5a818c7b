"""The rank of a process, and optional packages."""

import subprocess
import sys

import pytest

from cxr_fastai.core.environment import is_main_process, part_of, process_count, require_package
from cxr_fastai.core.errors import UsageError


def test_a_process_without_a_launcher_is_the_main_process():
    assert is_main_process()
    assert process_count() == 1


@pytest.mark.parametrize(('rank', 'is_main'), [('0', True), ('1', False)])
def test_the_first_of_several_processes_is_the_main_process(monkeypatch, rank, is_main):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', rank)
    assert process_count() == 2
    assert is_main_process() is is_main


@pytest.mark.parametrize('n', [0, 1, 5, 6])
def test_the_parts_of_all_processes_are_the_whole_in_order(n):
    parts = [list(range(n))[part_of(n, rank, 3)] for rank in range(3)]
    assert sum(parts, []) == list(range(n))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_a_missing_package_is_named_with_the_extra_that_installs_it():
    require_package('numpy', '--x', 'extra')
    with pytest.raises(
        UsageError, match=r'^--x needs the package no_such_package, .*pip install "cxr_fastai\[extra\]"'
    ):
        require_package('no_such_package', '--x', 'extra')


def test_the_core_loads_no_large_package():
    modules = ['errors', 'environment', 'files', 'progress', 'recipe', 'run', 'templates']
    code = (
        f'import sys; from cxr_fastai.core import {", ".join(modules)}; '
        'print(sorted({"numpy", "pandas", "matplotlib", "torch"} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'

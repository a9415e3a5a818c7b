"""The rank of a process, and optional packages."""

import os
import subprocess
import sys

import pytest

from cxr_fastai.core.environment import (
    Launch,
    is_main_process,
    join_launch,
    part_of,
    process_count,
    require_package,
)
from cxr_fastai.core.errors import UsageError


def test_a_process_without_a_launcher_is_the_main_process():
    assert is_main_process()
    assert process_count() == 1


@pytest.mark.parametrize(('rank', 'is_main'), [(0, True), (1, False)])
def test_the_first_of_several_processes_is_the_main_process(rank, is_main):
    join_launch(Launch(rank, processes=2))
    assert process_count() == 2
    assert is_main_process() is is_main


@pytest.mark.parametrize('variables', ['RANK=1', 'WORLD_SIZE=', 'WORLD_SIZE=1 RANK=3', 'WORLD_SIZE=0', 'RANK=abc'])
def test_variables_that_another_program_left_over_mean_a_single_process(monkeypatch, variables):
    set_variables(monkeypatch, variables)
    assert Launch.from_environment() == Launch()


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ('WORLD_SIZE=abc', 'WORLD_SIZE=abc: not a number of processes. Start the command by `accelerate launch`'),
        ('WORLD_SIZE=-2', 'WORLD_SIZE=-2: not a number'),
        ('WORLD_SIZE=²', 'WORLD_SIZE=²: not a number'),
        ('WORLD_SIZE=2', 'WORLD_SIZE=2: RANK is not set'),
        ('WORLD_SIZE=2 RANK=1', 'WORLD_SIZE=2: MASTER_ADDR is not set'),
        ('WORLD_SIZE=2 RANK=x MASTER_ADDR=a MASTER_PORT=1', 'RANK=x: not a number'),
        ('WORLD_SIZE=2 RANK=2 MASTER_ADDR=a MASTER_PORT=1', 'RANK=2: not below WORLD_SIZE=2'),
    ],
)
def test_variables_that_no_launcher_sets_are_an_error(monkeypatch, variables, message):
    set_variables(monkeypatch, variables)
    with pytest.raises(UsageError, match=message):
        Launch.from_environment()


def test_ranks_count_only_in_a_process_that_has_joined_others(monkeypatch):
    set_variables(monkeypatch, 'WORLD_SIZE=2 RANK=1 MASTER_ADDR=localhost MASTER_PORT=1')
    assert is_main_process()
    join_launch(Launch.from_environment())
    assert not is_main_process()


def set_variables(monkeypatch, variables: str) -> None:
    """Set the environment variables of a launcher to those of `variables`, and no others."""
    for name in ('WORLD_SIZE', 'RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split('='))


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


def test_launch_variables_without_a_value_do_not_reach_fastai(monkeypatch, images):
    from cxr_fastai.data.loaders import CXRDataLoaders
    from cxr_fastai.training.learner import cxr_learner

    for name in ('WORLD_SIZE', 'RANK'):
        monkeypatch.setenv(name, ' ')
    dls = CXRDataLoaders.from_folder(images, size=64, bs=16, limit=8, valid='official')
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert 'WORLD_SIZE' not in os.environ

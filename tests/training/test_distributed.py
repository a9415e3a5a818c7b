"""Two processes train what one process trains, and write one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorImageBW
from faults import start

from cxr_fastai.cli import main, output
from cxr_fastai.core import environment
from cxr_fastai.core.environment import part_of
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import write_text
from cxr_fastai.core.run import Run
from cxr_fastai.data.transforms import AugmentImages, DegradeImages
from cxr_fastai.inference.distributed import process_group
from cxr_fastai.training.distributed import call_once, check_batch_size

EPOCHS = 5
# The network has neither BatchNorm nor dropout. The last batch has one image, so the second process has none.
OPTIONS = (
    '--arch test_convnext --weights none --size 64 --batch-size 5 --limit 8 --lr 0.0005 --workers 0 '
    f'--epochs {EPOCHS} --valid official --set class_weights=true --set ema=0.9 --set blur=0.02'
).split()
LAUNCH = (
    '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no '
    '--dynamo_backend no --main_process_port 0 -m cxr_fastai'
)


@pytest.mark.parametrize(('n', 'world'), [(32, 2), (5, 2), (1, 2), (10, 4), (7, 3)])
def test_every_image_of_a_batch_belongs_to_one_process(n, world):
    parts = [list(range(n))[part_of(n, rank, world)] for rank in range(world)]
    assert sum(parts, []) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('transform', [AugmentImages(crop=0.3), DegradeImages(resolution=0.5, blur=0.05)])
def test_a_part_of_a_batch_is_augmented_like_the_whole_batch(transform):
    images = TensorImageBW(torch.rand(5, 1, 32, 32))
    torch.manual_seed(3)
    whole = transform.encodes(images)
    for part in (slice(0, 3), slice(3, 5)):
        torch.manual_seed(3)
        transform.parts = deque([(5, part)])
        # The filter of a low-pass is as wide as the largest sigma of its batch needs, so the last digits differ.
        assert torch.allclose(transform.encodes(images[part]), whole[part], atol=2e-3)


def test_only_the_main_process_writes_files(tmp_path, second_process):
    run = Run.create(tmp_path / 'run')
    run.log_event('start')
    with run.locked():
        write_text(run / 'history.csv', 'epoch')
    assert not any(tmp_path.iterdir())


def test_only_the_main_process_prints(second_process, capsys):
    output.print_line('text')
    assert capsys.readouterr().out == ''


def test_without_accelerate_the_error_names_the_extra(images, tmp_path, monkeypatch, capsys):
    for name, value in launcher_variables(rank=0, port=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run')]) == 2
    assert 'pip install "cxr_fastai[scale]"' in capsys.readouterr().err


def test_a_batch_smaller_than_the_number_of_processes_is_rejected(second_process):
    with pytest.raises(UsageError, match='--batch-size 1: 2 processes share a batch. Choose 2 or more'):
        check_batch_size(1)


def test_a_process_that_waits_in_vain_for_the_others_ends_with_one_line(monkeypatch):
    pytest.importorskip('accelerate', reason='needs pip install "cxr_fastai[scale]"')
    for name, value in launcher_variables(rank=1, port=free_port()).items():
        monkeypatch.setenv(name, value)
    message = 'process 1 of 2: the others did not join at 127.0.0.1:.* within 1 s'
    with pytest.raises(CXRError, match=message), process_group(timeout=1):
        pass


def test_a_single_process_needs_no_group_to_call_a_function_once():
    assert call_once(max, 3, 4) == 4


class Team:
    """Two processes that train or predict together, and the file `log` with their output."""

    def __init__(self, processes: list, log: Path):
        self.processes = processes
        self.log = log

    def exit_codes(self) -> list[int | None]:
        """The exit codes; None while a process runs."""
        return [
            process.poll() if isinstance(process, subprocess.Popen) else process.exitcode for process in self.processes
        ]

    def output(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGTERM)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait(self) -> str:
        """Wait until both have ended and return their output."""
        self.wait_until(lambda: None not in self.exit_codes())
        return self.output()


def start_with_accelerate(argv: list[str], log: Path) -> Team:
    """Start two processes with `accelerate launch`."""
    with open(log, 'a') as file:
        launcher = subprocess.Popen([sys.executable, *LAUNCH.split(), *argv], stdout=file, stderr=subprocess.STDOUT)
    return Team([launcher], log)


def start_forked(argv: list[str], log: Path) -> Team:
    """Start the same two processes from one that has already imported everything."""
    port = free_port()
    return Team([start(argv, log, partial(set_rank, rank, port)) for rank in range(2)], log)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def set_rank(rank: int, port: int) -> None:
    os.environ |= launcher_variables(rank, port)


def launcher_variables(rank: int, port: int) -> dict[str, str]:
    """The environment variables that a launcher sets."""
    return {
        'WORLD_SIZE': '2',
        'RANK': str(rank),
        'LOCAL_WORLD_SIZE': '2',
        'LOCAL_RANK': str(rank),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }


@pytest.fixture(params=[start_forked, pytest.param(start_with_accelerate, marks=pytest.mark.slow)])
def launch(request, tmp_path):
    """A function that starts a command in two processes, which end with the test."""
    teams = []

    def launch_team(*options: object) -> Team:
        team = request.param([str(option) for option in options], tmp_path / f'log-{len(teams)}')
        teams.append(team)
        return team

    yield launch_team
    for team in teams:
        for process in team.processes:
            process.kill()


def stop_after_an_epoch(team: Team, run: Run) -> None:
    """Stop both processes with SIGTERM after the first epoch."""
    team.wait_until(lambda: (run / 'history.csv').exists() or set(team.exit_codes()) != {None})
    assert set(team.exit_codes()) == {None}, team.output()
    team.stop()
    team.wait()


def test_two_processes_that_are_stopped_and_resumed_train_what_one_process_trains(launch, images, tmp_path):
    run, single = Run(tmp_path / 'two'), Run(tmp_path / 'one')
    argv = ['train', '--data', str(images), *OPTIONS]
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(stop_after_an_epoch, launch(*argv, '--out', run.path), run)
        assert main([*argv, '--out', str(single.path)]) == 0  # at the same time
        stopping.result()
    completed = len(run.history)
    assert (run / 'state.pt').exists() and not (run / 'learner.pkl').exists() and completed < EPOCHS
    resumed = launch('train', '--resume', run.path)
    output = resumed.wait()
    assert not any(resumed.exit_codes()), output
    assert output.count(' AUC ') == EPOCHS - completed and output.count('trained. Next') == 1
    assert run.history.epoch.tolist() == list(range(1, EPOCHS + 1))
    assert (run.history.phase == single.history.phase).all()
    numbers = single.history.columns.drop(['phase', 'seconds'])
    assert np.allclose(run.history[numbers], single.history[numbers], rtol=0, atol=1e-4)
    journal = pd.read_json(run / 'journal.jsonl', lines=True)
    assert journal.event.tolist() == ['start', 'stop', 'resume', 'end']
    assert run.last_event('start')['processes'] == 2
    assert {path.name for path in run.path.iterdir()} == {path.name for path in single.path.iterdir()}


def test_two_processes_predict_what_one_process_predicts_in_order(launch, bundle, images, tmp_path):
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    argv = ['predict', bundle, images / 'test', tmp_path / 'bad.jpeg', images / 'train', '--batch-size', '4', '--out']
    assert main([str(word) for word in (*argv, tmp_path / 'one.csv')]) == 3
    output = launch(*argv, tmp_path / 'two.csv').wait()
    assert output.count('E_EMPTY: the file is empty') == 1 and output.count('rows in') == 1
    single, shared = (pd.read_csv(tmp_path / name) for name in ('one.csv', 'two.csv'))
    assert np.allclose(single.pop('p_pneumonia'), shared.pop('p_pneumonia'), atol=1e-6, equal_nan=True)
    pd.testing.assert_frame_equal(single, shared)

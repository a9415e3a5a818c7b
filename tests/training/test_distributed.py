"""Two processes train what one trains, and leave one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from runpy import run_path

import numpy as np
import pandas as pd
import pytest
import torch
from faults import start

from cxr_fastai.cli import main, output
from cxr_fastai.core.environment import is_main_process, part_of
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import write_text
from cxr_fastai.core.run import Run
from cxr_fastai.data.transforms import AugmentImages, DegradeImages
from cxr_fastai.training.distributed import check_batch

# A network without BatchNorm and dropout; a last batch of one image, which leaves the second process without any.
OPTIONS = [
    '--arch',
    'test_convnext',
    '--weights',
    'none',
    '--size',
    '64',
    '--batch-size',
    '5',
    '--limit',
    '8',
    '--lr',
    '0.0005',
    '--epochs',
    '8',
    '--set',
    'class_weights=true',
    '--set',
    'ema=0.9',
    '--set',
    'blur=0.02',
    '--workers',
    '0',
]
LAUNCH = [
    sys.executable,
    '-m',
    'accelerate.commands.launch',
    '--multi_gpu',
    '--num_processes',
    '2',
    '--num_machines',
    '1',
    '--mixed_precision',
    'no',
    '--dynamo_backend',
    'no',
    '--main_process_port',
    '0',
    '-m',
    'cxr_fastai',
]


@pytest.mark.parametrize(('n', 'world'), [(32, 2), (5, 2), (1, 2), (10, 4), (7, 3)])
def test_every_image_of_a_batch_is_in_one_part(n, world):
    parts = [list(range(n))[part_of(n, rank, world)] for rank in range(world)]
    assert sum(parts, []) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('transform', [AugmentImages(crop=0.3), DegradeImages(resolution=0.5, blur=0.05)])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(transform):
    from fastai.torch_core import TensorImageBW

    images = TensorImageBW(torch.rand(5, 1, 32, 32))
    torch.manual_seed(3)
    whole = transform.encodes(images)
    for here in (slice(0, 3), slice(3, 5)):
        torch.manual_seed(3)
        transform.parts = iter([(5, here)])
        # Not to the last digit: a low-pass is as wide as the strongest of its batch asks for.
        assert torch.allclose(transform.encodes(images[here]), whole[here], atol=2e-3)


def test_a_process_that_does_not_lead_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    run = Run.create(tmp_path / 'run')
    run.note('start')
    with run.locked():
        write_text(run / 'history.csv', 'epoch')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('rank', [0, 1])
def test_one_process_speaks_for_all(monkeypatch, rank):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', str(rank))
    assert run_path(output.__file__)['out'].quiet is (rank > 0)


def test_without_accelerate_the_extra_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('cxr_fastai.models.weights.find_spec', lambda package: None)
    assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run')]) == 2
    assert 'pip install "cxr_fastai[scale]"' in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(UsageError, match='--batch-size 3: 4 processes share a batch: choose 4 or more'):
        check_batch(3)


class Team:
    """Two processes that train or predict together; `log` has what they print."""

    def __init__(self, processes: list, log: Path):
        self.processes, self.log = processes, log

    def codes(self) -> list[int | None]:
        """Their exit codes, None while they run."""
        return [
            process.poll() if isinstance(process, subprocess.Popen) else process.exitcode for process in self.processes
        ]

    def said(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGTERM)

    def until(self, there: Callable[[], bool]) -> None:
        """Wait until something is there."""
        deadline = time.monotonic() + 600
        while not there():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def ended(self) -> str:
        """What they have said, once both have ended."""
        self.until(lambda: None not in self.codes())
        return self.said()


def accelerated(argv: list[str], log: Path) -> Team:
    """What `accelerate launch` starts."""
    with open(log, 'a') as file:
        return Team([subprocess.Popen([*LAUNCH, *argv], stdout=file, stderr=subprocess.STDOUT)], log)


def forked(argv: list[str], log: Path) -> Team:
    """The same two, each told by its environment who it is, from a process that has imported everything."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return Team([start(argv, log, partial(join, rank, port)) for rank in range(2)], log)


def join(rank: int, port: int) -> None:
    """Say in the environment what a launcher says there."""
    os.environ |= {
        'WORLD_SIZE': '2',
        'RANK': str(rank),
        'LOCAL_WORLD_SIZE': '2',
        'LOCAL_RANK': str(rank),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }
    output.out.quiet = not is_main_process()  # which was decided before this was told


@pytest.fixture(params=[forked, pytest.param(accelerated, marks=pytest.mark.slow)])
def launch(request, tmp_path):
    """Start a command in two processes. Nothing survives the test."""
    teams = []

    def launched(*options: object) -> Team:
        teams.append(request.param([str(option) for option in options], tmp_path / f'log-{len(teams)}'))
        return teams[-1]

    yield launched
    for process in (process for team in teams for process in team.processes):
        process.kill()


def stop_after(team: Team, run: Run, epochs: int) -> None:
    """Stop both by SIGTERM after so many epochs."""
    team.until(lambda: (run / 'history.csv').exists() and len(run.history) >= epochs or set(team.codes()) != {None})
    assert set(team.codes()) == {None}, team.said()
    team.stop()
    team.ended()


def test_two_processes_stopped_and_resumed_do_what_one_does_and_write_it_once(launch, images, tmp_path):
    run = Run(tmp_path / 'two')
    given = ['--data', str(images), *OPTIONS]
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(stop_after, launch('train', *given, '--out', run.path), run, epochs=2)
        assert main(['train', *given, '--out', str(tmp_path / 'one')]) == 0  # meanwhile
        stopped.result()
    assert (run / 'state.pt').exists() and not (run / 'learner.pkl').exists() and (done := len(run.history)) < 8
    second = launch('train', '--resume', run.path)
    said, one = second.ended(), Run(tmp_path / 'one')
    assert not any(second.codes()), said
    assert said.count(' AUC ') == 8 - done and said.count('trained. Next') == 1
    assert run.history.epoch.tolist() == list(range(1, 9))
    assert (run.history.phase == one.history.phase).all()
    numbers = one.history.columns.drop(['phase', 'seconds'])
    assert np.allclose(run.history[numbers], one.history[numbers], rtol=0, atol=1e-4)
    events = [line.split('"event": "')[1].split('"')[0] for line in (run / 'journal.jsonl').read_text().splitlines()]
    assert events == ['start', 'stop', 'resume', 'end'] and run.noted('start')['processes'] == 2
    assert {path.name for path in run.path.iterdir()} == {path.name for path in one.path.iterdir()}


def test_two_processes_predict_what_one_does_in_order(launch, bundle, images, tmp_path):
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    wanted = ['predict', bundle, images / 'test', tmp_path / 'bad.jpeg', images / 'train', '--batch-size', '4', '--out']
    assert main([str(word) for word in (*wanted, tmp_path / 'one.csv')]) == 3
    team = launch(*wanted, tmp_path / 'two.csv')
    said = team.ended()
    assert said.count('E_EMPTY: the file is empty') == 1 and said.count('rows in') == 1
    one, two = (pd.read_csv(tmp_path / name) for name in ('one.csv', 'two.csv'))
    assert np.allclose(one.pop('p_pneumonia'), two.pop('p_pneumonia'), atol=1e-6, equal_nan=True)
    pd.testing.assert_frame_equal(one, two)

"""Two processes train what one trains, and leave one run."""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_fastai.augment import AugmentFilms, DegradeFilms
from cxr_fastai.cli import main
from cxr_fastai.core import UsageError, write_text
from cxr_fastai.ranks import check_batch
from cxr_fastai.run import Run
from cxr_fastai.shards import part_of

# A network without BatchNorm and dropout; a last batch of one film, which leaves the second process without any.
OPTIONS = ['--arch', 'test_convnext', '--weights', 'none', '--size', '64', '--batch-size', '5', '--limit', '8', '--lr',
           '0.0005', '--epochs', '12', '--set', 'class_weights=true', '--set', 'ema=0.9', '--set', 'blur=0.02']
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines',
          '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'cxr_fastai']


@pytest.mark.parametrize(('n', 'world'), [(32, 2), (5, 2), (1, 2), (10, 4), (7, 3)])
def test_every_film_of_a_batch_is_in_one_part(n, world):
    parts = [list(range(n))[part_of(n, rank, world)] for rank in range(world)]
    assert sum(parts, []) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('transform', [AugmentFilms(crop=0.3), DegradeFilms(resolution=0.5, blur=0.05)])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(transform):
    from fastai.torch_core import TensorImageBW
    films = TensorImageBW(torch.rand(5, 1, 32, 32))
    torch.manual_seed(3)
    whole = transform.encodes(films)
    for here in (slice(0, 3), slice(3, 5)):
        torch.manual_seed(3)
        transform.parts = iter([(5, here)])
        # Not to the last digit: a low-pass is as wide as the strongest of its batch asks for.
        assert torch.allclose(transform.encodes(films[here]), whole[here], atol=2e-3)


def test_a_process_that_does_not_lead_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    run = Run.create(tmp_path/'run')
    run.note('start')
    with run.locked(): write_text(run/'history.csv', 'epoch')
    assert not any(tmp_path.iterdir())


def test_without_accelerate_the_extra_is_named(films, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('cxr_fastai.weights.find_spec', lambda package: None)
    assert main(['train', '--data', str(films), '--out', str(tmp_path/'run')]) == 2
    assert 'pip install "cxr_fastai[scale]"' in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(UsageError, match='--batch-size 3: 4 processes share a batch: choose 4 or more'): check_batch(3)


def launch(*options: object) -> subprocess.Popen:
    return subprocess.Popen([*LAUNCH, *map(str, options)], env=os.environ | {'OMP_NUM_THREADS': '1'}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stop_after(process: subprocess.Popen, run: Run, epochs: int) -> None:
    """Stop `process` by SIGTERM after so many epochs."""
    until = time.monotonic() + 180
    while not (run/'history.csv').exists() or len(run.history) < epochs:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_do_what_one_does_and_write_it_once(films, tmp_path):
    run = Run(tmp_path/'two')
    given = ['--data', str(films), *OPTIONS]
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(stop_after, launch('train', *given, '--out', str(run.path)), run, epochs=2)
        assert main(['train', *given, '--out', str(tmp_path/'one')]) == 0  # meanwhile
        stopped.result()
    assert (run/'state.pt').exists() and not (run/'learner.pkl').exists() and (done := len(run.history)) < 12
    second = launch('train', '--resume', str(run.path))
    said = second.communicate(timeout=180)[0]
    assert second.returncode == 0, said
    one = Run(tmp_path/'one')
    assert said.count(' AUC ') == 12 - done and said.count('trained. Next') == 1
    assert run.history.epoch.tolist() == list(range(1, 13))
    assert (run.history.phase == one.history.phase).all()
    numbers = one.history.columns.drop(['phase', 'seconds'])
    assert np.allclose(run.history[numbers], one.history[numbers], rtol=0, atol=1e-4)
    events = [line.split('"event": "')[1].split('"')[0] for line in (run/'journal.jsonl').read_text().splitlines()]
    assert events == ['start', 'stop', 'resume', 'end'] and run.noted('start')['processes'] == 2
    assert {path.name for path in run.path.iterdir()} == {path.name for path in one.path.iterdir()}


@pytest.mark.slow
def test_two_processes_predict_what_one_does_in_order(bundle, films, tmp_path):
    (tmp_path/'bad.jpeg').write_bytes(b'')
    wanted = ['predict', bundle, films/'test', tmp_path/'bad.jpeg', films/'train', '--batch-size', '4', '--out']
    assert main([str(word) for word in (*wanted, tmp_path/'one.csv')]) == 3
    process = launch(*wanted, tmp_path/'two.csv')
    said, _ = process.communicate(timeout=300)
    assert said.count('E_EMPTY: the file is empty') == 1 and said.count('rows in') == 1
    one, two = (pd.read_csv(tmp_path/name) for name in ('one.csv', 'two.csv'))
    assert np.allclose(one.pop('p_pneumonia'), two.pop('p_pneumonia'), atol=1e-6, equal_nan=True)
    pd.testing.assert_frame_equal(one, two)

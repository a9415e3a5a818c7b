"""What a tracker is told: the recipe and the history's numbers, and nothing that names an image, a place or a machine."""

import dataclasses
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cxr_fastai.core.errors import UsageError
from cxr_fastai.models.architectures import BaselineCNN, make_recipe
from cxr_fastai.training.training import train

SMALL = make_recipe('baseline', epochs=2, size=48, batch_size=16, limit=8, seed=5)


@pytest.fixture
def recipe(tmp_path):
    """One whose weights come from a file, whose name is nobody's business."""
    torch.save(BaselineCNN().state_dict(), tmp_path / 'anna.pth')
    return dataclasses.replace(SMALL, weights=str(tmp_path / 'anna.pth'))


def fake(monkeypatch, name: str, **content) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr('cxr_fastai.core.environment.find_spec', lambda package: package == name)


def secrets(images, tmp_path) -> list[str]:
    return [str(images), str(tmp_path), 'anna', 'bacteria', socket.gethostname()]


def test_tensorboard_gets_a_number_an_epoch(images, tmp_path, recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe, images, tmp_path / 'run', track='tensorboard')
    (file,) = (run / 'tracking').iterdir()
    events = EventAccumulator(str(file)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars('valid_loss')]
    assert losses == [(row.epoch, pytest.approx(row.valid_loss)) for row in run.history.itertuples()]
    assert 'recipe/text_summary' in events.Tags()['tensors']
    content = file.read_bytes()
    assert not [secret for secret in secrets(images, tmp_path) if secret.encode() in content or secret in file.name]


def test_wandb_gets_the_same_and_collects_nothing_itself(images, tmp_path, recipe, monkeypatch):
    told = []
    tracker = SimpleNamespace(log=lambda figures, step: told.append((step, figures)), finish=lambda: told.append('end'))
    begun = {}
    fake(monkeypatch, 'wandb', Settings=dict, init=lambda **given: begun.update(given) or tracker)
    run = train(recipe, images, tmp_path / 'run', track='wandb')
    assert [step for step, _ in told[:-1]] == [1, 2] and told[-1] == 'end'
    assert told[0][1]['roc_auc'] == pytest.approx(run.history.roc_auc[0]) and 'phase' not in told[0][1]
    assert begun['config']['seed'] == 5 and begun.pop('dir') == str(run / 'tracking')
    assert begun['settings']['x_disable_meta'] and begun['settings']['console'] == 'off'
    assert not [secret for secret in secrets(images, tmp_path) if secret in repr((begun, told))]


def test_mlflow_gets_the_same_by_its_client(images, tmp_path, recipe, monkeypatch):
    told = []

    class MlflowClient:
        def __init__(self, tracking_uri):
            self.uri = tracking_uri

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return '7'

        def create_run(self, experiment):
            return SimpleNamespace(info=SimpleNamespace(run_id=f'run {experiment}'))

        def log_param(self, run, name, value):
            told.append((run, name, value))

        def log_metric(self, run, name, value, step):
            told.append((run, name, value, step))

        def set_terminated(self, run):
            told.append('end')

    fake(monkeypatch, 'mlflow', MlflowClient=MlflowClient)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    run = train(recipe, images, tmp_path / 'run', track='mlflow')
    assert ('run 7', 'batch_size', 16) in told and told[-1] == 'end'
    assert ('run 7', 'accuracy', pytest.approx(run.history.accuracy[1]), 2) in told
    assert not [secret for secret in secrets(images, tmp_path) if secret in repr(told)]


@pytest.mark.parametrize(
    ('name', 'match'),
    [
        ('mlflow', 'pip install "cxr_fastai\\[mlflow\\]"'),
        ('sacred', '--track sacred: choose tensorboard or wandb or mlflow'),
    ],
)
def test_what_cannot_be_told_is_refused_before_training(images, tmp_path, monkeypatch, name, match):
    monkeypatch.setattr('cxr_fastai.core.environment.find_spec', lambda package: None)
    with pytest.raises(UsageError, match=match):
        train(SMALL, images, tmp_path / 'run', track=name)
    assert not (tmp_path / 'run').exists()

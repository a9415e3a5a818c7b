"""Trackers receive the recipe and the metrics, and nothing that identifies an image, a place or a machine."""

import dataclasses
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cxr_fastai.core import environment
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.models.architectures import BaselineCNN, make_recipe
from cxr_fastai.training.callbacks import COLUMNS
from cxr_fastai.training.tracking import TrackerCallback, check_tracker, tracking
from cxr_fastai.training.training import train

SMALL = make_recipe('baseline', epochs=2, size=48, batch_size=8, limit=4, seed=5, workers=0)
ROWS = [
    dict(zip(COLUMNS, ['train', epoch, 1e-3, 0.7, 0.6, 0.5, auc, 0.8, 0.9, 1.5], strict=True))
    for epoch, auc in ((1, 0.75), (2, float('nan')))
]


@pytest.fixture
def recipe(tmp_path):
    """A recipe with weights from a file whose name identifies a person."""
    torch.save(BaselineCNN().state_dict(), tmp_path / 'anna.pth')
    return dataclasses.replace(SMALL, weights=str(tmp_path / 'anna.pth'))


@pytest.fixture
def new_run(tmp_path) -> Run:
    return Run.create(tmp_path / 'run')


def track_rows(tracker: str, run: Run, recipe) -> None:
    """Send `ROWS` to the tracker as a training would."""
    learn = SimpleNamespace(history=SimpleNamespace(rows=[]))
    with tracking(tracker, run, recipe) as (callback,):
        callback.learn = learn
        for row in ROWS:
            learn.history.rows.append(row)
            callback.after_epoch()


def install(monkeypatch, name: str, **content) -> None:
    """Let the package `name` with this `content` be the only installed one."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(environment, 'find_spec', lambda package: package == name)


def secrets(images, tmp_path) -> list[str]:
    return [str(images), str(tmp_path), 'anna', 'bacteria', socket.gethostname()]


def test_tensorboard_has_a_scalar_per_epoch_and_the_recipe(images, tmp_path, recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe, images, tmp_path / 'run', track='tensorboard')
    (file,) = (run / 'tracking').iterdir()
    events = EventAccumulator(str(file)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars('valid_loss')]
    assert losses == [(row.epoch, pytest.approx(row.valid_loss)) for row in run.history.itertuples()]
    assert 'recipe/text_summary' in events.Tags()['tensors']
    content = file.read_bytes()
    assert not [secret for secret in secrets(images, tmp_path) if secret.encode() in content or secret in file.name]


def test_event_files_of_a_killed_training_lose_the_host_name_too(new_run, recipe):
    folder = new_run / 'tracking'
    folder.mkdir()
    (folder / f'events.out.tfevents.1.{socket.gethostname()}.1.0').write_bytes(b'')
    track_rows('tensorboard', new_run, recipe)
    assert len(list(folder.iterdir())) == 2
    assert not [path for path in folder.iterdir() if socket.gethostname() in path.name]


def test_wandb_receives_finite_metrics_and_collects_nothing_itself(images, tmp_path, new_run, recipe, monkeypatch):
    logged, arguments = [], {}
    tracker = SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append('finished')
    )

    def init(**options):
        arguments.update(options)
        return tracker

    install(monkeypatch, 'wandb', Settings=dict, init=init)
    track_rows('wandb', new_run, recipe)
    assert [step for step, _ in logged[:-1]] == [1, 2] and logged[-1] == 'finished'
    assert logged[0][1]['roc_auc'] == 0.75 and 'roc_auc' not in logged[1][1] and 'phase' not in logged[0][1]
    assert arguments['config']['seed'] == 5 and arguments.pop('dir') == str(new_run / 'tracking')
    assert arguments['settings']['x_disable_meta'] and arguments['settings']['console'] == 'off'
    assert not [secret for secret in secrets(images, tmp_path) if secret in repr((arguments, logged))]


def test_mlflow_receives_the_recipe_and_the_metrics(images, tmp_path, new_run, recipe, monkeypatch):
    logged = []

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
            logged.append((run, name, value))

        def log_metric(self, run, name, value, step):
            logged.append((run, name, value, step))

        def set_terminated(self, run):
            logged.append('finished')

    install(monkeypatch, 'mlflow', MlflowClient=MlflowClient)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    track_rows('mlflow', new_run, recipe)
    assert ('run 7', 'batch_size', 8) in logged and logged[-1] == 'finished'
    assert ('run 7', 'accuracy', 0.5, 2) in logged
    assert not [secret for secret in secrets(images, tmp_path) if secret in repr(logged)]


@pytest.mark.slow
def test_a_training_logs_each_epoch_of_its_history_to_a_tracker(images, tmp_path, recipe, monkeypatch):
    logged = []
    tracker = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)
    install(monkeypatch, 'wandb', Settings=dict, init=lambda **_: tracker)
    run = train(recipe, images, tmp_path / 'run', track='wandb')
    assert [step for step, _ in logged] == [1, 2]
    for (_, metrics), auc in zip(logged, run.history.roc_auc, strict=True):
        assert metrics['roc_auc'] == pytest.approx(auc)


def test_a_tracker_that_fails_warns_once_and_does_not_end_the_training():
    calls = []

    def fail(metrics, epoch):
        calls.append(epoch)
        raise ConnectionError('server not reachable')

    callback = TrackerCallback(SimpleNamespace(log=fail))
    callback.learn = SimpleNamespace(history=SimpleNamespace(rows=ROWS))
    with pytest.warns(CXRWarning, match='the tracker failed .server not reachable.. Training continues') as warnings:
        callback.after_epoch()
        callback.after_epoch()
    assert len(warnings) == 1 and calls == [2]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('mlflow', 'pip install "cxr_fastai\\[mlflow\\]"'),
        ('sacred', '--track sacred: choose tensorboard or wandb or mlflow'),
    ],
)
def test_an_unknown_or_missing_tracker_is_an_error_before_training(images, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    with pytest.raises(UsageError, match=message):
        check_tracker(name)
    with pytest.raises(UsageError, match=message):
        train(SMALL, images, tmp_path / 'run', track=name)
    assert not (tmp_path / 'run').exists()

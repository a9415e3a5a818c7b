"""A training told to TensorBoard, Weights & Biases or MLflow: the recipe, and the numbers of `history.csv`.

Not fastai's own callbacks: those log images with predictions, models, and what the trackers' libraries collect by
themselves, such as the host's name and the program's path. Nothing of that may leave the machine with medical data.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fastai.callback.core import Callback

from cxr_fastai.core.environment import is_main_process, require_package
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import writing
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.models.architectures import find_arch

PROJECT = 'cxr_fastai'


class Tracker(Protocol):
    """Where figures go."""

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Take the figures of an epoch."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files, under a name without the host's."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        path = folder / f'events.out.tfevents.{time.time_ns() // 10**9}.{PROJECT}.{os.getpid()}'
        self.writer = RecordWriter(open(path, 'wb'))  # noqa: SIM115  (the writer closes it)
        self._write(text('recipe', '\n'.join(f'    {name}: {value}' for name, value in settings.items())), 0)

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Take the figures of an epoch."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in figures.items():
            self._write(scalar(name, value), epoch)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def _write(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())


class WandB:
    """Weights & Biases, with all it would collect by itself turned off."""

    PRIVATE = {
        'disable_git': True,
        'save_code': False,
        'disable_code': True,
        'disable_job_creation': True,
        'console': 'off',
        'x_disable_meta': True,
        'x_disable_stats': True,
        'x_disable_machine_info': True,
        'x_save_requirements': False,
        'host': PROJECT,
        'program': PROJECT,
    }

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import wandb

        self.run = wandb.init(
            project=PROJECT, dir=str(folder), config=settings, settings=wandb.Settings(**self.PRIVATE)
        )

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Take the figures of an epoch."""
        self.run.log(figures, step=epoch)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


class MLflow:
    """MLflow by its client, whose runs have no tags of user and program, as `mlflow.start_run` gives them."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        from mlflow import MlflowClient

        uri = os.environ.get('MLFLOW_TRACKING_URI') or f'sqlite:///{folder.resolve() / "mlflow.db"}'
        self.client = MlflowClient(tracking_uri=uri)
        known = self.client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self.client.create_experiment(PROJECT)
        self.id = self.client.create_run(experiment).info.run_id
        for name, value in settings.items():
            self.client.log_param(self.id, name, value)

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Take the figures of an epoch."""
        for name, value in figures.items():
            self.client.log_metric(self.id, name, value, step=epoch)

    def close(self) -> None:
        """Write what is left."""
        self.client.set_terminated(self.id)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    'tensorboard': TensorBoard,
    'wandb': WandB,
    'mlflow': MLflow,
}


class Track(Callback):
    """Hand each epoch's numbers to a `tracker`."""

    order = 62  # after the Checkpoint: an epoch that is told is an epoch that stays

    def __init__(self, tracker: Tracker):
        self.tracker, self.lost = tracker, False

    def after_epoch(self):
        row = self.history.rows[-1]
        numbers = {
            name: value for name, value in row.items() if name not in ('phase', 'epoch') and math.isfinite(value)
        }
        if not self.lost:
            self._tell(numbers, row['epoch'])

    def _tell(self, numbers: dict[str, float], epoch: int):
        # A server that went away is no reason to end a training; each library has errors of its own.
        try:
            self.tracker.log(numbers, epoch)
        except Exception as error:
            self.lost = True
            warnings.warn(
                f'the tracker failed ({error}), so nothing more is told to it; history.csv has it all.',
                CXRWarning,
                stacklevel=2,
            )


@contextmanager
def tracked(name: str | None, run: Run, recipe: Recipe) -> Iterator[list[Callback]]:
    """The callbacks of the tracker `name`, if there is one, which keeps its files in the run's folder `tracking`."""
    if name is None or not is_main_process():
        yield []
        return
    folder = run / 'tracking'
    with writing(folder):
        folder.mkdir(exist_ok=True)
    tracker = TRACKERS[name](folder, _settings(recipe))
    try:
        yield [Track(tracker)]
    finally:
        tracker.close()


def check_tracker(name: str | None) -> None:
    """Raise `UsageError` where there is no tracker `name`, or its package is missing."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(f'--track {name}: choose {" or ".join(TRACKERS)}.')
    require_package(name, f'--track {name}', name)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe, without the name of a file that its weights may come from."""
    known = recipe.weights in ('none', *find_arch(recipe.arch).weights)
    return asdict(recipe) | {'weights': recipe.weights if known else 'file', 'phases': repr(recipe.phases)}

"""Logging of a training to TensorBoard, Weights & Biases or MLflow: the recipe and the numbers of `history.csv`.

fastai's own callbacks are not used, because they also log images, predictions and models. The libraries of the trackers
collect more by themselves, such as the host name and the path of the program. All of that is turned off, because it
must not leave a machine with medical data.
"""

from __future__ import annotations

import math
import os
import socket
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
"""Name of the project at the trackers; it also replaces the host name."""


class Tracker(Protocol):
    """A destination of metrics."""

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Log the metrics of an epoch."""

    def close(self) -> None:
        """Write everything that is pending."""


class TensorBoard:
    """Event files in the run folder, written by torch's `SummaryWriter`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._rename_files()  # files of a process that was killed
        self.writer = SummaryWriter(folder)
        lines = [f'    {name}: {value}' for name, value in settings.items()]
        self.writer.add_text('recipe', '\n'.join(lines), 0)

    def _rename_files(self) -> None:
        """Replace the host name, which `SummaryWriter` puts into the names of its files."""
        for path in self.folder.glob(f'*.{socket.gethostname()}.*'):
            path.rename(path.with_name(path.name.replace(f'.{socket.gethostname()}.', f'.{PROJECT}.', 1)))

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Write the metrics of an epoch."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file and remove the host name from its name."""
        self.writer.close()
        self._rename_files()


class WandB:
    """Weights & Biases, without the data that its library collects by itself."""

    PRIVACY_SETTINGS = {
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

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(**self.PRIVACY_SETTINGS),
        )

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Send the metrics of an epoch."""
        self.run.log(metrics, step=epoch)

    def close(self) -> None:
        """Send everything that is pending."""
        self.run.finish()


class MLflow:
    """MLflow through its client, because `mlflow.start_run` also records the user and the program."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get('MLFLOW_TRACKING_URI') or f'sqlite:///{folder.resolve() / "mlflow.db"}'
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        self.run_id = self.client.create_run(experiment_id).info.run_id
        for name, value in settings.items():
            self.client.log_param(self.run_id, name, value)

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Send the metrics of an epoch."""
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, name, value, step=epoch)

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    'tensorboard': TensorBoard,
    'wandb': WandB,
    'mlflow': MLflow,
}
"""Trackers by the name of their package and of the extra that installs it."""


class TrackerCallback(Callback):
    """Log the metrics of every epoch to a `tracker`. If the tracker fails, warn once and stop logging."""

    order = 62  # after Checkpoint, so that every logged epoch is also saved

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.failed = False

    def after_epoch(self) -> None:
        if self.failed:
            return
        row = self.history.rows[-1]
        metrics = {name: value for name, value in row.items() if name not in ('phase', 'epoch')}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        # A server that is down must not end a training, and each library raises exceptions of its own.
        try:
            self.tracker.log(finite, row['epoch'])
        except Exception as error:
            self.failed = True
            warnings.warn(
                f'the tracker failed ({error}). Training continues without it; history.csv contains all metrics.',
                CXRWarning,
                stacklevel=2,
            )


@contextmanager
def tracking(name: str | None, run: Run, recipe: Recipe) -> Iterator[list[Callback]]:
    """Open the tracker `name` for the block and yield its callbacks; none if `name` is None.

    Local files of a tracker are in the folder `tracking` of the run.
    """
    if name is None or not is_main_process():
        yield []
        return
    folder = run / 'tracking'
    with writing(folder):
        folder.mkdir(exist_ok=True)
    tracker = TRACKERS[name](folder, _settings(recipe))
    try:
        yield [TrackerCallback(tracker)]
    finally:
        tracker.close()


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the recipe, without the path of a weights file."""
    public_weights = ['none', *find_arch(recipe.arch).weights]
    weights = recipe.weights if recipe.weights in public_weights else 'file'
    return asdict(recipe) | {'weights': weights, 'phases': repr(recipe.phases)}


def check_tracker(name: str | None) -> None:
    """Raise `UsageError` if there is no tracker `name`, or if its package is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(f'--track {name}: choose {" or ".join(TRACKERS)}.')
    require_package(name, f'--track {name}', name)

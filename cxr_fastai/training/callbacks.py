"""fastai callbacks of a training: history, best epoch, learning rate schedule, averaged weights, image size.

Every `CXRLearner` has a `History`. `fit_recipe` adds `KeepBest`, `DivergenceGuard` and the `recipe_callbacks`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cxr_fastai.core.files import write_csv
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.transforms import AugmentImages
from cxr_fastai.training.precision import Precision

COLUMNS = [
    'phase',
    'epoch',
    'lr',
    'train_loss',
    'valid_loss',
    'accuracy',
    'roc_auc',
    'sensitivity',
    'specificity',
    'seconds',
]
"""Columns of `history.csv`."""
FASTAI_NAMES = {'roc_auc_score': 'roc_auc', 'recall_score': 'sensitivity'}
"""Metrics of fastai, such as `RocAucBinary` and `Recall`, to their names in `history.csv`."""
Tensors = list[Tensor] | tuple[Tensor, ...]

log = logging.getLogger(__name__)


def recipe_callbacks(recipe: Recipe) -> list[Callback]:
    """Return the callbacks that `recipe` needs in every phase; `fit_phase` adds those of one phase."""
    callbacks: list[Callback] = []
    if recipe.mixup:
        callbacks.append(MixUp(recipe.mixup))
    if recipe.clip:
        callbacks.append(GradientClip(recipe.clip))
    if recipe.ema:
        callbacks.append(AverageWeights(recipe.ema))
    if recipe.precision != 'fp32':
        callbacks.append(Precision(recipe.precision))
    if recipe.start_size < 1:
        callbacks.append(GrowImages(recipe.start_size))
    return callbacks


class History(Callback):
    """Collect one row per epoch over all fits in `rows`, and write them to `history.csv` of `run_folder` if it is set.

    `phase` is the name of the current phase of a recipe. In other fits it is `frozen` or `unfrozen`, which says whether
    the body was frozen. `fits` describes each fit as a phase. A metric that the learner does not have is NaN.
    """

    order = 55  # after the Recorder

    def __init__(self) -> None:
        self.run_folder: Run | None = None  # `Callback.run` is fastai's
        self.phase = ''
        self.rows: list[dict[str, Any]] = []
        self.fits: list[Phase] = []

    def state_dict(self) -> dict[str, Any]:
        return {'rows': self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state['rows']

    def before_fit(self) -> None:
        self.epochs_of_fit = 0

    def before_epoch(self) -> None:
        self.start_time = time.perf_counter()
        self.loss_sum: Tensor | float = 0.0
        self.image_count = 0
        self.max_lr = 0.0

    def after_batch(self) -> None:
        if not self.training:
            return
        self.max_lr = max(self.max_lr, self.opt.hypers[-1]['lr'])
        batch_images = self._count_images()
        self.loss_sum = self.loss_sum + self.loss.detach() * batch_images
        self.image_count += batch_images

    def _count_images(self) -> int:
        """Return the number of images that `loss` is the mean of, including those of other processes."""
        if hasattr(self.learn, 'share_batches'):
            return self.learn.share_batches.batch_images
        return len(self.xb[0])  # not of `yb`, in which MixUp changes the labels

    def after_epoch(self) -> None:
        if not self.image_count or hasattr(self.learn, 'lr_finder') or 'recorder' not in vars(self.learn):
            return  # `validate`, `get_preds` and `lr_find` train no epoch
        metrics = validation_metrics(self.learn)
        metrics |= {
            'lr': self.max_lr,
            'train_loss': float(self.loss_sum) / self.image_count,  # fastai's own includes earlier epochs
            'seconds': round(time.perf_counter() - self.start_time, 2),
        }
        row: dict[str, Any] = {'phase': self.phase or self._describe_body(), 'epoch': len(self.rows) + 1}
        for name in COLUMNS[2:]:
            row[name] = float(metrics.get(name, math.nan))
        self.rows.append(row)
        self._describe_fit(row['phase'])
        if self.run_folder is not None:
            write_csv(self.run_folder / 'history.csv', pd.DataFrame(self.rows))

    def _describe_body(self) -> str:
        trained = [parameter.requires_grad for parameter in self.opt.param_lists[0]]
        return 'unfrozen' if any(trained) else 'frozen'

    def _describe_fit(self, phase: str) -> None:
        self.epochs_of_fit += 1
        lr = self.max_lr
        if self.epochs_of_fit > 1:
            lr = max(lr, self.fits.pop().lr)
        self.fits.append(Phase(phase, self.epochs_of_fit, float(lr), self._describe_body() == 'frozen'))


def validation_metrics(learn: Learner) -> dict[str, float]:
    """Return the validation loss and the metrics of the last epoch of `learn` by name."""
    return name_metrics(learn.recorder.metric_names[1:], learn.recorder.values[-1])


def name_metrics(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Return the values by the names of `history.csv`, for those of fastai's metrics that have another name.

    Without validation images fastai's values are None, and NaN here.
    """
    metrics = dict(zip(names, values, strict=False))
    return {FASTAI_NAMES.get(name, name): math.nan if value is None else value for name, value in metrics.items()}


def has_validation(learn: Learner) -> bool:
    """Return whether `learn` has validation images; a recipe with `valid='none'` has none."""
    return getattr(learn.dls.valid, 'n', None) != 0


class DivergenceGuard(Callback):
    """End the fit if the training or validation loss is NaN or infinite; `failure` then describes where it occurred."""

    order = 54  # before `History`, which then does not record the epoch

    def __init__(self) -> None:
        self.failure: dict[str, Any] = {}

    def after_batch(self) -> None:
        if self.training and not torch.isfinite(self.loss):
            self._fail('training', self.loss.item(), batch=self.iter + 1)

    def after_epoch(self) -> None:
        loss = float(validation_metrics(self.learn)['valid_loss'])
        if has_validation(self.learn) and not math.isfinite(loss):
            self._fail('validation', loss)

    def _fail(self, where: str, loss: float, batch: int | None = None) -> None:
        history = self.history
        self.failure = {
            'phase': history.phase,
            'epoch': len(history.rows) + 1,
            'where': where,
            'batch': batch,
            'loss': str(loss),
            'lr': max(history.max_lr, self.opt.hypers[-1]['lr']),
        }
        raise CancelFitException


class KeepBest(Callback):
    """Keep the weights of the best epoch over all phases: highest validation AUC, then lowest validation loss.

    An undefined AUC counts as 0. Without validation images the last epoch is kept. `row` is the epoch's row of
    `history.csv` and `weights` the state dict of the network.
    """

    order = 56

    def __init__(self) -> None:
        self.score = (-math.inf, -math.inf)
        self.row: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {'score': self.score, 'row': self.row, 'weights': self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score = tuple(state['score'])
        self.row = state['row']
        self.weights = state['weights']

    def after_epoch(self) -> None:
        row = self.history.rows[-1]
        auc = row['roc_auc'] if math.isfinite(row['roc_auc']) else 0.0
        score = (auc, -row['valid_loss'])
        if score > self.score or not has_validation(self.learn):
            self.score = score
            self.row = row
            self.weights = deepcopy(self._measured_weights())

    def _measured_weights(self) -> dict[str, Tensor]:
        """Return the weights that validation used."""
        if hasattr(self.learn, 'average_weights'):
            return self.learn.average_weights.average.module.state_dict()
        return self.learn.network.state_dict()


class StopEarly(Callback):
    """End the phase after `patience` epochs without one that `KeepBest` keeps. Each phase has a callback of its own."""

    order = KeepBest.order + 1

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.worse_epochs = 0
        self.had_ended = False  # before the training was resumed

    def state_dict(self) -> dict[str, Any]:
        return {'worse_epochs': self.worse_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.worse_epochs = state['worse_epochs']
        self.had_ended = self.has_ended

    @property
    def has_ended(self) -> bool:
        return self.worse_epochs >= self.patience

    def before_epoch(self) -> None:
        """Stop here, and not after an epoch, which the callbacks that come later have to log and save first."""
        if not self.has_ended:
            return
        if not self.had_ended:
            log.info(
                f'{self.history.phase} stops early: no epoch since epoch {self.keep_best.row["epoch"]} was better '
                f'(--patience {self.patience})'
            )
        raise CancelFitException

    def after_epoch(self) -> None:
        is_best = self.keep_best.row is self.history.rows[-1]
        self.worse_epochs = 0 if is_best else self.worse_epochs + 1


class ReduceOnPlateau(Callback):
    """Reduce the learning rate when the validation loss stops decreasing, with torch's `ReduceLROnPlateau`.

    Without validation images it is the training loss.

    The recipes use it because it is what the specification names, and because its state can be saved and restored.
    fastai's callback of that name works too. It counts every small decrease as one, waits one epoch less, and does not
    remember its best value when a training is resumed.
    """

    order = 57

    def __init__(self, factor: float, patience: int) -> None:
        self.factor = factor
        self.patience = patience

    def before_fit(self) -> None:
        rates = [group['lr'] for group in self.opt.hypers]
        # An optimiser of fastai has no optimiser of torch, so this one only holds its learning rates.
        holder = torch.optim.SGD([{'params': [torch.zeros(1)], 'lr': lr} for lr in rates])
        self.optimizer = getattr(self.opt, 'opt', holder)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=self.factor, patience=self.patience
        )

    def state_dict(self) -> dict[str, Any]:
        state = self.scheduler.state_dict()
        return {name: state[name] for name in ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)

    def after_epoch(self) -> None:
        row = self.history.rows[-1]
        self.scheduler.step(row['valid_loss' if has_validation(self.learn) else 'train_loss'])
        if not hasattr(self.opt, 'opt'):
            self.opt.set_hyper('lr', [group['lr'] for group in self.optimizer.param_groups])


class AverageWeights(Callback):
    """Keep an exponential moving average of weights and BatchNorm statistics (Polyak and Juditsky 1992).

    Validation and `KeepBest` use the `average`, training continues with the network's own weights.
    """

    order = 9

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: Any = None

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def before_fit(self) -> None:
        if self.average is None:
            self.average = AveragedModel(self.learn.network, multi_avg_fn=moving_average(self.decay), use_buffers=True)
            self.average.n_averaged += 1  # the initial weights are the first average

    def after_batch(self) -> None:
        if self.training:
            self.average.update_parameters(self.learn.network)

    def before_validate(self) -> None:
        self.own_weights = deepcopy(self.learn.network.state_dict())
        self.learn.network.load_state_dict(self.average.module.state_dict())

    def after_validate(self) -> None:
        self.learn.network.load_state_dict(self.own_weights)


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return the averaging function of `AveragedModel` for an exponential moving average with a warm-up.

    Step n uses the smaller of `decay` and (1 + n) / (10 + n), as TensorFlow's `ExponentialMovingAverage` does, so that
    the initial weights lose their influence early. Integers, such as counters of batches, are copied.
    """

    def update(averages: Tensors, values: Tensors, step: Tensor | int) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        step_decay = min(decay, (1 + int(step)) / (10 + int(step)))
        get_ema_multi_avg_fn(step_decay)(averages, values, step)

    return update


class GrowImages(Callback):
    """Start each phase with smaller images: `start_size` of the side, growing linearly for two thirds of the phase."""

    FULL_SIZE_AT = 2 / 3

    def __init__(self, start_size: float) -> None:
        self.start_size = start_size

    def before_train(self) -> None:
        self._set_size()

    def before_batch(self) -> None:
        if self.training:
            self._set_size()  # of the next batch: the current one is already loaded

    def _set_size(self) -> None:
        size = self.start_size + (1 - self.start_size) * self.pct_train / self.FULL_SIZE_AT
        for transform in self.dls.train.after_batch.fs:
            if isinstance(transform, AugmentImages):
                transform.share = min(1.0, size)

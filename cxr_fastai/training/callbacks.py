"""What happens in a fit beside the steps: history, the best epoch, schedules, averaged weights, lines to read."""

from __future__ import annotations

import logging
import math
import time
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientClip

from cxr_fastai.core.files import write_csv
from cxr_fastai.core.progress import progress_bar
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.transforms import AugmentImages
from cxr_fastai.training.hardware import Precision
from cxr_fastai.training.learner import network

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


def recipe_callbacks(recipe: Recipe) -> list[Callback]:
    """The callbacks that `recipe` asks for in every phase."""
    wanted = [
        (recipe.mixup, MixUp, recipe.mixup),
        (recipe.clip, GradientClip, recipe.clip),
        (recipe.ema, AverageWeights, recipe.ema),
        (recipe.precision != 'fp32', Precision, recipe.precision),
        (recipe.start_size < 1, GrowImages, recipe.start_size),
    ]
    return [make(value) for asked, make, value in wanted if asked]


log = logging.getLogger(__name__)


class History(Callback):
    """One row an epoch, in `rows` and in the run's `history.csv`, over all phases.

    The first loss that is no finite number, in training or validation, ends the fit; `failure` then tells where.
    """

    order = 55  # after the Recorder

    def __init__(self, run: Run):
        self.run_folder, self.rows, self.failure = run, [], {}

    def state_dict(self) -> dict[str, Any]:
        return {'rows': self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state['rows']

    def before_epoch(self):
        self.started, self.total, self.count = time.perf_counter(), 0.0, 0
        self.lr_now = 0.0

    def after_batch(self):
        if not self.training:
            return
        self.lr_now = max(self.lr_now, self.opt.hypers[-1]['lr'])
        if not torch.isfinite(self.loss):
            self._fail('training', self.loss.item(), self.iter + 1)
        n = self.images_in_batch()
        self.total, self.count = self.total + self.loss.detach() * n, self.count + n

    def images_in_batch(self) -> int:
        """How many images `loss` is the mean over, those of other processes included."""
        sharing = getattr(self.learn, 'share_batches', None)
        return sharing.images if sharing else len(self.xb[0])  # MixUp has its labels elsewhere

    def after_epoch(self):
        measured = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1], strict=False))
        row = measured | {
            'phase': self.phase,
            'epoch': len(self.rows) + 1,
            'lr': self.lr_now,
            'train_loss': float(self.total) / self.count,  # fastai's is smoothed over older batches
            'seconds': round(time.perf_counter() - self.started, 2),
        }
        if not math.isfinite(row['valid_loss']):
            self._fail('validation', row['valid_loss'])
        self.rows.append({name: row[name] if name == 'phase' else float(row[name]) for name in COLUMNS})
        self.rows[-1]['epoch'] = len(self.rows)
        write_csv(self.run_folder / 'history.csv', pd.DataFrame(self.rows))

    def _fail(self, where: str, loss: float, batch: int | None = None):
        self.failure = {
            'phase': self.phase,
            'epoch': len(self.rows) + 1,
            'where': where,
            'batch': batch,
            'loss': str(loss),
            'lr': self.lr_now,
        }
        raise CancelFitException


class KeepBest(Callback):
    """Keep the weights of the best epoch over all phases: by validation AUC, by loss where it ties or is undefined."""

    order = 56

    def __init__(self):
        self.key, self.row, self.state = (-math.inf, -math.inf), None, None

    def state_dict(self) -> dict[str, Any]:
        return {'key': self.key, 'row': self.row, 'state': self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.key, self.row, self.state = tuple(state['key']), state['row'], state['state']

    def after_epoch(self):
        row = self.history.rows[-1]
        key = (row['roc_auc'] if math.isfinite(row['roc_auc']) else 0.0, -row['valid_loss'])
        if key <= self.key:
            return
        self.key, self.row, self.state = key, row, deepcopy(self._weights())

    def _weights(self) -> dict[str, torch.Tensor]:
        averaging = getattr(self.learn, 'average_weights', None)
        return averaging.mean if averaging else network(self.learn).state_dict()


class ReduceOnPlateau(Callback):
    """torch's ReduceLROnPlateau on the validation loss, stepped after each epoch.

    fastai's own callback of that name writes into copies of the settings when the optimiser is an `OptimWrapper`, and
    so changes nothing.
    """

    order = 57

    def __init__(self, factor: float, patience: int):
        self.factor, self.patience = factor, patience

    def before_fit(self):
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.opt.opt, factor=self.factor, patience=self.patience
        )

    def state_dict(self) -> dict[str, Any]:
        known = self.scheduler.state_dict()
        return {name: known[name] for name in ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)

    def after_epoch(self):
        self.scheduler.step(self.history.rows[-1]['valid_loss'])


class AverageWeights(Callback):
    """An exponential moving average of the weights and statistics (Polyak and Juditsky 1992), which validation measures
    and `KeepBest` keeps; training goes on with the network's own. Early steps count more, as TensorFlow's has it."""

    order = 9

    def __init__(self, decay: float):
        self.decay, self.mean, self.steps = decay, None, 0

    def state_dict(self) -> dict[str, Any]:
        return {'mean': self.mean, 'steps': self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state['steps']
        self.mean = {name: value.to(self.dls.device) for name, value in state['mean'].items()}

    def before_fit(self):
        self.mean = self.mean or deepcopy(network(self.learn).state_dict())

    @torch.no_grad()
    def after_batch(self):
        if not self.training:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, now in network(self.learn).state_dict().items():
            if now.is_floating_point():
                self.mean[name].lerp_(now, 1 - decay)
            else:
                self.mean[name].copy_(now)

    def before_validate(self):
        self.own = deepcopy(network(self.learn).state_dict())
        network(self.learn).load_state_dict(self.mean)

    def after_validate(self):
        network(self.learn).load_state_dict(self.own)


class GrowImages(Callback):
    """Start each phase with images of a `share` of the side, which grows evenly until two thirds of the phase."""

    WHOLE_AT = 2 / 3

    def __init__(self, share: float):
        self.share = share

    def before_train(self):
        self._grow()

    def before_batch(self):  # the batch at hand is drawn already: this is for the next one
        if self.training:
            self._grow()

    def _grow(self) -> None:
        grown = self.share + (1 - self.share) * self.pct_train / self.WHOLE_AT
        for step in self.dls.train.after_batch.fs:
            if isinstance(step, AugmentImages):
                step.share = min(1.0, grown)


class ShowEpochs(Callback):
    """Logs a line an epoch, and draws a progress bar within it on a terminal or in a notebook."""

    order = 58
    bar = None

    def before_train(self):
        self._start(f'{self.history.phase} {len(self.history.rows) + 1}', len(self.dls.train))

    def before_validate(self):
        self._start('validation', len(self.dls.valid))

    def after_batch(self):
        if self.bar:
            self.bar.update()

    def after_train(self):
        self.close()

    def after_validate(self):
        self.close()

    def after_epoch(self):
        row = self.history.rows[-1]
        best = '  best' if row is self.keep_best.row else ''
        log.info(
            f'{row["phase"]:>9} {row["epoch"]:>3}  lr {row["lr"]:.0e}  train {row["train_loss"]:.4f}  '
            f'valid {row["valid_loss"]:.4f}  AUC {row["roc_auc"]:.4f}  sens {row["sensitivity"]:.3f}  '
            f'spec {row["specificity"]:.3f}  {row["seconds"]:.0f} s{best}'
        )

    def close(self):
        """Remove the bar, also when an exception ended the epoch."""
        if self.bar:
            self.bar.close()
        self.bar = None

    def _start(self, description: str, batches: int):
        self.bar = progress_bar(batches, description, unit='batch')

"""What a training shows: lines for each epoch, a progress bar, and a picture of its first batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastai.callback.core import Callback
from matplotlib.figure import Figure
from torch import Tensor

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.figures import BLUE, ORANGE, own_style, save_figure
from cxr_fastai.core.files import writing
from cxr_fastai.core.progress import ShownProgress, counted, format_seconds
from cxr_fastai.core.recipe import POSITIVE, VOCAB, Recipe
from cxr_fastai.models.inputs import denormalize
from cxr_fastai.training.callbacks import KeepBest, has_validation

MAX_IMAGES = 16
"""Largest number of images of a batch that are drawn."""
COLUMNS = 4

log = logging.getLogger(__name__)


class ShowEpochs(Callback):
    """Log two lines per epoch, and show the progress of its batches: a bar, or lines in the log (see `ShownProgress`).

    The second line has the training images per second, without validation, and the time that is left, if every epoch
    takes as long as the last one; an upper limit if a phase that is left can stop early. The first fit is the phase
    number `start` of `recipe`, and the next ones are those after it.
    """

    order = KeepBest.order + 2

    def __init__(self, recipe: Recipe, start: int = 0) -> None:
        self.recipe = recipe
        self.phase_number = start - 1
        self.bar: ShownProgress | None = None
        self.train_seconds = 0.0

    def before_fit(self) -> None:
        self.phase_number += 1

    def before_train(self) -> None:
        self.train_start = time.perf_counter()
        self._open_bar(f'{self.history.phase} {len(self.history.rows) + 1}', len(self.dls.train))

    def before_validate(self) -> None:
        if has_validation(self.learn):
            self._open_bar('validation', len(self.dls.valid))

    def _open_bar(self, description: str, batches: int) -> None:
        self.bar = ShownProgress(batches, description, unit='batch')

    def after_batch(self) -> None:
        if self.bar is not None:
            self.bar.update(len(self.learn.xb[0]))

    def after_train(self) -> None:
        self.train_seconds = time.perf_counter() - self.train_start
        self.close()

    def after_validate(self) -> None:
        self.close()

    def after_epoch(self) -> None:
        row = self.history.rows[-1]
        log.info(self._describe_epoch(row))
        line = f'{self.history.image_count / self.train_seconds:,.1f} images/s'
        current, *later = self.recipe.phases[self.phase_number :]
        phases = [replace(current, epochs=current.epochs - self.epoch - 1), *later]
        epochs_left = sum(phase.epochs for phase in phases)
        if epochs_left:
            can_stop_early = any(self.recipe.patience_of(phase) for phase in phases if phase.epochs)
            limit = 'at most ' if can_stop_early else 'about '
            line += f', {limit}{format_seconds(row["seconds"] * epochs_left)} left for {counted(epochs_left, "epoch")}'
        log.info(f'{"":>14}{line}')

    def _describe_epoch(self, row: dict[str, Any]) -> str:
        line = f'{row["phase"]:>9} {row["epoch"]:>2}  lr {row["lr"]:.0e}  train {row["train_loss"]:.4f}  '
        if has_validation(self.learn):
            line += (
                f'valid {row["valid_loss"]:.4f}  AUC {row["roc_auc"]:.4f}  sens {row["sensitivity"]:.3f}  '
                f'spec {row["specificity"]:.3f}  '
            )
        line += f'{row["seconds"]:.0f} s'
        if row is self.keep_best.row and has_validation(self.learn):
            line += '  best'
        return line

    def close(self) -> None:
        """Remove the bar. `train` calls this also when an exception ended the epoch."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None


class DrawBatch(Callback):
    """Draw the first training batch, as the network gets it, into the PNG file `path`, unless it exists.

    The batch is the one of the training itself, so that no random number is drawn for the picture.
    """

    order = 90  # after all callbacks that change a batch

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_due = is_main_process() and not path.exists()

    def before_batch(self) -> None:
        if not (self.is_due and self.training):
            return
        self.is_due = False
        names = [VOCAB[int(label)] for label in self.yb[0][:MAX_IMAGES]]
        if hasattr(self.learn, 'mix_up'):
            names = _mixed_names(names, self.mix_up)
        with writing(self.path):
            self.path.parent.mkdir(exist_ok=True)
        save_figure(plot_batch(self.xb[0], names), self.path)


def _mixed_names(names: list[str], mix_up: Any) -> list[str]:
    """Return the labels after MixUp: those of both images with their shares, or one if they are equal."""
    others = [VOCAB[int(label)] for label in mix_up.yb1[0][: len(names)]]
    shares = mix_up.lam.flatten().tolist()
    return [
        first if first == second else f'{first} {share:.0%}, {second} {1 - share:.0%}'
        for first, second, share in zip(names, others, shares, strict=False)
    ]


@own_style()
def plot_batch(images: Tensor, names: Sequence[str]) -> Figure:
    """Return a figure of the first `MAX_IMAGES` of the normalised `images` (n, 3, h, w), with their labels `names`."""
    shown = denormalize(images[:MAX_IMAGES].detach().cpu().float())[:, 0].clamp(0, 1).numpy()
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(8, 2.2 * rows + 0.6), layout='constrained')
    title = f'The first training batch: {len(shown)} of {counted(len(images))}, {shown.shape[1]} px'
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, image, name in zip(axes, shown, names, strict=False):
        ax.imshow(image, cmap='gray', vmin=0, vmax=1)
        ax.set_title(name, fontsize=9, color=BLUE if name.startswith(VOCAB[1 - POSITIVE]) else ORANGE)
    return figure

"""Figures of the confusion matrix, the training history, the robustness, the learning rate and the checks of CAMs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cxr_fastai.core.figures import BLUE, GREEN, GREY, INK, ORANGE, NotebookFigure, axes, plotting, set_title, tidy
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.evaluation.metrics import SPECIFICATION_THRESHOLD
from cxr_fastai.images.corruptions import CLEAN, SHORTCUT

if TYPE_CHECKING:
    from cxr_fastai.training.lr_finder import Rates

DARK_SHARE = 0.55
"""Share of a class above which the cell of a confusion matrix is dark, so that its text is white."""


@plotting
def plot_confusion_matrix(metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot the counts, and their shares of the true class, from a split's object of `metrics.json`."""
    cells = metrics['confusion']
    counts = np.array([[cells['tn'], cells['fp']], [cells['fn'], cells['tp']]])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, ax = axes(4.8, 4.4)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        colour = 'white' if share > DARK_SHARE else INK
        ax.text(column, row, f'{count:,}\n{share:.1%}', ha='center', va='center', fontsize=14, color=colour)
    ax.set(xticks=[0, 1], xticklabels=VOCAB, xlabel='predicted class', ylabel='true class')
    ax.set_yticks([0, 1], VOCAB, rotation=90, va='center')
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    set_title(ax, f'{title}\nn = {metrics["n"]:,}, threshold {metrics["threshold"]:g}')
    return figure


@plotting
def plot_robustness(robustness: pd.DataFrame, title: str = '', columns: int = 4) -> Figure:
    """Plot the AUC with its interval against the strength of each corruption.

    Horizontal lines are the AUC on clean images, and on images without the sharpness shortcut.

    Args:
        robustness: table of `measure_robustness`.
        title: beginning of the title.
        columns: number of panels in a row.
    """
    corrupted = robustness[robustness.strength > 0]
    auc_by_kind = robustness[robustness.strength == 0].set_index('corruption').auc
    references = (
        (auc_by_kind[CLEAN], GREY, '--', 'clean'),
        (auc_by_kind[SHORTCUT], ORANGE, ':', 'without sharpness shortcut'),
    )
    kinds = list(corrupted.groupby('corruption', sort=False))
    n_rows = math.ceil(len(kinds) / columns)
    figure = NotebookFigure(figsize=(2.5 * columns, 2.6 * n_rows), layout='constrained')
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, (kind, rows) in zip(panels, kinds, strict=False):
        for auc, colour, style, name in references:
            ax.axhline(auc, color=colour, ls=style, lw=1.5, label=f'{name} {auc:.3f}')
        ax.fill_between(rows.strength, rows.auc_low, rows.auc_high, color=BLUE, alpha=0.2, lw=0, label='95% interval')
        ax.plot(rows.strength, rows.auc, color=BLUE, marker='.', label='corrupted')
        tidy(ax).set_title(f'{kind}, mean {rows.auc.mean():.3f}', fontsize=10)
        ax.set_xticks(rows.strength)
        ax.set(xlabel='strength', ylabel='AUC')
        ax.label_outer()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(f'{title}, n = {robustness.n.iloc[0]:,}', fontsize=11, parse_math=False)
    return figure


@plotting
def plot_history(history: pd.DataFrame, kept_epoch: int | None = None) -> Figure:
    """Plot the losses and the validation metrics by epoch, with the training phases shaded.

    A line marks `kept_epoch`, the epoch that the saved weights are from: `Run.kept_epoch`. The history of a training
    without validation images has the panel of the losses alone.
    """
    panels = history_panels(history)
    figure = NotebookFigure(figsize=(4.5 * len(panels), 4.1), layout='constrained')
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        HISTORY_PANELS[panel](ax, history, kept_epoch)
    return figure


def history_panels(history: pd.DataFrame) -> list[str]:
    """Return the names of the panels of `HISTORY_PANELS` for which `history` has values."""
    return [panel for panel in HISTORY_PANELS if panel != 'validation' or history.roc_auc.notna().any()]


@plotting
def plot_history_panel(history: pd.DataFrame, panel: str, kept_epoch: int | None = None) -> Figure:
    """Plot one panel of `plot_history`, one of `HISTORY_PANELS`."""
    figure, ax = axes(4.8, 3.9)
    HISTORY_PANELS[panel](ax, history, kept_epoch)
    return figure


def _draw_losses(ax: Axes, history: pd.DataFrame, kept_epoch: int | None) -> None:
    ax.plot(history.epoch, history.train_loss, color=GREY, marker='.', label='train loss')
    if history.valid_loss.notna().any():
        ax.plot(history.epoch, history.valid_loss, color=BLUE, marker='.', label='valid loss')
    ax.set_ylim(0, None)
    _finish_history_panel(ax, history, kept_epoch, 'loss')


def _draw_validation(ax: Axes, history: pd.DataFrame, kept_epoch: int | None) -> None:
    ax.plot(history.epoch, history.roc_auc, color=BLUE, marker='.', label='AUC')
    for name, colour in (('sensitivity', ORANGE), ('specificity', GREEN)):
        label = f'{name} at threshold {SPECIFICATION_THRESHOLD:g}'  # training has not chosen a threshold yet
        ax.plot(history.epoch, history[name], color=colour, marker='.', label=label)
    ax.set_ylim(None, 1.01)
    _finish_history_panel(ax, history, kept_epoch, 'validation metrics')


HISTORY_PANELS: dict[str, Callable[[Axes, pd.DataFrame, int | None], None]] = {
    'losses': _draw_losses,
    'validation': _draw_validation,
}


def _finish_history_panel(ax: Axes, history: pd.DataFrame, kept_epoch: int | None, title: str) -> None:
    if kept_epoch is not None and kept_epoch in set(history.epoch):
        ax.axvline(kept_epoch, color=INK, lw=1, ls='--', zorder=1, label=f'kept epoch: {kept_epoch}')
    ax.set_title(title, pad=18)  # above the names of the phases
    tidy(ax).set_xlabel('epoch')
    ax.set_xlim(history.epoch.min() - 0.5, history.epoch.max() + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8, frameon=False)
    _shade_phases(ax, history)


def _shade_phases(ax: Axes, history: pd.DataFrame) -> None:
    """Shade and name the phases of the training if there are several; a phase can come again, as in fits by hand."""
    if history.phase.nunique() == 1:
        return
    is_start = history.phase != history.phase.shift()
    for i, (_, rows) in enumerate(history.groupby(is_start.cumsum())):
        name = rows.phase.iloc[0]
        left = rows.epoch.min() - 0.5
        right = rows.epoch.max() + 0.5
        alpha = 0.12 if i % 2 == 0 else 0.03
        ax.axvspan(left, right, color=GREY, alpha=alpha, lw=0, zorder=0)
        middle = (left + right) / 2
        ax.text(middle, 1.01, name, ha='center', color=GREY, fontsize=8, transform=ax.get_xaxis_transform())


@plotting
def plot_rates(rates: Rates, title: str = '') -> Figure:
    """Plot the loss against the learning rate, and the suggested learning rate."""
    curve = rates.curve
    lowest = curve.loss.min()
    highest_before = curve.loss[curve.lr <= rates.suggestion].max()
    spread = highest_before - lowest
    figure, ax = axes(6, 3.6)
    ax.plot(curve.lr, curve.loss, color=BLUE, lw=2)
    ax.axvline(rates.suggestion, color=ORANGE, ls='--', label=f'suggested learning rate {rates.suggestion:.1e}')
    ax.set(xscale='log', xlabel='learning rate', ylabel='smoothed loss')
    # The loss diverges at the end, which would flatten the rest of the curve.
    ax.set_ylim(lowest - 0.1 * spread, highest_before + spread)
    ax.legend(frameon=False)
    set_title(ax, title)
    return figure


@plotting
def plot_cam_check(check: dict[str, Any], title: str = '') -> Figure:
    """Plot the contents of `cam_check.json`: all of `CAM_CHECK_PANELS` next to each other."""
    figure = NotebookFigure(figsize=(12, 3.8), layout='constrained')
    panels = figure.subplots(1, len(CAM_CHECK_PANELS))
    for ax, draw in zip(panels, CAM_CHECK_PANELS.values(), strict=True):
        draw(ax, check)
    details = f'{check["method"]} at layer {check["layer"]}, {counted(check["images"])}'
    figure.suptitle(f'{title}, {details}', fontsize=11, parse_math=False)
    return figure


@plotting
def plot_cam_check_panel(check: dict[str, Any], panel: str) -> Figure:
    """Plot one panel of `plot_cam_check`, one of `CAM_CHECK_PANELS`."""
    figure, ax = axes(4.8, 3.6)
    CAM_CHECK_PANELS[panel](ax, check)
    return figure


def _draw_deletion(ax: Axes, check: dict[str, Any]) -> None:
    """Plot the probability while pixels are replaced by those of normal images, or restored."""
    lines = (
        ('deletion', 'deletion, highest first', ORANGE, '-'),
        ('deletion_random', 'deletion, random order', GREY, '--'),
        ('insertion', 'insertion, highest first', BLUE, '-'),
    )
    for key, label, colour, style in lines:
        ax.plot(check['steps'], check[key], color=colour, ls=style, marker='.', label=label)
    tidy(ax).set(title='deletion and insertion of pixels', xlabel='share of pixels', ylim=(-0.02, 1.02))
    ax.set_ylabel('mean probability of pneumonia')
    ax.legend(fontsize=8, frameon=False)


def _draw_randomisation(ax: Axes, check: dict[str, Any]) -> None:
    """Plot the similarity to the original map while layers are randomised, from the last one back."""
    stages = check['stages']
    for key, label, colour in (('ssim', 'SSIM', BLUE), ('spearman', 'Spearman', ORANGE)):
        ax.plot([stage[key] for stage in stages], color=colour, marker='.', label=label)
        ax.axhline(check['pairs'][key], color=colour, ls=':', label=f'{label}, two images')
    ax.set_xticks(range(len(stages)), [stage['layer'] for stage in stages], rotation=60, fontsize=8)
    tidy(ax).set(title='randomised layers', xlabel='from the last layer back to', ylim=(None, 1))
    ax.set_ylabel('similarity to the original map')
    ax.legend(fontsize=8, frameon=False, ncols=2)


def _draw_location(ax: Axes, check: dict[str, Any]) -> None:
    """Show the mean map with the box around the thorax."""
    left, top, right, bottom = check['thorax']
    ax.imshow(np.array(check['mean_map']), cmap='cividis', vmin=0, extent=(0, 1, 1, 0))
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor='white', ls='--'))
    ax.set(title='mean map and thorax', xticks=[], yticks=[])


CAM_CHECK_PANELS: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    'deletion': _draw_deletion,
    'randomisation': _draw_randomisation,
    'location': _draw_location,
}

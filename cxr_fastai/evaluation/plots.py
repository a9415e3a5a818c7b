"""What is drawn of a run beside curves: the confusion matrix, its history, its robustness, a learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cxr_fastai.core.figures import BLUE, GREEN, GREY, ORANGE, axes, entitle, tidy
from cxr_fastai.core.recipe import VOCAB

if TYPE_CHECKING:
    from cxr_fastai.training.lr_finder import Rates


def plot_confusion_matrix(metrics: dict, title: str = '') -> Figure:
    """Counts, and shares of each true class, of a split's object of `metrics.json`."""
    c = metrics['confusion']
    counts = np.array([[c['tn'], c['fp']], [c['fn'], c['tp']]])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, ax = axes(4.8, 4.4)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts):
        ax.text(
            j,
            i,
            f'{n}\n{shares[i, j]:.1%}',
            ha='center',
            va='center',
            fontsize=14,
            color='white' if shares[i, j] > 0.55 else '#222222',
        )
    ax.set(xticks=[0, 1], xticklabels=VOCAB, xlabel='predicted', ylabel='true')
    ax.set_yticks([0, 1], VOCAB, rotation=90, va='center')
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    entitle(ax, f'{title}\nn = {metrics["n"]}, threshold {metrics["threshold"]:g}')
    return figure


def plot_robustness(robustness: pd.DataFrame, title: str = '', columns: int = 4) -> Figure:
    """AUC with its interval against strength, a panel a corruption, beside the AUC of clean images and of images
    without shortcuts."""
    corrupted = robustness[robustness.strength > 0]
    plain = robustness[robustness.strength == 0].set_index('corruption').auc
    kinds = list(corrupted.groupby('corruption', sort=False))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.6 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, (kind, rows) in zip(panels, kinds, strict=False):
        for (name, auc), (colour, style) in zip(plain.items(), ((GREY, '--'), (ORANGE, ':')), strict=True):
            ax.axhline(auc, color=colour, ls=style, lw=1.5, label=f'{name} {auc:.3f}')
        ax.fill_between(rows.strength, rows.auc_low, rows.auc_high, color=BLUE, alpha=0.2, lw=0)
        ax.plot(rows.strength, rows.auc, color=BLUE, marker='.', label='corrupted')
        tidy(ax).set_title(f'{kind}, mean {rows.auc.mean():.3f}', fontsize=10)
        ax.set_xticks(rows.strength)
        ax.set(xlabel='strength', ylabel='AUC')
        ax.label_outer()
    figure.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f'{title}, n = {robustness.n.iloc[0]}', fontsize=11, parse_math=False)
    return figure


def plot_history(history: pd.DataFrame) -> Figure:
    """Losses, and validation figures, by epoch; the phases are shaded and named."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for ax, draw in zip(figure.subplots(1, 2), EPOCHS.values(), strict=True):
        draw(ax, history)
    return figure


def plot_epochs(history: pd.DataFrame, part: str) -> Figure:
    """One half of `plot_history`: `losses` or `validation`."""
    figure, ax = axes(4.8, 3.4)
    EPOCHS[part](ax, history)
    return figure


def _draw_losses(ax: Axes, history: pd.DataFrame) -> None:
    for name, colour in (('train_loss', GREY), ('valid_loss', BLUE)):
        ax.plot(history.epoch, history[name], color=colour, marker='.', label=name.replace('_', ' '))
    ax.set(title='loss', ylim=(0, None))
    _finish_epochs(ax, history)


def _draw_validation(ax: Axes, history: pd.DataFrame) -> None:
    for name, colour in (('roc_auc', BLUE), ('sensitivity', ORANGE), ('specificity', GREEN)):
        ax.plot(history.epoch, history[name], color=colour, marker='.', label=name.replace('roc_auc', 'AUC'))
    ax.set(title='validation', ylim=(None, 1.01))
    _finish_epochs(ax, history)


EPOCHS = {'losses': _draw_losses, 'validation': _draw_validation}


def plot_rates(rates: Rates, title: str = '') -> Figure:
    """The loss against the learning rate, and the rate that is suggested."""
    figure, ax = axes(6, 3.6)
    ax.plot(rates.curve.lr, rates.curve.loss, color=BLUE, lw=2)
    ax.axvline(rates.suggestion, color=ORANGE, ls='--', label=f'suggestion {rates.suggestion:.1e}')
    # What the loss blows up to at the end would flatten the rest.
    lowest, before = rates.curve.loss.min(), rates.curve.loss[rates.curve.lr <= rates.suggestion].max()
    ax.set(
        xscale='log',
        xlabel='learning rate',
        ylabel='loss (smoothed)',
        ylim=(lowest - 0.1 * (before - lowest), 2 * before - lowest),
    )
    ax.legend(frameon=False)
    entitle(ax, title)
    return figure


def plot_check(check: dict, title: str = '') -> Figure:
    """What `cam_check.json` found, side by side: every one of `CHECKED`."""
    figure = Figure(figsize=(12, 3.8), layout='constrained')
    for ax, draw in zip(figure.subplots(1, len(CHECKED)), CHECKED.values(), strict=True):
        draw(ax, check)
    figure.suptitle(
        f'{title}, {check["method"]} at layer {check["layer"]}, {check["images"]} images', fontsize=11, parse_math=False
    )
    return figure


def plot_checked(check: dict, part: str) -> Figure:
    """One panel of `plot_check`: `deletion`, `forgetting` or `place`."""
    figure, ax = axes(4.8, 3.6)
    CHECKED[part](ax, check)
    return figure


def _draw_deletion(ax: Axes, check: dict) -> None:
    lines = {
        'deletion': ('highest of the map first', ORANGE, '-'),
        'deletion_random': ('by chance', GREY, '--'),
        'insertion': ('brought back, highest first', BLUE, '-'),
    }
    for name, (label, colour, style) in lines.items():
        ax.plot(check['steps'], check[name], color=colour, ls=style, marker='.', label=label)
    tidy(ax).set(
        title='pixels made normal', xlabel='share of the pixels', ylabel='mean p(pneumonia)', ylim=(-0.02, 1.02)
    )
    ax.legend(fontsize=8, frameon=False)


def _draw_forgetting(ax: Axes, check: dict) -> None:
    stages = check['stages']
    for name, label, colour in (('ssim', 'SSIM', BLUE), ('spearman', 'Spearman', ORANGE)):
        ax.plot([stage[name] for stage in stages], color=colour, marker='.', label=label)
        ax.axhline(check['pairs'][name], color=colour, ls=':', label=f'{label}, two images')
    ax.set_xticks(range(len(stages)), [stage['layer'] for stage in stages], rotation=60, fontsize=8)
    tidy(ax).set(
        title='layers drawn anew', xlabel='from the last layer back to', ylabel='similarity to the map', ylim=(None, 1)
    )
    ax.legend(fontsize=8, frameon=False, ncols=2)


def _draw_place(ax: Axes, check: dict) -> None:
    heat, (left, top, right, bottom) = np.array(check['mean_map']), check['thorax']
    ax.imshow(heat, cmap='cividis', vmin=0, extent=(0, 1, 1, 0))
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor='white', ls='--'))
    ax.set(title='mean map, and the box of the thorax', xticks=[], yticks=[])


CHECKED = {'deletion': _draw_deletion, 'forgetting': _draw_forgetting, 'place': _draw_place}


def _finish_epochs(ax: Axes, history: pd.DataFrame) -> None:
    tidy(ax).set_xlabel('epoch')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, frameon=False)
    _shade_phases(ax, history)


def _shade_phases(ax: Axes, history: pd.DataFrame) -> None:
    if history.phase.nunique() == 1:
        return
    for i, (name, rows) in enumerate(history.groupby('phase', sort=False)):
        left, right = rows.epoch.min() - 0.5, rows.epoch.max() + 0.5
        ax.axvspan(left, right, color=GREY, alpha=0.12 if i % 2 == 0 else 0.03, lw=0, zorder=0)
        ax.text((left + right) / 2, 0.02, name, ha='center', color=GREY, fontsize=8, transform=ax.get_xaxis_transform())

"""Predictions and history become pictures, each a matplotlib `Figure`; nothing here predicts again."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxr_fastai.core import VOCAB, atomic
from cxr_fastai.evaluation import TARGETS, Estimate, roc_curve
from cxr_fastai.rates import Rates
from cxr_fastai.run import Run

# Okabe and Ito's colours, told apart also by the colour-blind.
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#767676'


def save_figures(run: Run, split: str) -> list[str]:
    """Draw what `evaluate` shows of `split` into the run's `figures/`; returns the names, relative to the run."""
    metrics, predictions = run.metrics[split], run.predictions
    title = f'{run.recipe.arch}, {split} split'
    figures = {f'confusion_{split}': plot_confusion_matrix(metrics, title)}
    if (run/'history.csv').exists(): figures['history'] = plot_history(run.history)
    if metrics['auc']['value'] is not None:
        figures[f'roc_{split}'] = plot_roc(predictions[predictions.split == split], metrics, title)
    return [_save(run, name, figure) for name, figure in figures.items()]


def save_robustness(run: Run, split: str) -> str:
    """Draw the run's robustness on `split` into its `figures/`; returns the name, relative to the run."""
    table = run.robustness
    return _save(run, f'robustness_{split}', plot_robustness(table[table.split == split],
                                                             f'{run.recipe.arch}, {split} split'))


def plot_confusion_matrix(metrics: dict, title: str = '') -> Figure:
    """Counts, and shares of each true class, of a split's object of `metrics.json`."""
    c = metrics['confusion']
    counts = np.array([[c['tn'], c['fp']], [c['fn'], c['tp']]])
    shares = counts/np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, ax = _axes(4.8, 4.4)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts):
        ax.text(j, i, f'{n}\n{shares[i, j]:.1%}', ha='center', va='center', fontsize=14,
                color='white' if shares[i, j] > 0.55 else '#222222')
    ax.set(xticks=[0, 1], xticklabels=VOCAB, xlabel='predicted', ylabel='true')
    ax.set_yticks([0, 1], VOCAB, rotation=90, va='center')
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f'{title}\nn = {metrics["n"]}, threshold {metrics["threshold"]:g}', fontsize=11, parse_math=False)
    return figure


def plot_roc(predictions: pd.DataFrame, metrics: dict, title: str = '') -> Figure:
    """The ROC curve of one split, its AUC with interval, the operating point, and the specification's two targets."""
    fpr, tpr = roc_curve(predictions)
    figure, ax = _axes(4.8, 4.8)
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=':')
    ax.plot(fpr, tpr, color=BLUE, lw=2, label=f'AUC {describe(metrics["auc"])}')
    sensitivity, specificity = metrics['sensitivity'], metrics['specificity']
    ax.errorbar(1 - specificity['value'], sensitivity['value'], color=ORANGE, marker='o', ms=7, capsize=3,
                xerr=[[specificity['high'] - specificity['value']], [specificity['value'] - specificity['low']]],
                yerr=[[sensitivity['value'] - sensitivity['low']], [sensitivity['high'] - sensitivity['value']]],
                label=f'threshold {metrics["threshold"]:g}: sensitivity {sensitivity["value"]:.3f}, '
                      f'specificity {specificity["value"]:.3f}')
    ax.fill_between([0, 1 - TARGETS['specificity']], TARGETS['sensitivity'], 1, color=GREEN, alpha=0.2, lw=0,
                    label='both targets met')
    ax.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect='equal')
    ax.legend(loc='lower right', fontsize=8, frameon=False)
    ax.set_title(f'{title}, n = {metrics["n"]}', fontsize=11, parse_math=False)
    return figure


def plot_robustness(robustness: pd.DataFrame, title: str = '') -> Figure:
    """AUC with its interval against strength, a panel a corruption, beside the AUC of clean films and of films
    without shortcuts."""
    corrupted = robustness[robustness.strength > 0]
    plain = robustness[robustness.strength == 0].set_index('corruption').auc
    kinds = list(corrupted.groupby('corruption', sort=False))
    figure = Figure(figsize=(10, 2.6*-(-len(kinds)//4)), layout='constrained')
    panels = figure.subplots(-(-len(kinds)//4), 4, sharex=True, sharey=True, squeeze=False).flat
    for ax, (kind, rows) in zip(panels, kinds, strict=False):
        for (name, auc), (colour, style) in zip(plain.items(), ((GREY, '--'), (ORANGE, ':')), strict=True):
            ax.axhline(auc, color=colour, ls=style, lw=1.5, label=f'{name} {auc:.3f}')
        ax.fill_between(rows.strength, rows.auc_low, rows.auc_high, color=BLUE, alpha=0.2, lw=0)
        ax.plot(rows.strength, rows.auc, color=BLUE, marker='.', label='corrupted')
        _tidy(ax).set_title(f'{kind}, mean {rows.auc.mean():.3f}', fontsize=10)
        ax.set_xticks(rows.strength)
        ax.set(xlabel='strength', ylabel='AUC')
        ax.label_outer()
    figure.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f'{title}, n = {robustness.n.iloc[0]}', fontsize=11, parse_math=False)
    return figure


def plot_history(history: pd.DataFrame) -> Figure:
    """Losses, and validation figures, by epoch; the phases are shaded and named."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    losses, scores = figure.subplots(1, 2)
    for name, colour in (('train_loss', GREY), ('valid_loss', BLUE)):
        losses.plot(history.epoch, history[name], color=colour, marker='.', label=name.replace('_', ' '))
    for name, colour in (('roc_auc', BLUE), ('sensitivity', ORANGE), ('specificity', GREEN)):
        scores.plot(history.epoch, history[name], color=colour, marker='.', label=name.replace('roc_auc', 'AUC'))
    losses.set(title='loss', ylim=(0, None))
    scores.set(title='validation', ylim=(None, 1.01))
    for ax in (losses, scores):
        _tidy(ax)
        ax.set_xlabel('epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8, frameon=False)
        _shade_phases(ax, history)
    return figure


def plot_rates(rates: Rates, title: str = '') -> Figure:
    """The loss against the learning rate, and the rate that is suggested."""
    figure, ax = _axes(6, 3.6)
    ax.plot(rates.curve.lr, rates.curve.loss, color=BLUE, lw=2)
    ax.axvline(rates.suggestion, color=ORANGE, ls='--', label=f'suggestion {rates.suggestion:.1e}')
    # What the loss blows up to at the end would flatten the rest.
    lowest, first = rates.curve.loss.min(), rates.curve.loss.iloc[0]
    ax.set(xscale='log', xlabel='learning rate', ylabel='loss (smoothed)',
           ylim=(lowest - 0.1*(first - lowest), 2*first - lowest))
    ax.legend(frameon=False)
    ax.set_title(title, fontsize=11, parse_math=False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG, atomically. Raises `OutputError`."""
    with atomic(path) as temporary: figure.savefig(temporary, format='png', dpi=130)


def describe(estimate: Estimate) -> str:
    """An estimate in words: `0.953 (0.931 to 0.968)`, or `undefined` where there is nothing to estimate from."""
    if estimate['value'] is None: return 'undefined'
    if estimate['low'] is None: return f'{estimate["value"]:.3f}'
    return f'{estimate["value"]:.3f} ({estimate["low"]:.3f} to {estimate["high"]:.3f})'


def _save(run: Run, name: str, figure: Figure) -> str:
    save_figure(figure, run/'figures'/f'{name}.png')
    return f'figures/{name}.png'


def _shade_phases(ax: Axes, history: pd.DataFrame) -> None:
    if history.phase.nunique() == 1: return
    for i, (name, rows) in enumerate(history.groupby('phase', sort=False)):
        left, right = rows.epoch.min() - 0.5, rows.epoch.max() + 0.5
        ax.axvspan(left, right, color=GREY, alpha=0.12 if i % 2 == 0 else 0.03, lw=0, zorder=0)
        ax.text((left + right)/2, 0.02, name, ha='center', color=GREY, fontsize=8, transform=ax.get_xaxis_transform())


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, _tidy(figure.subplots())


def _tidy(ax: Axes) -> Axes:
    ax.spines[['top', 'right']].set_visible(False)
    return ax

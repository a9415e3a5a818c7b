"""Curves over all thresholds become pictures: of one split, or of several runs together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

from cxr_fastai.core.figures import BLUE, GREEN, GREY, INK, LINES, ORANGE, axes, entitle, tidy
from cxr_fastai.evaluation.calibration import reliability
from cxr_fastai.evaluation.intervals import describe
from cxr_fastai.evaluation.metrics import HALF, TARGETS, truth
from cxr_fastai.evaluation.thresholds import (
    net_benefit,
    precision_recall,
    precision_recall_band,
    risk_coverage,
    roc_band,
    roc_curve,
)
from cxr_fastai.inference.config import logits, temper

UNIT = (-0.02, 1.02)
SCORES = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
"""Probabilities that an axis of logits names."""


def plot_roc(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """The ROC curve of one split, its AUC with interval, both operating points, and the specification's two targets."""
    fpr, tpr = roc_curve(predictions)
    figure, ax = axes(4.8, 4.8)
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=':')
    _shade(ax, roc_band(predictions))
    ax.plot(fpr, tpr, color=BLUE, lw=2, label=f'AUC {describe(metrics["auc"])}')
    for point, colour, marker in _points(metrics):
        _mark(ax, point, colour, marker)
    ax.fill_between(
        [0, 1 - TARGETS['specificity']],
        TARGETS['sensitivity'],
        1,
        color=GREEN,
        alpha=0.2,
        lw=0,
        label='both targets met',
    )
    ax.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=UNIT, ylim=UNIT, aspect='equal')
    ax.legend(loc='lower right', fontsize=8, frameon=False)
    entitle(ax, f'{title}, n = {metrics["n"]}')
    return figure


def plot_precision_recall(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """PPV against sensitivity at the prevalence of the split, both operating points, and what chance would give."""
    recall, precision = precision_recall(predictions)
    figure, ax = axes(4.8, 4.8)
    prevalence = metrics['positives'] / metrics['n']
    ax.axhline(prevalence, color=GREY, lw=1, ls=':', label=f'chance: the prevalence, {prevalence:.3f}')
    _shade(ax, precision_recall_band(predictions))
    ax.plot(
        recall,
        precision,
        color=BLUE,
        lw=2,
        drawstyle='steps-post',
        label=f'average precision {describe(metrics["average_precision"])}',
    )
    for point, colour, marker in _points(metrics):
        if point['ppv']['value'] is None:
            continue
        ax.plot(
            point['sensitivity']['value'],
            point['ppv']['value'],
            color=colour,
            marker=marker,
            ls='',
            ms=7,
            label=f'threshold {point["threshold"]:g}',
        )
    ax.set(xlabel='sensitivity (recall)', ylabel='PPV (precision)', xlim=UNIT, ylim=UNIT, aspect='equal')
    ax.legend(loc='lower left', fontsize=8, frameon=False)
    entitle(ax, f'{title}, n = {metrics["n"]}')
    return figure


def plot_calibration(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """The share of pneumonia against the probability, in tenths of the images with intervals, as it is and at the
    temperature of the validation images; below, how the probabilities are spread."""
    targs, p = truth(predictions)
    figure = Figure(figsize=(4.8, 4.8), layout='constrained')
    ax, spread = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=':', label='perfect')
    temperature = metrics['calibrated']['temperature']
    tempered = temper(p, temperature), ORANGE, f'temperature {temperature:.2f}'
    for scores, colour, name in ((p, BLUE, 'as it is'), tempered):
        bins = reliability(targs, scores)
        ax.errorbar(
            bins.p,
            bins.share,
            yerr=[bins.share - bins.low, bins.high - bins.share],
            color=colour,
            marker='o',
            ms=4,
            capsize=2,
            lw=1.2,
            label=name,
        )
        spread.hist(scores, bins=np.linspace(0, 1, 31), color=colour, alpha=0.5)
        if temperature == 1:
            break
    tidy(ax).set(ylabel='share of pneumonia', xlim=UNIT, ylim=UNIT)
    ax.legend(loc='upper left', fontsize=8, frameon=False)
    tidy(spread).set(xlabel='probability of pneumonia', ylabel='images', yscale='log')
    spread.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    spread.yaxis.set_minor_formatter(NullFormatter())
    entitle(ax, f'{title}, n = {metrics["n"]}')
    return figure


def plot_scores(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """How the probabilities of the two classes are spread, on the logit scale, and where the thresholds cut."""
    targs, p = truth(predictions)
    z = np.clip(logits(p), *logits(np.array([1e-4, 1 - 1e-4])))
    figure, ax = axes(4.8, 3.6)
    edges = np.linspace(z.min(), z.max() + 1e-9, 41)
    for side, colour, name in ((~targs, BLUE, 'normal'), (targs, ORANGE, 'pneumonia')):
        ax.hist(z[side], bins=edges, color=colour, alpha=0.55, label=f'{name}, {side.sum()}')
    for point, colour, _ in _points(metrics):
        ax.axvline(
            float(np.clip(logits(point['threshold']), *edges[[0, -1]])),
            color=colour,
            lw=1.2,
            ls='--',
            label=f'threshold {point["threshold"]:g}',
        )
    shown = SCORES[(logits(SCORES) >= edges[0]) & (logits(SCORES) <= edges[-1])]
    ax.set_xticks(logits(shown), [f'{score:g}' for score in shown])
    ax.set(xlabel='probability of pneumonia (logit scale)', ylabel='images')
    ax.legend(fontsize=8, frameon=False)
    entitle(ax, f'{title}, n = {metrics["n"]}')
    return figure


def plot_net_benefit(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """The decision curve: what the model is worth beside treating everybody or nobody."""
    curve = net_benefit(predictions, np.linspace(0.01, 0.99, 99))
    figure, ax = axes(4.8, 3.6)
    ax.axhline(0, color=GREY, lw=1, ls=':', label='treat nobody')
    ax.plot(curve.threshold, curve['all'], color=ORANGE, lw=1.5, ls='--', label='treat everybody')
    ax.plot(curve.threshold, curve.model, color=BLUE, lw=2, label='by the model')
    highest = max(curve.model.max(), 0.05)
    ax.set(xlabel='threshold probability', ylabel='net benefit', xlim=UNIT, ylim=(-0.15 * highest, 1.1 * highest))
    ax.legend(loc='center left', fontsize=8, frameon=False)
    entitle(ax, f'{title}, prevalence {metrics["positives"] / metrics["n"]:.3f}')
    return figure


def plot_risk_coverage(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """The accuracy on the images that are left when the least certain ones are set aside."""
    curve = risk_coverage(predictions, metrics['threshold'])
    figure, ax = axes(4.8, 3.6)
    ax.plot(curve.coverage, curve.accuracy, color=BLUE, lw=2)
    for share in (0.5, 0.8, 1.0):
        at = curve.iloc[max(round(share * len(curve)) - 1, 0)]
        ax.plot(at.coverage, at.accuracy, color=ORANGE, marker='o', ms=5)
        ax.annotate(
            f'{at.accuracy:.3f}',
            (at.coverage, at.accuracy),
            (0, -14),
            textcoords='offset points',
            fontsize=8,
            ha='center',
            color=INK,
        )
    ax.set(xlabel='images kept, the most certain first', ylabel='accuracy among them', xlim=(0, 1.04))
    ax.set_ylim(curve.accuracy.iloc[len(curve) // 20 :].min() - 0.04, 1.005)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    entitle(ax, f'{title}, threshold {metrics["threshold"]:g}')
    return figure


def plot_comparison(
    tables: Mapping[str, pd.DataFrame], metrics: Mapping[str, dict[str, Any]], title: str = ''
) -> Figure:
    """The ROC curves of several runs by their predictions `tables`, and their figures with intervals side by side."""
    figure = Figure(figsize=(10.5, 4.8), layout='constrained')
    ax, forest = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for (name, table), colour in zip(tables.items(), LINES * len(tables), strict=False):
        ax.plot(*roc_curve(table), color=colour, lw=1.8, label=f'{name}: AUC {describe(metrics[name]["auc"])}')
    tidy(ax).set(xlabel='1 - specificity', ylabel='sensitivity', xlim=UNIT, ylim=UNIT, aspect='equal')
    legend = ax.legend(loc='lower right', fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _draw_forest(forest, metrics)
    entitle(ax, title)
    return figure


def _draw_forest(ax: Axes, metrics: Mapping[str, dict[str, Any]]) -> None:
    figures, runs = ('auc', 'sensitivity', 'specificity', 'accuracy'), len(metrics)
    places = np.linspace(-0.3, 0.3, runs) if runs > 1 else [0]
    for found, colour, place in zip(metrics.values(), LINES * runs, places, strict=False):
        rows = [(i + place, found[figure]) for i, figure in enumerate(figures) if found[figure]['value'] is not None]
        at, values = [row for row, _ in rows], [estimate['value'] for _, estimate in rows]
        off = [
            [estimate['value'] - estimate['low'] for _, estimate in rows],
            [estimate['high'] - estimate['value'] for _, estimate in rows],
        ]
        ax.errorbar(values, at, xerr=off, color=colour, marker='o', ms=5, ls='', capsize=2)
    for figure, target in TARGETS.items():
        i = figures.index(figure)
        ax.plot(
            [target, target],
            [i - 0.45, i + 0.45],
            color=INK,
            lw=1.2,
            ls='--',
            label='target' if figure == 'sensitivity' else None,
        )
    ax.set_yticks(range(len(figures)), [name.replace('auc', 'AUC') for name in figures])
    tidy(ax).set(ylim=(len(figures) - 0.5, -0.5), xlabel='with 95 % intervals')
    ax.legend(loc='lower left', fontsize=8, frameon=False)


def _shade(ax: Axes, band: pd.DataFrame) -> None:
    ax.fill_between(band.x, band.low, band.high, color=BLUE, alpha=0.18, lw=0, label='95 % of the draws of patients')


def _points(metrics: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """The chosen operating point and that of .5 if it is another, with their colours and markers."""
    half = [] if metrics['threshold'] == HALF else [(metrics['at_half'], GREY, 's')]
    return [(metrics, ORANGE, 'o'), *half]


def _mark(ax: Axes, point: dict[str, Any], colour: str, marker: str) -> None:
    """An operating point with both intervals."""
    sensitivity, specificity = point['sensitivity'], point['specificity']
    ax.errorbar(
        1 - specificity['value'],
        sensitivity['value'],
        color=colour,
        marker=marker,
        ms=7,
        capsize=3,
        ls='',
        xerr=[[specificity['high'] - specificity['value']], [specificity['value'] - specificity['low']]],
        yerr=[[sensitivity['value'] - sensitivity['low']], [sensitivity['high'] - sensitivity['value']]],
        label=f'threshold {point["threshold"]:g}: sensitivity {sensitivity["value"]:.3f}, '
        f'specificity {specificity["value"]:.3f}',
    )

"""Figures of the predictions of a split over all thresholds, and of several runs together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from scipy.special import expit

from cxr_fastai.core.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINES,
    ORANGE,
    NotebookFigure,
    axes,
    plotting,
    set_title,
    tidy,
)
from cxr_fastai.evaluation.calibration import reliability
from cxr_fastai.evaluation.intervals import Estimate, format_estimate
from cxr_fastai.evaluation.metrics import (
    FEW_PATIENTS,
    SPECIFICATION_THRESHOLD,
    TARGETS,
    Sample,
    name_metric,
    targets_and_probabilities,
)
from cxr_fastai.evaluation.thresholds import (
    net_benefit,
    precision_recall_band,
    precision_recall_curve,
    risk_coverage,
    roc_band,
    roc_curve,
)
from cxr_fastai.inference.config import logits, temper

UNIT_LIMITS = (-0.02, 1.02)
"""Limits of an axis from 0 to 1."""
TICK_PROBABILITIES = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
"""Usual tick labels of an axis of logits."""
MIN_SHOWN_PROBABILITY = 1e-4
"""Probabilities closer to 0 and 1 are drawn at the edge of an axis of logits."""
HISTOGRAM_BINS = 40
MIN_LOGIT_SPAN = 0.01
"""Width of an axis of logits on which all images have the same probability."""
MIN_TICKS = 3
"""An axis with fewer of `TICK_PROBABILITIES` gets other tick labels."""
MAX_CLOSE_TICKS = 5
MIN_BIN_DISTANCE = 0.05
"""Distance of the mean probabilities below which two bins of a reliability diagram would look like one."""
MIN_AUC_OF_INSET = 0.95
INSET_SPAN = 0.2
"""Share of both axes of a ROC curve that the inset enlarges."""
INSET_BOX = (0.36, 0.3, 0.6, 0.6)
"""Left, bottom, width and height of the inset in units of both axes: between the curve and the legend."""
MARKED_COVERAGES = (0.5, 0.8, 1.0)
FOREST_METRICS = ('auc', 'sensitivity', 'specificity', 'accuracy')
PREDICTED_PROBABILITY = 'predicted probability of pneumonia'


@plotting
def plot_roc(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot the ROC curve with its 95% band and AUC, the operating points, and the region that meets both targets.

    From `MIN_AUC_OF_INSET` on, an inset enlarges the upper left corner, where all of it would be crowded.

    Args:
        predictions: predictions table of one split.
        metrics: its object of `metrics.json`.
        title: beginning of the title.
    """
    fpr, tpr = roc_curve(predictions)
    band = roc_band(predictions)
    figure, ax = axes(4.8, 4.8)
    panels = [ax]
    if metrics['auc']['value'] >= MIN_AUC_OF_INSET:
        panels.append(_add_inset(ax))
    else:
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=':')
    max_fpr = 1 - TARGETS['specificity']
    for panel in panels:
        _plot_band(panel, band, metrics)
        panel.plot(fpr, tpr, color=BLUE, lw=2, label=f'AUC {format_estimate(metrics["auc"])}')
        for point, colour, marker in _operating_points(metrics):
            _plot_operating_point(panel, point, colour, marker)
        panel.fill_between(
            [0, max_fpr], TARGETS['sensitivity'], 1, color=GREEN, alpha=0.2, lw=0, label='both targets met'
        )
    ax.set(xlabel='1 - specificity', ylabel='sensitivity', xlim=UNIT_LIMITS, ylim=UNIT_LIMITS, aspect='equal')
    ax.legend(loc='lower right', fontsize=8, frameon=False)
    set_title(ax, f'{title}, n = {metrics["n"]:,}')
    return figure


def _add_inset(ax: Axes) -> Axes:
    """Return axes inside `ax` that enlarge the upper left corner, and draw the line of chance around them.

    The line leaves the inset out because an SVG has no background that could hide it.
    """
    left, bottom, width, height = INSET_BOX
    for start, end in ((0, left), (bottom + height, 1)):
        ax.plot([start, end], [start, end], color=GREY, lw=1, ls=':')
    inset = ax.inset_axes(INSET_BOX, transform=ax.transData)
    margin = 0.01
    inset.set(xlim=(-margin, INSET_SPAN), ylim=(1 - INSET_SPAN, 1 + margin))
    inset.set(xticks=[0, INSET_SPAN / 2, INSET_SPAN], yticks=[1 - INSET_SPAN / 2, 1])
    inset.tick_params(labelsize=8)
    ax.indicate_inset_zoom(inset, edgecolor=GREY)
    return inset


def _plot_band(ax: Axes, band: pd.DataFrame, metrics: dict[str, Any]) -> None:
    """Plot a band, unless a class has too few patients: the bootstrap then underestimates its width."""
    if min(metrics['patients_by_class'].values()) < FEW_PATIENTS:
        return
    ax.fill_between(band.x, band.low, band.high, color=BLUE, alpha=0.18, lw=0, label='95% bootstrap band')


def _operating_points(metrics: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """Return the metrics at the chosen threshold, and at that of the specification if it differs; colour and marker."""
    points = [(metrics, ORANGE, 'o')]
    if metrics['threshold'] != SPECIFICATION_THRESHOLD:
        points.append((metrics['at_half'], GREY, 's'))
    return points


def _plot_operating_point(ax: Axes, point: dict[str, Any], colour: str, marker: str) -> None:
    """Mark sensitivity and specificity at a threshold, with their intervals."""
    sensitivity = point['sensitivity']
    specificity = point['specificity']
    position = (1 - specificity['value'], sensitivity['value'])
    ax.errorbar(
        *position,
        xerr=_error_bar(specificity)[::-1],  # the axis is 1 - specificity
        yerr=_error_bar(sensitivity),
        color=colour,
        fmt='none',
        lw=1.2,
        capsize=3,
    )
    label = (
        f'threshold {point["threshold"]:g}: sensitivity {sensitivity["value"]:.3f}, '
        f'specificity {specificity["value"]:.3f}'
    )
    # The marker is drawn apart from its error bars: in a legend both together are a blob.
    ax.plot(*position, color=colour, marker=marker, ms=6, ls='', label=label)


def _error_bar(estimate: Estimate) -> list[list[float]]:
    """Return the distances from the value to both limits, (2, 1); 0 without an interval."""
    value, low, high = estimate['value'], estimate['low'], estimate['high']
    if value is None or low is None or high is None:
        return [[0], [0]]
    return [[value - low], [high - value]]


@plotting
def plot_precision_recall(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot PPV against sensitivity with its 95% band, the operating points, and the prevalence as the chance level."""
    recall, precision = precision_recall_curve(predictions)
    prevalence = metrics['positives'] / metrics['n']
    label = f'average precision {format_estimate(metrics["average_precision"])}'
    figure, ax = axes(4.8, 4.8)
    ax.axhline(prevalence, color=GREY, lw=1, ls=':', label=f'chance level (prevalence {prevalence:.3f})')
    _plot_band(ax, precision_recall_band(predictions), metrics)
    ax.plot(recall, precision, color=BLUE, lw=2, drawstyle='steps-post', label=label)
    for point, colour, marker in _operating_points(metrics):
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
    ax.set(xlabel='sensitivity (recall)', ylabel='PPV (precision)', aspect='equal')
    ax.set(xlim=UNIT_LIMITS, ylim=UNIT_LIMITS)
    ax.legend(loc='lower left', fontsize=8, frameon=False)
    set_title(ax, f'{title}, n = {metrics["n"]:,}')
    return figure


@plotting
def plot_calibration(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot a reliability diagram before and after temperature scaling, above histograms of the probabilities.

    The bins have equal numbers of images, except that bins closer than `MIN_BIN_DISTANCE` are merged; the intervals are
    Wilson's.
    """
    sample = Sample.from_predictions(predictions)
    figure = NotebookFigure(figsize=(4.8, 4.8), layout='constrained')
    ax, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=':', label='perfect calibration')
    for probabilities, colour, name in _series(sample.p, metrics):
        bins = reliability(sample.targs, probabilities, sample.patients, min_distance=MIN_BIN_DISTANCE)
        error = [bins.share - bins.low, bins.high - bins.share]
        ax.errorbar(bins.p, bins.share, yerr=error, color=colour, marker='o', ms=4, capsize=2, lw=1.2, label=name)
        histogram.hist(probabilities, bins=np.linspace(0, 1, 31), color=colour, alpha=0.5)
    tidy(ax).set(ylabel='observed share of pneumonia', xlim=UNIT_LIMITS, ylim=UNIT_LIMITS)
    ax.legend(loc='upper left', fontsize=8, frameon=False)
    tidy(histogram).set(xlabel=PREDICTED_PROBABILITY, ylabel='images', yscale='log')
    histogram.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    histogram.yaxis.set_minor_formatter(NullFormatter())
    set_title(ax, f'{title}, n = {metrics["n"]:,}')
    return figure


def _series(p: np.ndarray, metrics: dict[str, Any]) -> list[tuple[np.ndarray, str, str]]:
    """Return the probabilities before and after temperature scaling, if it changes them; with colours and names."""
    temperature = metrics['calibrated']['temperature']
    series = [(p, BLUE, 'uncalibrated')]
    if temperature not in (None, 1):
        series.append((temper(p, temperature), ORANGE, f'temperature {temperature:.2f}'))
    return series


@plotting
def plot_scores(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot histograms of the probabilities of both classes on the logit scale, with the thresholds."""
    targs, p = targets_and_probabilities(predictions)
    z = logits(np.clip(p, MIN_SHOWN_PROBABILITY, 1 - MIN_SHOWN_PROBABILITY))
    padding = max(MIN_LOGIT_SPAN - np.ptp(z), 1e-9) / 2
    low, high = z.min() - padding, z.max() + padding
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    figure, ax = axes(4.8, 4.1)
    for in_class, colour, name in ((~targs, BLUE, 'normal'), (targs, ORANGE, 'pneumonia')):
        ax.hist(z[in_class], bins=edges.tolist(), color=colour, alpha=0.55, label=f'{name} (n = {in_class.sum():,})')
    for point, colour, _ in _operating_points(metrics):
        position = float(logits(point['threshold']))
        label = f'threshold {point["threshold"]:g}'
        if position < low:
            label += ', below all images'
        elif position > high:
            label += ', above all images'
        ax.axvline(np.clip(position, low, high), color=colour, lw=1.2, ls='--', label=label)
    ticks = _tick_labels(float(expit(low)), float(expit(high)))
    ax.set_xticks(logits(np.array(list(ticks))), ticks.values())
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=f'{PREDICTED_PROBABILITY} (logit scale)', ylabel='images')
    figure.legend(loc='outside lower center', ncols=2, fontsize=8, frameon=False)  # inside, it would cover bars
    set_title(ax, f'{title}, n = {metrics["n"]:,}')
    return figure


def _tick_labels(low: float, high: float) -> dict[float, str]:
    """Return probabilities from `low` to `high` with their labels, for an axis of logits.

    These are round probabilities at about equal distances of the logits. Scores that lie close together have too few of
    them; they get equal distances of the probability instead, with as many digits as that needs.
    """
    standard = {probability: f'{probability:g}' for probability in TICK_PROBABILITIES if low <= probability <= high}
    if len(standard) >= MIN_TICKS:
        return standard
    ticks = np.asarray(MaxNLocator(MAX_CLOSE_TICKS).tick_values(low, high))
    digits = max(-math.floor(math.log10(ticks[1] - ticks[0])), 1)
    inside = ticks[(ticks >= low) & (ticks <= high)]
    return {tick: f'{tick:.{digits}f}' for tick in inside.tolist()}


@plotting
def plot_net_benefit(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot the decision curve: the net benefit of the model, of treating all patients and of treating none.

    The model has one curve for its probabilities as they are, and one after temperature scaling: a decision curve takes
    probabilities at their word, so calibration changes it.
    """
    thresholds = np.linspace(0.01, 0.99, 99)
    figure, ax = axes(4.8, 3.6)
    ax.axhline(0, color=GREY, lw=1, ls=':', label='treat none')
    highest = 0.05
    for p, colour, name in _series(predictions.p_pneumonia.to_numpy(float), metrics):
        curve = net_benefit(predictions.assign(p_pneumonia=p), thresholds)
        ax.plot(curve.threshold, curve.model, color=colour, lw=2, label=f'model, {name}')
        highest = max(highest, curve.model.max())
    ax.plot(curve.threshold, curve['all'], color=INK, lw=1.2, ls='--', label='treat all')
    ax.set(xlabel='threshold probability', ylabel='net benefit (true positives per image)')
    ax.set(xlim=UNIT_LIMITS, ylim=(-0.5 * highest, 1.1 * highest))  # room for the legend below zero
    ax.legend(loc='lower left', fontsize=8, frameon=False)
    set_title(ax, f'{title}, prevalence {metrics["positives"] / metrics["n"]:.3f}')
    return figure


@plotting
def plot_risk_coverage(predictions: pd.DataFrame, metrics: dict[str, Any], title: str = '') -> Figure:
    """Plot the accuracy against the share of images that the model classifies, the most certain ones first."""
    curve = risk_coverage(predictions, metrics['threshold'])
    first_images = len(curve) // 20  # the accuracy on a few images varies too much to scale the axis by it
    lowest = curve.accuracy.iloc[first_images:].min()
    bottom = lowest - max(0.05, 0.2 * (1 - lowest))  # room for the labels below the line
    figure, ax = axes(4.8, 3.6)
    ax.plot(curve.coverage, curve.accuracy, color=BLUE, lw=2)
    for coverage in MARKED_COVERAGES:
        point = curve.iloc[max(round(coverage * len(curve)) - 1, 0)]
        ax.plot(point.coverage, point.accuracy, color=ORANGE, marker='o', ms=5)
        ax.vlines(point.coverage, bottom, point.accuracy, color=GREY, lw=1, ls=':')
        ax.annotate(
            f'{point.accuracy:.3f}',
            (point.coverage, bottom),
            (-3, 3),
            textcoords='offset points',
            fontsize=8,
            ha='right',
            color=INK,
        )
    ax.set(xlabel='coverage: share of images, most certain first', ylabel='accuracy on these images', xlim=(0, 1.04))
    ax.set_ylim(bottom, 1.005)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    set_title(ax, f'{title}, threshold {metrics["threshold"]:g}')
    return figure


@plotting
def plot_comparison(
    tables: Mapping[str, pd.DataFrame], metrics: Mapping[str, dict[str, Any]], title: str = ''
) -> Figure:
    """Plot the ROC curves of several runs, and their metrics with intervals next to each other.

    Args:
        tables: predictions by run.
        metrics: objects of `metrics.json` by run.
        title: title of the figure.
    """
    figure = NotebookFigure(figsize=(10.5, 4.8), layout='constrained')
    ax, forest = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for (name, table), colour in zip(tables.items(), cycle(LINES), strict=False):
        fpr, tpr = roc_curve(table)
        ax.plot(fpr, tpr, color=colour, lw=1.8, label=f'{name}: AUC {format_estimate(metrics[name]["auc"])}')
    tidy(ax).set(xlabel='1 - specificity', ylabel='sensitivity', aspect='equal')
    ax.set(xlim=UNIT_LIMITS, ylim=UNIT_LIMITS)
    legend = ax.legend(loc='lower right', fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a `$` in the name of a run does not start a formula
    _plot_forest(forest, metrics)
    set_title(ax, title)
    return figure


def _plot_forest(ax: Axes, metrics: Mapping[str, dict[str, Any]]) -> None:
    """Plot `FOREST_METRICS` of each run with intervals, one group of rows per metric."""
    reach = min(0.1 * (len(metrics) - 1), 0.3)  # few runs lie close together, so that each metric is one group
    offsets = np.linspace(-reach, reach, len(metrics))
    for of_run, colour, offset in zip(metrics.values(), cycle(LINES), offsets, strict=False):
        for row, name in enumerate(FOREST_METRICS):
            estimate = of_run[name]
            if estimate['value'] is None:
                continue
            error = _error_bar(estimate)
            ax.errorbar(estimate['value'], row + offset, xerr=error, color=colour, marker='o', ms=5, ls='', capsize=2)
    label: str | None = 'target'
    for name, target in TARGETS.items():
        row = FOREST_METRICS.index(name)
        ax.plot([target, target], [row - 0.45, row + 0.45], color=INK, lw=1.2, ls='--', label=label)
        label = None  # one entry in the legend
    ax.set_yticks(range(len(FOREST_METRICS)), [name_metric(name) for name in FOREST_METRICS])
    tidy(ax).set(ylim=(len(FOREST_METRICS) - 0.5, -0.5), xlabel='value with 95% interval')
    ax.legend(loc='lower left', fontsize=8, frameon=False)

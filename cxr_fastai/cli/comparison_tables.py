"""Tables of several runs, as `evaluate` prints them: their comparison, and the folds of a cross-validation."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cxr_fastai.cli.output import new_table
from cxr_fastai.core.errors import visible
from cxr_fastai.core.progress import counted
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.evaluation.metrics import name_metric


def comparison_tables(
    metrics: dict[str, dict[str, Any]], pairs: list[dict[str, Any]], seeds: list[dict[str, Any]]
) -> Group:
    """Tabulate several runs: their metrics, paired tests on the same images, and the variation over seeds."""
    tables = [_runs_table(metrics)]
    if pairs:
        tables.append(_pairs_table(pairs))
    tables.extend(_seeds_table(group) for group in seeds)
    return Group(*tables)


def _runs_table(metrics: dict[str, dict[str, Any]]) -> Table:
    table = new_table('runs', ('run', 'images', 'AUC', 'sensitivity', 'specificity', 'threshold'))
    for name, run in metrics.items():
        rates = [format_estimate(run[metric]) for metric in ('auc', 'sensitivity', 'specificity')]
        table.add_row(escape(visible(name)), str(run['n']), *rates, f'{run["threshold"]:g}')
    return table


def _pairs_table(pairs: list[dict[str, Any]]) -> Table:
    caption = 'p values by DeLong and by McNemar (exact), in brackets adjusted for the number of runs (Holm)'
    if pairs[0]['grouped_by_patient']:
        caption += ';\nthose of the AUC with images clustered by patient, those of McNemar with independent images'
    if pairs[0]['unknown_patients']:
        caption += (
            f';\nthe patients of {counted(pairs[0]["unknown_patients"])} are unknown: if patients have several images, '
            'the p values are too small'
        )
    table = new_table(
        f'compared with {pairs[0]["against"]}, on the same {counted(pairs[0]["n"])}',
        ('run', 'AUC difference', 'p', 'only this run correct : only the other', 'p'),
        caption,
    )
    for row in pairs:
        auc = row['auc']
        mcnemar = row['mcnemar']
        table.add_row(
            escape(visible(row['run'])),
            format_estimate(auc, sign='+'),
            f'{format_p(auc["p"])} ({format_p(auc["p_holm"])})',
            f'{mcnemar["only_second"]} : {mcnemar["only_first"]}',
            f'{format_p(mcnemar["p"])} ({format_p(mcnemar["p_holm"])})',
        )
    return table


def folds_table(folds: dict[str, dict[str, Any]], spread: dict[str, dict[str, float | None]]) -> Table:
    """Tabulate the metrics of each fold at the common threshold, and their mean and standard deviation (sd)."""
    table = new_table('folds, at the common threshold', ('fold',))
    for name in ('images', *map(name_metric, spread)):
        table.add_column(name, justify='right')
    for name, fold in folds.items():
        table.add_row(name, f'{fold["n"]:,}', *[_format_number(fold[metric]) for metric in spread])
    table.add_section()
    for name in ('mean', 'sd'):
        table.add_row(name, '', *[_format_number(values[name]) for values in spread.values()])
    return table


def _format_number(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'


def format_p(p: float | None) -> str:
    """Format a p value with three decimals; empty without one."""
    if p is None:
        return ''
    if p < 0.001:
        return '< 0.001'
    return f'{p:.3f}'


def _seeds_table(seeds: dict[str, Any]) -> Table:
    title = f'{len(seeds["runs"])} seeds: {", ".join(seeds["runs"])}'
    table = new_table(title, ('', 'mean', 'standard deviation'))
    for name, summary in seeds.items():
        if name != 'runs' and summary['mean'] is not None:
            table.add_row(name_metric(name), f'{summary["mean"]:.4f}', f'{summary["sd"]:.4f}')
    return table

"""Terminal output of the commands: results on stdout, errors and warnings on stderr, and tables of 80 columns.

Functions import pandas and the evaluation room only when called, so that `--help` stays fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cxr_fastai.cli.console import err, out
from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, UsageError, visible
from cxr_fastai.core.paths import HUB_PREFIX
from cxr_fastai.core.progress import counted

if TYPE_CHECKING:
    from cxr_fastai.data.auditing import Audit, Finding


MAX_PROBES = 4
"""Probes shown for each target of the audit; audit.html has all of them."""
MAX_EXAMPLES = 3
"""Images shown for each finding of the audit."""


def print_line(text: str) -> None:
    """Print `text` to stdout without wrapping it."""
    out.print(visible(text), soft_wrap=True, markup=False)


def print_hub_model(model: Path) -> None:
    """Print the name and commit of a model of the Hugging Face Hub, and nothing for another one."""
    from cxr_fastai.inference.pretrained import name_model

    name = name_model(model)
    if name.startswith(HUB_PREFIX):
        print_line(f'model: {name}')


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` in aligned columns. A terminal wraps the last column; elsewhere each row is one line."""
    if out.is_terminal:
        table = Table(*header, box=None, pad_edge=False, header_style='bold')
        for column in table.columns[:-1]:
            column.no_wrap = True
        for row in rows:
            table.add_row(*map(escape, row))
        out.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print_line('  '.join(f'{text:{width}}' for text, width in zip(row, widths, strict=True)).rstrip())


class LogLines(logging.Handler):
    """Prints the log records of the library: those of the level INFO to stdout, others to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of `record`."""
        if record.levelno == logging.INFO:
            print_line(record.getMessage())
        else:
            print_error(f'{record.levelname.lower()}: {record.getMessage()}')


def print_error(text: str) -> None:
    """Print an error or a warning to stderr without wrapping it. If stderr cannot be written, there is no other way."""
    with suppress(OSError):
        err.print(visible(text), soft_wrap=True, markup=False, highlight=False)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line; replaces `warnings.showwarning`."""
    if is_main_process():
        print_error(f'warning: {message}')


def error_message(error: CXRError) -> str:
    """Return the message of `error`.

    A worker process passes an error on as a traceback, the last line of which is the message with the exception's name.
    """
    last_line = str(error).strip().splitlines()[-1].strip()
    return last_line.removeprefix(f'{type(error).__module__}.{type(error).__name__}: ')


def choose_source(folder: Path | None, csv: Path | None) -> Path | None:
    """Return the folder or the CSV of images, or None if neither is given. Raises `UsageError` if both are given."""
    if folder and csv:
        raise UsageError(f'{folder} and --csv {csv}: both name images. Give only one of them.')
    return folder or csv


def unused_path(path: Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Path:
    """Return the first of `path`, path-2, path-3, ... that does not exist, or that the caller may replace."""
    candidate = path
    number = 2
    while candidate.exists() and not may_replace(candidate):
        candidate = path.with_name(f'{path.name}-{number}')
        number += 1
    return candidate


def predictions_table(rows: Sequence[dict[str, Any]], limit: int = 20) -> Table:
    """Tabulate the first `limit` prediction rows; images without a probability show their error code."""
    caption = f'the first {limit} of {len(rows)}' if len(rows) > limit else None
    table = Table(caption=caption)
    for name in ('image', 'p(pneumonia)', 'prediction'):
        table.add_column(name, overflow='fold')
    for row in rows[:limit]:
        path = Text(visible(row['path']))
        if row['status'] == 'ok':
            table.add_row(path, f'{float(row["p_pneumonia"]):.4f}', row['prediction'])
        else:
            table.add_row(path, '', row['code'])
    return table


def audit_tables(audit: Audit) -> Group:
    """Tabulate the image counts, file properties, probes and findings of an audit."""
    counts = new_table('images', ('split', 'class', 'kind'))
    counts.add_column('images', justify='right')
    for row in audit.counts.itertuples():
        counts.add_row(row.split, row.label, row.kind, f'{row.images:,}')
    return Group(counts, _files_table(audit), _probes_table(audit), _findings_table(audit))


def _files_table(audit: Audit) -> Table:
    table = Table(title='files', title_justify='left', show_header=False)
    for name in ('formats', 'modes', 'bits', 'ignored'):
        counts = ', '.join(f'{value}: {count:,}' for value, count in audit.facts[name].items())
        if counts:
            table.add_row(name, escape(visible(counts)))
    for name in ('width', 'height', 'bytes'):
        span = audit.facts[name]
        if span:
            table.add_row(name, '{least:,} to {most:,}, median {median:,}'.format(**span))
    return table


def _probes_table(audit: Audit) -> Table:
    from cxr_fastai.data.probes import SHORTCUT_AUC

    caption = 'too few images or patients of each class' if audit.probes.empty else None
    table = new_table(
        'probes: how well a single number, or a network without the lungs, predicts the class or the split',
        ('target', 'number'),
        caption,
    )
    table.add_column('AUC', justify='right')
    best = audit.probes.groupby('probe', sort=False).head(MAX_PROBES)
    for row in best.itertuples():
        auc = f'{row.auc:.3f}'
        if row.auc > SHORTCUT_AUC:
            auc = f'[yellow]{auc}[/]'
        table.add_row(row.probe, row.trait, auc)
    return table


def _findings_table(audit: Audit) -> Table:
    caption = None if audit.findings else 'no problems found'
    table = new_table('findings', ('level', 'finding', 'count', 'advice'), caption)
    table.show_lines = True
    for finding in audit.findings:
        color = 'red' if finding.level == 'error' else 'yellow'
        count = '' if finding.count is None else f'{finding.count:,}'
        advice = finding.advice + _examples(finding)
        table.add_row(f'[{color}]{finding.level}[/]', escape(finding.name), count, escape(visible(advice)))
    return table


def _examples(finding: Finding) -> str:
    """Return up to three of the images, or groups of images, of a finding; audit.json has all of them."""
    groups = ['; '.join(group) for group in finding.images[:MAX_EXAMPLES]]
    return f' Such as: {", ".join(groups)}.' if groups else ''


def metrics_tables(metrics: dict[str, Any]) -> Group:
    """Tabulate the metrics of one split.

    The tables show the metrics at the chosen threshold and at 0.5 with the targets of the specification, PPV and NPV
    at other prevalences, calibration, and subgroups.
    """
    tables = [_rates_table(metrics), _prevalences_table(metrics['prevalences']), _calibration_table(metrics)]
    if metrics['subgroups']:
        tables.append(_groups_table(metrics['subgroups']))
    return Group(*tables)


def _rates_table(metrics: dict[str, Any]) -> Table:
    from cxr_fastai.evaluation.intervals import format_estimate
    from cxr_fastai.evaluation.metrics import (
        RANKING_METRICS,
        TARGETS,
        THRESHOLD_METRICS,
        describe_sample,
        interval_warnings,
        name_metric,
    )

    half = metrics['at_half']
    confusion = metrics['confusion']
    targets = [_compare_with_target(name, metrics[name]['value'], target) for name, target in TARGETS.items()]
    intervals = '95% intervals'
    if metrics['intervals']['grouped_by_patient']:
        intervals += ', clustered by patient'
    caption = (
        f'targets: {", ".join(targets)}\n'
        f'{confusion["tp"]} true positives, {confusion["fn"]} false negatives\n'
        f'{confusion["tn"]} true negatives, {confusion["fp"]} false positives\n'
        f'{intervals}'
    )
    for warning in interval_warnings(metrics):
        caption += f'\n[yellow]{warning}[/]'
    columns = ('', f'threshold {metrics["threshold"]:g}', f'threshold {half["threshold"]:g}')
    table = new_table(describe_sample(metrics), columns, caption)
    for name in RANKING_METRICS:
        table.add_row(name_metric(name), format_estimate(metrics[name]))
    table.add_section()
    for name in THRESHOLD_METRICS:
        table.add_row(name_metric(name), format_estimate(metrics[name]), format_estimate(half[name]))
    return table


def _compare_with_target(name: str, value: float | None, target: float) -> str:
    if value is None:
        verdict = 'undefined'
    elif value >= target:
        verdict = '[green]met[/]'
    else:
        verdict = '[red]missed[/]'
    return f'{name} ≥{target:.0%} {verdict}'


def _prevalences_table(prevalences: list[dict[str, Any]]) -> Table:
    from cxr_fastai.evaluation.intervals import format_estimate

    table = new_table('predictive values at other prevalences', ('prevalence', 'PPV', 'NPV'))
    for row in prevalences:
        table.add_row(f'{100 * row["prevalence"]:.3g}%', format_estimate(row['ppv']), format_estimate(row['npv']))
    return table


def _calibration_table(metrics: dict[str, Any]) -> Table:
    from cxr_fastai.evaluation.intervals import format_estimate
    from cxr_fastai.evaluation.metrics import name_metric

    uncalibrated = metrics['calibration']
    calibrated = metrics['calibrated']
    temperature = calibrated['temperature']
    columns = (
        '',
        'uncalibrated',
        'no temperature fitted' if temperature is None else f'at temperature {temperature:.2f}',
    )
    notes = dict.fromkeys([*uncalibrated['notes'], *calibrated['notes']])
    table = new_table('calibration', columns, '\n'.join(notes) or None)
    for name in ('brier', 'log_loss', 'slope', 'intercept'):
        table.add_row(name_metric(name), format_estimate(uncalibrated[name]), format_estimate(calibrated[name]))
    errors = [uncalibrated['ece'], calibrated['ece']]
    table.add_row('ECE', *[f'{error["value"]:.3f}' for error in errors])
    table.add_row(
        'ECE by chance',
        *[f'{error["chance"]:.3f} (95% below {error["chance_high"]:.3f})' for error in errors],
    )
    return table


def _groups_table(groups: list[dict[str, Any]]) -> Table:
    from cxr_fastai.evaluation.intervals import describe_suppressed, format_estimate, too_few

    table = new_table(
        'subgroups',
        ('group', 'images', 'sensitivity', 'specificity', 'AUC'),
        'A group with one class is compared with all images of the other class to compute its AUC.',
    )
    for row in groups:
        if row['group'] is None:
            table.add_row(escape(visible(f'{row["column"]}: {describe_suppressed(row)}')))
            continue
        name = escape(visible(f'{row["column"]} {row["group"]}'))
        rates = [too_few(row, rate) or format_estimate(row[rate]) for rate in ('sensitivity', 'specificity')]
        table.add_row(name, str(row['n']), *rates, format_estimate(row['auc']))
    return table


def check_table(check: dict[str, Any]) -> Table:
    """Tabulate the numbers of a check of maps, each with its target and whether it is reached."""
    from cxr_fastai.interpretation.check_targets import check_rows

    title = f'{check["method"]} at layer {check["layer"]}, {counted(check["images"])} with pneumonia'
    table = new_table(title, ('check',))
    for name in ('value', 'target', 'result'):
        table.add_column(name, justify='right')
    results = {True: 'passed', False: 'failed', None: ''}
    for row in check_rows(check):
        table.add_row(row.description, row.value, row.target, results[row.passed])
    return table


def new_table(title: str, columns: tuple[str, ...], caption: str | None = None) -> Table:
    """Return an empty table with the header `columns`; a cell that is too wide is folded."""
    table = Table(title=escape(visible(title)), title_justify='left', caption=caption, caption_justify='left')
    for name in columns:
        table.add_column(name, overflow='fold')
    return table

"""What the commands print: results on stdout, errors and warnings on stderr, tables."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, UsageError, visible
from cxr_fastai.evaluation.intervals import describe
from cxr_fastai.evaluation.metrics import name_figure

if TYPE_CHECKING:
    import pandas as pd

    from cxr_fastai.data.auditing import Audit

out, err = Console(quiet=not is_main_process()), Console(stderr=True)


def say(text: str) -> None:
    """Print `text` on a line that no console breaks."""
    out.print(visible(text), soft_wrap=True, markup=False)


class LogLines(logging.Handler):
    """Prints what the library logs, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def complain(text: str) -> None:
    """Print `text` for errors and warnings."""
    err.print(visible(text), soft_wrap=True, markup=False, highlight=False)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In the place of `warnings.showwarning`: one line."""
    if is_main_process():
        complain(f'warning: {message}')


def last_line(error: CXRError) -> str:
    """An error's message; a worker process hands it over as the last line of its traceback, a callback indented."""
    last = str(error).strip().splitlines()[-1].strip()
    return last.removeprefix(f'{type(error).__module__}.{type(error).__name__}: ')


def one_of(folder: Path | None, csv: Path | None) -> Path | None:
    """The one of two places that was named, if any. Raises `UsageError` for both."""
    if folder and csv:
        raise UsageError(f'{folder} and --csv {csv}: name one of them.')
    return folder or csv


def free(path: Path) -> Path:
    """`path`, or the first free of path-2, path-3 and so on."""
    tries = (path.with_name(f'{path.name}-{i}') for i in range(2, sys.maxsize))
    return path if not path.exists() else next(p for p in tries if not p.exists())


MOST_PROBES = 4
"""Numbers shown for each thing they could tell; the page has all."""


def robustness_table(robustness: pd.DataFrame) -> Table:
    """The AUC by kind and strength of corruption, then on clean images and on those without shortcuts."""
    from cxr_fastai.images.corruptions import CLEAN, SHORTCUT, summarise

    table = Table(title='AUC on corrupted images', title_justify='left', caption_justify='left')
    strengths = sorted(set(robustness.strength) - {0})
    for name in ('', *map(str, strengths), 'mean'):
        table.add_column(name, justify='right' if name else 'left')
    for kind, rows in robustness.groupby('corruption', sort=False):
        if kind not in (CLEAN, SHORTCUT):
            table.add_row(kind, *map(_auc, rows.auc), _auc(rows.auc.mean()))
    table.add_section()
    of, blank = summarise(robustness), [''] * len(strengths)
    table.add_row(CLEAN, *blank, _auc(of['clean']))
    table.add_row(SHORTCUT, *blank, _auc(of['shortcut']))
    table.caption = (
        f'{_auc(of["corrupted"])} on average over the corruptions\n'
        f'{abs(of["loss"]):.3f} {"lost" if of["loss"] >= 0 else "gained"} where sharpness tells nothing '
        '(shortcut)'
    )
    return table


def check_table(check: dict) -> Table:
    """The numbers of a check of maps, each with its target and whether it is reached."""
    from cxr_fastai.interpretation.checks import CHECKS, tell

    table = Table(
        title=f'{check["method"]} at layer {check["layer"]}, {check["images"]} images of pneumonia',
        title_justify='left',
    )
    for name in ('maps', 'found', 'target', ''):
        table.add_column(name, justify='left' if name == 'maps' else 'right')
    for name, one in CHECKS.items():
        holds = check['verdicts'].get(name)
        table.add_row(one.words, tell(check[name]), one.aim, {True: 'holds', False: 'fails', None: ''}[holds])
    return table


def _auc(value: float) -> str:
    return 'undefined' if value != value else f'{value:.3f}'


def predictions_table(rows: Sequence[dict], most: int = 20) -> Table:
    """The first predictions, with the code of each image that could not be used."""
    table = Table(caption=f'the first {most} of {len(rows)}' if len(rows) > most else None)
    for name in ('image', 'p(pneumonia)', 'prediction'):
        table.add_column(name, overflow='fold')
    for row in rows[:most]:
        judged = (f'{float(row["p_pneumonia"]):.4f}', row['prediction']) if row['status'] == 'ok' else ('', row['code'])
        table.add_row(Text(visible(row['path'])), *judged)
    return table


def audit_tables(audit: Audit) -> Group:
    """What an audit counted, found and probed."""
    counts = Table(title='images', title_justify='left')
    for name in ('split', 'class', 'kind'):
        counts.add_column(name)
    counts.add_column('images', justify='right')
    for row in audit.counts.itertuples():
        counts.add_row(row.split, row.label, row.kind, f'{row.images:,}')
    return Group(counts, _files_table(audit), _probes_table(audit), _findings_table(audit))


def _files_table(audit: Audit) -> Table:
    table = Table(title='files', title_justify='left', show_header=False)
    for name in ('formats', 'modes', 'bits', 'ignored'):
        told = ', '.join(f'{value}: {n:,}' for value, n in audit.facts[name].items())
        if told:
            table.add_row(name, escape(visible(told)))
    for name in ('width', 'height', 'bytes'):
        if span := audit.facts[name]:
            table.add_row(name, '{least:,} to {most:,}, median {median:,}'.format(**span))
    return table


def _probes_table(audit: Audit) -> Table:
    from cxr_fastai.data.auditing import TELLING

    table = Table(
        title='what one number tells',
        title_justify='left',
        caption='too few images or patients of each class' if audit.probes.empty else None,
    )
    for name in ('of what', 'number', 'AUC'):
        table.add_column(name, justify='right' if name == 'AUC' else 'left')
    best = audit.probes.groupby('probe', sort=False).head(MOST_PROBES)
    for row in best.itertuples():
        table.add_row(row.probe, row.trait, f'[yellow]{row.auc:.3f}[/]' if row.auc > TELLING else f'{row.auc:.3f}')
    return table


def _findings_table(audit: Audit) -> Table:
    table = Table(
        title='findings',
        title_justify='left',
        show_lines=True,
        caption=None if audit.findings else 'nothing was found to be wrong',
    )
    for name in ('', 'what', 'how often', 'what to do'):
        table.add_column(name, overflow='fold')
    for finding in audit.findings:
        level = f'[{"red" if finding.level == "error" else "yellow"}]{finding.level}[/]'
        count = '' if finding.count is None else f'{finding.count:,}'
        table.add_row(level, escape(finding.name), count, escape(finding.advice))
    return table


def metrics_tables(metrics: dict[str, Any]) -> Group:
    """The metrics of one split: at the chosen threshold, with targets, and at .5; at other prevalences; calibration;
    groups."""
    tables = [_rates_table(metrics), _prevalences_table(metrics['prevalences']), _calibration_table(metrics)]
    return Group(*tables, *([_groups_table(metrics['subgroups'])] if metrics['subgroups'] else []))


def comparison_tables(metrics: dict[str, dict], pairs: list[dict], seeds: list[dict]) -> Group:
    """Several runs: their figures, what sets them apart on the same images, and how seeds vary."""
    table = _table('runs', ('run', 'images', 'AUC', 'sensitivity', 'specificity', 'threshold'))
    for name, found in metrics.items():
        table.add_row(
            escape(visible(name)),
            str(found['n']),
            say_estimate(found['auc']),
            say_estimate(found['sensitivity']),
            say_estimate(found['specificity']),
            f'{found["threshold"]:g}',
        )
    return Group(table, *([_pairs_table(pairs)] if pairs else []), *map(_seeds_table, seeds))


def say_estimate(estimate: dict, sign: str = '') -> str:
    """An estimate with its interval, where there are any, with the `sign` '+' also where it is positive."""
    return _short(describe(estimate, sign=sign))


def say_p(p: float | None) -> str:
    """A p value, in three digits."""
    return '' if p is None else '< .001' if p < 0.001 else _short(f'{p:.3f}')


def _short(words: str) -> str:
    return re.sub(r'(?<![\d.])0\.', '.', words)  # a terminal has 80 columns


def _rates_table(metrics: dict[str, Any]) -> Table:
    from cxr_fastai.evaluation.metrics import AT_A_THRESHOLD, OVERALL, TARGETS

    half, c = metrics['at_half'], metrics['confusion']
    grouped = (
        'as wide as the patients, of whom some have several images, demand'
        if (metrics['intervals']['grouped_by_patient'])
        else 'images are independent'
    )
    caption = (
        f'95 % intervals; {grouped}\n{c["tp"]} true positives, {c["fn"]} false negatives\n'
        f'{c["tn"]} true negatives, {c["fp"]} false positives'
    )
    columns = ('', f'threshold {metrics["threshold"]:g}', 'target', f'threshold {half["threshold"]:g}')
    table = _table(f'{metrics["n"]} images of {metrics["patients"]} patients', columns, caption)
    for name in OVERALL:
        table.add_row(name_figure(name), say_estimate(metrics[name]))
    table.add_section()
    for name in AT_A_THRESHOLD:
        table.add_row(
            name_figure(name),
            say_estimate(metrics[name]),
            _met(metrics[name], TARGETS.get(name)),
            say_estimate(half[name]),
        )
    return table


def _prevalences_table(prevalences: list[dict]) -> Table:
    table = _table('predictive values at other prevalences', ('prevalence', 'PPV', 'NPV'))
    for row in prevalences:
        table.add_row(f'{row["prevalence"]:.3g}', say_estimate(row['ppv']), say_estimate(row['npv']))
    return table


def _calibration_table(metrics: dict[str, Any]) -> Table:
    plain, tempered = metrics['calibration'], metrics['calibrated']
    columns = ('', 'as it is', f'at temperature {tempered["temperature"]:.2f}')
    table = _table('calibration', columns)
    for name in ('brier', 'log_loss', 'slope', 'intercept'):
        table.add_row(name_figure(name), say_estimate(plain[name]), say_estimate(tempered[name]))
    errors = [found['ece'] for found in (plain, tempered)]
    table.add_row('ECE', *(_short(f'{error["value"]:.3f}') for error in errors))
    chance = [f'{error["chance"]:.3f} (95 % below {error["chance_high"]:.3f})' for error in errors]
    table.add_row('ECE by chance', *map(_short, chance))
    return table


def _groups_table(groups: list[dict]) -> Table:
    table = _table(
        'groups',
        ('group', 'images', 'sensitivity', 'specificity', 'AUC'),
        'the AUC of a group of one class is against all images of the other',
    )
    for row in groups:
        if row['group'] is None:
            table.add_row(f'{row["column"]}: {row["suppressed"]} groups too small to show', '')
        else:
            table.add_row(
                escape(visible(f'{row["column"]} {row["group"]}')),
                str(row['n']),
                say_estimate(row['sensitivity']),
                say_estimate(row['specificity']),
                say_estimate(row['auc']),
            )
    return table


def _pairs_table(pairs: list[dict]) -> Table:
    patients = (
        ''
        if pairs[0]['p_patients'] is None
        else (';\n"patients" is the adjusted p of the AUC where images of one patient belong together')
    )
    table = _table(
        f'against {pairs[0]["against"]}, on the same {pairs[0]["n"]} images',
        ('run', 'AUC, difference', 'p', 'patients', 'alone right : wrong', 'p'),
        f'p by DeLong, and by McNemar (exact); in brackets adjusted for the number of runs (Holm){patients}',
    )
    for row in pairs:
        auc, calls = row['auc'], row['mcnemar']
        table.add_row(
            escape(visible(row['run'])),
            say_estimate(auc, '+'),
            f'{say_p(auc["p"])} ({say_p(auc["p_holm"])})',
            say_p(row['p_patients_holm']),
            f'{calls["only_second"]} : {calls["only_first"]}',
            f'{say_p(calls["p"])} ({say_p(calls["p_holm"])})',
        )
    return table


def _seeds_table(seeds: dict) -> Table:
    table = _table(f'{len(seeds["runs"])} seeds: {", ".join(seeds["runs"])}', ('', 'mean', 'standard deviation'))
    for name, found in seeds.items():
        if name != 'runs' and found['mean'] is not None:
            table.add_row(name_figure(name), f'{found["mean"]:.4f}', f'{found["sd"]:.4f}')
    return table


def _table(title: str, columns: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(title=escape(visible(title)), title_justify='left', caption=caption, caption_justify='left')
    for name in columns:
        table.add_column(name, overflow='fold')
    return table


def _met(estimate: dict, target: float | None) -> str:
    if target is None or estimate['value'] is None:
        return ''
    return f'>={target:.0%} ' + ('[green]met[/]' if estimate['value'] >= target else '[red]missed[/]')

"""Tables for the terminal: what an audit found, what was predicted, how an AUC and maps hold; figures have `scores`."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cxr_fastai.core.files import visible

if TYPE_CHECKING:
    import pandas as pd

    from cxr_fastai.data.auditing import Audit

MOST_PROBES = 4
"""Numbers shown for each thing they could tell; the page has all."""


def robustness_table(robustness: pd.DataFrame) -> Table:
    """The AUC by kind and strength of corruption, then on clean films and on those without shortcuts."""
    from cxr_fastai.images.corruptions import CLEAN, SHORTCUT, summarise
    table = Table(title='AUC on corrupted films', title_justify='left', caption_justify='left')
    strengths = sorted(set(robustness.strength) - {0})
    for name in ('', *map(str, strengths), 'mean'): table.add_column(name, justify='right' if name else 'left')
    for kind, rows in robustness.groupby('corruption', sort=False):
        if kind not in (CLEAN, SHORTCUT): table.add_row(kind, *map(_auc, rows.auc), _auc(rows.auc.mean()))
    table.add_section()
    of, blank = summarise(robustness), [''] * len(strengths)
    table.add_row(CLEAN, *blank, _auc(of['clean']))
    table.add_row(SHORTCUT, *blank, _auc(of['shortcut']))
    table.caption = (f'{_auc(of["corrupted"])} on average over the corruptions\n'
                     f'{abs(of["loss"]):.3f} {"lost" if of["loss"] >= 0 else "gained"} where sharpness tells nothing '
                     '(shortcut)')
    return table


def check_table(check: dict) -> Table:
    """The numbers of a check of maps, each with its target and whether it is reached."""
    from cxr_fastai.interpretation.checks import CHECKS, tell
    table = Table(title=f'{check["method"]} at layer {check["layer"]}, {check["films"]} films of pneumonia',
                  title_justify='left')
    for name in ('maps', 'found', 'target', ''): table.add_column(name, justify='left' if name == 'maps' else 'right')
    for name, one in CHECKS.items():
        holds = check['verdicts'].get(name)
        table.add_row(one.words, tell(check[name]), one.aim, {True: 'holds', False: 'fails', None: ''}[holds])
    return table


def _auc(value: float) -> str: return 'undefined' if value != value else f'{value:.3f}'


def predictions_table(rows: Sequence[dict], most: int = 20) -> Table:
    """The first predictions, with the code of each film that could not be used."""
    table = Table(caption=f'the first {most} of {len(rows)}' if len(rows) > most else None)
    for name in ('film', 'p(pneumonia)', 'prediction'): table.add_column(name, overflow='fold')
    for row in rows[:most]:
        judged = (f'{float(row["p_pneumonia"]):.4f}', row['prediction']) if row['status'] == 'ok' else ('', row['code'])
        table.add_row(Text(visible(row['path'])), *judged)
    return table


def audit_tables(audit: Audit) -> Group:
    """What an audit counted, found and probed."""
    counts = Table(title='films', title_justify='left')
    for name in ('split', 'class', 'kind'): counts.add_column(name)
    counts.add_column('films', justify='right')
    for row in audit.counts.itertuples(): counts.add_row(row.split, row.label, row.kind, f'{row.films:,}')
    return Group(counts, _files_table(audit), _probes_table(audit), _findings_table(audit))


def _files_table(audit: Audit) -> Table:
    table = Table(title='files', title_justify='left', show_header=False)
    for name in ('formats', 'modes', 'bits', 'ignored'):
        told = ', '.join(f'{value}: {n:,}' for value, n in audit.facts[name].items())
        if told: table.add_row(name, escape(visible(told)))
    for name in ('width', 'height', 'bytes'):
        if span := audit.facts[name]: table.add_row(name, '{least:,} to {most:,}, median {median:,}'.format(**span))
    return table


def _probes_table(audit: Audit) -> Table:
    from cxr_fastai.data.probes import TELLING
    table = Table(title='what one number tells', title_justify='left',
                  caption='too few films or patients of each class' if audit.probes.empty else None)
    for name in ('of what', 'number', 'AUC'): table.add_column(name, justify='right' if name == 'AUC' else 'left')
    best = audit.probes.groupby('probe', sort=False).head(MOST_PROBES)
    for row in best.itertuples():
        table.add_row(row.probe, row.trait, f'[yellow]{row.auc:.3f}[/]' if row.auc > TELLING else f'{row.auc:.3f}')
    return table


def _findings_table(audit: Audit) -> Table:
    table = Table(title='findings', title_justify='left', show_lines=True,
                  caption=None if audit.findings else 'nothing was found to be wrong')
    for name in ('', 'what', 'how often', 'what to do'): table.add_column(name, overflow='fold')
    for finding in audit.findings:
        level = f'[{"red" if finding.level == "error" else "yellow"}]{finding.level}[/]'
        count = '' if finding.count is None else f'{finding.count:,}'
        table.add_row(level, escape(finding.name), count, escape(finding.advice))
    return table

"""What `evaluate` says in the terminal: the metrics of a split, and of several runs together."""
from __future__ import annotations

import re
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cxr_fastai.core.files import visible
from cxr_fastai.evaluation.intervals import describe

NAMES = {'auc': 'AUC', 'ppv': 'PPV', 'npv': 'NPV', 'f1': 'F1', 'mcc': 'MCC', 'brier': 'Brier score'}
"""Figures that are not called by their own name."""


def metrics_tables(metrics: dict[str, Any]) -> Group:
    """The metrics of one split: at the chosen threshold, with targets, and at .5; at other prevalences; calibration;
    groups."""
    tables = [_rates_table(metrics), _prevalences_table(metrics['prevalences']), _calibration_table(metrics)]
    return Group(*tables, *([_groups_table(metrics['subgroups'])] if metrics['subgroups'] else []))


def comparison_tables(metrics: dict[str, dict], pairs: list[dict], seeds: list[dict]) -> Group:
    """Several runs: their figures, what sets them apart on the same films, and how seeds vary."""
    table = _table('runs', ('run', 'films', 'AUC', 'sensitivity', 'specificity', 'threshold'))
    for name, found in metrics.items():
        table.add_row(escape(visible(name)), str(found['n']), say(found['auc']), say(found['sensitivity']),
                      say(found['specificity']), f'{found["threshold"]:g}')
    return Group(table, *([_pairs_table(pairs)] if pairs else []), *map(_seeds_table, seeds))


def name_figure(name: str) -> str:
    """A figure's key of `metrics.json` in words."""
    return NAMES.get(name, name.replace('_', ' '))


def say(estimate: dict, sign: str = '') -> str:
    """An estimate with its interval, where there are any, with the `sign` '+' also where it is positive."""
    return _short(describe(estimate, sign=sign))


def say_p(p: float | None) -> str:
    """A p value, in three digits."""
    return '' if p is None else '< .001' if p < 0.001 else _short(f'{p:.3f}')


def _short(words: str) -> str: return re.sub(r'(?<![\d.])0\.', '.', words)  # a terminal has 80 columns


def _rates_table(metrics: dict[str, Any]) -> Table:
    from cxr_fastai.evaluation.metrics import AT_A_THRESHOLD, OVERALL, TARGETS
    half, c = metrics['at_half'], metrics['confusion']
    grouped = 'as wide as the patients, of whom some have several films, demand' if (
        metrics['intervals']['grouped_by_patient']) else 'films are independent'
    caption = (f'95 % intervals; {grouped}\n{c["tp"]} true positives, {c["fn"]} false negatives\n'
               f'{c["tn"]} true negatives, {c["fp"]} false positives')
    columns = ('', f'threshold {metrics["threshold"]:g}', 'target', f'threshold {half["threshold"]:g}')
    table = _table(f'{metrics["n"]} films of {metrics["patients"]} patients', columns, caption)
    for name in OVERALL: table.add_row(name_figure(name), say(metrics[name]))
    table.add_section()
    for name in AT_A_THRESHOLD:
        table.add_row(name_figure(name), say(metrics[name]), _met(metrics[name], TARGETS.get(name)), say(half[name]))
    return table


def _prevalences_table(prevalences: list[dict]) -> Table:
    table = _table('predictive values at other prevalences', ('prevalence', 'PPV', 'NPV'))
    for row in prevalences: table.add_row(f'{row["prevalence"]:.3g}', say(row['ppv']), say(row['npv']))
    return table


def _calibration_table(metrics: dict[str, Any]) -> Table:
    plain, tempered = metrics['calibration'], metrics['calibrated']
    columns = ('', 'as it is', f'at temperature {tempered["temperature"]:.2f}')
    table = _table('calibration', columns)
    for name in ('brier', 'log_loss', 'slope', 'intercept'):
        table.add_row(name_figure(name), say(plain[name]), say(tempered[name]))
    errors = [found['ece'] for found in (plain, tempered)]
    table.add_row('ECE', *(_short(f'{error["value"]:.3f}') for error in errors))
    chance = [f'{error["chance"]:.3f} (95 % below {error["chance_high"]:.3f})' for error in errors]
    table.add_row('ECE by chance', *map(_short, chance))
    return table


def _groups_table(groups: list[dict]) -> Table:
    table = _table('groups', ('group', 'films', 'sensitivity', 'specificity', 'AUC'),
                   'the AUC of a group of one class is against all films of the other')
    for row in groups:
        if row['group'] is None: table.add_row(f'{row["column"]}: {row["suppressed"]} groups too small to show', '')
        else: table.add_row(escape(visible(f'{row["column"]} {row["group"]}')), str(row['n']), say(row['sensitivity']),
                            say(row['specificity']), say(row['auc']))
    return table


def _pairs_table(pairs: list[dict]) -> Table:
    patients = '' if pairs[0]['p_patients'] is None else (
        ';\n"patients" is the adjusted p of the AUC where films of one patient belong together')
    table = _table(f'against {pairs[0]["against"]}, on the same {pairs[0]["n"]} films',
                   ('run', 'AUC, difference', 'p', 'patients', 'alone right : wrong', 'p'),
                   f'p by DeLong, and by McNemar (exact); in brackets adjusted for the number of runs (Holm){patients}')
    for row in pairs:
        auc, calls = row['auc'], row['mcnemar']
        table.add_row(escape(visible(row['run'])), say(auc, '+'), f'{say_p(auc["p"])} ({say_p(auc["p_holm"])})',
                      say_p(row['p_patients_holm']), f'{calls["only_second"]} : {calls["only_first"]}',
                      f'{say_p(calls["p"])} ({say_p(calls["p_holm"])})')
    return table


def _seeds_table(seeds: dict) -> Table:
    table = _table(f'{len(seeds["runs"])} seeds: {", ".join(seeds["runs"])}', ('', 'mean', 'standard deviation'))
    for name, found in seeds.items():
        if name != 'runs' and found['mean'] is not None:
            table.add_row(name_figure(name), f'{found["mean"]:.4f}', f'{found["sd"]:.4f}')
    return table


def _table(title: str, columns: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(title=escape(visible(title)), title_justify='left', caption=caption, caption_justify='left')
    for name in columns: table.add_column(name, overflow='fold')
    return table


def _met(estimate: dict, target: float | None) -> str:
    if target is None or estimate['value'] is None: return ''
    return f'>={target:.0%} ' + ('[green]met[/]' if estimate['value'] >= target else '[red]missed[/]')

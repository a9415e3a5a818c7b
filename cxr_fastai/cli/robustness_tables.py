"""Tables of the robustness of a model, as `evaluate --robustness` prints them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.evaluation.robustness import anatomy_aucs, summarise
from cxr_fastai.evaluation.shift import COMPARED_SPLITS, SHIFT_NAMES
from cxr_fastai.images.anatomy import ANATOMY, EXCHANGED, FILLS
from cxr_fastai.images.corruptions import CLEAN, SHORTCUT

if TYPE_CHECKING:
    import pandas as pd


def robustness_table(robustness: pd.DataFrame) -> Table:
    """Tabulate the AUC by kind and strength of corruption, on clean images, and on images without shortcuts."""
    strengths = sorted(set(robustness.strength) - {0})
    summary = summarise(robustness)
    table = Table(title='AUC on corrupted images', title_justify='left', caption_justify='left')
    table.add_column('corruption \\ strength')
    for name in (*map(str, strengths), 'mean'):
        table.add_column(name, justify='right')
    for kind, rows in robustness.groupby('corruption', sort=False):
        if kind not in (CLEAN, SHORTCUT, *ANATOMY):
            table.add_row(kind, *[_format_auc(auc) for auc in rows.auc], _format_auc(rows.auc.mean()))
    table.add_section()
    for name, key in ((CLEAN, 'clean'), ('shortcut removed', 'shortcut')):
        table.add_row(name, *[''] * len(strengths), _format_auc(summary[key]))
    change = 'lower' if summary['loss'] >= 0 else 'higher'
    table.caption = (
        f'mean over the corruptions: {_format_auc(summary["corrupted"])}\n'
        f'without the sharpness shortcut: {abs(summary["loss"]):.3f} {change} than on clean images'
    )
    return table


def anatomy_table(robustness: pd.DataFrame) -> Table:
    """Tabulate the AUC with the lungs, the thorax or the rest of the image hidden, by what hides it."""
    table = Table(title='AUC with parts of the image hidden', title_justify='left', caption_justify='left')
    table.add_column('hidden by')
    for fill in FILLS:
        table.add_column(fill, justify='right')
    for part, values in anatomy_aucs(robustness).items():
        table.add_row(part, *map(_format_auc, values))
    exchanged = summarise(robustness)['exchanged']
    table.caption = (
        f'{EXCHANGED} (of the other class): {_format_auc(exchanged)}\n'
        'A network that looks at the lungs is near 0.5 with lungs hidden,\nand loses little in the other rows.'
    )
    return table


def shift_tables(results: dict[str, Any]) -> Group:
    """Tabulate what `measure_shift` returned: the figures of both splits, and the trade of the two thresholds."""
    figures = Table(title='validation images and soft images (shift)', title_justify='left')
    figures.add_column('')
    for split in COMPARED_SPLITS:
        figures.add_column(split, justify='right')
    first, *_ = results['splits'].values()
    for name in first:
        values = [results['splits'][split][name] for split in COMPARED_SPLITS]
        cells = [f'{value:,}' if name == 'n' else format_estimate(value) for value in values]
        figures.add_row(SHIFT_NAMES[name], *cells)
    trade = Table(title=f'threshold by {results["rule"]}', title_justify='left', caption_justify='left')
    for column in ('chosen on', 'threshold', 'images', 'sensitivity', 'specificity'):
        trade.add_column(column)
    for split, row in results['thresholds'].items():
        for on in COMPARED_SPLITS:
            rates = [format_estimate(row[on][rate]) for rate in ('sensitivity', 'specificity')]
            trade.add_row(split, f'{row["threshold"]:g}', on, *rates)
    trade.caption = '--choose-on valid or --choose-on shift decides which threshold the run has.'
    return Group(figures, trade)


def _format_auc(auc: float) -> str:
    return 'undefined' if math.isnan(auc) else f'{auc:.3f}'

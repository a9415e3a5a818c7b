"""The command `cxr-fastai combine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, out, print_line

if TYPE_CHECKING:
    from rich.table import Table

    from cxr_fastai.evaluation.combining import Combination
    from cxr_fastai.evaluation.selection import Candidate, Selection

WORDS = {
    'single': 'the network of {names}; no combination is better by more than {margin:g}',
    'soup': 'a soup, the mean weights of {names}',
    'ensemble': 'an ensemble, the mean logits of {names}',
}
"""What the network of a combined run is, by how it was made."""


def combine(
    runs: opt.CombinedRuns,
    folder: opt.NewRun,
    how: opt.How = 'auto',
    data: opt.Data = None,
    csv: opt.Csv = None,
    batch_size: opt.BatchSize = 32,
    device: opt.Device = 'auto',
) -> None:
    """Combine the networks of several runs into one run: a soup of networks that were trained from the same pretrained
    weights, or an ensemble of any networks of one architecture.

    auto keeps the simplest of the best single network, the best soup and the best ensemble, judged by the AUC on clean,
    corrupted and equally sharp validation images that all runs share. Test images are never used.

    Example: cxr-fastai combine runs/folds --how ensemble --out runs/ensemble
    """
    from cxr_fastai.evaluation.combining import combine

    combination = combine(runs, folder, how, choose_source(data, csv), batch_size, device)
    _print_combination(combination)


def _print_combination(combination: Combination) -> None:
    from cxr_fastai.evaluation.selection import MARGIN

    run = combination.run
    if combination.selection:
        out.print(_selection_table(combination.selection))
    words = WORDS[combination.how].format(names=', '.join(combination.members), margin=MARGIN)
    views = ', which uses test-time views, as the evaluation of these runs did' if combination.tta else ''
    print_line(f'{run.path}: {words}. Next: {run.first_evaluation()}{views}')


def _selection_table(selection: Selection) -> Table:
    """Tabulate the AUCs of the single networks, best first, and of the combinations."""
    from rich.table import Table

    table = Table(title='AUC on the shared validation images', title_justify='left')
    table.add_column('network')
    for name in ('clean', 'corrupted', 'shortcut removed', 'score'):
        table.add_column(name, justify='right')
    for candidate in selection.singles:
        table.add_row(candidate.members[0], *_figures(candidate))
    table.add_section()
    for candidate in selection.contenders[1:]:
        table.add_row(f'{candidate.how} of {", ".join(candidate.members)}', *_figures(candidate))
    return table


def _figures(candidate: Candidate) -> list[str]:
    values = (candidate.clean, candidate.corrupted, candidate.shortcut, candidate.score)
    return [f'{value:.4f}' for value in values]

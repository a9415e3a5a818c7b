"""Print a table of runs that were evaluated with --robustness: validation, corruptions, shortcuts and time.

    for seed in 42 43 44; do
        cxr-fastai train --arch efficientnet_lite0 --recipe tuned --epochs 3 --size 128 --seed $seed \\
            --out runs/tuned-$seed
        cxr-fastai evaluate runs/tuned-$seed --split valid --robustness
    done
    python benchmarks/recipes.py runs/*

There is one row per name: runs NAME-SEED with the same name are averaged, and the standard deviation over the seeds
follows the mean. The threshold is the highest one with a sensitivity of at least 0.95 on the validation images; that of
the corrupted images is the one that `evaluate` chose for the run.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.robustness import read_robustness, summarise

SENSITIVITY = 0.95
TARGET_AUC = 0.985


def measure(run: Run) -> dict[str, float]:
    """Return the columns of the table for one run."""
    predictions = run.predictions.query('split == "valid"')
    pneumonia = predictions.label == 'PNEUMONIA'
    threshold = predictions[pneumonia].p_pneumonia.quantile(1 - SENSITIVITY, interpolation='lower')
    positive = predictions.p_pneumonia >= threshold
    robustness = read_valid_robustness(run)
    corrupted = robustness[robustness.strength > 0]
    auc = summarise(robustness)
    return {
        'epochs': len(run.history),
        'valid AUC': run.metrics['valid']['auc']['value'],
        'sensitivity': positive[pneumonia].mean(),
        'specificity': (~positive[~pneumonia]).mean(),
        'corrupted AUC': auc['corrupted'],
        'corrupted specificity': corrupted.specificity.mean(),
        'corrupted sensitivity': corrupted.sensitivity.mean(),
        'shortcut AUC': auc['shortcut'],
        'shortcut loss': auc['loss'],
        f's to {TARGET_AUC}': _seconds_to_target(run.history),
        's per epoch': run.history.seconds.mean(),
    }


def read_valid_robustness(run: Run) -> pd.DataFrame:
    """Return the robustness table of `run` on validation images. Raises `UsageError` if none is current."""
    table = read_robustness(run, 'valid')
    if table is None:
        raise UsageError(f'{run.path}: no current robustness. Run `{run.evaluation("valid")} --robustness`.')
    return table


def _seconds_to_target(history: pd.DataFrame) -> float:
    """Return the seconds until the validation AUC reaches `TARGET_AUC`; NaN if it does not."""
    reached = np.flatnonzero(history.roc_auc >= TARGET_AUC)
    if len(reached) == 0:
        return float('nan')
    return float(history.seconds[: reached[0] + 1].sum())


def format_table(means: pd.DataFrame, deviations: pd.DataFrame, sizes: pd.Series) -> str:
    """Return a Markdown table of the means, with the standard deviations where there are several runs."""
    lines = ['| run | seeds | ' + ' | '.join(means) + ' |', '|---' * (len(means.columns) + 2) + '|']
    for name, row in means.iterrows():
        cells = [_format_cell(mean, deviations.loc[name, column], sizes[name]) for column, mean in row.items()]
        lines.append(f'| {name} | {sizes[name]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _format_cell(mean: float, deviation: float, size: int) -> str:
    if abs(mean) >= 1.5:  # seconds and epochs
        return f'{mean:.0f}'
    if size > 1 and deviation < 1:
        return f'{mean:.4f} ± {deviation:.4f}'
    return f'{mean:.4f}'


def main() -> None:
    """Measure the given runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='run folders; those without robustness.csv are ignored')
    parser.add_argument('--kinds', action='store_true', help='also print the mean AUC of each kind of corruption')
    args = parser.parse_args()
    runs = [Run.open(path) for path in args.runs if (path / 'robustness.csv').exists()]
    names = [run.path.name.rsplit('-', 1)[0] for run in runs]
    print_grouped(pd.DataFrame([measure(run) for run in runs], index=names))
    if args.kinds:
        rows = []
        for run in runs:
            robustness = read_valid_robustness(run)
            rows.append(robustness.groupby('corruption', sort=False).auc.mean().to_dict())
        print()
        print_grouped(pd.DataFrame(rows, index=names))


def print_grouped(table: pd.DataFrame) -> None:
    """Print the means of the rows with the same name."""
    grouped = table.groupby(level=0, sort=False)
    print(format_table(grouped.mean(), grouped.std(), grouped.size()))


if __name__ == '__main__':
    main()

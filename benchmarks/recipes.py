"""A table of runs that were evaluated with --robustness: validation, corruption, shortcuts, time.

    for seed in 42 43 44; do
        cxr-fastai train --arch efficientnet_lite0 --recipe tuned --epochs 3 --size 128 --valid patients --seed $seed \\
            --out runs/tuned-$seed
        cxr-fastai evaluate runs/tuned-$seed --split valid --robustness
    done
    python benchmarks/recipes.py runs/*

A row a name; runs NAME-SEED of one name are averaged, with the standard deviation over the seeds behind the mean. The
threshold is chosen on the validation images: the highest whose sensitivity there is at least .95.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.core.run import Run
from cxr_fastai.images.corruptions import summarise

SENSITIVITY = 0.95
TARGET = 0.985


def measure(run: Run) -> dict[str, float]:
    """What the table has of one run."""
    known = run.predictions.query('split == "valid"')
    threshold = known[known.label == 'PNEUMONIA'].p_pneumonia.quantile(1 - SENSITIVITY, interpolation='lower')
    called = known.p_pneumonia >= threshold
    normal = known.label == 'NORMAL'
    robust = run.robustness.query('split == "valid"')
    harmed = robust[robust.strength > 0]
    history = run.history
    there = np.flatnonzero(history.roc_auc >= TARGET)
    seconds = history.seconds[: there[0] + 1].sum() if len(there) else np.nan
    auc = summarise(robust)
    return {
        'epochs': len(history),
        'valid AUC': run.metrics['valid']['auc']['value'],
        'sensitivity': called[~normal].mean(),
        'specificity': (~called[normal]).mean(),
        'corrupted AUC': auc['corrupted'],
        'corrupted specificity at .5': harmed.specificity.mean(),
        'corrupted sensitivity at .5': harmed.sensitivity.mean(),
        'shortcut AUC': auc['shortcut'],
        'shortcut loss': auc['loss'],
        f's to {TARGET}': seconds,
        's an epoch': history.seconds.mean(),
    }


def main() -> None:
    """Measure the runs that are named and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path)
    parser.add_argument('--kinds', action='store_true', help='the mean AUC of each kind of corruption as well')
    args = parser.parse_args()
    runs = [Run.open(path) for path in args.runs if (path / 'robustness.csv').exists()]
    names = [run.path.name.rsplit('-', 1)[0] for run in runs]
    table = pd.DataFrame(map(measure, runs), index=names).groupby(level=0, sort=False)
    print(show(table.mean(), table.std(), table.size()))
    if args.kinds:
        kinds = [run.robustness.query('split == "valid"').groupby('corruption', sort=False).auc.mean() for run in runs]
        by_name = pd.DataFrame([kind.to_dict() for kind in kinds], index=names).groupby(level=0, sort=False)
        print('\n' + show(by_name.mean(), by_name.std(), by_name.size()))


def show(means: pd.DataFrame, deviations: pd.DataFrame, sizes: pd.Series) -> str:
    """The means, with the deviations where there are several runs, as Markdown."""
    lines = ['| run | seeds | ' + ' | '.join(means) + ' |', '|---' * (len(means.columns) + 2) + '|']
    for name, row in means.iterrows():
        cells = [f'{value:.4f}' if abs(value) < 1.5 else f'{value:.0f}' for value in row]
        if sizes[name] > 1:
            cells = [
                f'{cell} ± {off:.4f}' if off < 1 and '.' in cell else cell
                for cell, off in zip(cells, deviations.loc[name], strict=True)
            ]
        lines.append(f'| {name} | {sizes[name]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()

"""Table of what a network loses and gains when it is trained not to use the surroundings of the lungs.

    python benchmarks/surroundings.py runs/surroundings --data data/chest_xray --seeds 1 2 3

Trains every variant of `VARIANTS` with every seed, each seed with other validation patients, and measures its
robustness on the validation images. A training or a measurement that is complete in the folder is not repeated, so the
command continues after an interruption. Takes about 6 minutes for each variant and seed on two cores.
"""

import argparse
from pathlib import Path

import pandas as pd

from cxr_fastai.core.run import Run
from cxr_fastai.core.series import has_ended
from cxr_fastai.data.items import data_root
from cxr_fastai.evaluation import robustness
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.training import train

VARIANTS = {
    'without': {'exchange': 0.0, 'hide_lungs': 0.0},
    'exchange 0.5': {'exchange': 0.5, 'hide_lungs': 0.0},
    'exchange 0.5, hide_lungs 0.3': {'exchange': 0.5, 'hide_lungs': 0.3},
    'exchange 0.5, hide_lungs 0.4': {'exchange': 0.5, 'hide_lungs': 0.4},
}
"""Name of a variant to its fields of the recipe `tuned`."""
COLUMNS = ('clean', 'corrupted', 'shortcut', 'lungs_hidden', 'thorax_hidden', 'lungs_only', 'exchanged')


def train_or_resume(folder: Path, args: argparse.Namespace, seed: int, fields: dict[str, float]) -> None:
    """Train `tuned` with other `fields` into `folder`, or continue there."""
    data = data_root(args.data)
    if (folder / 'recipe.json').is_file():
        train(Run.open(folder).recipe, data, folder, resume=True)
        return
    options = {'size': args.size, 'valid': 'patients', 'seed': seed, 'limit': args.limit, **fields}
    train(make_recipe(args.arch, 'tuned', args.epochs, **options), data, folder, precision='auto')


def measure(run: Run) -> dict[str, float]:
    """Return the columns of the table for a trained run."""
    if not (run / 'robustness.csv').is_file():
        robustness.evaluate_robustness(run, split='valid')
    return {name: value for name, value in robustness.summarise(run.robustness).items() if name in COLUMNS}


def main() -> None:
    """Train and measure what is missing, print a row for each run, and then the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder of the runs')
    parser.add_argument('--data', type=Path, help='images (default: CXR_DATA, else data/chest_xray)')
    parser.add_argument('--arch', default='efficientnet_lite0')
    parser.add_argument('--size', type=int, default=128, help='side of the images in pixels')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS, metavar='VARIANT')
    parser.add_argument('--limit', type=int, help='images of each class and split, for a trial')
    parser.add_argument('--strengths', type=int, nargs='+', default=[3], help='strengths of the corruptions')
    args = parser.parse_args()
    robustness.STRENGTHS = tuple(args.strengths)
    rows = []
    for seed in args.seeds:
        for name in args.variants:
            folder = args.out / f'{name.replace(", ", "-").replace(" ", "")}-{seed}'
            if not has_ended(folder):
                train_or_resume(folder, args, seed, VARIANTS[name])
            rows.append({'run': name, 'seed': seed, **measure(Run.open(folder))})
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
    table = pd.DataFrame(rows).drop(columns='seed').groupby('run', sort=False)
    print(f'\nmean over {len(args.seeds)} seeds\n{table.mean().round(3).to_string()}')


if __name__ == '__main__':
    main()

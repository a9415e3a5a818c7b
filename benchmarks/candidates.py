"""Table of recipes: what each gains and loses on validation images, on soft images, and with parts changed or hidden.

    python benchmarks/candidates.py runs/candidates --data data/chest_xray --seeds 1 2 3

Trains every candidate with every seed, each seed with other validation patients. A fifth of the patients, of the
softest normal images, is held out of all trainings (`shift_pct`). With `--combine`, the runs of the seeds of a
candidate are also combined, and measured on these images. A training or a measurement that is complete in the folder is
not repeated, so the command continues after an interruption. Takes about 8 minutes for each candidate and seed on two
cores; `--candidates` chooses some of them.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import data_root
from cxr_fastai.evaluation import robustness
from cxr_fastai.evaluation.combining import combine
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.metrics import Sample, measure_auc
from cxr_fastai.evaluation.shift import SENSITIVITY, evaluate_shift, shift_table, specificity_at
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.training import train

CANDIDATES: dict[str, dict[str, Any]] = {
    'tuned': {},
    'without surroundings': {'exchange': 0.0, 'hide_lungs': 0.0, 'match_histogram': 0.0},
    'match_histogram 0': {'match_histogram': 0.0},
    'reference': {'name': 'reference'},
    'exchange only': {'hide_lungs': 0.0, 'match_histogram': 0.0},
    'blur 0.03': {'blur': 0.03},
    'resolution 0.2': {'resolution': 0.2},
    'blur 0.03, resolution 0.2': {'blur': 0.03, 'resolution': 0.2, 'match_histogram': 0.0},
    'low_pass 0': {'low_pass': 0.0},
    'low_pass 1/64': {'low_pass': 1 / 64},
    'contrast 0.6': {'contrast': 0.6, 'brightness': 0.6},
    'gamma 0.5': {'gamma': 0.5, 'match_histogram': 0.0},
    'match_histogram 0.5': {'match_histogram': 0.5},
    'mild': {
        'crop': 0.6,
        'resolution': 0.7,
        'blur': 0.006,
        'jpeg': 60,
        'hide_lungs': 0.0,
        'match_histogram': 0.0,
    },
    'match_detail 0.7': {'match_detail': 0.7, 'match_histogram': 0.0},
    'match_histogram 0.5, match_detail 0.7': {'match_histogram': 0.5, 'match_detail': 0.7},
    'mixup 0.2': {'mixup': 0.2},
    'label_smoothing 0.1': {'label_smoothing': 0.1},
    'weight_decay 0.1': {'weight_decay': 0.1},
    'erase 0.5': {'erase': 0.5},
    'crop 0.1': {'crop': 0.1},
    'class_weights': {'class_weights': True},
    'epochs 6': {'epochs': 6},
    'epochs 12, ema 0.999': {'epochs': 12, 'ema': 0.999},
    'size 192': {'size': 192},
    'resize pad': {'resize': 'pad'},
}
"""Name of a candidate to the fields of the recipe, and the arguments of this script, in which it differs."""
COLUMNS = ('clean', 'corrupted', 'shortcut', 'lungs_hidden', 'lungs_only', 'exchanged')


def make_candidate(name: str, args: argparse.Namespace, seed: int) -> Recipe:
    """Return the recipe of the candidate `name`."""
    settings = {
        'arch': args.arch,
        'name': 'tuned',
        'epochs': args.epochs,
        'size': args.size,
        'valid': 'patients',
        'seed': seed,
        'limit': args.limit,
        'shift_pct': args.shift,
    }
    return make_recipe(**settings | CANDIDATES[name])


def train_or_resume(folder: Path, recipe: Recipe, data: Path, precision: str) -> None:
    """Train by `recipe` into `folder`, or continue there."""
    if (folder / 'recipe.json').is_file():
        train(Run.open(folder).recipe, data, folder, resume=True)
    else:
        train(recipe, data, folder, precision=precision)


def measure(run: Run) -> dict[str, float]:
    """Return the columns of the table for a trained run."""
    row = {}
    if run.recipe.shift_pct:
        for figures in shift_table(evaluate_shift(run, again=False)).to_dict('records'):
            for figure in ('auc', 'specificity_at_95', 'specificity', 'intercept'):
                row[f'{figures["split"]} {figure}'] = figures[figure]
    table = robustness.read_robustness(run, 'valid')
    if table is None:
        table = robustness.evaluate_robustness(run, split='valid')
    return row | {name: value for name, value in robustness.summarise(table).items() if name in COLUMNS}


def combine_seeds(folders: list[Path], out: Path, name: str) -> pd.DataFrame:
    """Return the figures on the split `shift` of the ensemble and the soup of the runs `folders`, which `out` keeps."""
    rows = []
    for how in ('ensemble', 'soup'):
        folder = out / f'{folders[0].name.rsplit("-", 1)[0]}-{how}'
        if not folder.exists():
            combine(folders, folder, how)
        evaluate(Run.open(folder), split='shift', rule='fixed:0.5', again=False)
        sample = Sample.from_predictions(Run.open(folder).predicted('shift'))
        figures = {'auc': measure_auc(sample), 'specificity_at_95': specificity_at(sample, SENSITIVITY)}
        values = {f'shift {figure}': estimate['value'] for figure, estimate in figures.items()}
        rows.append({'candidate': name, 'combination': how, **values})
    return pd.DataFrame(rows)


def main() -> None:
    """Train and measure what is missing, print a row for each run, and then the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder of the runs')
    parser.add_argument('--data', type=Path, help='images (default: CXR_DATA, else data/chest_xray)')
    parser.add_argument('--arch', default='efficientnet_lite0')
    parser.add_argument('--size', type=int, default=128, help='side of the images in pixels')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--precision', default='auto', choices=('auto', 'fp32', 'fp16', 'bf16'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--shift', type=float, default=0.2, help='proportion of the patients that is held out')
    parser.add_argument('--candidates', nargs='+', default=list(CANDIDATES), choices=CANDIDATES, metavar='NAME')
    parser.add_argument('--combine', action='store_true', help='also combine the runs of the seeds')
    parser.add_argument('--limit', type=int, help='images of each class and split, for a trial')
    parser.add_argument('--strengths', type=int, nargs='+', default=[3], help='strengths of the corruptions')
    args = parser.parse_args()
    robustness.STRENGTHS = tuple(args.strengths)
    rows = []
    for name in args.candidates:
        folders = []
        for seed in args.seeds:
            folder = args.out / f'{name.replace(", ", "-").replace(" ", "-").replace("/", "_")}-{seed}'
            if not Run(folder).has_ended:
                train_or_resume(folder, make_candidate(name, args, seed), data_root(args.data), args.precision)
            folders.append(folder)
            rows.append({'candidate': name, 'seed': seed, **measure(Run.open(folder))})
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
        if args.combine:
            print(combine_seeds(folders, args.out, name).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows).drop(columns='seed').groupby('candidate', sort=False)
    args.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out / 'candidates.csv', index=False)
    print(f'\nmean over {len(args.seeds)} seeds\n{table.mean().round(3).T.to_string()}')


if __name__ == '__main__':
    main()

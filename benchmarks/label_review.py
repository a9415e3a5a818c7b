"""Recall of `data review`: the share of planted wrong labels among the images that it lists first.

    python benchmarks/label_review.py runs/flipped --data data/chest_xray --folds 3 --size 96 --epochs 3

Copies the list of the images of train and valid into a CSV file in the folder, with the label of 2% of them flipped at
random, image by image. Their patients are those of the original labels, so that the folds still keep all images of a
patient together. Then it trains the folds on these labels, predicts every image out of fold, and counts the planted
labels among the first 4% of the images, for each way of ranking them. Folds that are complete in the folder are not
trained again, so the command continues after an interruption. Takes about 5 minutes for each fold on one core.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.series import Series, is_series
from cxr_fastai.data.items import data_root, image_root, read_items
from cxr_fastai.evaluation.cross_validation import read_out_of_fold
from cxr_fastai.evaluation.intervals import wilson_interval
from cxr_fastai.evaluation.label_review import calibrate_folds, label_probabilities, rank_labels
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.series import resume_series, train_folds

LISTED_SHARES = (0.02, 0.04, 0.08)
"""Shares of the images that are listed first, among which the planted labels are counted."""
MAX_PRINTED = 20
"""Number of missed labels that are printed with their rank."""


def plant(items: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Return `items` with the labels of the `share` of the rows flipped, and the column `planted` that marks them."""
    planted = np.zeros(len(items), bool)
    planted[np.random.default_rng(seed).choice(len(items), round(share * len(items)), replace=False)] = True
    other = items.label.map({VOCAB[0]: VOCAB[1], VOCAB[1]: VOCAB[0]})
    return items.assign(label=items.label.mask(planted, other), planted=planted)


def write_listing(args: argparse.Namespace) -> pd.DataFrame:
    """Write `images.csv` with the planted labels into the folder; return its rows."""
    root = data_root(args.data)
    items = read_items(root, limit=args.limit)
    items = plant(items[items.split != 'test'].reset_index(drop=True), args.share, args.seed)
    folder = image_root(root).resolve()
    listing = items.assign(path=[str(folder / path) for path in items.path])
    args.out.mkdir(parents=True, exist_ok=True)
    listing.drop(columns='kind').to_csv(args.out / 'images.csv', index=False)
    return listing


def train(args: argparse.Namespace) -> Series:
    """Train the folds on the planted labels, or continue there; return the series."""
    listing, folder = args.out / 'images.csv', args.out / 'folds'
    if is_series(folder):
        return resume_series(folder, listing) if Series.open(folder).find_missing() else Series.open(folder)
    recipe = make_recipe(args.arch, args.recipe, args.epochs, size=args.size, seed=args.seed, valid='patients')
    return train_folds(recipe, listing, folder, args.folds)


def check_patients(series: Series) -> None:
    """Raise `UsageError` if a patient has validation images in two folds."""
    parts = [run.used_items.query('split == "valid"').assign(fold=run.path.name) for run in series.open_runs()]
    folds = pd.concat(parts).groupby('patient').fold.nunique()
    if (folds > 1).any():
        raise UsageError(f'{series.path}: {(folds > 1).sum()} patients have validation images in two folds.')


def score(predictions: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the scores (n,) of the images by the name of the ranking; the lowest are listed first.

    The first is that of `data review`. The last is the self-confidence minus the mean one of the images with the same
    label in the fold, the thresholds of confident learning.
    """
    p_label = pd.Series(label_probabilities(predictions.label, predictions.p_pneumonia.to_numpy()), predictions.index)
    classes = p_label.groupby([predictions.fold, predictions.label])
    return {
        'calibrated in the fold': label_probabilities(predictions.label, calibrate_folds(predictions)),
        'self-confidence': p_label.to_numpy(),
        'rank in the fold': p_label.groupby(predictions.fold).rank(pct=True).to_numpy(),
        'self-confidence minus mean': (p_label - classes.transform('mean')).to_numpy(),
    }


def measure(predictions: pd.DataFrame, planted: pd.Series) -> pd.DataFrame:
    """Return the recall among the first images with its 95% interval (Wilson), a row for each ranking and share."""
    rows = []
    for ranking, scores in score(predictions).items():
        is_planted = predictions.path.map(planted).to_numpy(bool)[np.argsort(scores, kind='stable')]
        for share in LISTED_SHARES:
            n = math.ceil(share * len(predictions))
            recall = wilson_interval(int(is_planted[:n].sum()), int(is_planted.sum()))
            rows.append((ranking, share, n, int(is_planted[:n].sum()), *recall.values()))
    return pd.DataFrame(rows, columns=['ranking', 'first', 'images', 'found', 'recall', 'low', 'high'])


def print_ranks(predictions: pd.DataFrame, planted: pd.Series) -> None:
    """Print the quantiles of the ranks of the planted labels, and those that are ranked last."""
    ranked = rank_labels(predictions)
    ranks = ranked[ranked.path.map(planted).to_numpy(bool)]
    quantiles = ranks['rank'].quantile([0.25, 0.5, 0.75, 0.9, 0.95, 1])
    print(f'\nranks of {len(ranks)} planted labels among {len(ranked):,} images')
    print(', '.join(f'{share:.0%} up to {rank:.0f}' for share, rank in quantiles.items()))
    print(f'by label: {ranks.groupby("label")["rank"].median().to_dict()} (median)')
    last = ranks.tail(MAX_PRINTED).assign(name=[Path(path).name for path in ranks.tail(MAX_PRINTED).path])
    print(last[['rank', 'label', 'p_pneumonia', 'fold', 'name']].to_string(index=False))


def main() -> None:
    """Plant, train, predict, and print the recall of each ranking and the ranks of the planted labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder of the list of images and of the folds')
    parser.add_argument('--data', type=Path, help='images (default: CXR_DATA, else data/chest_xray)')
    parser.add_argument('--share', type=float, default=0.02, help='share of the labels that are flipped')
    parser.add_argument('--folds', type=int, default=3)
    parser.add_argument('--arch', default='efficientnet_lite0')
    parser.add_argument('--recipe', default='tuned')
    parser.add_argument('--size', type=int, default=96, help='side of the images in pixels')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--limit', type=int, help='images of each class and split, for a trial')
    args = parser.parse_args()
    listing = write_listing(args)
    series = train(args)
    check_patients(series)
    predictions = read_out_of_fold(series)
    folder = args.out.resolve()
    planted = pd.Series(listing.planted.to_numpy(), [str(folder / path) for path in listing.path])
    predictions['path'] = [str(folder / path) for path in predictions.path]
    print(f'{listing.planted.sum()} of {len(listing):,} labels flipped')
    print(measure(predictions, planted).round(3).to_string(index=False))
    print_ranks(predictions, planted)


if __name__ == '__main__':
    main()

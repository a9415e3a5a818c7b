"""Images per second from file to probability: `predict` compared with two ways of fastai, alternating in one process.

    python benchmarks/inference.py RUN BUNDLE IMAGES --rounds 5

RUN is a run folder, BUNDLE its bundle, IMAGES a folder of original images. For each way this prints the images per
second (median of the rounds), the ratio to `learn.predict` and to `learn.get_preds` in the same round (median, minimum
and maximum), and the largest difference of a probability.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from fastai.learner import Learner

from cxr_fastai.data.find import list_images
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.training.restoring import load_learner

BASELINES = ('learn.predict', 'learn.get_preds')


def predict_one_by_one(learn: Learner, paths: list[Path]) -> np.ndarray:
    """Return probabilities (n,) by fastai's `predict`."""
    with learn.no_bar():
        return np.array([float(learn.predict(path)[2][1]) for path in paths])


def predict_batches(learn: Learner, paths: list[Path], batch_size: int) -> np.ndarray:
    """Return probabilities (n,) by fastai's `get_preds`."""
    dl = learn.dls.test_dl(paths, bs=batch_size, num_workers=0)
    with learn.no_bar():
        return learn.get_preds(dl=dl)[0][:, 1].numpy()


def predict_rows(predictor: Predictor, paths: list[Path], batch_size: int) -> np.ndarray:
    """Return probabilities (n,) by `Predictor.predict`."""
    return np.array([row['p_pneumonia'] for row in predictor.predict(paths, batch_size)])


def measure(methods: dict[str, Callable[[], np.ndarray]], images: int, rounds: int) -> dict[str, np.ndarray]:
    """Return the images per second (rounds,) of each method. The methods alternate within a round."""
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            speeds[name].append(images / (time.perf_counter() - start))
    return {name: np.array(values) for name, values in speeds.items()}


def describe(ratio: np.ndarray) -> str:
    """Return the median of ratios, with minimum and maximum."""
    return f'{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})'


def main() -> None:
    """Measure all methods and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='run folder')
    parser.add_argument('bundle', type=Path, help='bundle of the run')
    parser.add_argument('images', type=Path, help='folder of original images')
    parser.add_argument('--rounds', type=int, default=5, help='alternating rounds (default: 5)')
    parser.add_argument('--batch-size', type=int, default=16, help='images per batch (default: 16)')
    parser.add_argument('--limit', type=int, default=96, help='maximum number of images (default: 96)')
    args = parser.parse_args()
    warnings.simplefilter('ignore')

    paths = list_images([args.images])[: args.limit]
    learn = load_learner(args.run / 'learner.pkl')
    by_torch = Predictor.load(args.bundle, engine='torch', gate=False)
    by_onnx = Predictor.load(args.bundle, engine='onnx', gate=False)
    methods = {
        'learn.predict': partial(predict_one_by_one, learn, paths),
        'learn.get_preds': partial(predict_batches, learn, paths, args.batch_size),
        'predict, torch': partial(predict_rows, by_torch, paths, args.batch_size),
        'predict, onnx': partial(predict_rows, by_onnx, paths, args.batch_size),
    }
    probabilities = {name: method() for name, method in methods.items()}  # also warms up
    speeds = measure(methods, len(paths), args.rounds)
    for name, speed in speeds.items():
        ratios = ', '.join(describe(speed / speeds[baseline]) for baseline in BASELINES)
        difference = np.abs(probabilities[name] - probabilities['learn.get_preds']).max()
        print(
            f'{name:16s} {np.median(speed):6.1f} images/s; ratio to predict, get_preds: {ratios}; '
            f'largest difference {difference:.1g}'
        )


if __name__ == '__main__':
    main()

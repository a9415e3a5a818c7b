"""Images per second from file to probability: fastai's two ways, and `predict`, alternating in one process.

    python benchmarks/inference.py RUN BUNDLE IMAGES --rounds 5

RUN is a run folder, BUNDLE what `export RUN --int8` made of it, IMAGES a folder of original images. Prints images per
second (medians over the rounds), and the ratio of each way to `learn.predict` and to `learn.get_preds`, round by round.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cxr_fastai.data.find import list_images
from cxr_fastai.inference.bundle import INT8, Bundle
from cxr_fastai.inference.pickles import load_learner
from cxr_fastai.inference.predictor import Predictor


def ways(run: Path, bundle: Path, paths: list[Path], batch_size: int) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> what predicts all images and returns their probabilities."""
    learn = load_learner(run / 'learner.pkl')

    def one_by_one() -> np.ndarray:
        with learn.no_bar():
            return np.array([float(learn.predict(path)[2][1]) for path in paths])

    def batches() -> np.ndarray:
        with learn.no_bar():
            return learn.get_preds(dl=learn.dls.test_dl(paths, bs=batch_size, num_workers=0))[0][:, 1].numpy()

    found = {'learn.predict': one_by_one, 'learn.get_preds': batches}
    for engine in ('torch', 'onnx', *(['int8'] if INT8 in Bundle.open(bundle) else [])):
        predictor = Predictor.load(bundle, engine=engine, gate=False)
        found[f'predict, {engine}'] = lambda predictor=predictor: np.array(
            [row['p_pneumonia'] for row in predictor.predict(paths, batch_size)]
        )
    return found


def main() -> None:
    """Time all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--limit', type=int, default=96)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    paths = list_images([args.images])[: args.limit]
    works, speeds, scores = ways(args.run, args.bundle, paths, args.batch_size), {}, {}
    for name, work in works.items():
        scores[name] = work()
    for _ in range(args.rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            speeds.setdefault(name, []).append(len(paths) / (time.perf_counter() - start))
    for name, found in speeds.items():
        ratios = [np.array(found) / np.array(speeds[base]) for base in ('learn.predict', 'learn.get_preds')]
        told = ', '.join(f'{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})' for r in ratios)
        off = np.abs(scores[name] - scores['learn.get_preds']).max()
        print(f'{name:16s} {np.median(found):6.1f} images/s; over predict, get_preds: {told}; differs by {off:.1g}')


if __name__ == '__main__':
    main()

"""What maps cost: a batch of Grad-CAMs against a forward and a backward pass, in alternating rounds in one process.

    python benchmarks/explain.py --rounds 7

64 images of 224 px through the baseline, in its memory layout. Prints seconds (medians) and the ratio round by round.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
from cxr_fastai.models.architectures import build_model


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--images', type=int, default=64)
    args = parser.parse_args()
    model = build_model('baseline').eval().to(memory_format=torch.channels_last)
    images = torch.randn(args.images, 3, 224, 224).to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        model(images)[:, 1].sum().backward()

    def explain() -> None:
        scale(enlarge(activation_maps(model, images, 1, 'gradcam'), 224))

    for work in (step, explain):
        work()
    rows = np.array([[seconds(explain), seconds(step)] for _ in range(args.rounds)])
    ratios = rows[:, 0] / rows[:, 1]
    print(
        f'maps {np.median(rows[:, 0]):.2f} s, forward and backward {np.median(rows[:, 1]):.2f} s, ratio '
        f'{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}), {args.rounds} rounds'
    )


if __name__ == '__main__':
    main()

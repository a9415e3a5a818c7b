"""Time of explanation maps: a batch of Grad-CAMs, compared with a forward and a backward pass.

    python benchmarks/explain.py --rounds 7

Both run alternately in one process, on images of 224 pixels through the baseline. Prints the median seconds of each and
the ratio of the two in each round (median and range).
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
from cxr_fastai.models.architectures import build_model

SIZE = 224


def main() -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7, help='number of alternating measurements (default 7)')
    parser.add_argument('--images', type=int, default=64, help='number of images in the batch (default 64)')
    args = parser.parse_args()
    model = build_model('baseline').eval().to(memory_format=torch.channels_last)
    images = torch.randn(args.images, 3, SIZE, SIZE).to(memory_format=torch.channels_last)

    def forward_and_backward() -> None:
        model.zero_grad()
        model(images)[:, 1].sum().backward()

    def explain() -> None:
        scale(enlarge(activation_maps(model, images, target=1, method='gradcam'), SIZE))

    forward_and_backward()  # warm up
    explain()
    explain_seconds = []
    pass_seconds = []
    for _ in range(args.rounds):
        explain_seconds.append(measure_seconds(explain))
        pass_seconds.append(measure_seconds(forward_and_backward))
    ratios = np.divide(explain_seconds, pass_seconds)
    print(
        f'maps {np.median(explain_seconds):.2f} s, forward and backward {np.median(pass_seconds):.2f} s, ratio '
        f'{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}), {args.rounds} rounds'
    )


def measure_seconds(function: Callable[[], None]) -> float:
    """Return the duration of one call of `function` in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == '__main__':
    main()

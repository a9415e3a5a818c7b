"""Measure images per second, from files to augmented and normalised batches, in alternating rounds in one process.

    (a) the pipeline of the specification: Pillow in RGB, torchvision's transforms, no workers
    (b) a typical fastai DataBlock: ImageBlock, Resize (squish), aug_transforms, fastai's default number of workers
    (c) this package without a cache, with the default number of workers of `train`
    (d) this package with the cache of `data prepare`

    python benchmarks/data_pipeline.py --data chest_xray_originals --rounds 5

A round is one epoch of each over the training images, repeated until there are at least `--images`. The time includes
the start of the workers. The cache is written to a temporary folder before the first round. Without `--data` the images
are synthetic, of 1,400 x 1,400 pixels.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader
from fastai.vision.augment import Resize, ResizeMethod, aug_transforms
from fastai.vision.data import ImageBlock
from torch.utils.data import DataLoader
from train_throughput import PlainImages

from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.loaders import CXRDataLoaders, locate
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe


def make_loaders(items: pd.DataFrame, root: Path, size: int, batch_size: int) -> dict[str, Any]:
    """Return the four loaders by their letter."""
    recipe = make_recipe('baseline', size=size, batch_size=batch_size, workers=None)
    prepare(items.path, root, Preprocessing.of(recipe))
    valid = items.head(1).assign(split='valid')  # a DataBlock needs a validation image
    make_own = partial(CXRDataLoaders.from_items, pd.concat([items, valid], ignore_index=True), root, recipe)
    return {
        'a': DataLoader(PlainImages(items, root, size), batch_size=batch_size, shuffle=True),
        'b': make_fastai_loader(items, root, size, batch_size),
        'c': make_own(None).train,
        'd': make_own(find_cache(root, Preprocessing.of(recipe))).train,
    }


def make_fastai_loader(items: pd.DataFrame, root: Path, size: int, batch_size: int) -> Any:
    """Return the DataLoader that fastai's tutorials build."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=lambda table: (range(len(table)), []),
        item_tfms=Resize(size, ResizeMethod.Squish),
        batch_tfms=aug_transforms(),
    )
    return block.dataloaders(locate(items, root), bs=batch_size).train


def count_images(batches: Iterable[Any]) -> int:
    """Iterate over all batches and count their images."""
    return sum(len(batch[0]) for batch in batches)


def measure(loaders: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return images per second of each loader and round; the order of the loaders alternates between rounds."""
    rates: dict[str, list[float]] = {letter: [] for letter in loaders}
    for number in range(rounds + 1):  # the first round warms up
        for letter in sorted(loaders, reverse=number % 2 == 1):
            start = time.perf_counter()
            images = count_images(loaders[letter])
            if number > 0:
                rates[letter].append(images / (time.perf_counter() - start))
        if number == 0:
            print('warmed up', flush=True)
        else:
            line = ' '.join(f'{letter} {values[-1]:.1f}' for letter, values in rates.items())
            print(f'round {number}: {line} images/s', flush=True)
    return rates


def main() -> None:
    """Measure, and print one line per round, then the medians and the ratios to (a)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='folder of images (default: synthetic images)')
    parser.add_argument('--images', type=int, default=500, help='minimum number per round (default: 500)')
    parser.add_argument('--size', type=int, default=224, help='side of the input in pixels (default: 224)')
    parser.add_argument('--batch-size', type=int, default=32, help='images per batch (default: 32)')
    parser.add_argument('--rounds', type=int, default=5, help='rounds after the warm-up (default: 5)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['CXR_CACHE'] = str(Path(folder, 'cache'))
        root = args.data
        if root is None:
            root = Path(folder, 'images')
            make_demo(root, images=64, size=1400)
        items = read_items(root)
        items = items[items.split == 'train']
        repeats = -(-args.images // len(items))
        items = pd.concat([items] * repeats, ignore_index=True)
        rates = measure(make_loaders(items, image_root(root), args.size, args.batch_size), args.rounds)
    for letter, values in rates.items():
        ratios = [value / plain for value, plain in zip(values, rates['a'], strict=True)]
        print(
            f'({letter}) median {statistics.median(values):.1f} images/s; ratio to (a) '
            f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
        )


if __name__ == '__main__':
    main()

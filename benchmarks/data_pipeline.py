"""Images per second from files to an augmented, normalised batch, in alternating rounds in one process:

    (a) the specification's pipeline: Pillow in RGB, torchvision's transforms, no workers
    (b) a usual fastai DataBlock: ImageBlock, Resize (squish), aug_transforms, fastai's own number of workers
    (c) ours without a cache, `train`'s own number of workers
    (d) ours with the cache of `data prepare`

    python benchmarks/data_pipeline.py --data chest_xray_originals --rounds 5

A round of each is one epoch of the train images, repeated to at least `--images`; starting workers counts. The cache is
made in a temporary folder before the first round. Without `--data` the images are synthetic, of 1,400 px.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader
from fastai.vision.augment import Resize, ResizeMethod, aug_transforms
from fastai.vision.data import ImageBlock
from torch.utils.data import DataLoader
from train_throughput import PlainImages

from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.loaders import locate, make_dls
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe


def count(batches) -> int:
    """Take every batch and count its images."""
    return sum(len(batch[0]) for batch in batches)


def usual(items: pd.DataFrame, root: Path, size: int, bs: int):
    """fastai's DataLoader as its tutorials make it."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=lambda table: (range(len(table)), []),
        item_tfms=Resize(size, ResizeMethod.Squish),
        batch_tfms=aug_transforms(),
    )
    return block.dataloaders(locate(items, root), bs=bs).train


def sides(items: pd.DataFrame, root: Path, size: int, bs: int) -> dict:
    """The four loaders, by letter."""
    recipe = make_recipe('baseline', size=size, batch_size=bs, workers=None)
    prepare(items.path, root, Preprocessing.of(recipe))
    one = items.head(1).assign(split='valid')  # a DataBlock wants one
    ours = partial(make_dls, pd.concat([items, one], ignore_index=True), root, recipe)
    return {
        'a': DataLoader(PlainImages(items, root, size), batch_size=bs, shuffle=True),
        'b': usual(items, root, size, bs),
        'c': ours(None).train,
        'd': ours(find_cache(root, Preprocessing.of(recipe))).train,
    }


def main() -> None:
    """Measure and print a line a round, then the medians and the ratios to (a)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='images (default: synthetic)')
    parser.add_argument('--images', type=int, default=500)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['CXR_CACHE'] = str(Path(folder, 'cache'))
        if args.data is None:
            make_demo(root := Path(folder, 'images'), images=64, size=1400)
        else:
            root = args.data
        items = read_items(root).query('split == "train"')
        items = pd.concat([items] * (-(-args.images // len(items))), ignore_index=True)
        loaders = sides(items, image_root(root), args.size, args.batch_size)
        rates = {side: [] for side in loaders}
        for i in range(args.rounds + 1):  # the first warms up
            for side in sorted(loaders, reverse=i % 2):
                start = time.perf_counter()
                images = count(loaders[side])
                if i:
                    rates[side].append(images / (time.perf_counter() - start))
            told = ' '.join(f'{side} {found[-1]:.1f}' for side, found in rates.items() if found)
            print(f'round {i}: {told} images/s' if told else 'warmed up', flush=True)
    for side, found in rates.items():
        ratios = [ours / plain for ours, plain in zip(found, rates['a'], strict=True)]
        print(
            f'({side}) median {statistics.median(found):.1f} images/s; ratio to (a) {statistics.median(ratios):.2f} '
            f'({min(ratios):.2f} to {max(ratios):.2f})'
        )


if __name__ == '__main__':
    main()

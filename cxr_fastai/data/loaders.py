"""Items become fastai `DataLoaders`: one channel read and augmented, three channels normalised."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import pandas as pd
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, ColSplitter, IntToFloatTensor

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import VOCAB, Recipe
from cxr_fastai.data.transforms import NormalizeImage, OpenImage, augmentations
from cxr_fastai.images.cache import ImageCache
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing


def image_block(recipe: Recipe, cache: ImageCache | None = None) -> DataBlock:
    """The `DataBlock` of `recipe`, for a table with the columns `path` (complete), `label` and `split`. Images that
    `cache` holds are not decoded again; the batches are the same without it."""
    opened = OpenImage(cache or Preprocessing.of(recipe), recipe.on_bad_image == 'skip')
    images = TransformBlock(type_tfms=opened, batch_tfms=[IntToFloatTensor, NormalizeImage])
    return DataBlock(
        blocks=(images, CategoryBlock(vocab=list(VOCAB), sort=False)),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=ColSplitter('split', on='valid'),
        batch_tfms=augmentations(recipe),
    )


def make_dls(items: pd.DataFrame, root: Path, recipe: Recipe, cache: ImageCache | None = None) -> DataLoaders:
    """`DataLoaders` of the items' train and valid images below `root`, with the loader's settings of `recipe`.

    Where that leaves the workers open, there is one a core, and none where `cache` holds every image.

    Batches are images (n, 3, size, size) and categories (n,). The last, smaller batch of train is used too.
    """
    # Filtered first: to fastai's splitter whatever is not valid is train, test images included.
    source = locate(items[items.split.isin(['train', 'valid'])], root)
    workers = recipe.workers
    if workers is None:
        workers = 0 if cache and all(path in cache for path in source.path) else os.cpu_count()
    return image_block(recipe, cache).dataloaders(
        source,
        bs=recipe.batch_size,
        num_workers=workers,
        drop_last=False,
        pin_memory=torch.cuda.is_available(),
        wif=follow_parent,
    )


def follow_parent() -> None:
    """Let a worker process leave Ctrl-C, which a terminal sends to the whole group, to its parent, and end with that
    even where it is killed (Linux); else the worker would keep the run's lock for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
    if sys.platform.startswith('linux'):
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def find_unreadable(paths: Sequence[Path]) -> dict[Path, ImageError]:
    """Read each image once, on all cores, so that a bad one is known before hours of training."""

    def complaint(path: Path) -> ImageError | None:
        try:
            read_image(path)
        except ImageError as error:
            return error
        return None

    return {path: error for path, error in zip(paths, in_threads(complaint, paths), strict=True) if error}


def name_images(bad: dict[Path, ImageError]) -> str:
    """The first unreadable images with what is wrong with them, and how many more there are."""
    return '; '.join(map(str, list(bad.values())[:3])) + (f'; and {len(bad) - 3} more' if len(bad) > 3 else '')


def locate(items: pd.DataFrame, root: Path) -> pd.DataFrame:
    """`items` with complete paths, as `dls.test_dl` and the `DataBlock` take them."""
    return items.assign(path=[str(root / path) for path in items.path]).reset_index(drop=True)

"""Make fastai `DataLoaders` from the items table."""

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

MAX_ERRORS_LISTED = 3
"""Largest number of unreadable images that a message names."""
PR_SET_PDEATHSIG = 1
"""The option of Linux's `prctl` that sends a process a signal when its parent ends."""


def make_dls(items: pd.DataFrame, root: Path, recipe: Recipe, cache: ImageCache | None = None) -> DataLoaders:
    """Return `DataLoaders` of the train and valid images of `items` below the folder `root`.

    Batches are images (n, 3, size, size) and categories (n,); the last, smaller batch of train is kept. If the recipe
    does not set the number of workers, it is the number of cores, or 0 if `cache` contains every image.
    """
    # ColSplitter puts every row that is not valid into train, so test images have to be removed before.
    source = locate(items[items.split.isin(['train', 'valid'])], root)
    workers = recipe.workers
    if workers is None:
        all_cached = cache is not None and all(path in cache for path in source.path)
        workers = 0 if all_cached else os.cpu_count()
    return cxr_block(recipe, cache).dataloaders(
        source,
        bs=recipe.batch_size,
        num_workers=workers,
        drop_last=False,
        pin_memory=torch.cuda.is_available(),
        wif=follow_parent,
    )


def cxr_block(recipe: Recipe, cache: ImageCache | None = None) -> DataBlock:
    """Return the `DataBlock` of `recipe`, for a table with the columns `path` (complete), `label` and `split`.

    Images in `cache` are not decoded again; the batches are the same with and without it.
    """
    open_image = OpenImage(cache or Preprocessing.of(recipe), skip=recipe.on_bad_image == 'skip')
    images = TransformBlock(type_tfms=open_image, batch_tfms=[IntToFloatTensor, NormalizeImage])
    return DataBlock(
        blocks=(images, CategoryBlock(vocab=list(VOCAB), sort=False)),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=ColSplitter('split', on='valid'),
        batch_tfms=augmentations(recipe),
    )


def locate(items: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Return `items` with complete paths, as `dls.test_dl` and `cxr_block` expect them."""
    return items.assign(path=[str(root / path) for path in items.path]).reset_index(drop=True)


def follow_parent() -> None:
    """Prepare a worker process of a loader: ignore Ctrl-C, and on Linux end when the parent process ends.

    A terminal sends Ctrl-C to all processes, and the parent stops its workers. A worker that outlives a killed parent
    would keep the lock of the run folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith('linux'):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def find_unreadable(paths: Sequence[Path]) -> dict[Path, ImageError]:
    """Read each image once, in one thread per core, and return the error of each unreadable image.

    Training can take hours, so it checks its images first.
    """
    errors = in_threads(_read_error, paths)
    return {path: error for path, error in zip(paths, errors, strict=True) if error}


def _read_error(path: Path) -> ImageError | None:
    try:
        read_image(path)
    except ImageError as error:
        return error
    return None


def describe_unreadable(errors: dict[Path, ImageError]) -> str:
    """Return the first of the `errors` that `find_unreadable` found, and the number of others."""
    messages = [str(error) for error in errors.values()]
    text = '; '.join(messages[:MAX_ERRORS_LISTED])
    if len(messages) > MAX_ERRORS_LISTED:
        text += f'; and {len(messages) - MAX_ERRORS_LISTED} more'
    return text

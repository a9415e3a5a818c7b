"""Images and a trained run for the notebooks, and a split that keeps the official test images unused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock

from cxr_fastai.core.files import StrPath, write_csv, writing
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.splits import split_patients
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.training import train

FOLDER = Path('example')
SYNTHETIC_IMAGES = 400
REAL_IMAGES = {'train': 120, 'valid': 40, 'test': 40}
"""Number of real images of each class to copy for each split."""


def example_images(folder: StrPath = FOLDER) -> Path:
    """Return a folder of images `train|val|test / NORMAL|PNEUMONIA` below `folder`; create it if it does not exist.

    The images are synthetic. If the environment variable CXR_DATA names the real data set, they are copies of real
    images: each patient is in one split, and no image is from the official test split.
    """
    real_data = os.environ.get('CXR_DATA')
    images = Path(folder) / ('real' if real_data else 'synthetic') / 'images'
    with _lock(images.parent):
        if images.exists():
            return images
        incomplete = images.with_name('images.part')
        shutil.rmtree(incomplete, ignore_errors=True)
        if real_data:
            _copy_sample(Path(real_data), incomplete)
        else:
            make_demo(incomplete, images=SYNTHETIC_IMAGES, size=128, seed=0)
        incomplete.rename(images)
    return images


def _copy_sample(root: Path, target: Path) -> None:
    """Copy the first `REAL_IMAGES` of each class and split of `hold_out` to the folder `target`."""
    for (split, label), images in hold_out(read_items(root)).groupby(['split', 'label'], sort=False):
        folder = target / split / label
        with writing(target):
            folder.mkdir(parents=True)
            for path in images.path.head(REAL_IMAGES[split]):
                shutil.copyfile(image_root(root) / path, folder / Path(path).name)


def _lock(folder: Path) -> FileLock:
    """Return a lock that one process at a time can hold for `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / '.lock')


def example_run(folder: StrPath = FOLDER) -> Run:
    """Return the baseline trained on `example_images(folder)` at 96 px and evaluated on their test split.

    The run is stored next to the images and reused by later calls.
    """
    images = example_images(folder)
    run = images.with_name('run')
    with _lock(images.parent):
        if not Run(run).intact_metrics():
            shutil.rmtree(run, ignore_errors=True)  # an interrupted training, or one of an older version
            recipe = make_recipe('baseline', size=96, batch_size=16, epochs=8, seed=0, valid='official')
            evaluate(train(recipe, images, run), images)
    return Run.open(run)


def hold_out(items: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return `items` without the official test images, with new splits by patient.

    A tenth of the patients is for test, and a tenth of the others for valid. Decisions that are based on this test
    split leave the official one unused.
    """
    first_split = split_patients(items[items.split != 'test'], seed)
    test = first_split[first_split.split == 'valid'].assign(split='test')
    others = split_patients(first_split[first_split.split != 'valid'], seed + 1)
    return pd.concat([others, test], ignore_index=True)


def list_held_out(root: StrPath, listing: StrPath, seed: int = 0) -> Path:
    """Write the images of `root`, split by `hold_out`, to the CSV file `listing` and return its path.

    Every function and command accepts the CSV file instead of a folder of images.
    """
    listing = Path(listing)
    items = hold_out(read_items(root), seed)
    paths = [os.path.relpath(image_root(root) / path, listing.parent) for path in items.path]
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_csv(listing, items.assign(path=paths))
    return listing

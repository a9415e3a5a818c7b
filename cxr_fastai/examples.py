"""What the notebooks begin with: a few hundred images in three splits, and one trained and measured run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock

from cxr_fastai.core.files import write_csv, writing
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.splits import split_patients
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.training import train

FOLDER = Path('example')
SYNTHETIC = 400
REAL = {'train': 120, 'valid': 40, 'test': 40}
"""Images of each class that are taken of the real ones."""


def example_images(folder: Path = FOLDER) -> Path:
    """A folder of images `train|val|test / NORMAL|PNEUMONIA` below `folder`, made when it is not there yet.

    They are synthetic, or, where the environment's CXR_DATA names real images, copies of some of them: of patients who
    are in one split each, and never of the official test split, which is kept for the finished system.
    """
    real = os.environ.get('CXR_DATA')
    images = folder / ('real' if real else 'synthetic') / 'images'
    with _locked(images.parent):
        if images.exists():
            return images
        making = images.with_name('images.part')
        shutil.rmtree(making, ignore_errors=True)
        if real:
            _copy_sample(Path(real), making)
        else:
            make_demo(making, images=SYNTHETIC, size=128, seed=0)
        making.rename(images)
    return images


def example_run(folder: Path = FOLDER) -> Run:
    """The baseline trained on `example_images(folder)` at 96 px and measured on their test split; kept beside them."""
    images = example_images(folder)
    run = images.with_name('run')
    with _locked(images.parent):
        if not (run / 'metrics.json').exists():
            shutil.rmtree(run, ignore_errors=True)  # of a training that was stopped
            recipe = make_recipe('baseline', size=96, batch_size=16, epochs=8, seed=0)
            evaluate(train(recipe, images, run), images)
    return Run.open(run)


def list_held_out(root: Path, listing: Path, seed: int = 0) -> Path:
    """Write the CSV `listing` of the images of `root` by `hold_out`, and return it; it can stand for a folder of images
    everywhere."""
    items = hold_out(read_items(root), seed)
    paths = [os.path.relpath(image_root(root) / path, listing.parent) for path in items.path]
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_csv(listing, items.assign(path=paths))
    return listing


def hold_out(items: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`items` without the official test images, split anew: a tenth of the patients as test, a tenth of the others as
    valid. What is decided by looking at such a test split leaves the official one as it was."""
    first = split_patients(items[items.split != 'test'], seed)
    rest = split_patients(first[first.split != 'valid'], seed + 1)
    return pd.concat([rest, first[first.split == 'valid'].assign(split='test')], ignore_index=True)


def _copy_sample(root: Path, into: Path) -> None:
    """Copy `REAL` images of each class and split of `hold_out` into the layout of the data set."""
    for (split, label), images in hold_out(read_items(root)).groupby(['split', 'label'], sort=False):
        folder = into / split / label
        with writing(into):
            folder.mkdir(parents=True)
            for path in images.path.head(REAL[split]):
                shutil.copyfile(image_root(root) / path, folder / Path(path).name)


def _locked(folder: Path) -> FileLock:
    """One process at a time makes what is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / '.lock')

"""What the notebooks begin with: a few hundred films in three splits, and one trained and measured run."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock

from cxr_fastai.core.files import write_csv, writing
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import film_root, read_items
from cxr_fastai.data.splits import split_patients
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.training import train

FOLDER = Path('example')
SYNTHETIC = 400
REAL = {'train': 120, 'valid': 40, 'test': 40}
"""Films of each class that are taken of the real ones."""


def example_films(folder: Path = FOLDER) -> Path:
    """A folder of films `train|val|test / NORMAL|PNEUMONIA` below `folder`, made when it is not there yet.

    They are synthetic, or, where the environment's CXR_DATA names real films, copies of some of them: of patients who
    are in one split each, and never of the official test split, which is kept for the finished system.
    """
    real = os.environ.get('CXR_DATA')
    films = folder/('real' if real else 'synthetic')/'films'
    with _locked(films.parent):
        if films.exists(): return films
        making = films.with_name('films.part')
        shutil.rmtree(making, ignore_errors=True)
        if real: _copy_sample(Path(real), making)
        else: make_demo(making, films=SYNTHETIC, size=128, seed=0)
        making.rename(films)
    return films


def example_run(folder: Path = FOLDER) -> Run:
    """The baseline trained on `example_films(folder)` at 96 px and measured on their test split; kept beside them."""
    films = example_films(folder)
    run = films.with_name('run')
    with _locked(films.parent):
        if not (run/'metrics.json').exists():
            shutil.rmtree(run, ignore_errors=True)  # of a training that was stopped
            recipe = make_recipe('baseline', size=96, batch_size=16, epochs=8, seed=0)
            evaluate(train(recipe, films, run), films)
    return Run.open(run)


def list_held_out(root: Path, listing: Path, seed: int = 0) -> Path:
    """Write the CSV `listing` of the films of `root` by `hold_out`, and return it; it can stand for a folder of films
    everywhere."""
    items = hold_out(read_items(root), seed)
    paths = [os.path.relpath(film_root(root)/path, listing.parent) for path in items.path]
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_csv(listing, items.assign(path=paths))
    return listing


def hold_out(items: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`items` without the official test films, split anew: a tenth of the patients as test, a tenth of the others as
    valid. What is decided by looking at such a test split leaves the official one as it was."""
    first = split_patients(items[items.split != 'test'], seed)
    rest = split_patients(first[first.split != 'valid'], seed + 1)
    return pd.concat([rest, first[first.split == 'valid'].assign(split='test')], ignore_index=True)


def _copy_sample(root: Path, into: Path) -> None:
    """Copy `REAL` films of each class and split of `hold_out` into the layout of the data set."""
    for (split, label), films in hold_out(read_items(root)).groupby(['split', 'label'], sort=False):
        folder = into/split/label
        with writing(into):
            folder.mkdir(parents=True)
            for path in films.path.head(REAL[split]): shutil.copyfile(film_root(root)/path, folder/Path(path).name)


def _locked(folder: Path) -> FileLock:
    """One process at a time makes what is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder/'.lock')

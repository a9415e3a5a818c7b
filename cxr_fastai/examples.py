"""What the notebooks begin with: a few hundred films in three splits, and one trained and measured run."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock

from cxr_fastai.core import writing
from cxr_fastai.demo import make_demo
from cxr_fastai.evaluation import evaluate
from cxr_fastai.items import film_root, read_items, split_patients
from cxr_fastai.models import make_recipe
from cxr_fastai.run import Run
from cxr_fastai.training import train

FOLDER = Path('example')
SYNTHETIC = 400
REAL = {'train': 120, 'val': 40, 'test': 40}
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


def _copy_sample(root: Path, into: Path) -> None:
    items = read_items(root)
    sample = _hold_out(items[items.split != 'test']).groupby(['split', 'label'], sort=False)
    for (split, label), films in sample:
        for path in films.path.head(REAL[split]):
            with writing(into):
                (into/split/label).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(film_root(root)/path, into/split/label/Path(path).name)


def _hold_out(items: pd.DataFrame) -> pd.DataFrame:
    """A tenth of the patients as test, a tenth of the others as val."""
    first = split_patients(items, seed=0)
    rest = split_patients(first[first.split != 'valid'], seed=1)
    test = first[first.split == 'valid'].assign(split='test')
    return pd.concat([rest.replace({'split': {'valid': 'val'}}), test])


def _locked(folder: Path) -> FileLock:
    """One process at a time makes what is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder/'.lock')

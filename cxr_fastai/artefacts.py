"""Both ends of every model file: for now the exported `learner.pkl`."""
from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.core import CXRError, CXRWarning, UsageError, atomic
from cxr_fastai.recipe import Recipe

if TYPE_CHECKING:
    from fastai.learner import Learner


@dataclass(frozen=True)
class ModelConfig:
    """What prediction has to know beside the weights; it travels in the model file as `learn.config`."""
    arch: str
    size: int
    threshold: float
    threshold_rule: str = 'fixed:0.5'
    resize: str = 'squish'
    low_pass: float = 0.0
    temperature: float | None = None


def save_learner(learn: Learner, path: Path, recipe: Recipe) -> None:
    """Export `learn` to `path` for stock `load_learner`, atomically, with plain pickle and without a folder's name.

    (fastai's `export` writes in place, embeds bytecode and paths, and leaves a gutted Learner when it fails.)
    """
    import torch
    learn.config = asdict(ModelConfig(recipe.arch, recipe.size, recipe.threshold, f'fixed:{recipe.threshold:g}',
                                      recipe.resize, recipe.low_pass))
    buffer = BytesIO()  # torch would tell of a full disk by a RuntimeError
    with _emptied(learn): torch.save(learn, buffer, pickle_module=pickle)
    with atomic(path) as temporary: temporary.write_bytes(buffer.getbuffer())


def load_learner(path: Path) -> Learner:
    """The `Learner` in the file `path`, on the CPU. Unpickling runs whatever the file says, so it warns and names the
    file's SHA-256. Raises `CXRError` where the file is no learner of this package."""
    from fastai.learner import load_learner as load
    warnings.warn(f'{path} is a pickle, which can run code while it loads: use it only from a source you trust. '
                  f'SHA-256 {sha256(path)}', CXRWarning, stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # A broken or foreign pickle raises whatever its bytes ask for.
        try: learn = load(path)
        except Exception as error: raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from error
    if not hasattr(learn, 'config'):
        raise CXRError(f'{path}: an exported {type(learn).__name__} without film size and threshold, so not made by '
                       'cxr-fastai: export it with `cxr_fastai.artefacts.save_learner`.')
    return learn


def find_learner(model: Path) -> Path:
    """The model file that `model` means: itself, or the `learner.pkl` of a run folder."""
    path = model/'learner.pkl' if model.is_dir() else model
    if path.is_file(): return path
    raise UsageError(f'{model}: no model there: name a run folder that `cxr-fastai train` finished, or a .pkl file.')


def sha256(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex."""
    with open(path, 'rb') as file: return hashlib.file_digest(file, 'sha256').hexdigest()


@contextmanager
def _emptied(learn: Learner) -> Iterator[None]:
    """`learn` without films, results, optimiser and paths; it gets them back, also after an exception."""
    kept = {name: getattr(learn, name) for name in ('dls', 'opt', 'path')}
    from fastcore.foundation import L
    folder = learn.dls.path
    steps = [step for films_or_labels in learn.dls.train_ds.tls for step in films_or_labels.tfms]
    openers = [(step, step.skip) for step in steps if hasattr(step, 'skip')]
    try:
        learn.dls.path = learn.path = Path('.')
        learn.dls, learn.opt = learn.dls.new_empty(), None
        for metric in learn.metrics: metric.reset()  # they hold the last scores and labels
        for dl in learn.dls.loaders:
            for films_or_labels in dl.dataset.tls: films_or_labels.splits = L([[], []])
        for step, _ in openers: step.skip = False  # prediction owes an answer for every film
        yield
    finally:
        for name, value in kept.items(): setattr(learn, name, value)
        learn.dls.path = folder
        for step, skip in openers: step.skip = skip


def _cause(error: BaseException) -> str:
    """The error's first line; fastai hides a missing package behind another."""
    if isinstance(error.__context__, ModuleNotFoundError): return f'it needs the package {error.__context__.name}'
    return (str(error).splitlines() or [type(error).__name__])[0]

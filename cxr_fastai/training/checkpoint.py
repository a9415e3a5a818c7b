"""Checkpoints: the complete state of a training after every epoch, and resuming from it.

Interrupted training resumes, losing at most one epoch. On the CPU without worker processes the weights are the same,
bit for bit, as those of a training that was not interrupted.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import zipfile
from contextlib import suppress
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, Stopped, UsageError
from cxr_fastai.core.files import atomic, csv_text, sync
from cxr_fastai.core.foreign import open_regular
from cxr_fastai.core.recipe import VOCAB, Recipe
from cxr_fastai.core.recipe_texts import differences
from cxr_fastai.core.run import Run
from cxr_fastai.core.zips import check_zip
from cxr_fastai.inference._unpickler import check_keys, read_pickle
from cxr_fastai.training.learner import Position

STATE = 'state.pt'
PREVIOUS_STATE = 'state.previous.pt'
STATEFUL_CALLBACKS = ('history', 'keep_best', 'average_weights', 'reduce_on_plateau', 'stop_early', 'precision')
"""Attributes of a `Learner` with the callbacks that have a state."""
MAX_ENTRIES = 100_000
"""Largest number of files in the zip of a state: the tensors of the network, of the optimiser and of the callbacks."""
MAX_DIRECTORY = 2**24
"""Largest list of these files at the end of the zip, in bytes."""
RESULTS = ('history.csv', 'model.safetensors', 'learner.pkl')
"""Files of a run that a new training would overwrite."""


class Checkpoint(Callback):
    """Write `state.pt` before the first epoch and after every epoch; continue from `state` if it is given.

    The state consists of weights, optimiser, callbacks and random number generators. `identity`, from `identify`, is
    stored with it. `start` is the position in the training that the state belongs to.
    """

    order = 60  # after the callbacks whose state it saves

    def __init__(self, run: Run, identity: dict[str, Any], state: dict[str, Any] | None = None) -> None:
        self.run_folder = run  # `Callback.run` is fastai's
        self.identity = identity
        self.state = state
        self.start = Position(state['phase'], state['epochs']) if state else Position()
        self.phase = self.start.phase - 1  # number of the current phase; `before_fit` counts it

    def before_fit(self) -> None:
        self.phase += 1
        if self.state:
            self._restore(self.state)
            self.state = None
        elif self.phase == 0:
            self._save(epochs=0)

    def after_epoch(self) -> None:
        self._save(epochs=self.epoch + 1)

    def _save(self, epochs: int) -> None:
        """Save the state after so many `epochs` of the current phase."""
        if not is_main_process():
            return
        state = {
            'identity': self.identity,
            'phase': self.phase,
            'epochs': epochs,
            'model': self.learn.network.state_dict(),
            'optimizer': _builtin_numbers(self.opt.opt.state_dict()),
            'random': random_state(self.dls),
        }
        for name, callback in self._stateful_callbacks().items():
            state[name] = callback.state_dict()
        save_state(self.run_folder, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.learn.network.load_state_dict(state['model'])
        self.opt.opt.load_state_dict(state['optimizer'])
        for name, callback in self._stateful_callbacks().items():
            callback.load_state_dict(state[name])
        set_random_state(self.dls, state['random'])

    def _stateful_callbacks(self) -> dict[str, Any]:
        return {name: getattr(self.learn, name) for name in STATEFUL_CALLBACKS if hasattr(self.learn, name)}


def _builtin_numbers(value: Any) -> Any:
    """Return `value` with Python numbers instead of NumPy's, which a `weights_only` load rejects.

    The learning rate schedules of fastai leave NumPy numbers in the optimiser.
    """
    if isinstance(value, dict):
        return {key: _builtin_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_builtin_numbers(inner) for inner in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


class StopOnSignal(Callback):
    """While entered, SIGINT and SIGTERM end the training after the current batch with `Stopped`.

    A second signal is handled as before, and so ends the process at once. `received` is the number of the signal.
    """

    order = 61
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        with suppress(ValueError):  # signals can be handled only in the main thread
            for number in self.SIGNALS:
                self.previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self.previous_handlers[number])

    def after_batch(self) -> None:
        if self.received:
            raise Stopped(self.received)


def save_state(run: Run, state: dict[str, Any]) -> None:
    """Write `state` to `state.pt` atomically and keep the previous file as `state.previous.pt`.

    Raises `OutputError` if the file cannot be written.
    """
    buffer = BytesIO()  # with a file, torch would raise a RuntimeError for a full disk
    torch.save(state, buffer)
    with atomic(run / STATE) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        sync(temporary)  # before the previous state is renamed
        with suppress(FileNotFoundError):
            os.replace(run / STATE, run / PREVIOUS_STATE)


def load_state(run: Run) -> dict[str, Any] | None:
    """Return the newest intact state of `run`, on the CPU; None if no state was saved. Loading runs no code from it.

    Raises `CXRError` if all states are damaged.
    """
    paths = [run / name for name in (STATE, PREVIOUS_STATE) if (run / name).exists()]
    if not paths:
        return None
    open_regular(paths[0]).close()  # raises an error that names what is no file, such as a pointer of Git LFS
    for path in paths:
        # A damaged file can raise any exception in pickle and zipfile.
        with suppress(Exception):
            _check_pickle(path)
            state = torch.load(path, map_location='cpu', weights_only=True)
            if path != paths[0] and is_main_process():
                paths[0].unlink()  # otherwise the next save would replace the intact state by the damaged one
            return state
    raise CXRError(f'{paths[0]}: the file is damaged, so the run cannot be resumed. Train again with another --out.')


def _check_pickle(path: Path) -> None:
    """Raise `ValueError` if reading the state could take for ever, because a key contains keys, or grow without end."""
    with open_regular(path) as file:
        check_zip(file, MAX_ENTRIES, MAX_DIRECTORY)
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError('it is compressed')
            [name] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
            check_keys(read_pickle(archive.read(name)))


def load_matching_state(run: Run, recipe: Recipe, items: pd.DataFrame) -> dict[str, Any] | None:
    """Return the state that `run` resumes from; None if it was stopped before the first state was saved.

    `recipe` may have further phases after those of the state. Raises `UsageError` if `recipe`, `items` or the classes
    differ otherwise from those of `run`, if the state is missing, or if another version of the package made `run`.
    """
    recipe_of_run = run.recipe  # first, because it raises a clear error for a run of another version
    state = load_state(run)
    if state is not None:
        saved = state['identity']
    elif any((run / name).exists() for name in RESULTS):
        raise UsageError(f'{run.path} cannot be resumed: it has no {STATE}. Train with another --out.')
    else:
        saved = identify(recipe_of_run, run.items)
    current = identify(recipe, items)
    recipe_of_state = Recipe.from_dict(saved['recipe'])
    if recipe.phases[: len(recipe_of_state.phases)] == recipe_of_state.phases:
        recipe_of_state = replace(recipe_of_state, phases=recipe.phases)
    changes = differences(recipe_of_state, recipe)
    if saved['classes'] != current['classes']:
        changes.append(f'classes: {saved["classes"]}, now {current["classes"]}')
    if saved['items'] != current['items']:
        changes.append(f'images: {_compare_items(run.items, items)}')
    if changes:
        raise UsageError(
            f'{run.path} cannot be resumed: it was trained with other settings or images ({"; ".join(changes)}). '
            'Restore them, or train with another --out.'
        )
    return state


def identify(recipe: Recipe, items: pd.DataFrame) -> dict[str, Any]:
    """Return what must not change when a run is resumed: the recipe, the SHA-256 of the items table and the classes."""
    text = csv_text(items).encode(errors='backslashreplace')
    return {'recipe': asdict(recipe), 'items': hashlib.sha256(text).hexdigest(), 'classes': list(VOCAB)}


def _compare_items(before: pd.DataFrame, now: pd.DataFrame) -> str:
    removed = set(before.path) - set(now.path)
    added = set(now.path) - set(before.path)
    common = before.merge(now, on='path', suffixes=('', '_now'))
    changed = pd.Series(False, index=common.index)
    for column in ('label', 'split', 'patient'):
        changed |= common[column] != common[f'{column}_now']
    return f'{len(removed)} removed, {len(added)} added, {changed.sum()} with another label, split or patient'


def random_state(dls: DataLoaders) -> dict[str, Any]:
    """Return the states of all random number generators of a training.

    These are the generators of Python, NumPy, torch and CUDA, and one of each loader.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        'python': _generator_state(random),
        'numpy': [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        'torch': torch.get_rng_state(),
        'loaders': [_generator_state(dl.rng) for dl in dls.loaders],
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(dls: DataLoaders, state: dict[str, Any]) -> None:
    """Restore the `state` that `random_state` returned."""
    _set_generator_state(random, state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    for dl, loader_state in zip(dls.loaders, state['loaders'], strict=True):
        _set_generator_state(dl.rng, loader_state)
    if state['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state['cuda'])


def _generator_state(generator: Any) -> list[Any]:
    """Return the state of Python's `generator` with its 625 integers as a tensor, which loads faster."""
    version, keys, next_gauss = generator.getstate()
    return [version, torch.tensor(keys), next_gauss]


def _set_generator_state(generator: Any, state: list[Any]) -> None:
    version, keys, next_gauss = state
    generator.setstate((version, tuple(keys.tolist()), next_gauss))

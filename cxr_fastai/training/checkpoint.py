"""The state of a training, on disk after every epoch: whatever stops it costs one epoch, and it goes on bit by bit."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.data.core import DataLoaders
from fastai.learner import Learner

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, Stopped, UsageError
from cxr_fastai.core.files import atomic, csv_text, sync
from cxr_fastai.core.recipe import VOCAB, Recipe, differences
from cxr_fastai.core.run import Run
from cxr_fastai.training.learner import network

PREVIOUS = 'state.previous.pt'
PARTS = ('history', 'keep_best', 'average_weights', 'reduce_on_plateau', 'precision')
"""Callbacks that remember something from one epoch to the next."""


class Checkpoint(Callback):
    """Write `state.pt` when training starts and after every epoch; where a `state` is given, go on from it.

    `identity` is what has to be the same for that. Weights, optimiser, callbacks and random numbers are all restored,
    so that on the CPU, with no worker processes, the weights come out as if nothing had stopped.
    """

    order = 60  # after the callbacks whose state it takes

    def __init__(self, run: Run, identity: dict[str, Any], state: dict[str, Any] | None = None):
        self.run_folder, self.identity, self.state, self.phase = run, identity, state, 0

    def before_fit(self):
        if self.state:
            self._restore(self.state)
        elif self.phase == 0:
            self._save(0)
        self.state = None

    def after_epoch(self):
        self._save(self.epoch + 1)

    def _save(self, epochs: int) -> None:
        if not is_main_process():
            return
        parts = {name: part.state_dict() for name in PARTS if (part := getattr(self.learn, name, None))}
        save_state(
            self.run_folder,
            {
                'identity': self.identity,
                'phase': self.phase,
                'epochs': epochs,
                'model': network(self.learn).state_dict(),
                'optimizer': _plain(self.opt.opt.state_dict()),
                'random': random_state(self.dls),
                **parts,
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        network(self.learn).load_state_dict(state['model'])
        self.opt.opt.load_state_dict(state['optimizer'])
        for name in PARTS:
            if part := getattr(self.learn, name, None):
                part.load_state_dict(state[name])
        set_random_state(self.dls, state['random'])


class StopOnSignal(Callback):
    """Let SIGINT and SIGTERM end the batch at hand and then training, by `Stopped`; the second one ends it at once."""

    order = 61
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = None

    def __enter__(self) -> StopOnSignal:
        with suppress(ValueError):  # only the main thread may listen
            self.before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ValueError, AttributeError):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = number
        signal.signal(number, self.before[number])

    def after_batch(self):
        if self.received:
            raise Stopped(self.received)


def save_state(run: Run, state: dict[str, Any]) -> None:
    """Write `state` to `state.pt`, whole or not at all; the one before it stays as `state.previous.pt`. Raises
    `OutputError`."""
    buffer = BytesIO()  # torch would tell of a full disk by a RuntimeError
    torch.save(state, buffer)
    with atomic(run / 'state.pt') as temporary:
        temporary.write_bytes(buffer.getbuffer())
        sync(temporary)  # before the old one moves
        with suppress(FileNotFoundError):
            os.replace(run / 'state.pt', run / PREVIOUS)


def load_state(run: Run) -> dict[str, Any] | None:
    """The newest whole state of `run`, on the CPU; loading runs no code. None where it was stopped before there was
    one. Raises `CXRError` where none can be read."""
    there = [run / name for name in ('state.pt', PREVIOUS) if (run / name).exists()]
    for i, path in enumerate(there):
        # Which exception a damaged file raises is up to pickle and zip.
        with suppress(Exception):
            state = torch.load(path, map_location='cpu', weights_only=True)
            if i and is_main_process():
                there[0].unlink()  # or the next save would move it over the good one
            return state
    if there:
        raise CXRError(f'{there[0]}: damaged, so there is nothing to resume: train again into another --out.')
    return None


def take_up(run: Run, recipe: Recipe, items: pd.DataFrame) -> dict[str, Any] | None:
    """The state that `run` goes on from, if there is one yet. Raises `UsageError` where `recipe`, `items` or the
    classes are not those of `run`."""
    state = load_state(run)
    if state is None and any((run / name).exists() for name in ('history.csv', 'model.safetensors', 'learner.pkl')):
        raise UsageError(f'{run.path} has been trained but has no state.pt to go on from: train into another --out.')
    known, now = state['identity'] if state else identify(run.recipe, run.items), identify(recipe, items)
    other = differences(Recipe.from_dict(known['recipe']), recipe)
    if known['classes'] != now['classes']:
        other.append(f'classes: {known["classes"]}, now {now["classes"]}')
    if known['items'] != now['items']:
        other.append(f'images: {_compare_items(run.items, items)}')
    if other:
        raise UsageError(
            f'{run.path} was trained otherwise ({"; ".join(other)}): resume it as it was, or train into another --out.'
        )
    return state


def identify(recipe: Recipe, items: pd.DataFrame) -> dict[str, Any]:
    """What has to be the same for a training to go on: the recipe, the SHA-256 of the items as CSV, the classes."""
    items = hashlib.sha256(csv_text(items).encode(errors='backslashreplace')).hexdigest()
    return {'recipe': asdict(recipe), 'items': items, 'classes': list(VOCAB)}


def _compare_items(known: pd.DataFrame, now: pd.DataFrame) -> str:
    gone, new = set(known.path) - set(now.path), set(now.path) - set(known.path)
    both, facts = known.merge(now, on='path', suffixes=('', '_now')), ['label', 'split', 'patient']
    changed = (both[facts].to_numpy() != both[[f'{name}_now' for name in facts]].to_numpy()).any(axis=1)
    return f'{len(gone)} gone, {len(new)} new, {int(changed.sum())} with another label, split or patient'


@contextmanager
def starting_at(learn: Learner, epoch: int) -> Iterator[None]:
    """Let fits within begin at `epoch`, counted from 0. (fastai's own `start_epoch` runs the events of the epochs that
    it skips.)"""

    def rest() -> None:
        for now in range(epoch, learn.n_epoch):
            learn.epoch = now
            learn._with_events(learn._do_epoch, 'epoch', CancelEpochException)

    learn._do_fit = rest
    try:
        yield
    finally:
        del learn._do_fit


def random_state(dls: DataLoaders) -> dict[str, Any]:
    """The state of every generator that training draws from: Python's, numpy's, torch's, those of the loaders."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': _of_python(random),
        'numpy': [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        'torch': torch.get_rng_state(),
        'loaders': [_of_python(dl.rng) for dl in dls.loaders],
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(dls: DataLoaders, state: dict[str, Any]) -> None:
    """Go back to the `state` that `random_state` gave."""
    _set_python(random, state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    for dl, known in zip(dls.loaders, state['loaders'], strict=True):
        _set_python(dl.rng, known)
    if state['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state['cuda'])


def _plain(value: Any) -> Any:
    """`value` with Python's numbers for numpy's, which schedules leave in an optimiser and a safe load refuses."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _of_python(generator: Any) -> list:
    version, keys, gauss = generator.getstate()
    return [version, torch.tensor(keys), gauss]


def _set_python(generator: Any, state: list) -> None:
    version, keys, gauss = state
    generator.setstate((version, tuple(keys.tolist()), gauss))

"""`PrepareAhead` prepares the next training batch while a GPU trains the network with the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fasttransform import Pipeline

from cxr_fastai.data.transforms import NormalizeImage, PerImageTransform

PREPARED_AHEAD = (IntToFloatTensor, NormalizeImage, PerImageTransform, ToTensor)
"""Transforms that do not draw from the generators that the training draws from."""


class PrepareAhead(Callback):
    """Prepare the next training batch in a second thread during the step with the current one.

    A batch depends only on a seed, which the main thread draws from torch's generator. The batches are therefore those
    of a training without a second thread, and a resumed training continues with the same ones. Loaders with other
    transforms than those of this package, which may draw random numbers, are left as they are.

    On a processor the main thread prepares each batch after the step, unless `overlap` is True: a step uses all cores,
    so that a second thread does not make it faster (`benchmarks/step_share.py`). The batches are the same.
    """

    order = 12  # after `GrowImages`, which sets the size of the next images, and fastai's `DistributedTrainer`

    def __init__(self, overlap: bool | None = None) -> None:
        self.overlap = overlap

    def before_train(self) -> None:
        if can_prepare_ahead(self.dl):
            overlap = self.dls.device.type != 'cpu' if self.overlap is None else self.overlap
            self.learn.dl = BatchesAhead(self.dl, overlap)

    def before_batch(self) -> None:
        if isinstance(self.dl, BatchesAhead):
            self.dl.prepare_next()


def can_prepare_ahead(loader: DataLoader) -> bool:
    """Return True if the batches of `loader` depend on no generator but the loader's own and that of its transforms."""
    loader = _inner_loader(loader)
    steps = [getattr(loader, name, None) for name in ('after_item', 'before_batch', 'after_batch')]
    return all(isinstance(step, Pipeline) and all(isinstance(f, PREPARED_AHEAD) for f in step.fs) for step in steps)


def _inner_loader(loader: Any) -> Any:
    """Return the loader with the transforms, which that of a process of several contains."""
    return getattr(loader, 'dl', loader)


class BatchesAhead:
    """The batches of `loader`, each prepared in a second thread from `prepare_next` on, or on demand without one.

    Other attributes are those of the loader.
    """

    def __init__(self, loader: DataLoader, overlap: bool) -> None:
        self.loader = loader
        self.overlap = overlap
        self.take_next: Callable[[], Any] | None = None
        self.transforms = [f for f in _inner_loader(loader).after_batch.fs if isinstance(f, PerImageTransform)]

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == 'loader':  # a copy does not have it yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        self.batches = iter(self.loader)
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(1, 'prepare-batches', torch.set_num_threads, (1,)) as self.thread:
            batch = self._prepare(_draw_seed())  # here, because worker processes belong to the main thread
            while batch is not None:
                self.seed = _draw_seed()
                self.take_next = None
                yield batch
                if self.take_next is None:  # a callback cancelled the step before
                    self.prepare_next()
                batch = self.take_next()  # type: ignore[misc]
                torch.set_num_threads(threads)  # which the second thread has changed for threads that start later

    def prepare_next(self) -> None:
        """Start to prepare the next batch in the second thread if there is one."""
        prepare = partial(self._prepare, self.seed)
        self.take_next = self.thread.submit(prepare).result if self.overlap else prepare

    def _prepare(self, seed: int) -> Any:
        """Return the next batch, with augmentations from `seed`; None at the end of the epoch."""
        generator = torch.Generator().manual_seed(seed)
        try:
            for transform in self.transforms:
                transform.generator = generator
            return next(self.batches, None)
        finally:
            for transform in self.transforms:
                transform.generator = None  # a learner with one could not be exported


def _draw_seed() -> int:
    return int(torch.randint(2**62, ()))

"""`PrepareAhead` prepares the next training batch while a GPU trains the network with the current one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, ColReader, IntToFloatTensor, ToTensor
from fasttransform import Pipeline

from cxr_fastai.data.matching import MatchDetails, MatchHistograms
from cxr_fastai.data.surroundings import ExchangeSurroundings, HideLungs
from cxr_fastai.data.transforms import AugmentImages, DegradeImages, NormalizeImage, OpenImage, PerImageTransform

PREPARED_AHEAD = (
    AugmentImages,
    Categorize,
    ColReader,
    DegradeImages,
    ExchangeSurroundings,
    HideLungs,
    IntToFloatTensor,
    MatchDetails,
    MatchHistograms,
    NormalizeImage,
    OpenImage,
    ToTensor,
)
"""Transforms that do not draw from the generators that the training draws from."""


class PrepareAhead(Callback):
    """Prepare the next training batch in a second thread during the step with the current one.

    A batch depends only on a seed, which the main thread draws from torch's generator. The batches are therefore those
    of a training without a second thread, and a resumed training continues with the same ones. Loaders with other
    transforms than `PREPARED_AHEAD`, which may draw random numbers, are left as they are.

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
    pipelines = [getattr(loader, name, None) for name in ('after_item', 'before_batch', 'after_batch')]
    pipelines += [part.tfms for part in getattr(loader.dataset, 'tls', [])]
    return all(
        # Not of classes derived from them, which may draw other random numbers.
        isinstance(pipeline, Pipeline) and all(type(step) in PREPARED_AHEAD for step in pipeline.fs)
        for pipeline in pipelines
    )


def _inner_loader(loader: Any) -> Any:
    """Return the loader with the transforms, which that of a process of several contains."""
    return vars(loader).get('dl', loader)


class BatchesAhead:
    """The batches of `loader`, each prepared in a second thread from `prepare_next` on, or on demand without one.

    Other attributes are those of the loader.
    """

    def __init__(self, loader: DataLoader, overlap: bool) -> None:
        self.loader = loader
        self.overlap = overlap
        self.iteration: _Iteration | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == 'loader':  # a copy does not have it yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        if self.iteration is not None:  # a callback looks at the batches during a step
            self.iteration.wait()
            yield from self.loader
            return
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(1, 'prepare-batches', torch.set_num_threads, (1,)) as thread:
            self.iteration = _Iteration(self.loader, thread if self.overlap else None)
            try:
                yield from self.iteration
            finally:
                self.iteration = None
                torch.set_num_threads(threads)  # which the second thread has changed for threads that start later

    def prepare_next(self) -> None:
        """Start to prepare the next batch in the second thread if there is one."""
        if self.iteration is not None:
            self.iteration.prepare_next()


class _Iteration:
    """The batches of one epoch of `loader`, prepared in `thread` if there is one."""

    def __init__(self, loader: DataLoader, thread: ThreadPoolExecutor | None) -> None:
        self.batches = iter(loader)
        self.thread = thread
        self.transforms = [f for f in _inner_loader(loader).after_batch.fs if isinstance(f, PerImageTransform)]
        self.next: Future[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        batch = self._prepare(_draw_seed())  # here, because worker processes belong to the main thread
        while batch is not None:
            self.seed = _draw_seed()
            yield batch
            if self.next is None:  # without a second thread, or after a step that a callback cancelled early
                batch = self._prepare(self.seed)
            else:
                batch = self.next.result()
                self.next = None

    def prepare_next(self) -> None:
        if self.thread is not None:
            self.next = self.thread.submit(self._prepare, self.seed)

    def wait(self) -> None:
        """Wait until no batch is being prepared."""
        if self.next is not None:
            wait([self.next])

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

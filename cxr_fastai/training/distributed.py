"""Training in several processes, started by `accelerate launch` or `torchrun`: joining them, and sharing batches.

The batch size of a recipe is that of all processes together, and the batches are those of a single process. fastai's
`Learner.distrib_ctx` wraps the network in torch's `DistributedDataParallel`. `data_parallel` adds what it does not do.

accelerate is imported only in runs of several processes, so that the package works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from fastai.learner import Learner

from cxr_fastai.core.environment import is_main_process, process_count
from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.distributed import broadcast, process_group
from cxr_fastai.training.checkpoint import random_state, set_random_state

T = TypeVar('T')


@contextmanager
def training_processes() -> Iterator[None]:
    """Join the processes that train together; without effect if there is only one. Raises as `process_group` does."""
    with process_group('training in several processes', cpu=not torch.cuda.is_available()):
        yield


def call_once(func: Callable[..., T], *args: Any) -> T:
    """Call `func(*args)` in the main process and return its result in all processes, which wait for it."""
    result: Any = func(*args) if is_main_process() else None
    return broadcast(result)


def check_batch_size(batch_size: int) -> None:
    """Raise `UsageError` if there are more processes than images in a batch."""
    processes = process_count()
    if batch_size < processes:
        raise UsageError(
            f'--batch-size {batch_size}: {processes} processes share a batch. '
            f'Choose {processes} or more, or start fewer processes.'
        )


@contextmanager
def share_batches(learn: Learner) -> Iterator[None]:
    """Make fits in the block process one part of each batch in each process; without effect if there is only one."""
    if process_count() < 2:
        yield
        return
    from cxr_fastai.training.data_parallel import BatchPartLoader, ShareBatches

    loaders = learn.dls.loaders
    generators = random_state(learn.dls)
    learn.dls.loaders = [BatchPartLoader(dl) for dl in loaders]
    set_random_state(learn.dls, generators)  # new loaders draw random numbers, which a single process does not
    callback = ShareBatches()
    learn.add_cb(callback)
    try:
        # The recipe sets the precision, not accelerate.
        with learn.distrib_ctx(sync_bn=False, cpu=not torch.cuda.is_available(), mixed_precision='no'):
            yield
    finally:
        learn.remove_cb(callback)
        for part in learn.dls.loaders:
            part.release_transforms()
        learn.dls.loaders = loaders

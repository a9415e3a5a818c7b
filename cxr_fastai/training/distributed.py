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
import torch.distributed as dist
from fastai.learner import Learner

from cxr_fastai.core.environment import is_main_process, process_count, require_package
from cxr_fastai.core.errors import UsageError
from cxr_fastai.training.checkpoint import random_state, set_random_state

T = TypeVar('T')


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that train together; without effect if there is only one.

    Accelerate chooses the device and the backend of each process. After an exception the group is not left in order:
    the process ends, and the launcher ends the others. Raises `UsageError` if accelerate is not installed.
    """
    if process_count() < 2:
        yield
        return
    require_package('accelerate', 'training in several processes', 'scale')
    from accelerate import Accelerator

    Accelerator(**_accelerator_options())
    yield
    dist.barrier()
    dist.destroy_process_group()


def _accelerator_options() -> dict[str, Any]:
    # The recipe sets the precision, not Accelerate.
    return {'cpu': not torch.cuda.is_available(), 'mixed_precision': 'no'}


def call_once(func: Callable[..., T], *args: Any) -> T:
    """Call `func(*args)` in the main process and return its result in all processes, which wait for it."""
    if process_count() < 2:
        return func(*args)
    results: list[Any] = [None]
    if is_main_process():
        results[0] = func(*args)
    dist.broadcast_object_list(results)
    dist.barrier()
    return results[0]


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
        with learn.distrib_ctx(sync_bn=False, **_accelerator_options()):
            yield
    finally:
        learn.remove_cb(callback)
        for part in learn.dls.loaders:
            part.release_transforms()
        learn.dls.loaders = loaders

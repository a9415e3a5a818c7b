"""Several processes train one network: each takes its part of every batch, and all know the figures of the whole.

`accelerate launch` or `torchrun` starts them. The recipe's batch is the batch of all together, in the order and with
the augmentation of one process; only what a network draws itself (dropout) and what it takes over a batch (BatchNorm,
whose statistics are those of a process's own images, MixUp, erasing) is each process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedTrainer
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib, to_detach
from torch import Tensor

from cxr_fastai.core.environment import is_main_process, part_of, require_package
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.data.transforms import ByImage
from cxr_fastai.training.checkpoint import random_state, set_random_state

T = TypeVar('T')


@contextmanager
def team() -> Iterator[None]:
    """Join the processes that train together, if there are several: Accelerate chooses device and backend for each.

    A process that fails leaves at once, and its launcher ends the others.
    """
    if num_distrib() < 2:
        yield
        return
    require_package('accelerate', 'training in several processes', 'scale')
    _accelerator_options(start=True)
    yield
    dist.barrier()
    dist.destroy_process_group()


def once(func: Callable[..., T], *args: Any) -> T:
    """What `func` of `args` returns, called in the process that leads and told to the others, which are then all
    there."""
    if num_distrib() < 2:
        return func(*args)
    told = [func(*args) if is_main_process() else None]
    dist.broadcast_object_list(told)
    dist.barrier()
    return told[0]


def check_batch(size: int) -> None:
    """Raise `UsageError` where a batch of `size` images has fewer than there are processes."""
    if size < num_distrib():
        raise UsageError(
            f'--batch-size {size}: {num_distrib()} processes share a batch: choose {num_distrib()} or '
            'more, or fewer processes.'
        )


@contextmanager
def shared(learn: Learner) -> Iterator[None]:
    """Let fits within take one process's part of each batch, if there are several."""
    if num_distrib() < 2:
        yield
        return
    loaders, drawn = learn.dls.loaders, random_state(learn.dls)
    learn.dls.loaders = [PartOfBatches.of(dl) for dl in loaders]
    set_random_state(learn.dls, drawn)  # making them has drawn numbers, which one process does not
    sharing = ShareBatches()
    learn.add_cb(sharing)
    try:
        yield
    finally:
        learn.remove_cb(sharing)
        learn.dls.loaders = loaders
        for step in _by_image(loaders[0]):
            step.parts = None


class PartOfBatches(TfmdDL):
    """One process's part of each batch of a loader. Every process draws the same order; a part without an image, of a
    last batch that is too small, borrows the batch's first, which then counts nothing."""

    @classmethod
    def of(cls, dl: TfmdDL) -> PartOfBatches:
        """The part of `dl` that this process takes."""
        own = part_of(dl.bs, rank_distrib(), num_distrib())
        made = dl.new(cls=cls, bs=own.stop - own.start)
        made.whole = dl.bs
        return made

    def get_idxs(self) -> list[int]:
        """The indices of this process's images, batch by batch; `sizes` are those of the whole batches."""
        idxs, parts, mine = list(super().get_idxs()), [], []
        for start in range(0, len(idxs), self.whole):
            batch = idxs[start : start + self.whole]
            own = part_of(len(batch), rank_distrib(), num_distrib())
            parts.append((len(batch), own if batch[own] else slice(0, 1)))
            mine += batch[parts[-1][1]]
        self.sizes = [size for size, _ in parts]
        for step in _by_image(self):
            step.parts = iter(parts)
        return mine

    def do_item(self, s: int) -> Any:
        """The image and label `s`. One that goes bad now would leave this process with other batches than the rest."""
        if (item := super().do_item(s)) is None:
            raise ImageError(
                'an image went bad in training, which several processes cannot skip: start again, and it is '
                'found before.'
            )
        return item

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """`b` detached; never gathered, since figures are those of the whole batch already."""
        return to_detach(b, cpu, gather=False)

    def __len__(self) -> int:
        return -(-self.n // self.whole)


class ShareBatches(DistributedTrainer):
    """fastai's way to train by Accelerate, with exact figures: a process counts as many images as it has, so that the
    step, and the loss in `learn.loss`, are those of the whole batch; and validation scores each image once.

    A signal that stops one process stops all after the same batch.
    """

    def __init__(self):
        super().__init__(sync_bn=False, **_accelerator_options())

    def _wrap_dl(self, dl: TfmdDL) -> TfmdDL:
        return dl

    def before_batch(self):
        self.images = self.dl.sizes[self.iter]
        if self.training:
            self._draw_apart()

    def after_pred(self):
        if self.training:
            return
        self.learn.pred = self._gather(self.pred)
        self.learn.yb = tuple(map(self._gather, self.yb))

    def after_loss(self):
        if not self.training:
            return
        weight = self._weight()
        sums = torch.stack([self.loss.detach() * weight, weight]).double()
        dist.all_reduce(sums)
        self.learn.loss = (sums[0] / sums[1]).to(self.loss.dtype)
        self.learn.loss_grad = self.loss_grad * (weight * num_distrib() / sums[1]).to(self.loss.dtype)

    def after_batch(self):
        if self.training:
            torch.set_rng_state(self.drawn)
        if stop := getattr(self.learn, 'stop_on_signal', None):
            number = torch.tensor(stop.received or 0, device=self.dls.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            stop.received = int(number) or None

    def _draw_apart(self):
        """Let the network draw other numbers here than in the other processes, and the loader the same again."""
        self.drawn = torch.get_rng_state()
        fork = torch.Generator()
        fork.set_state(self.drawn)
        torch.manual_seed(int(torch.randint(2**62, (), generator=fork)) + rank_distrib())

    def _count(self, rank: int) -> int:
        part = part_of(self.images, rank, num_distrib())
        return part.stop - part.start

    def _weight(self) -> Tensor:
        """What the mean over this process's images counts in that over the batch."""
        count = self._count(rank_distrib())
        by_class = getattr(getattr(self.loss_func, 'func', None), 'weight', None)
        if by_class is None:
            return torch.tensor(float(count), device=self.loss.device)
        return by_class[self.yb[0].as_subclass(Tensor)[:count]].sum()

    def _gather(self, mine: Tensor) -> Tensor:
        """The rows of all processes in the batch's order, each once."""
        counts = [self._count(rank) for rank in range(num_distrib())]
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: counts[rank_distrib()]] = mine[: counts[rank_distrib()]]
        rows = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(rows, padded.as_subclass(Tensor))
        return type(mine)(torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]))


def _accelerator_options(start: bool = False) -> dict[str, Any]:
    options = {'cpu': not torch.cuda.is_available(), 'mixed_precision': 'no'}  # the recipe has the precision
    if start:
        from accelerate import Accelerator

        Accelerator(**options)
    return options


def _by_image(dl: TfmdDL) -> list[ByImage]:
    return [step for step in dl.after_batch.fs if isinstance(step, ByImage)] if dl.split_idx == 0 else []

"""The parts of distributed training that differ from fastai's, so that it gives the results of a single process.

fastai's `DistributedDL` gives each process a share of the images of an epoch, repeats some of them to make the shares
equal, and averages the gradients of the processes with equal weights. Here each process takes its part of each batch,
in the order and with the augmentation of a single process; gradients and the training loss are weighted by the number
of images; and validation counts each image once.

These still differ from a single process: dropout, the batch statistics of BatchNorm, MixUp and random erasing, which
each process computes for its own part. Import this module only in runs of several processes: it needs accelerate.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL
from fastai.torch_core import num_distrib, rank_distrib, to_detach
from torch import Tensor

from cxr_fastai.core.environment import part_of
from cxr_fastai.core.errors import ImageError
from cxr_fastai.data.transforms import PerImageTransform


class BatchPartLoader(DistributedDL):
    """Load this process's part of each batch of the loader `dl`.

    All processes draw the same order of images. If the last batch has fewer images than there are processes, a process
    without an image loads the first image of the batch, which is then not counted. `batch_sizes` are the sizes of the
    whole batches of the current epoch.
    """

    def __init__(self, dl: TfmdDL) -> None:
        part = part_of(dl.bs, rank_distrib(), num_distrib())
        super().__init__(dl.new(cls=_LoaderWithoutSkips, bs=part.stop - part.start))
        self.whole_batch_size = dl.bs
        self.n = dl.n
        # `DistributedDL` does not take these from its loader.
        self.after_batch = self.dl.after_batch
        self.wif = self.dl.wif

    @property
    def rng(self) -> random.Random:
        """The random number generator of the order of the images."""
        return self.dl.rng

    def __len__(self) -> int:
        return math.ceil(self.n / self.whole_batch_size)

    def get_idxs(self) -> list[int]:
        """Return the indices of this process's images in an epoch, batch by batch."""
        order = list(self.dl.get_idxs())
        indices: list[int] = []
        parts: deque[tuple[int, slice]] = deque()
        for start in range(0, len(order), self.whole_batch_size):
            batch = order[start : start + self.whole_batch_size]
            part = part_of(len(batch), rank_distrib(), num_distrib())
            if not batch[part]:
                part = slice(0, 1)
            parts.append((len(batch), part))
            indices += batch[part]
        self.batch_sizes = [size for size, _ in parts]
        for transform in self._per_image_transforms():
            transform.parts = deque(parts)
        return indices

    def _per_image_transforms(self) -> list[PerImageTransform]:
        """Return the transforms that draw random numbers for each training image; none for validation."""
        if self.dl.split_idx != PerImageTransform.split_idx:
            return []
        return [transform for transform in self.dl.after_batch.fs if isinstance(transform, PerImageTransform)]

    def release_transforms(self) -> None:
        """Make the transforms augment whole batches again."""
        for transform in self._per_image_transforms():
            transform.parts = None

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach `b` without gathering it, because `ShareBatches` has already gathered the predictions."""
        return to_detach(b, cpu, gather=False)


class _LoaderWithoutSkips(TfmdDL):
    def do_item(self, s: int) -> Any:
        """Return the image and label `s`. A skipped image would leave this process with other batches than the rest."""
        item = super().do_item(s)
        if item is None:
            raise ImageError(
                'an image became unreadable during training, and several processes cannot skip it. '
                'Resume the run: unreadable images are excluded at the start.'
            )
        return item


class ShareBatches(Callback):
    """Weight each process by the number of its images, so that steps and metrics are those of the whole batch.

    `batch_images` is the size of the whole batch. A signal that stops one process stops all after the same batch.
    """

    order = 11  # with fastai's DistributedTrainer

    def before_batch(self) -> None:
        self.batch_images = self.dl.batch_sizes[self.iter]
        if self.training:
            self._fork_generator()

    def _fork_generator(self) -> None:
        """Seed the generator of the network's dropout differently in each process; `after_batch` restores it."""
        self.generator_state = torch.get_rng_state()
        fork = torch.Generator()
        fork.set_state(self.generator_state)
        seed = int(torch.randint(2**62, (), generator=fork))
        torch.manual_seed(seed + rank_distrib())

    def after_pred(self) -> None:
        if not self.training:
            self.learn.pred = self._gather(self.pred)
            self.learn.yb = tuple(self._gather(labels) for labels in self.yb)

    def _gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of the batch, each once."""
        counts = [self._count(rank) for rank in range(num_distrib())]
        count = counts[rank_distrib()]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[:count] = rows[:count]
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.as_subclass(Tensor))
        return type(rows)(torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)]))

    def _count(self, rank: int) -> int:
        part = part_of(self.batch_images, rank, num_distrib())
        return part.stop - part.start

    def after_loss(self) -> None:
        if not self.training:
            return
        weight = self._weight()
        sums = torch.stack([self.loss.detach() * weight, weight]).double()
        dist.all_reduce(sums)
        loss_sum, weight_sum = sums
        self.learn.loss = (loss_sum / weight_sum).to(self.loss.dtype)
        # DistributedDataParallel divides the sum of the gradients by the number of processes.
        self.learn.loss_grad = self.loss_grad * (weight * num_distrib() / weight_sum).to(self.loss.dtype)

    def _weight(self) -> Tensor:
        """Return the weight of this process's mean loss in that of the batch: its images or their class weights."""
        count = self._count(rank_distrib())
        class_weights = getattr(getattr(self.loss_func, 'func', None), 'weight', None)
        if class_weights is None:
            return torch.tensor(float(count), device=self.loss.device)
        labels = self.yb[0].as_subclass(Tensor)[:count]
        return class_weights[labels].sum()

    def after_batch(self) -> None:
        if self.training:
            torch.set_rng_state(self.generator_state)
        self._share_signal()

    def _share_signal(self) -> None:
        stop = getattr(self.learn, 'stop_on_signal', None)
        if stop is not None:
            number = torch.tensor(stop.received or 0, device=self.dls.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            stop.received = int(number) or None

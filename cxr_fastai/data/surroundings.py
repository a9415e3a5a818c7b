"""fastai transforms of training batches that keep a network from using what is around the lungs.

Both work before any augmentation, while the lungs are still where `images.anatomy.LUNGS` expects them.
"""

from __future__ import annotations

from typing import Any

import torch
from fastai.data.core import TfmdDL
from fastai.torch_core import TensorCategory, TensorImageBW
from fasttransform import ItemTransform
from torch import Tensor

from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.data.transforms import MixingTransform, list_labels
from cxr_fastai.images.anatomy import FEATHER, FILLS, LUNGS

MOVE = 0.04
"""Largest distance by which an edge of the box is moved at random, as a fraction of the side."""


class _Surroundings(MixingTransform, ItemTransform):
    """A transform of whole batches, images (n, 1, h, w) in [0, 1] and categories (n,), before augmentation.

    A batch without categories stays as it is.
    """

    order = 15

    def _draw_boxes(self, n: int) -> Tensor:
        """Draw the top, bottom, left and right edges of `n` boxes, (n, 4), as fractions of the side."""
        edges = torch.tensor([LUNGS.top, LUNGS.bottom, LUNGS.left, LUNGS.right])
        return edges + self._uniform(4 * n, MOVE).view(n, 4)


class ExchangeSurroundings(_Surroundings):
    """Give an image the surroundings of its neighbour in the batch, with the probability `p`.

    In these images, what is around the lungs says nothing about the label, which stays that of the lungs. A process
    with a single image exchanges nothing.
    """

    def encodes(self, batch: Any) -> Any:
        if not self.is_on or len(batch) < 2:
            return batch
        x, *labels = batch
        images = x.as_subclass(Tensor)
        drawn = self.per_image(images, self.draw)
        chosen = drawn['chosen']
        neighbours = self.neighbours(images)
        masks = soft_masks(drawn['box'][chosen], *images.shape[-2:])
        mixed = images.clone()
        mixed[chosen] = torch.lerp(images[neighbours[chosen]], images[chosen], masks)
        return TensorImageBW(mixed), *labels

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw which of `n` images are `chosen`, and the `box` of their lungs, (n, 4)."""
        return {'chosen': self._rand(n) < self.p, 'box': self._draw_boxes(n)}


class HideLungs(_Surroundings):
    """Hide the lungs of an image, with the probability `p`, and give it a random label.

    The label is pneumonia as often as among the training images, `share`, which `setups` measures if it is not given.
    The best that a network can answer then is this share: what is around the lungs must not decide, and the
    probabilities of whole images stay calibrated. In every batch, the number of hidden images with pneumonia is as near
    to its expectation as it can be, so that they disturb the training less.
    """

    def __init__(self, p: float, share: float | None = None) -> None:
        super().__init__(p)
        self.share = 1 / 2 if share is None else share
        self.is_measured = share is None

    def setups(self, dl: TfmdDL) -> None:
        """Measure `share` on the labels of `dl`, the loader of the training images."""
        labels = list_labels(dl.dataset) if self.is_measured else []
        if labels:
            self.share = labels.count(POSITIVE) / len(labels)

    def encodes(self, batch: Any) -> Any:
        if not self.is_on or len(batch) < 2:
            return batch
        x, labels, *rest = batch
        images = x.as_subclass(Tensor)
        drawn = self.per_image(images, self.draw)
        chosen = drawn['chosen']
        noise = torch.randn(1, *images.shape[1:], generator=self.generator).to(images.device)
        hidden = images.clone()
        if chosen.any():
            masks = soft_masks(drawn['box'][chosen], *images.shape[-2:])
            fills = make_fills(images[chosen], noise, drawn['fill'][chosen])
            hidden[chosen] = torch.lerp(images[chosen], fills, masks)
        labels = TensorCategory(torch.where(chosen, drawn['label'], labels.as_subclass(Tensor)))
        return TensorImageBW(hidden), labels, *rest

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw which of `n` images are `chosen`, the number of the `fill`, the `box`, and the `label`."""
        chosen = self._rand(n) < self.p
        return {
            'chosen': chosen,
            'fill': torch.randint(len(FILLS), (n,), generator=self.generator),
            'box': self._draw_boxes(n),
            'label': self._draw_labels(chosen.cumsum(0)),
        }

    def _draw_labels(self, numbers: Tensor) -> Tensor:
        """Draw the labels of the hidden images with these `numbers`, 1, 2, ..., by systematic sampling.

        Each is pneumonia with the probability `share`. Of m images, m * `share` are, rounded up or down.
        """
        is_positive = (numbers * self.share + self._rand(1)) % 1 < self.share
        return torch.where(is_positive, POSITIVE, 1 - POSITIVE)


def make_fills(images: Tensor, noise: Tensor, numbers: Tensor) -> Tensor:
    """Return what hides the lungs of `images` (n, 1, h, w): by `numbers` (n,) in the order of `FILLS`.

    `noise` (1, 1, h, w), with mean 0 and deviation 1, is scaled to the mean and the deviation of each image.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), keepdim=True)
    fills = torch.stack([torch.zeros_like(images), mean.expand_as(images), (mean + deviation * noise).clamp(0, 1)])
    return fills[numbers, torch.arange(len(images), device=images.device)]


def soft_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the share of each box (n, 4) in each pixel, (n, 1, height, width), which falls to 0 within `FEATHER`.

    The columns of `boxes` are the top, bottom, left and right edges, as fractions of the height and width.
    """
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    rows = torch.minimum(y - top, bottom - y)
    columns = torch.minimum(x - left, right - x)
    distance = torch.minimum(rows[:, :, None], columns[:, None, :])
    return (distance / FEATHER + 0.5).clamp(0, 1)[:, None]

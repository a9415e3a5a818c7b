"""fastai transforms of training batches that make images alike in tone and in detail, whatever their label.

Both work before any augmentation, on pairs of neighbours in the batch (see `MixingTransform`).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from fastai.torch_core import TensorImageBW
from torch import Tensor

from cxr_fastai.data.augment import blur
from cxr_fastai.data.transforms import MixingTransform

LEVELS = 256
"""Grey levels of a histogram."""
SIGMAS = torch.tensor([0.0, 1 / 512, 1 / 256, 1 / 128, 3 / 256, 1 / 64])
"""Standard deviations of the Gaussian filters between which `match_details` interpolates, as fractions of the side."""


class _MatchNeighbour(MixingTransform):
    """A transform that changes each image (1, h, w) in [0, 1] towards its neighbour, with the probability `p`.

    The last image of a batch with an odd number of images stays as it is.
    """

    order = 14  # before `ExchangeSurroundings`

    def encodes(self, x: TensorImageBW) -> TensorImageBW:
        if not self.is_on:
            return x
        images = x.as_subclass(Tensor)
        neighbours = self.neighbours(images)
        has_neighbour = neighbours != torch.arange(len(images), device=images.device)
        chosen = self.per_image(images, self.draw)['chosen'] & has_neighbour
        matched = images.clone()
        if chosen.any():
            matched[chosen] = self.match(images[chosen], images[neighbours[chosen]])
        return TensorImageBW(matched)

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw which of `n` images are `chosen`."""
        return {'chosen': self._rand(n) < self.p}

    @abstractmethod
    def match(self, images: Tensor, others: Tensor) -> Tensor:
        """Return `images` (n, 1, h, w) with a property of `others`."""


class MatchHistograms(_MatchNeighbour):
    """Give an image the histogram of grey levels of its neighbour, so that exposure and contrast hide no label."""

    def match(self, images: Tensor, others: Tensor) -> Tensor:
        return match_histograms(images, others)


class MatchDetails(_MatchNeighbour):
    """Blur an image that has more detail than its neighbour, until both have the same."""

    def match(self, images: Tensor, others: Tensor) -> Tensor:
        return match_details(images, others)


def match_histograms(images: Tensor, others: Tensor) -> Tensor:
    """Return `images` (n, 1, h, w) in [0, 1] with the histograms of `others`, by a monotonic curve for each image."""
    levels = _levels(images)
    own, wanted = _cumulative_histograms(levels), _cumulative_histograms(_levels(others))
    curves = torch.searchsorted(wanted, own).clamp_(max=LEVELS - 1)
    return curves.gather(1, levels.flatten(1)).view_as(images).to(images.dtype) / (LEVELS - 1)


def _levels(images: Tensor) -> Tensor:
    return (images * (LEVELS - 1)).round().long()


def _cumulative_histograms(levels: Tensor) -> Tensor:
    """Return the number of pixels of each image up to each grey level, (n, `LEVELS`)."""
    numbers = torch.arange(len(levels), device=levels.device).view(-1, 1, 1, 1) * LEVELS
    counts = torch.bincount((levels + numbers).flatten(), minlength=len(levels) * LEVELS)
    return counts.view(-1, LEVELS).cumsum(1)


def match_details(images: Tensor, others: Tensor) -> Tensor:
    """Return `images` (n, 1, h, w), blurred until their detail is that of `others`; those with less stay as they are.

    The detail is that of `details_of`. The standard deviation of the Gaussian filter is interpolated between `SIGMAS`.
    """
    sigmas = SIGMAS.to(images.device) * images.shape[-1]
    details = torch.stack([details_of(blur(images, sigma.expand(len(images)))) for sigma in sigmas], 1)  # decreasing
    wanted = details_of(others)[:, None].clamp(details[:, -1:], details[:, :1])
    steps = (details > wanted).sum(1, keepdim=True).clamp(1, len(sigmas) - 1)
    high, low = details.gather(1, steps - 1), details.gather(1, steps)
    share = (high - wanted) / (high - low).clamp(min=1e-9)
    return blur(images, torch.lerp(sigmas[steps - 1], sigmas[steps], share)[:, 0])


def details_of(images: Tensor) -> Tensor:
    """Return the detail of each of the `images` (n, 1, h, w): (n,).

    It is the mean difference between neighbouring pixels, in standard deviations of the image, so that it does not
    depend on the contrast.
    """
    across, down = images.diff(dim=-1).abs().mean((1, 2, 3)), images.diff(dim=-2).abs().mean((1, 2, 3))
    return (across + down) / 2 / images.std((1, 2, 3)).clamp(min=1e-6)

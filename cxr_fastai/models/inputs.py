"""Grey images to normalised network input, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# ImageNet's mean and standard deviation per channel, for pixels in [0, 1].
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def normalize(images: Tensor) -> Tensor:
    """Grey images in [0, 1], (n, 1, h, w), as the networks want them: ImageNet-normalised, (n, 3, h, w)."""
    return (images - MEAN.to(images.device)).div_(STD.to(images.device))  # broadcasting makes the three channels


def to_input(images: np.ndarray) -> Tensor:
    """Grey uint8 images (n, s, s) as the networks want them, (n, 3, s, s)."""
    whole = np.require(images, requirements=['C', 'W'])  # a copy where it is a view, or read-only
    return normalize(torch.from_numpy(whole)[:, None].float().div_(255.0))


def pool(maps: Tensor) -> Tensor:
    """The mean of each channel of what a body gives, (n, c, h, w), as (n, c); anything else flattened."""
    return maps.mean(dim=(2, 3)) if maps.ndim == 4 else maps.flatten(1)


def denormalize(images: Tensor) -> Tensor:
    """The inverse of `normalize`, with the three equal channels kept: (n, 3, h, w)."""
    return images * STD.to(images.device) + MEAN.to(images.device)

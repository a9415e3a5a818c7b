"""Conversion between grey images and the normalised input of the networks.

Every network expects float32 images (n, 3, h, w) that are normalised like those of its ImageNet weights: pixel values
in [0, 1], minus `MEAN`, divided by `STD`. A grey image has the same values in all three channels before normalisation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
"""Mean of the red, green and blue pixels of ImageNet, in [0, 1]; torchvision, timm and fastai use the same values."""
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
"""Standard deviation of the red, green and blue pixels of ImageNet, from the same sources."""


def normalize(images: Tensor) -> Tensor:
    """Convert grey images in [0, 1], (n, 1, h, w), to network input, (n, 3, h, w). Broadcasting adds the channels."""
    return (images - MEAN.to(images.device)).div_(STD.to(images.device))


def denormalize(images: Tensor) -> Tensor:
    """Invert `normalize`, and keep the three equal channels: (n, 3, h, w) in [0, 1]."""
    return images * STD.to(images.device) + MEAN.to(images.device)


def to_input(images: np.ndarray, device: torch.device | str = 'cpu') -> Tensor:
    """Convert grey uint8 images (n, h, w) to network input, (n, 3, h, w), on `device`, which receives the bytes."""
    writable = np.require(images, requirements=['C', 'W'])  # copies views and read-only arrays, which torch refuses
    pixels = torch.from_numpy(writable).to(device)
    return normalize(pixels[:, None].float().div_(255.0))


def pool(features: Tensor) -> Tensor:
    """Reduce the output of a body to one vector per image, which the input gate compares with training images.

    Feature maps (n, c, h, w) are averaged over their positions: (n, c). Other shapes are flattened.
    """
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.flatten(1)

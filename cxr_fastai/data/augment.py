"""Functions that augment batches of images, each image with parameters of its own: jitter, warp, blur, compression."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_fastai.core.hardware import available_cores
from cxr_fastai.images.corruptions import reencode


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, brighter_first: Tensor) -> Tensor:
    """Change brightness and contrast of images (n, 1, h, w) in [0, 1], each with its own parameters (n,).

    `brightness` multiplies an image and `contrast` multiplies the difference from its mean. `brighter_first` gives the
    order of the two. Values are clamped after each step, as in torchvision's ColorJitter.
    """
    no_change = torch.ones_like(brightness)
    brightness_before = torch.where(brighter_first, brightness, no_change).view(-1, 1, 1, 1)
    brightness_after = torch.where(brighter_first, no_change, brightness).view(-1, 1, 1, 1)
    contrast = contrast.view(-1, 1, 1, 1)
    images = (images * brightness_before).clamp_(0, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (contrast * images + (1 - contrast) * mean).clamp_(0, 1)
    return images.mul_(brightness_after).clamp_(0, 1)


def warp(
    images: Tensor,
    flip: Tensor,
    angle: Tensor,
    shift: Tensor,
    interpolation: str = 'nearest',
    scale: Tensor | None = None,
    side: int | None = None,
) -> Tensor:
    """Flip, rotate, shift and crop images (n, 1, h, w) with a single interpolation.

    Each image is mirrored if its `flip` (n,) is true, rotated counter-clockwise about its centre by `angle` (n,) in
    degrees and shifted by `shift` (n, 2) in pixels to the right and down. Of the result the central part with the
    proportions `scale` (n, 2) of width and height is kept (default: all). Returns images (n, 1, side, side), or
    (n, 1, h, w) without `side`; pixels outside of the input are black. `interpolation` is `nearest` or `bilinear`.
    """
    height, width = images.shape[-2:]
    out_height, out_width = side or height, side or width
    if scale is None:
        scale = images.new_ones(len(images), 2)
    # grid_sample measures in half sides. torch's affine_grid needs ten times as long to make the same grid.
    half_sides = images.new_tensor([2 / width, 2 / height]).view(2, 1, 1, 1)
    matrices = _inverse_affine(flip, angle, shift, scale) * half_sides
    x = _centred_positions(out_width, width, images.device)
    y = _centred_positions(out_height, height, images.device)
    grid = images.new_empty(len(images), out_height, out_width, 2)
    for axis in range(2):
        of_x, of_y, constant = matrices[:, axis].unbind(1)  # each (n, 1, 1)
        torch.add(of_x * x, of_y * y[:, None] + constant, out=grid[..., axis])
    return F.grid_sample(images, grid, mode=interpolation, padding_mode='zeros', align_corners=False)


def _centred_positions(n: int, length: int, device: torch.device) -> Tensor:
    """Return the centres of `n` pixels that cover `length` input pixels, in input pixels from the centre: (n,)."""
    return (torch.arange(n, device=device) - (n - 1) / 2) * (length / n)


def _inverse_affine(flip: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the input position of an output pixel p: mirror(rotate back(scale p - shift)), from the image centre.

    The result (n, 2, 3, 1, 1) has a row for x and one for y, with the factors of x and y and the constant.
    """
    radians = torch.deg2rad(angle)
    cos, sin = torch.cos(radians), torch.sin(radians)
    dx, dy = shift.unbind(1)
    sx, sy = scale.unbind(1)
    mirror = 1 - 2 * flip.to(shift.dtype)
    inverse = [
        mirror * cos * sx,
        -mirror * sin * sy,
        mirror * (dy * sin - dx * cos),
        sin * sx,
        cos * sy,
        -dx * sin - dy * cos,
    ]
    return torch.stack(inverse, dim=1).view(-1, 2, 3, 1, 1)


def coarsen(images: Tensor, factor: Tensor) -> Tensor:
    """Resize each image (n, 1, h, w) to `factor` (n,) of its sides, with antialiasing, and back again."""
    coarse = []
    for image, scale in zip(images, factor.tolist(), strict=True):
        small = F.interpolate(image[None], scale_factor=scale, mode='bilinear', antialias=True)
        coarse.append(F.interpolate(small, images.shape[-2:], mode='bilinear'))
    return torch.cat(coarse)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (n, 1, h, w) with a Gaussian of its own standard deviation `sigma` (n,) in pixels.

    The kernels are cut off at three times the largest standard deviation, and images are continued by reflection. A
    blur is a product with a matrix for the columns and one for the rows. This takes half as long as a convolution that
    has another kernel for each image.
    """
    sigma = sigma.to(images.device).clamp(min=1e-3)
    reach = max(1, math.ceil(3 * float(sigma.max())))
    kernel = torch.exp(-(torch.arange(reach + 1, device=images.device) ** 2) / (2 * sigma[:, None] ** 2))
    kernel = kernel / (2 * kernel.sum(dim=1, keepdim=True) - kernel[:, :1])
    height, width = images.shape[-2:]
    of_columns = _blur_matrices(kernel, height)
    of_rows = of_columns if width == height else _blur_matrices(kernel, width)
    return (of_columns @ images[:, 0] @ of_rows.mT)[:, None]


def _blur_matrices(kernel: Tensor, length: int) -> Tensor:
    """Return the matrices (n, length, length) that filter a column of pixels by `kernel` (n, reach + 1), the weights
    of the pixel itself and of those at the distances 1 to `reach`.
    """
    n, taps = kernel.shape
    kernel = F.pad(kernel, (0, 1))  # the last weight, 0, is that of all larger distances
    position = torch.arange(length, device=kernel.device)
    distance = (position[:, None] - position).abs().clamp_(max=taps)
    matrices = kernel.index_select(1, distance.flatten()).view(n, length, length)
    # Position -j, outside of the image, shows position j.
    inner, outer = position[: taps - 1, None], position[1:taps]
    reflected = kernel[:, (inner + outer).clamp_(max=taps)]
    matrices[:, : taps - 1, 1:taps] += reflected
    matrices[:, 1 - taps :, -taps:-1] += reflected.flip(1, 2)
    return matrices


def recompress(images: Tensor, quality: Tensor) -> Tensor:
    """Compress each image (n, 1, h, w) in [0, 1] as a JPEG of its `quality` (n,), and decode it again."""
    pixels = (images[:, 0] * 255).round().to('cpu', torch.uint8).numpy()
    with ThreadPoolExecutor(available_cores()) as threads:
        compressed = list(threads.map(reencode, pixels, quality.tolist()))
    return torch.from_numpy(np.stack(compressed))[:, None].to(images.device).float().div_(255)

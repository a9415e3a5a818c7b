"""What happens to a batch of training images alone, drawn anew for each image from torch's global generator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.load import SkipItemException
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.augment import RandomErasing
from fasttransform import DisplayedTransform, Transform
from torch import Tensor

from cxr_fastai.core.errors import CXRWarning, ImageError
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.images.cache import ImageCache
from cxr_fastai.images.corruptions import reencode
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.inputs import denormalize, normalize

STRIDE = 32
"""Images that start smaller have sides that are multiples of it, as the networks halve a side five times."""
BEST_JPEG = 95


class ByImage(DisplayedTransform):
    """A transform that draws something for each image. Where several processes share a batch, each draws for the whole
    of it and keeps its own `parts`, so that the images come out as in one process."""

    split_idx = 0
    parts: Iterator[tuple[int, slice]] | None = None  # for each batch to come the images in all, and which are here

    def per_image(self, images: Tensor, draw: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `draw` of a number of images gives for the `images` that are here, where they are."""
        whole, here = next(self.parts) if self.parts else (len(images), slice(None))
        return {name: value[here].to(images.device) for name, value in draw(whole).items()}


class AugmentImages(ByImage):
    """Flip, rotation, translation, brightness, contrast and random crops of images (n, 1, h, w) in [0, 1]; the
    parameters are `Recipe`'s.

    By default they are the specification's, as torchvision's RandomHorizontalFlip, RandomRotation, ColorJitter
    (brightness and contrast, in random order) and RandomAffine (translation in whole pixels), with flip, rotation and
    translation in one interpolation; like theirs, the nearest neighbour by default. (Bilinear smooths the training
    images and no others, and on the real data sharpness gives the label away.) The frame is filled with black after the
    change of brightness and contrast. Crops are torchvision's RandomResizedCrop, in the same interpolation.

    `share` of the side is what comes out; training may start with small images.
    """

    order = 20

    def __init__(
        self,
        flip: float = 0.5,
        degrees: float = 10.0,
        translate: float = 0.1,
        brightness: float = 0.2,
        contrast: float = 0.2,
        interpolation: str = 'nearest',
        crop: float = 1.0,
        crop_aspect: float = 1.0,
    ):
        super().__init__()
        self.flip, self.degrees, self.translate = flip, degrees, translate
        self.brightness, self.contrast, self.interpolation = brightness, contrast, interpolation
        self.crop, self.crop_aspect, self.share = crop, crop_aspect, 1.0

    def draw(self, n: int, h: int, w: int) -> dict[str, Tensor]:
        """Parameters for `n` images: `flip` and `brighter_first` bool, `angle` in degrees, `shift` (n, 2) in pixels
        right and down, `brightness` and `contrast` factors, `scale` (n, 2) the shares of width and height kept."""
        between = lambda reach: (2 * torch.rand(n) - 1) * reach
        shift = torch.stack([between(self.translate * w), between(self.translate * h)], dim=1).round()
        drawn = {
            'flip': torch.rand(n) < self.flip,
            'angle': between(self.degrees),
            'brightness': 1 + between(self.brightness),
            'contrast': 1 + between(self.contrast),
            'brighter_first': torch.rand(n) < 0.5,
        }
        if self.crop == self.crop_aspect == 1:
            return drawn | {'shift': shift, 'scale': torch.ones(n, 2)}
        area, aspect = self.crop + torch.rand(n) * (1 - self.crop), torch.exp(between(math.log(self.crop_aspect)))
        scale = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp_(max=1)
        aside = (2 * torch.rand(n, 2) - 1) * (1 - scale) / 2 * torch.tensor([w, h])
        return drawn | {'shift': shift + aside, 'scale': scale}

    def encodes(self, x: TensorImageBW):
        p = self.per_image(x, lambda n: self.draw(n, *x.shape[-2:]))
        images = jitter(x.as_subclass(Tensor), p['brightness'], p['contrast'], p['brighter_first'])
        return TensorImageBW(
            warp(images, p['flip'], p['angle'], p['shift'], self.interpolation, p['scale'], self.side(x.shape[-1]))
        )

    def side(self, whole: int) -> int:
        """The side of the images that come out, in pixels, where those that go in have the side `whole`."""
        return whole if self.share >= 1 else min(whole, max(2 * STRIDE, round(whole * self.share / STRIDE) * STRIDE))


class DegradeImages(ByImage):
    """Random resolution, low-pass and JPEG quality of images (n, 1, h, w) in [0, 1], so that none of them tells
    anything. The parameters, `Recipe`'s, are the greatest strengths; each image's is uniform from none to that."""

    order = 30

    def __init__(self, resolution: float = 1.0, blur: float = 0.0, jpeg: int = 0):
        super().__init__()
        self.resolution, self.blur, self.jpeg = resolution, blur, jpeg

    def encodes(self, x: TensorImageBW):
        images, p = x.as_subclass(Tensor), self.per_image(x, self.draw)
        if 'resolution' in p:
            images = coarsen(images, p['resolution'])
        if 'blur' in p:
            images = blur(images, p['blur'] * x.shape[-1])
        if 'jpeg' in p:
            images = recompress(images, p['jpeg'])
        return TensorImageBW(images)

    def draw(self, n: int) -> dict[str, Tensor]:
        """Strengths for `n` images, of those that are asked for: factors of the side, shares of the side, qualities."""
        drawn = {}
        if self.resolution < 1:
            drawn['resolution'] = self.resolution + torch.rand(n) * (1 - self.resolution)
        if self.blur:
            drawn['blur'] = torch.rand(n) * self.blur
        if self.jpeg:
            drawn['jpeg'] = torch.randint(self.jpeg, BEST_JPEG + 1, (n,))
        return drawn


def augmentations(recipe: Recipe) -> list[Transform]:
    """The batch transforms that `recipe` asks for, for training images alone."""
    wanted = [_of(AugmentImages, recipe)]
    if recipe.resolution < 1 or recipe.blur or recipe.jpeg:
        wanted.append(_of(DegradeImages, recipe))
    if recipe.erase:
        wanted.append(RandomErasing(p=recipe.erase))
    return wanted


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, brighter_first: Tensor) -> Tensor:
    """Multiply each image (n, 1, h, w) in [0, 1] by its `brightness` (n,), and spread it by its `contrast` (n,) about
    its mean, in the order that `brighter_first` (n,) says; clamped after each, as torchvision's ColorJitter does."""
    per_image = lambda factor: factor.view(-1, 1, 1, 1)
    one = torch.ones_like(brightness)
    images = (images * per_image(torch.where(brighter_first, brightness, one))).clamp_(0, 1)
    mean, contrast = images.mean(dim=(1, 2, 3), keepdim=True), per_image(contrast)
    images = (contrast * images + (1 - contrast) * mean).clamp_(0, 1)
    return images.mul_(per_image(torch.where(brighter_first, one, brightness))).clamp_(0, 1)


def warp(
    images: Tensor,
    flip: Tensor,
    angle: Tensor,
    shift: Tensor,
    interpolation: str = 'nearest',
    scale: Tensor | None = None,
    side: int | None = None,
) -> Tensor:
    """Mirror, rotate counter-clockwise about the centre by `angle` (n,) degrees, shift by (n, 2) pixels right and down,
    and keep the middle `scale` (n, 2) of width and height: images (n, 1, h, w) to (n, 1, side, side), in one
    `interpolation` (`nearest` or `bilinear`), with black outside. Without `scale` and `side` the frame is kept."""
    h, w = images.shape[-2:]
    rows = _sources(flip, angle, shift, images.new_ones(len(images), 2) if scale is None else scale)
    size = (side or h, side or w)
    # grid_sample counts in half sides. (torch's affine_grid takes ten times as long for the same grid.)
    rows = rows * images.new_tensor([2 / w, 2 / h]).view(2, 1, 1, 1)
    y, x = (
        (torch.arange(n, device=images.device) - (n - 1) / 2) * (old / n) for n, old in zip(size, (h, w), strict=True)
    )
    grid = images.new_empty(len(images), *size, 2)
    for i in range(2):
        right, down, start = rows[:, i].unbind(1)  # each (n, 1, 1)
        torch.add(right * x, down * y[:, None] + start, out=grid[..., i])
    return F.grid_sample(images, grid, mode=interpolation, padding_mode='zeros', align_corners=False)


def coarsen(images: Tensor, factor: Tensor) -> Tensor:
    """Each image (n, 1, h, w) down to `factor` (n,) of its sides and up again, with antialiasing."""
    down = lambda image, share: F.interpolate(image, scale_factor=share, mode='bilinear', antialias=True)
    up = lambda image: F.interpolate(image, images.shape[-2:], mode='bilinear')
    return torch.cat([up(down(image[None], share)) for image, share in zip(images, factor.tolist(), strict=True)])


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image (n, 1, h, w) through the Gaussian of its `sigma` (n,), in pixels, cut off at three of the greatest."""
    sigma = sigma.to(images.device).clamp(min=1e-3)
    reach = max(1, math.ceil(3 * float(sigma.max())))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=images.device) ** 2) / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).view(len(images), 1, 1, -1)
    planes = F.pad(images.transpose(0, 1), [reach] * 4, mode='reflect')  # (1, n, h, w): an image is a channel
    planes = F.conv2d(F.conv2d(planes, kernel, groups=len(images)), kernel.transpose(2, 3), groups=len(images))
    return planes.transpose(0, 1)


def recompress(images: Tensor, quality: Tensor) -> Tensor:
    """Each image (n, 1, h, w) in [0, 1] as a JPEG of its `quality` (n,) shows it."""
    grey = (images[:, 0] * 255).round().to('cpu', torch.uint8).numpy()
    again = np.stack([reencode(image, q) for image, q in zip(grey, quality.tolist(), strict=True)])
    return torch.from_numpy(again)[:, None].to(images.device).float().div_(255)


def _of(transform: type, recipe: Recipe) -> Transform:
    # Not the recipe itself: exported learners carry transforms, and a recipe may name a folder of its user.
    return transform(**{name: getattr(recipe, name) for name in list(signature(transform.__init__).parameters)[1:]})


def _sources(flip: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Where an output pixel p comes from, in pixels about the centre: mirror(rotate back(scale p - shift)); (n, 2, 3,
    1, 1), whose last three numbers are for x, y and 1."""
    turn = torch.deg2rad(angle)
    cos, sin, (dx, dy), (sx, sy) = torch.cos(turn), torch.sin(turn), shift.unbind(1), scale.unbind(1)
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


class OpenImage(Transform):
    """A path, or a grey uint8 array (h, w), to a grey uint8 tensor (1, size, size), as `source` loads or fits it. A
    image that cannot be read raises `ImageError`, or where they are to `skip`, leaves the batch with a warning."""

    def __init__(self, source: Preprocessing | ImageCache, skip: bool = False):
        super().__init__()
        self.source, self.skip, self.input_types = source, skip, (str, Path, np.ndarray)  # what `dls.test_dl` accepts

    def encodes(self, image: str | Path | np.ndarray):
        try:
            grey = (self.source.fit if isinstance(image, np.ndarray) else self.source.load)(image)
        except ImageError as error:
            if not self.skip:
                raise
            warnings.warn(f'{error}: skipped', CXRWarning, stacklevel=2)
            raise SkipItemException from error
        return TensorImageBW(torch.from_numpy(grey.copy())[None])


class NormalizeImage(DisplayedTransform):
    """Grey images (n, 1, h, w) in [0, 1] to ImageNet-normalised (n, 3, h, w); the last step before the network."""

    order = 99

    def encodes(self, x: TensorImageBW):
        return TensorImage(normalize(x.as_subclass(Tensor)))

    def decodes(self, x: TensorImage):
        return TensorImage(denormalize(x.as_subclass(Tensor)))

"""fastai transforms of the data pipeline: open an image, augment a training batch, normalise a batch.

The random transforms draw separately for each image: from torch's global generator, or from one of their own, so that a
batch can be prepared in one thread while a network trains in another.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import numpy as np
import torch
from fastai.data.load import DataLoader, SkipItemException
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorImage, TensorImageBW
from fasttransform import DisplayedTransform, Transform
from torch import Tensor

from cxr_fastai.core.errors import CXRWarning, ImageError
from cxr_fastai.data.augment import blur, coarsen, jitter, recompress, warp
from cxr_fastai.images.cache import ImageCache
from cxr_fastai.images.decode import file_path
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.inputs import MEAN, STD, denormalize, normalize

STRIDE = 32
"""Smaller training images have sides that are multiples of 32 pixels, because the networks halve a side five times."""
MAX_JPEG_QUALITY = 95
"""Quality of the weakest JPEG compression that `DegradeImages` applies."""


class OpenImage(Transform):
    """Convert an image to a grey uint8 tensor (1, size, size): a path, the bytes of a file, a PIL image or an array.

    `source` reads and resizes the image. Images in memory are those that `images.decode_image` accepts. A path and its
    image in memory give the same pixels, except for a large JPEG (see `Preprocessing.load`). An item of a dataset that
    this transform opened already is not changed.

    An image that cannot be used raises `ImageError`; with `skip` a file that cannot be used is left out of the batch,
    with a warning.
    """

    input_types = object
    """What `test_dl` and `predict` pass on to this transform: anything, so that it can say why it refuses an input.

    An attribute of the class, because a pickled learner contains the attributes of the transform.
    """

    def __init__(self, source: Preprocessing | ImageCache, skip: bool = False) -> None:
        super().__init__()
        self.source = source
        self.skip = skip

    def __call__(self, image: Any, **options: Any) -> TensorImageBW:
        """Open `image`. A tuple is refused too; fastai would open each of its parts."""
        if isinstance(image, tuple):
            return self.encodes(image)
        return super().__call__(image, **options)

    def encodes(self, image: Any) -> TensorImageBW:
        if self.is_opened(image):
            return image
        path = file_path(image)
        if path is None:
            return self.to_tensor(self.preprocessing.load(image))
        try:
            return self.to_tensor(self.source.load(path))
        except ImageError as error:
            if not self.skip:
                raise
            warnings.warn(f'{error}: skipped', CXRWarning, stacklevel=2)
            raise SkipItemException from error

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of every image, also of those in a cache."""
        if isinstance(self.source, ImageCache):
            return self.source.preprocessing
        return self.source

    def is_opened(self, image: Any) -> bool:
        """Return True if `image` is a result of this transform, such as an item of `dls.valid_ds`."""
        size = self.preprocessing.size
        return isinstance(image, TensorImageBW) and image.dtype == torch.uint8 and image.shape == (1, size, size)

    @staticmethod
    def to_tensor(pixels: np.ndarray) -> TensorImageBW:
        """Return grey uint8 pixels (size, size) as a tensor (1, size, size) of its own."""
        return TensorImageBW(torch.from_numpy(pixels.copy())[None])


class NormalizeImage(Normalize):
    """Convert grey images (n, 1, h, w) in [0, 1] to the ImageNet-normalised input (n, 3, h, w) of the networks.

    It is a `Normalize`, so that `vision_learner` does not add another one.
    """

    mean, std = MEAN, STD
    parameters = ()  # nothing to move to a device: `normalize` does it

    def __init__(self) -> None:
        pass  # the statistics belong to the class, so that model files do not contain them

    def encodes(self, x: TensorImageBW) -> TensorImage:
        return TensorImage(normalize(x.as_subclass(Tensor)))

    def decodes(self, x: TensorImage) -> TensorImage:
        return TensorImage(denormalize(x.as_subclass(Tensor)))


class PerImageTransform(DisplayedTransform):
    """A transform of training batches that draws random parameters for each image.

    It draws from `generator`, or from torch's global one if that is None.

    If several processes share a batch, `parts` holds, for each batch to come, the size of the whole batch and the slice
    of this process. Each process then draws for the whole batch, so the images are the same as with one process.
    """

    split_idx = 0
    generator: torch.Generator | None = None
    parts: deque[tuple[int, slice]] | None = None

    def per_image(self, images: Tensor, draw: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parameters that `draw` gives for the `images` of this process, on their device."""
        if self.parts is None:
            batch_size, part = len(images), slice(None)
        else:
            batch_size, part = self.parts.popleft()
        return {name: values[part].to(images.device) for name, values in draw(batch_size).items()}

    def _rand(self, *shape: int) -> Tensor:
        """Draw numbers between 0 and 1."""
        return torch.rand(*shape, generator=self.generator)

    def _uniform(self, n: int, limit: float) -> Tensor:
        """Draw `n` numbers between -`limit` and `limit`."""
        return (2 * self._rand(n) - 1) * limit


class MixingTransform(PerImageTransform):
    """A transform that changes an image, with the probability `p`, by another image of the batch or with its label.

    It is for training only: `without_mixing` turns it off where fastai augments images to predict them.
    """

    is_on = True

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @staticmethod
    def neighbours(images: Tensor) -> Tensor:
        """Return the number of the neighbour of each of the `images`, (n,): 1, 0, 3, 2, and so on.

        The last image of an odd number is its own neighbour. The order of training images is random, so a neighbour
        says nothing about the label. Processes that share a batch in parts of an even number of images make the same
        pairs as one process does.
        """
        return (torch.arange(len(images), device=images.device) ^ 1).clamp_(max=len(images) - 1)


def list_labels(dataset: Any) -> list[int]:
    """Return the index of the class of each image of a fastai `Datasets`, whose last pipeline makes the labels."""
    return [int(label) for label in dataset.tls[-1]]


@contextmanager
def without_mixing(loader: DataLoader) -> Iterator[None]:
    """Turn the transforms that mix images off in all loaders that share those of `loader`."""
    transforms = [transform for transform in loader.after_batch.fs if isinstance(transform, MixingTransform)]
    try:
        for transform in transforms:
            transform.is_on = False
        yield
    finally:
        for transform in transforms:
            transform.is_on = True


class AugmentImages(PerImageTransform):
    """Flip, rotate, translate and crop images (n, 1, h, w) in [0, 1] at random, and change brightness and contrast.

    The defaults are those of the specification, and equal torchvision's RandomHorizontalFlip, RandomRotation,
    ColorJitter (brightness and contrast, in random order) and RandomAffine (translation by whole pixels). Flip,
    rotation and translation need one interpolation, by default the nearest neighbour as in torchvision: bilinear
    interpolation smooths training images only, and in the real data sharpness is a shortcut to the label. Pixels
    outside of the image are black, whatever the brightness. Crops equal torchvision's RandomResizedCrop with the same
    interpolation.

    Parameters
    ----------
    flip : probability of a horizontal flip.
    degrees : largest rotation in either direction.
    translate : largest translation, as a proportion of the width and height.
    brightness, contrast : largest change of the factor 1 in either direction.
    interpolation : `nearest` or `bilinear`.
    crop : smallest area of a crop, as a proportion of the image; 1 does not crop.
    crop_aspect : largest change of the aspect ratio by a crop; 1 keeps it.
    gamma : grey levels are raised to exponents from 1 / (1 + gamma) to 1 + gamma, before brightness and contrast.

    The attribute `share`, from 0 to 1, makes the output images smaller, for training that starts with small images.
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
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.flip = flip
        self.degrees = degrees
        self.translate = translate
        self.brightness = brightness
        self.contrast = contrast
        self.interpolation = interpolation
        self.crop = crop
        self.crop_aspect = crop_aspect
        self.gamma = gamma
        self.share = 1.0

    def encodes(self, x: TensorImageBW) -> TensorImageBW:
        height, width = x.shape[-2:]
        p = self.per_image(x, lambda n: self.draw(n, height, width))
        images = x.as_subclass(Tensor)
        if 'gamma' in p:
            images = images ** p['gamma'].view(-1, 1, 1, 1)
        images = jitter(images, p['brightness'], p['contrast'], p['brighter_first'])
        side = self.output_side(width)
        return TensorImageBW(warp(images, p['flip'], p['angle'], p['shift'], self.interpolation, p['scale'], side))

    def draw(self, n: int, h: int, w: int) -> dict[str, Tensor]:
        """Draw the parameters of `n` images of `h` x `w` pixels.

        Returns `flip` and `brighter_first` (bool), `angle` in degrees, `shift` (n, 2) in pixels to the right and down,
        the factors `brightness` and `contrast`, and `scale` (n, 2), the proportions of width and height that a crop
        keeps.
        """
        right, down = self._uniform(n, self.translate * w), self._uniform(n, self.translate * h)
        shift = torch.stack([right, down], dim=1).round()
        parameters = {
            'flip': self._rand(n) < self.flip,
            'angle': self._uniform(n, self.degrees),
            'brightness': 1 + self._uniform(n, self.brightness),
            'contrast': 1 + self._uniform(n, self.contrast),
            'brighter_first': self._rand(n) < 0.5,
            'shift': shift,
            'scale': torch.ones(n, 2),
        }
        if self.gamma:
            parameters['gamma'] = torch.exp(self._uniform(n, math.log(1 + self.gamma)))
        if self.crop == self.crop_aspect == 1:
            return parameters
        area = self.crop + self._rand(n) * (1 - self.crop)
        aspect = torch.exp(self._uniform(n, math.log(self.crop_aspect)))
        scale = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp_(max=1)
        crop_shift = (2 * self._rand(n, 2) - 1) * (1 - scale) / 2 * torch.tensor([w, h])
        return parameters | {'shift': shift + crop_shift, 'scale': scale}

    def output_side(self, side: int) -> int:
        """Return the side in pixels of the output images, for input images of `side` pixels."""
        if self.share >= 1:
            return side
        return min(side, max(2 * STRIDE, round(side * self.share / STRIDE) * STRIDE))


class DegradeImages(PerImageTransform):
    """Reduce the resolution, sharpness and JPEG quality of images (n, 1, h, w) in [0, 1] at random.

    A network that sees every quality in both classes cannot use the quality as a shortcut to the label.

    Parameters
    ----------
    resolution : smallest proportion of the side that images are resized to; 1 keeps the resolution.
    blur : largest standard deviation of the Gaussian blur, as a proportion of the side; 0 does not blur.
    jpeg : lowest quality of the JPEG compression; 0 does not compress.
    """

    order = 30

    def __init__(self, resolution: float = 1.0, blur: float = 0.0, jpeg: int = 0) -> None:
        super().__init__()
        self.resolution = resolution
        self.blur = blur
        self.jpeg = jpeg

    def encodes(self, x: TensorImageBW) -> TensorImageBW:
        images = x.as_subclass(Tensor)
        p = self.per_image(x, self.draw)
        if 'resolution' in p:
            images = coarsen(images, p['resolution'])
        if 'blur' in p:
            images = blur(images, p['blur'] * x.shape[-1])
        if 'jpeg' in p:
            images = recompress(images, p['jpeg'])
        return TensorImageBW(images)

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw the parameters of `n` images for the degradations in use.

        Returns `resolution` and `blur` as proportions of the side, and `jpeg` as a quality.
        """
        parameters = {}
        if self.resolution < 1:
            parameters['resolution'] = self.resolution + self._rand(n) * (1 - self.resolution)
        if self.blur:
            parameters['blur'] = self._rand(n) * self.blur
        if self.jpeg:
            parameters['jpeg'] = torch.randint(self.jpeg, MAX_JPEG_QUALITY + 1, (n,), generator=self.generator)
        return parameters

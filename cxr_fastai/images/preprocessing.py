"""The preprocessing that training and prediction share: from a decoded image to the square that a network sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from cxr_fastai.core.errors import UsageError
from cxr_fastai.images.arrays import check_grey
from cxr_fastai.images.decode import ImageLike, open_image
from cxr_fastai.images.dicom_header import parse_modalities

BILINEAR = Image.Resampling.BILINEAR
"""Pillow's bilinear filter, which includes antialiasing when it reduces an image."""
MAX_LOW_PASS = 0.1


def _squish(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, BILINEAR)


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.pad(image, size, BILINEAR, color=0)


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, size, BILINEAR)


RESIZES: dict[str, Callable[[Image.Image, tuple[int, int]], Image.Image]] = {
    'squish': _squish,
    'pad': _pad,
    'crop': _crop,
}
"""Methods that make an image square: distort its aspect ratio, add black bars, or cut off the longer side."""


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of every image. Recipes and model files contain these fields.

    `size` is the side of the square in pixels, `resize` a key of `RESIZES`. `low_pass` is the standard deviation of a
    Gaussian filter, as a fraction of the side; 0 turns it off. `modality` has the codes of the DICOM modalities that
    are accepted besides CR, DX and DR, separated by commas. Raises `UsageError` for other values.
    """

    size: int = 224
    resize: str = 'squish'
    low_pass: float = 0.0
    modality: str = ''

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UsageError(f'--resize {self.resize}: choose {", ".join(RESIZES)}.')
        if not 0 <= self.low_pass <= MAX_LOW_PASS:
            raise UsageError(f'low_pass {self.low_pass}: a number from 0 to {MAX_LOW_PASS} is needed.')
        parse_modalities(self.modality)

    @classmethod
    def of(cls, source: Any) -> Preprocessing:
        """Return the preprocessing of a `Recipe` or a `ModelConfig`."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})

    def load(self, image: ImageLike) -> np.ndarray:
        """Read an image (see `open_image`) and return the network's view of it: grey uint8 (size, size).

        Raises `ImageError`. The file of a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides if both remain at least
        twice as long as needed, so that resampling still smooths the image. On 96 original images the result differs
        from a full decode, and thus from the same image in memory, by 0.20 grey levels on average (0.91 in the worst
        image), and vertical sharpness changes by -1% to +4%. With sides as long as needed, and not twice that, it would
        differ by 0.64 (2.46), and sharpness by -4% to +6%.
        """
        return self.fit(open_image(image, self).pixels)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return the network's view of a decoded image, grey uint8 (h, w): grey uint8 (size, size)."""
        return self.smooth(self.square(image))

    def square(self, image: np.ndarray) -> np.ndarray:
        """Resize `image`, grey uint8 (h, w), to (size, size), without the low-pass filter.

        Raises `ImageError` E_ARRAY for an array of another type or shape.
        """
        check_grey(image)
        if image.shape == (self.size, self.size):
            return image
        resize = RESIZES[self.resize]
        return np.asarray(resize(Image.fromarray(image), (self.size, self.size)))

    def smooth(self, square: np.ndarray) -> np.ndarray:
        """Apply the low-pass filter to `square`, grey uint8 (size, size)."""
        if self.low_pass == 0:
            return square
        blur = ImageFilter.GaussianBlur(self.low_pass * self.size)
        return np.asarray(Image.fromarray(square).filter(blur))

    def map_to_image(self, heat: np.ndarray, height: int, width: int) -> np.ndarray:
        """Resize a map of the network's view, (size, size), to the image it was made from: float32 (height, width).

        This is the inverse of `square`. The parts that `crop` cut off are 0.
        """
        view = Image.fromarray(heat.astype(np.float32))
        side = len(heat)
        if self.resize == 'pad':
            scale = side / max(width, height)
            left = (side - width * scale) / 2
            top = (side - height * scale) / 2
            return np.asarray(view.resize((width, height), BILINEAR, (left, top, side - left, side - top)))
        if self.resize == 'crop':
            shorter = min(width, height)
            whole = Image.new('F', (width, height))
            whole.paste(view.resize((shorter, shorter), BILINEAR), ((width - shorter) // 2, (height - shorter) // 2))
            return np.asarray(whole)
        return np.asarray(view.resize((width, height), BILINEAR))

    def decode_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the minimum width and height at which an image of `width` x `height` pixels may be decoded."""
        side = max(width, height) if self.resize == 'pad' else min(width, height)
        scale = 2 * self.size / side
        return math.ceil(width * scale), math.ceil(height * scale)

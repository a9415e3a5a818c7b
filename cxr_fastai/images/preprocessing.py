"""From a decoded image to the square that a network sees; training and prediction share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from cxr_fastai.core.errors import UsageError
from cxr_fastai.images.decode import open_image

BILINEAR = Image.Resampling.BILINEAR
RESIZES = {
    'squish': lambda image, size: image.resize(size, BILINEAR),
    'pad': lambda image, size: ImageOps.pad(image, size, BILINEAR, color=0),
    'crop': lambda image, size: ImageOps.fit(image, size, BILINEAR),
}
"""How an image becomes a square, always with antialiasing: its aspect lost, kept between black bars, or kept and cut."""


@dataclass(frozen=True)
class Preprocessing:
    """What every image goes through on its way to the network; recipe and model file carry its fields.

    `low_pass` is the standard deviation, as a share of the side, of a Gaussian that smooths every square; 0 leaves it
    alone. Raises `UsageError` for what cannot be.
    """

    size: int = 224
    resize: str = 'squish'
    low_pass: float = 0.0

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise UsageError(f'--resize {self.resize}: choose {", ".join(RESIZES)}.')
        if not 0 <= self.low_pass <= 0.1:
            raise UsageError(f'low_pass {self.low_pass}: a share from 0 to .1 is needed.')

    @classmethod
    def of(cls, source: Any) -> Preprocessing:
        """That of a `Recipe` or of a `ModelConfig`, which have the same fields."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})

    def load(self, path: str | Path) -> np.ndarray:
        """Read the image `path` and make it what the network sees: grey uint8 (size, size). Raises `ImageError`.

        A large JPEG is decoded at a half, a quarter or an eighth of its sides as long as both stay at least twice what
        is asked for, so that resampling still smooths it. On 96 original images that differs from a full decode by .20
        grey levels on average (.91 in the worst image) and changes vertical sharpness by -1 to +4 %; down to once
        what is asked for it would be .64 (2.46), and -4 to +6 %.
        """
        return self.fit(open_image(path, self).pixels)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """`image`, grey uint8 (h, w), as grey uint8 (size, size)."""
        return self.smooth(self.square(image))

    def square(self, image: np.ndarray) -> np.ndarray:
        """`image`, grey uint8 (h, w), as a sharp square (size, size)."""
        if image.shape == (self.size, self.size):
            return image
        return np.asarray(RESIZES[self.resize](Image.fromarray(image), (self.size, self.size)))

    def smooth(self, square: np.ndarray) -> np.ndarray:
        """`square`, grey uint8 (size, size), without the detail that the low-pass takes away."""
        if not self.low_pass:
            return square
        return np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur(self.low_pass * self.size)))

    def spread(self, heat: np.ndarray, height: int, width: int) -> np.ndarray:
        """A map (size, size) of what the network saw, laid over the image (height, width) it came from: the inverse of
        `square`. What was cut away by `crop` is 0."""
        whole, side = Image.fromarray(heat.astype(np.float32)), len(heat)
        if self.resize == 'pad':
            scale = side / max(width, height)
            left, top = (side - width * scale) / 2, (side - height * scale) / 2
            whole = whole.resize((width, height), BILINEAR, (left, top, side - left, side - top))
        elif self.resize == 'crop':
            least = min(width, height)
            whole, part = Image.new('F', (width, height)), whole.resize((least, least), BILINEAR)
            whole.paste(part, ((width - least) // 2, (height - least) // 2))
        else:
            whole = whole.resize((width, height), BILINEAR)
        return np.asarray(whole)

    def enough(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image of `width` x `height` may be decoded at."""
        scale = 2 * self.size / (max if self.resize == 'pad' else min)(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)

"""The input gate (out-of-distribution check): rejects images that are unlike the images of the training.

It measures three distances, because none is enough alone. The features of the network hardly change for a negative
image, and thumbnails as a whole hardly change for an image upside down.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.files import StrPath

OUT_OF_DISTRIBUTION = 'E_OUT_OF_DISTRIBUTION'
REJECTION = {
    'status': 'rejected',
    'code': OUT_OF_DISTRIBUTION,
    'message': 'unlike the chest X-ray images of the training, so a probability would be meaningless',
}
"""The fields of the row of an image that the gate rejects."""

MAX_IMAGES = 800
"""Largest number of training images, and of validation images, that a gate is fitted to."""
REJECTED_FRACTION = 0.02
"""Fraction of the validation images that a gate rejects."""
NEIGHBOUR = 5
"""The features are compared with the training image that is the fifth nearest."""
COMPONENTS = 64
"""Largest number of principal components of the thumbnails."""
THUMB = 16
"""Side of a thumbnail, in px."""
FLAT = 1.0
"""Smallest standard deviation, in grey levels, of an image that is not blank."""


@dataclass(frozen=True)
class Space:
    """The distribution of vectors: `mean` (d,), principal `axes` (d, k) with the standard deviations `spread` (k,).

    `rest` is the standard deviation of all other directions together, a scalar array.
    """

    mean: np.ndarray
    axes: np.ndarray
    spread: np.ndarray
    rest: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, components: int = COMPONENTS) -> Space:
        """Return the distribution of `vectors` (n, d), with at most `components` principal axes."""
        n = len(vectors)
        mean = vectors.mean(axis=0)
        _, singular_values, axes = np.linalg.svd(vectors - mean, full_matrices=False)
        k = min(components, len(singular_values) - 1, max(n // 4, 1))
        rest = np.sqrt((singular_values[k:] ** 2).sum() / n)
        return cls(
            mean=np.asarray(mean, np.float32),
            axes=np.asarray(axes[:k].T, np.float32),
            spread=np.asarray(singular_values[:k] / np.sqrt(n), np.float32),
            rest=np.asarray(rest, np.float32),
        )

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distance (n,) of `vectors` (n, d). All directions off the axes count as one."""
        offset = vectors - self.mean
        along = offset @ self.axes
        off_axes = np.maximum((offset**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        squared = ((along / np.maximum(self.spread, 1e-6)) ** 2).sum(axis=1)
        return np.asarray(np.sqrt(squared + off_axes / np.maximum(self.rest, 1e-6) ** 2))


@dataclass(frozen=True)
class Gate:
    """The gate of a network: what is known of the training images, and the `limits` (3,) of the three distances.

    `bank` (m, c) are the mean features of training images, normalised to length 1; `thumbs` is the distribution of
    their thumbnails.
    """

    bank: np.ndarray
    thumbs: Space
    limits: np.ndarray

    @classmethod
    def fit(
        cls,
        train: tuple[np.ndarray, np.ndarray],
        valid: tuple[np.ndarray, np.ndarray],
        max_bank: int = MAX_IMAGES,
    ) -> Gate:
        """Return a gate for `train` that rejects the fraction `REJECTED_FRACTION` of `valid`.

        Both are mean features (n, c) and images, grey uint8 (n, s, s). The bank has the features of at most `max_bank`
        images. Each distance rejects the same number of images.
        """
        features, images = train
        bank = np.asarray(unit(features[:max_bank]), np.float16)
        gate = cls(bank, Space.fit(thumbnails(images)), limits=np.ones(3, np.float32))
        limits = np.quantile(gate.distances(*valid), 1 - REJECTED_FRACTION / 3, axis=1)
        return replace(gate, limits=limits.astype(np.float32))

    def measure(self, features: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return for each image the largest ratio (n,) of a distance to its limit; above 1 the gate rejects the image.

        It is infinite for a blank image.
        """
        ratios = self.distances(features, images) / np.maximum(self.limits, 1e-9)[:, None]
        is_blank = images.std(axis=(1, 2)) < FLAT
        return np.where(is_blank, np.inf, ratios.max(axis=0))

    def distances(self, features: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return three distances (3, n) of images, grey uint8 (n, s, s), with the mean features (n, c):

        1. the cosine distance of the features to the `NEIGHBOUR`-th nearest of the bank (Sun et al. 2022)
        2. the Mahalanobis distance of the thumbnail
        3. the ratio of distance 2 to the same of the image upside down
        """
        similarities = np.sort(unit(features) @ self._bank_columns, axis=1)
        nearest = similarities[:, -min(NEIGHBOUR, len(self.bank))]
        upright = self.thumbs.distance(thumbnails(images))
        upside_down = self.thumbs.distance(thumbnails(images[:, ::-1]))
        return np.stack([1 - nearest, upright, upright / np.maximum(upside_down, 1e-9)])

    @cached_property
    def _bank_columns(self) -> np.ndarray:
        """The bank as float32 (c, m), converted once: that takes 3 ms for 400 images, as long as a small batch."""
        return self.bank.astype(np.float32).T

    def as_tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays of the gate by name."""
        thumbs = {f'thumbs.{name}': array for name, array in asdict(self.thumbs).items()}
        return {'bank': self.bank, 'limits': self.limits, **thumbs}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], source: StrPath) -> Gate:
        """Return the gate that `as_tensors` described. Raises `CXRError` if `tensors`, from `source`, are not one."""
        try:
            thumbs = Space(**{field.name: tensors[f'thumbs.{field.name}'] for field in fields(Space)})
            gate = cls(tensors['bank'], thumbs, tensors['limits'])
        except KeyError as error:
            raise CXRError(f'{source}: not an input gate ({error} is missing). Get the file again.') from None
        if not np.isfinite(gate.limits).all():
            raise CXRError(f'{source}: not an input gate (a limit is NaN or infinite). Get the file again.')
        return gate


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (n, d) normalised to length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Return images, uint8 (n, s, s), as vectors (n, THUMB * THUMB) of local means, each of mean 0 and deviation 1."""
    side = images.shape[-1]
    edges = np.linspace(0, side, THUMB + 1).astype(int)
    # Sums of integers are exact, and four times as fast as those of a copy in double precision.
    bands = [images[:, start:end].sum(axis=1, dtype=np.uint32) for start, end in pairwise(edges)]
    sums = np.add.reduceat(np.stack(bands, axis=1), edges[:-1], axis=2)
    means = sums / np.outer(np.diff(edges), np.diff(edges))
    vectors = means.reshape(len(images), -1)
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(vectors.std(axis=1, keepdims=True), 1))

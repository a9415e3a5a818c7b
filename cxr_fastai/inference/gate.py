"""Whether a picture looks like the images that a network was trained on: if not, its probability means nothing.

Three distances, since each alone lets something through: the network's features do not mind a negative, nor thumbnails,
all in all, an image upside down.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cxr_fastai.core.errors import CXRError

OUT_OF_DISTRIBUTION = 'E_OUT_OF_DISTRIBUTION'
OUTSIDE = {
    'status': 'rejected',
    'code': OUT_OF_DISTRIBUTION,
    'message': ('unlike the chest images that the network was trained on, so a probability would mean nothing'),
}
"""What a row says of a picture that is let through by no gate."""
IMAGES = 800
"""Images of training, and of validation, that are looked at."""
NEAR, COMPONENTS = 5, 64
"""Which neighbour counts; directions of thumbnails that are told apart."""
FLAT = 1.0
"""Grey levels of deviation below which there is nothing to see."""
REJECTED = 0.02
"""The share of validation images that a gate may turn away."""
THUMB = 16
"""Side of the small picture that is looked at beside the network's features."""


@dataclass(frozen=True)
class Space:
    """Where vectors of training images lie: around `mean` (d,), along `axes` (d, k) with the deviations `spread`
    (k,), and outside these with `rest`, the deviation of all other directions together."""

    mean: np.ndarray
    axes: np.ndarray
    spread: np.ndarray
    rest: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, components: int = COMPONENTS) -> Space:
        """The space of `vectors` (n, d)."""
        mean = vectors.mean(axis=0)
        _, deviations, axes = np.linalg.svd(vectors - mean, full_matrices=False)
        k = min(components, len(deviations) - 1, max(len(vectors) // 4, 1))
        others = np.sqrt((deviations[k:] ** 2).sum() / len(vectors))
        return cls(*(np.float32(part) for part in (mean, axes[:k].T, deviations[:k] / np.sqrt(len(vectors)), others)))

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """The Mahalanobis distance (n,) of `vectors` (n, d), with the directions outside `axes` taken as one more."""
        off = vectors - self.mean
        along = off @ self.axes
        outside = np.maximum((off**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        return np.sqrt(
            ((along / np.maximum(self.spread, 1e-6)) ** 2).sum(axis=1) + outside / np.maximum(self.rest, 1e-6) ** 2
        )


@dataclass(frozen=True)
class Gate:
    """A `bank` (m, c) of the network's mean features of training images, of length 1; the space of their thumbnails; and
    the `limits` (3,) of the distances from both."""

    bank: np.ndarray
    thumbs: Space
    limits: np.ndarray

    @classmethod
    def fit(cls, train: tuple[np.ndarray, np.ndarray], valid: tuple[np.ndarray, np.ndarray]) -> Gate:
        """A gate that knows the features (n, c) and images uint8 (n, s, s) of training, and turns away `REJECTED` of
        those of validation, as many by each distance."""
        gate = cls(np.float16(unit(train[0])), Space.fit(thumbnails(train[1])), np.ones(3, np.float32))
        limits = np.quantile(gate.distances(*valid), 1 - REJECTED / 3, axis=1)
        return replace(gate, limits=limits.astype(np.float32))

    def measure(self, features: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The greatest of the distances (n,) of each image, over its limit: above 1 it is no chest image."""
        over = self.distances(features, images) / np.maximum(self.limits, 1e-9)[:, None]
        return np.where(images.std(axis=(1, 2)) < FLAT, np.inf, over.max(axis=0))

    def distances(self, features: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Three distances (3, n) of each image: of its features to the `NEAR`-th nearest of the bank, by angle (Sun et
        al. 2022); of its thumbnail to those of training images; and that over the one when it is turned upside down."""
        alike = np.sort(unit(features) @ self.bank.astype(np.float32).T, axis=1)
        far, turned = (self.thumbs.distance(thumbnails(one)) for one in (images, images[:, ::-1]))
        return np.stack([1 - alike[:, -min(NEAR, len(self.bank))], far, far / np.maximum(turned, 1e-9)])

    def as_tensors(self) -> dict[str, np.ndarray]:
        """Plain arrays, by name."""
        space = {f'thumbs.{part}': array for part, array in asdict(self.thumbs).items()}
        return {'bank': self.bank, 'limits': self.limits, **space}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], source: Path) -> Gate:
        """The inverse of `as_tensors`. Raises `CXRError` for what is none."""
        try:
            thumbs = Space(*(tensors[f'thumbs.{part}'] for part in Space.__dataclass_fields__))
            found = cls(tensors['bank'], thumbs, tensors['limits'])
        except KeyError as error:
            raise CXRError(f'{source}: no gate ({error} is missing).') from None
        if not np.isfinite(found.limits).all():
            raise CXRError(f'{source}: no gate (its limits are no numbers).')
        return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, s, s) as vectors (n, 256): the means of 16 x 16 parts, each image at mean 0 and deviation 1."""
    side = images.shape[-1]
    edges = np.linspace(0, side, THUMB + 1).astype(int)
    small = np.add.reduceat(np.add.reduceat(images.astype(np.float64), edges[:-1], axis=1), edges[:-1], axis=2)
    small /= np.outer(np.diff(edges), np.diff(edges))
    flat = small.reshape(len(images), -1)
    return (flat - flat.mean(axis=1, keepdims=True)) / np.maximum(flat.std(axis=1, keepdims=True), 1)

"""What may befall an image on its way to the network and leave it readable for a radiologist: eight kinds by strength.

Validation images of one hospital share what gives the label away (sharpness, resolution, exposure, compression); what a
network is worth shows in how its AUC holds when these change. The form is that of Hendrycks and Dietterich (2019,
"Benchmarking Neural Network Robustness to Common Corruptions"), the kinds are those of radiography.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from cxr_fastai.images.preprocessing import BILINEAR

STRENGTHS = (1, 2, 3, 4, 5)
CLEAN, SHORTCUT = 'clean', 'shortcut'
"""The rows that are no corruption; their strength is 0."""


@dataclass(frozen=True)
class Corruption:
    """`apply(square, value, rng)` harms a grey uint8 (s, s) and returns another; `values` are the five strengths of
    `what`, from mild to strong, lengths as shares of the side."""

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    what: str
    values: tuple[float, float, float, float, float]


def corrupt(square: np.ndarray, kind: str, strength: int, path: str, seed: int = 0) -> np.ndarray:
    """The image `square`, grey uint8 (s, s), harmed by a `kind` of `CORRUPTIONS` at a `strength` from 1 to 5.

    What is drawn depends on `seed`, `path` (relative to the images' folder) and `kind` alone, on every machine; not on
    the strength, so that an image turns the same way at each and the strengths differ by nothing but strength.
    """
    corruption = CORRUPTIONS[kind]
    return corruption.apply(square, corruption.values[strength - 1], image_rng(seed, path, kind))


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """AUCs that stand for a robustness table: `clean`; `corrupted`, the mean over the kinds, each weighing the same;
    `shortcut`; and `loss`, what clean images have above those without shortcuts."""
    auc = table.groupby('corruption', sort=False).auc.mean()
    return {
        'clean': float(auc[CLEAN]),
        'corrupted': float(auc.drop([CLEAN, SHORTCUT]).mean()),
        'shortcut': float(auc[SHORTCUT]),
        'loss': float(auc[CLEAN] - auc[SHORTCUT]),
    }


def image_rng(seed: int, path: str, kind: str) -> np.random.Generator:
    """The random stream of an image and a kind of corruption."""
    digest = hashlib.sha256('\0'.join((str(seed), path, kind)).encode('utf-8', 'surrogateescape')).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], 'little'))


def crop_and_scale(square: np.ndarray, area: float, rng: np.random.Generator) -> np.ndarray:
    """Keep a square part of `area` (share of the image's) and enlarge it to the whole; it lies anywhere in the middle
    half of the room there is, as a collimator set too narrow still means the chest."""
    side = len(square)
    part = side * np.sqrt(area)
    left, top = (side - part) * rng.uniform(0.25, 0.75, 2)
    return np.asarray(Image.fromarray(square).resize((side, side), BILINEAR, (left, top, left + part, top + part)))


def blur(square: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth by a Gaussian of `sigma` (share of the side): an image that moved, or was scanned out of focus."""
    return smooth(square, sigma * len(square), sigma * len(square))


def noise(square: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of the standard `deviation` (grey levels), independent in each pixel: a low dose."""
    return _grey(square + deviation * rng.standard_normal(square.shape, np.float32))


def gamma(square: np.ndarray, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """255*(g/255)**e with e the `exponent` (darker) or its inverse (brighter), drawn: another exposure or screen."""
    return _grey(255 * (np.arange(256) / 255) ** (exponent if rng.random() < 0.5 else 1 / exponent))[square]


def contrast(square: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Shrink the distance of each pixel to the image's mean by `factor`: scatter, or a wide window."""
    mean = square.mean()
    return _grey(mean + factor * (np.arange(256) - mean))[square]


def reencode(square: np.ndarray, quality: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Through a JPEG file of `quality` (that of libjpeg) and back."""
    file = BytesIO()
    Image.fromarray(square).save(file, 'JPEG', quality=int(quality))
    return np.asarray(Image.open(file))


def rotate(square: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """Turn by `degrees`, to a side that is drawn, with black outside: a patient who leans, a cassette askew."""
    return np.asarray(Image.fromarray(square).rotate(degrees if rng.random() < 0.5 else -degrees, BILINEAR))


def blank_border(square: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Blacken a border as wide as `share` of the side: markers, text, arms and the edges of a collimator go."""
    edge = round(share * len(square))
    blanked = np.zeros_like(square)
    inner = slice(edge, len(square) - edge)
    blanked[inner, inner] = square[inner, inner]
    return blanked


def smooth(square: np.ndarray, vertical: float, horizontal: float) -> np.ndarray:
    """`square`, grey uint8 (h, w), through a Gaussian of standard deviations in pixels, as Pillow approximates it."""
    return np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur((horizontal, vertical))))


def _grey(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).clip(0, 255).astype(np.uint8)


CORRUPTIONS = {
    # Two fifths of the area still hold both lungs of an image that was taken with arms and abdomen.
    'crop and scale': Corruption(crop_and_scale, 'area kept', (0.9, 0.8, 0.65, 0.5, 0.4)),
    # On a chest 30 cm wide .03 is 9 mm: consolidations and the heart's border stay, fine markings go.
    'blur': Corruption(blur, 'sigma / side', (0.004, 0.008, 0.013, 0.02, 0.03)),
    # Lungs and mediastinum differ by about 100 levels, an opacity and its lung by 30; the eye averages over pixels.
    'noise': Corruption(noise, 'grey levels', (4, 8, 13, 20, 30)),
    # Reading rooms differ by as much between an uncalibrated screen and a light box.
    'gamma': Corruption(gamma, 'exponent or 1/exponent', (1.15, 1.3, 1.5, 1.75, 2)),
    # A third of the levels, some 80, are more than a reader tells apart at once.
    'contrast': Corruption(contrast, 'factor', (0.85, 0.7, 0.55, 0.4, 0.3)),
    # Blocks are seen from about 15 on, and yet opacities are larger than a block of 8 px.
    'JPEG quality': Corruption(reencode, 'quality', (60, 40, 25, 15, 8)),
    # Augmentation in training reaches 10 degrees; children are held at more.
    'rotation': Corruption(rotate, 'degrees', (3, 6, 10, 15, 20)),
    # A tenth of each side leaves 64 % of the image; lungs begin at about a tenth.
    'border': Corruption(blank_border, 'width / side', (0.02, 0.04, 0.06, 0.08, 0.1)),
}
"""Every kind, and the five strengths of each; the fifth is chosen so that an image can still be read."""

POOREST = 10
"""Percentile of the images that the others are reduced to."""
QUALITY = 75
"""JPEG quality of all images, that of most programs."""
TRIES = 12
CLOSE = 0.002
"""Relative error of sharpness at which the search ends."""
MOST_SIGMA, LONGEST_STEP = 0.06, 0.01
"""Of the search, as shares of the side."""
SLOPES = (-3, -0.15)
"""Steepest and flattest fall of log sharpness by pixel of sigma that the search believes."""


@dataclass(frozen=True)
class Equaliser:
    """Makes images alike in what should not tell their class: `Equaliser.of(squares, sides)`, then call it on each.

    An image goes to the common resolution (`side` px and up again; nothing where that is its side already), through a
    Gaussian of its own vertical and horizontal width, and through JPEG of one quality, so that in the end its vertical
    and horizontal sharpness (`traits.sharpness`) are those `wanted`. An image that is poorer already is not sharpened:
    where most of the poorest tenth are of one class, so much of the difference is left.

    That takes away what one number tells, not all that fine detail does: on real images several numbers together
    (steps and spectral bands of the equalised images) still tell the label, part of which is the disease.
    """

    wanted: tuple[float, float]
    side: int

    @classmethod
    def of(cls, squares: Iterable[np.ndarray], sides: Iterable[int]) -> Equaliser:
        """That of a split: `squares`, grey uint8 (s, s) each, and the shorter sides of their files in pixels.

        Sharpness is compared after resampling and JPEG, which is where images end; files larger than the squares lose
        no resolution, since they were read at the squares' side.
        """
        side = round(np.percentile(list(sides), POOREST))
        wanted = np.percentile([sharpness(_store(square, side)) for square in squares], POOREST, axis=0)
        return cls((float(wanted[0]), float(wanted[1])), side)

    def __call__(self, square: np.ndarray) -> np.ndarray:
        """`square`, grey uint8 (s, s), reduced; by the secant method in both directions at once."""
        return _search(square, np.array(self.wanted), self.side)


def _search(square: np.ndarray, wanted: np.ndarray, side: int) -> np.ndarray:
    """The best of `TRIES` images; sigma, log sharpness over that wanted and its slope are (vertical, horizontal)."""
    sigma, slope = np.zeros(2), np.full(2, -1.0)
    best, excess = _try(square, sigma, wanted, side)
    least = _error(sigma, excess)
    for _ in range(TRIES):
        if least < CLOSE:
            break
        step = np.clip(-excess / slope, -LONGEST_STEP * len(square), LONGEST_STEP * len(square))
        following = np.clip(sigma + step, 0, MOST_SIGMA * len(square))
        tried, found = _try(square, following, wanted, side)
        moved = np.abs(following - sigma) > 1e-3
        slope = np.where(moved, np.clip((found - excess) / np.where(moved, following - sigma, 1), *SLOPES), slope)
        sigma, excess = following, found
        if _error(sigma, excess) < least:
            best, least = tried, _error(sigma, excess)
    return best


def _try(square: np.ndarray, sigma: np.ndarray, wanted: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    stored = _store(smooth(square, *sigma) if sigma.any() else square, side)
    return stored, np.log(np.maximum(sharpness(stored), 1e-6) / np.maximum(wanted, 1e-6))


def _error(sigma: np.ndarray, excess: np.ndarray) -> float:
    """How far off the worse direction is; being too poor without any blur counts nothing."""
    return float(np.abs(np.where((sigma == 0) & (excess < 0), 0, excess)).max())


def _store(square: np.ndarray, side: int) -> np.ndarray:
    """`square` at the resolution `side`, back at its own, and through JPEG."""
    if side < len(square):
        small = Image.fromarray(square).resize((side, side), BILINEAR)
        square = np.asarray(small.resize(square.shape[::-1], BILINEAR))
    return reencode(square, QUALITY)


def sharpness(seen: np.ndarray) -> tuple[float, float]:
    """Vertical and horizontal mean step between neighbouring pixels of the image `seen` (h, w), in its grey levels."""
    seen = seen.astype(np.float32)  # bytes would wrap around
    return float(np.abs(np.diff(seen, axis=0)).mean()), float(np.abs(np.diff(seen, axis=1)).mean())

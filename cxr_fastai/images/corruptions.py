"""Corruptions of images at five strengths, and an equaliser of sharpness, to measure the robustness of a classifier.

Images of one hospital share properties that reveal the label (sharpness, resolution, exposure, compression). How much
of its AUC a classifier keeps when these change shows how far it relies on them. The design follows Hendrycks and
Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"; the kinds are those
of radiography. At every strength a radiologist can still read the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from cxr_fastai.images.preprocessing import BILINEAR

STRENGTHS = (1, 2, 3, 4, 5)
CLEAN = 'clean'
SHORTCUT = 'shortcut'
"""`CLEAN` and `SHORTCUT` are rows of a robustness table that are not a corruption; their strength is 0."""


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption. `apply(square, value, rng)` returns a corrupted copy of a grey uint8 image (s, s).

    `values` are the five strengths of `parameter`, from mild to strong; lengths are fractions of the side.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    parameter: str
    values: tuple[float, float, float, float, float]


def corrupt(square: np.ndarray, kind: str, strength: int, path: str, seed: int = 0) -> np.ndarray:
    """Corrupt an image, grey uint8 (s, s), by a `kind` of `CORRUPTIONS` at a `strength` from 1 to 5.

    Random values depend only on `seed`, `kind` and `path` (relative to the folder of the images), on every machine.
    They do not depend on the strength: an image rotates in the same direction at every strength.
    """
    corruption = CORRUPTIONS[kind]
    return corruption.apply(square, corruption.values[strength - 1], image_rng(seed, path, kind))


def image_rng(seed: int, path: str, kind: str) -> np.random.Generator:
    """Return the random generator of an image and a kind of corruption."""
    text = '\0'.join((str(seed), path, kind))
    digest = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], 'little'))


def crop_and_scale(square: np.ndarray, area: float, rng: np.random.Generator) -> np.ndarray:
    """Crop a square of `area` (fraction of the image's area) and enlarge it to the size of the image.

    Its centre varies over the middle half of the possible range, because even a collimator that is set too narrow is
    aimed at the chest.
    """
    side = len(square)
    part = side * np.sqrt(area)
    left, top = (side - part) * rng.uniform(0.25, 0.75, 2)
    return np.asarray(Image.fromarray(square).resize((side, side), BILINEAR, (left, top, left + part, top + part)))


def blur(square: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Apply a Gaussian filter of `sigma` (fraction of the side), as motion or a scan out of focus would."""
    return gaussian_blur(square, sigma * len(square), sigma * len(square))


def noise(square: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Add independent Gaussian noise of the standard `deviation` (grey levels), as a low dose would."""
    return _to_uint8(square + deviation * rng.standard_normal(square.shape, np.float32))


def gamma(square: np.ndarray, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Map grey level g to 255 * (g / 255) ** e, as another exposure or screen would.

    e is the `exponent` (darker) or its inverse (brighter), at random.
    """
    if rng.random() >= 0.5:
        exponent = 1 / exponent
    table = _to_uint8(255 * (np.arange(256) / 255) ** exponent)
    return table[square]


def contrast(square: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Multiply the distance of each pixel from the mean by `factor`, as scatter or a wide window would."""
    mean = square.mean()
    table = _to_uint8(mean + factor * (np.arange(256) - mean))
    return table[square]


def reencode(square: np.ndarray, quality: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Compress as JPEG of `quality` (1 to 95, libjpeg's scale) and decode again."""
    file = BytesIO()
    Image.fromarray(square).save(file, 'JPEG', quality=int(quality))
    return np.asarray(Image.open(file))


def rotate(square: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """Rotate by `degrees` in a random direction, with black outside, as for a leaning patient."""
    if rng.random() >= 0.5:
        degrees = -degrees
    return np.asarray(Image.fromarray(square).rotate(degrees, BILINEAR))


def blank_border(square: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """Blacken a border of `width` (fraction of the side), which hides markers, text, arms and collimator edges."""
    edge = round(width * len(square))
    blanked = np.zeros_like(square)
    inner = slice(edge, len(square) - edge)
    blanked[inner, inner] = square[inner, inner]
    return blanked


def gaussian_blur(square: np.ndarray, vertical: float, horizontal: float) -> np.ndarray:
    """Apply Pillow's approximation of a Gaussian filter; the standard deviations are in pixels."""
    return np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur((horizontal, vertical))))


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).clip(0, 255).astype(np.uint8)


CORRUPTIONS = {
    # 40% of the area still contains both lungs of an image that shows arms and abdomen.
    'crop and scale': Corruption(crop_and_scale, 'area kept', (0.9, 0.8, 0.65, 0.5, 0.4)),
    # On a chest of 30 cm, 0.03 is 9 mm: consolidations and the heart border remain, fine markings disappear.
    'blur': Corruption(blur, 'sigma / side', (0.004, 0.008, 0.013, 0.02, 0.03)),
    # Lungs and mediastinum differ by about 100 levels, an opacity and its lung by 30; the eye averages over pixels.
    'noise': Corruption(noise, 'grey levels', (4, 8, 13, 20, 30)),
    # An uncalibrated screen and a light box differ by as much.
    'gamma': Corruption(gamma, 'exponent or 1/exponent', (1.15, 1.3, 1.5, 1.75, 2)),
    # 30% of the levels, about 80, are more than a reader distinguishes at once.
    'contrast': Corruption(contrast, 'factor', (0.85, 0.7, 0.55, 0.4, 0.3)),
    # Blocks of 8 px become visible at a quality of about 15, but opacities are larger.
    'JPEG quality': Corruption(reencode, 'quality', (60, 40, 25, 15, 8)),
    # Augmentation rotates by up to 10 degrees; children are imaged at larger angles.
    'rotation': Corruption(rotate, 'degrees', (3, 6, 10, 15, 20)),
    # 10% on each side leaves 64% of the image; the lungs begin at about 10%.
    'border': Corruption(blank_border, 'width / side', (0.02, 0.04, 0.06, 0.08, 0.1)),
}
"""Name of each kind of corruption to its function and strengths."""

POOREST = 10
"""Percentile of sharpness and resolution that all images are reduced to."""
QUALITY = 75
"""JPEG quality of all equalised images; the default of most programs."""
MAX_TRIES = 12
"""Maximum number of steps of the search for the width of the filter."""
TOLERANCE = 0.002
"""Relative error of sharpness at which the search stops."""
MAX_SIGMA = 0.06
"""Maximum standard deviation of the filter, as a fraction of the side."""
MAX_STEP = 0.01
"""Maximum change of the standard deviation in a step of the search, as a fraction of the side."""
SLOPES = (-3, -0.15)
"""Range of the derivative of log sharpness with respect to sigma (1/px) that the search accepts."""


@dataclass(frozen=True)
class Equaliser:
    """Makes all images equally sharp, so that sharpness no longer reveals the label.

    `Equaliser.of(squares, sides)` fits it to a set of images; then call it on each image. An image is reduced to the
    common resolution (`side` in pixels, then enlarged again), filtered by a Gaussian of its own vertical and horizontal
    width, and compressed as JPEG of one quality. The widths are such that the vertical and horizontal `sharpness` of
    the result equal `target`. An image that is less sharp already is not sharpened, so a difference remains if most of
    the least sharp 10% belong to one class.

    This removes what one number reveals, not all fine detail: on real images, several numbers together still predict
    the label of equalised images, partly because of the disease.
    """

    target: tuple[float, float]
    side: int

    @classmethod
    def of(cls, squares: Iterable[np.ndarray], sides: Iterable[int]) -> Equaliser:
        """Fit an equaliser to the images of a split: `squares`, each grey uint8 (s, s), and the shorter sides of their
        files in pixels.

        Sharpness is measured after resampling and compression, as in the result. Files larger than the squares lose no
        resolution, because they were read at the size of the squares.
        """
        side = round(np.percentile(list(sides), POOREST))
        values = [sharpness(_resample_and_compress(square, side)) for square in squares]
        vertical, horizontal = np.percentile(values, POOREST, axis=0)
        return cls((float(vertical), float(horizontal)), side)

    def __call__(self, square: np.ndarray) -> np.ndarray:
        """Return the equalised copy of an image, grey uint8 (s, s)."""
        return _search_blur(square, np.array(self.target), self.side)


def _search_blur(square: np.ndarray, target: np.ndarray, side: int) -> np.ndarray:
    """Search the blur that gives the `target` sharpness, by the secant method in both directions at once.

    `sigma` (px), `excess` (log of sharpness over target) and `slope` (1/px) are arrays (vertical, horizontal).
    """
    sigma = np.zeros(2)
    slope = np.full(2, -1.0)
    best, excess = _blur_and_measure(square, sigma, target, side)
    smallest_error = _error(sigma, excess)
    for _ in range(MAX_TRIES):
        if smallest_error < TOLERANCE:
            break
        step = np.clip(-excess / slope, -MAX_STEP * len(square), MAX_STEP * len(square))
        new_sigma = np.clip(sigma + step, 0, MAX_SIGMA * len(square))
        image, new_excess = _blur_and_measure(square, new_sigma, target, side)
        moved = np.abs(new_sigma - sigma) > 1e-3
        distance = np.where(moved, new_sigma - sigma, 1)
        slope = np.where(moved, np.clip((new_excess - excess) / distance, *SLOPES), slope)
        sigma, excess = new_sigma, new_excess
        if _error(sigma, excess) < smallest_error:
            best = image
            smallest_error = _error(sigma, excess)
    return best


def _blur_and_measure(
    square: np.ndarray, sigma: np.ndarray, target: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    blurred = gaussian_blur(square, *sigma) if sigma.any() else square
    image = _resample_and_compress(blurred, side)
    return image, np.log(np.maximum(sharpness(image), 1e-6) / np.maximum(target, 1e-6))


def _error(sigma: np.ndarray, excess: np.ndarray) -> float:
    """Return the larger error of the two directions. Too little sharpness without any blur is not an error."""
    cannot_sharpen = (sigma == 0) & (excess < 0)
    return float(np.abs(np.where(cannot_sharpen, 0, excess)).max())


def _resample_and_compress(square: np.ndarray, side: int) -> np.ndarray:
    """Reduce `square` to the resolution `side`, enlarge it again and compress it as JPEG."""
    if side < len(square):
        small = Image.fromarray(square).resize((side, side), BILINEAR)
        square = np.asarray(small.resize(square.shape[::-1], BILINEAR))
    return reencode(square, QUALITY)


def sharpness(image: np.ndarray) -> tuple[float, float]:
    """Return the mean absolute difference between vertical and between horizontal neighbours of `image` (h, w)."""
    image = image.astype(np.float32)  # differences of uint8 would wrap around
    return float(np.abs(np.diff(image, axis=0)).mean()), float(np.abs(np.diff(image, axis=1)).mean())

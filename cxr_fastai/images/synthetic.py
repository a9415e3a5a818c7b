"""Synthetic frontal chest images with masks of their opacities, in the layout and naming of the real data set.

They are drawn from a rough model of the tissue that X-rays cross: an image is brighter where the tissue is thicker.
They serve first runs, tests and notebooks, and the masks are ground truth for explanations. They say nothing about
patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy.ndimage import affine_transform, gaussian_filter

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath, check_new, writing
from cxr_fastai.core.progress import progress
from cxr_fastai.images.formats import MASKS, png_mark

SHARES = {'train': 0.6, 'val': 0.2, 'test': 0.2}
"""Folder of the data set to its share of the images. The real `val` has 16 images, too few to measure anything."""
PNEUMONIA_SHARE = 0.6
KINDS = ('bacteria', 'virus')
MIN_IMAGES = 20
MIN_SIZE = 64
MASK_THRESHOLD = 0.12
"""Minimum added thickness of an opacity's pixel that belongs to its mask."""


@dataclass(frozen=True)
class Chest:
    """The anatomy of a patient, in units in which the image spans [-1, 1] from left to right and from top to bottom."""

    width: float
    apex: float
    base: float
    heart: float
    ribs: int
    slope: float
    bones: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Chest:
        """Return a random patient."""
        return cls(
            width=rng.uniform(0.88, 1.06),
            apex=rng.uniform(-0.78, -0.66),
            base=rng.uniform(0.44, 0.62),
            heart=rng.uniform(0.85, 1.15),
            ribs=int(rng.integers(8, 11)),
            slope=rng.uniform(0.25, 0.5),
            bones=rng.uniform(0.7, 1.2),
        )


def make_demo(folder: StrPath, images: int = 480, size: int = 256, seed: int = 0) -> pd.DataFrame:
    """Write synthetic images of `size` x `size` pixels below `folder`, and show the progress.

    Images are JPEG files in `train|val|test/NORMAL|PNEUMONIA`. The masks of the opacities of each pneumonia are PNG
    files of the same name below `masks/`. Returns a table with the columns `path`, `label` and `split` (the folder).
    Raises `UsageError` if the folder is not empty, or if `images` is too small to fill each split with both classes.
    """
    folder = Path(folder)
    if images < MIN_IMAGES or size < MIN_SIZE:
        raise UsageError(
            f'--images {images} --size {size}: at least {MIN_IMAGES} images of {MIN_SIZE} pixels are needed.'
        )
    check_new(folder)
    rows = []
    for path, label, chest, rng in progress(list(_plan(images, seed))):
        image, mask = draw_image(chest, label, size, rng)
        with writing(folder):
            _save(image, folder / path, quality=int(rng.integers(80, 96)))
            if label == 'PNEUMONIA':
                _save(mask.astype(np.uint8) * 255, (folder / 'masks' / path).with_suffix('.png'))
        rows.append((path.as_posix(), label, path.parts[0]))
    return pd.DataFrame(rows, columns=['path', 'label', 'split'])


def _plan(images: int, seed: int) -> Iterator[tuple[Path, str, Chest, np.random.Generator]]:
    """Yield path, label, patient and random generator of each image.

    A patient has one to three images, all in one split.
    """
    rng = np.random.default_rng(seed)
    patients = {'NORMAL': 100, 'bacteria': 0, 'virus': 0}
    for split, share in SHARES.items():
        total = round(images * share)
        pneumonias = round(total * PNEUMONIA_SHARE)
        for label, remaining in (('NORMAL', total - pneumonias), ('PNEUMONIA', pneumonias)):
            while remaining > 0:
                kind = 'NORMAL' if label == 'NORMAL' else str(rng.choice(KINDS))
                patients[kind] += 1
                chest = Chest.draw(rng)
                views = min(remaining, int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])))
                remaining -= views
                for view in range(views):
                    path = Path(split, label, _file_name(kind, patients[kind], view))
                    yield path, label, chest, np.random.default_rng(rng.integers(2**63))


def _file_name(kind: str, patient: int, view: int) -> str:
    if kind == 'NORMAL':
        return f'IM-{patient:04d}-{view + 1:04d}.jpeg'
    return f'person{patient}_{kind}_{10 * patient + view}.jpeg'


def _save(pixels: np.ndarray, path: Path, quality: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {'pnginfo': png_mark(MASKS)} if quality is None else {'quality': quality}
    Image.fromarray(pixels).save(path, **options)


def draw_image(chest: Chest, label: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image of the patient `chest`.

    Returns the image, grey uint8 (size, size), and the boolean mask (size, size) of its opacities, empty for NORMAL.
    """
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    lungs = _lungs(chest, x, y)
    opacity = _opacities(lungs, x, y, rng, size) if label == 'PNEUMONIA' else np.zeros_like(x)
    thickness = _tissue(chest, x, y, lungs, size, rng) + opacity
    thickness, opacity = _turn(np.stack([thickness, opacity]), rng)
    return _expose(thickness, size, rng), opacity > MASK_THRESHOLD


def _soft(distance: np.ndarray, edge: float) -> np.ndarray:
    """Return 1 for `distance` far below 0 and 0 far above, with a smooth transition of the width `edge`."""
    return 1 / (1 + np.exp(np.clip(distance / edge, -40, 40)))


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    """Return a Gaussian bell: 1 at `distance` 0."""
    return np.exp(-((distance / width) ** 2))


def _lungs(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the share of lung in each pixel, 0 to 1: two fields, narrow at the apex, cut by heart and diaphragm."""
    lungs = np.zeros_like(x)
    height = np.clip((y - chest.apex) / (chest.base - chest.apex), 0, 1.3)
    for side in (-1, 1):
        u = side * x / chest.width
        inner = 0.13 + 0.03 * height
        outer = 0.30 + 0.50 * np.sin(np.pi / 2 * np.clip(height, 0, 1) ** 0.7)
        dome = chest.base - 0.16 * _bump(u - 0.34, 0.30) + 0.05 * (side > 0) + 0.30 * np.clip(u - 0.45, 0, 1) ** 1.5
        apex = chest.apex + 1.2 * (u - 0.30) ** 2
        field = _soft(u - outer, 0.014) * _soft(inner - u, 0.014) * _soft(apex - y, 0.018) * _soft(y - dome, 0.012)
        lungs = np.maximum(lungs, field)
    return lungs * (1 - _heart(chest, x, y))


def _heart(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the share of heart and great vessels in each pixel, 0 to 1; the heart leans to the right of the image."""
    u = x - 0.13
    v = y - chest.base + 0.20
    across = u * 0.87 - v * 0.5
    along = v * 0.87 + u * 0.5
    heart = _soft((across / (0.29 * chest.heart)) ** 2 + (along / (0.40 * chest.heart)) ** 2 - 1, 0.16)
    arch = _soft(np.hypot((x - 0.09) / 0.12, (y - chest.apex - 0.36) / 0.11) - 1, 0.10)
    return np.maximum(heart, 0.7 * arch)


def _tissue(
    chest: Chest, x: np.ndarray, y: np.ndarray, lungs: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the thickness of healthy tissue: body, arms, lungs, heart, abdomen, bones, vessels."""
    flank = chest.width * (0.90 + 0.05 * np.cos(2.2 * (y - 0.2)))
    shoulder = -0.86 + 0.50 * np.clip(np.abs(x) - 0.22, 0, 1) ** 1.6
    body = np.maximum(_soft(np.abs(x) - flank, 0.02) * _soft(shoulder - y, 0.03), _soft(np.abs(x) - 0.21, 0.03))
    arm = _soft(np.abs(np.abs(x) - chest.width * 1.02 - 0.16 * y) - 0.12, 0.03) * _soft(-0.45 - y, 0.05)
    thickness = body * (0.58 - 0.16 * (x / chest.width) ** 2) + 0.30 * arm * (1 - 0.6 * body)
    thickness = thickness - 0.42 * lungs + 0.10 * body * _bump(x, 0.22)
    thickness += 0.17 * _heart(chest, x, y) + 0.17 * body * _soft(chest.base - 0.10 - y, 0.05) * (1 - lungs)
    return thickness + body * (_bones(chest, x, y) + _vessels(x, y, lungs, size, rng))


def _bones(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the thickness of bone.

    It consists of the spine with its discs, posterior ribs (descending outwards, with bright rims), fainter anterior
    ribs, and clavicles.
    """
    bones = 0.13 * _soft(np.abs(x) - 0.085, 0.014) * (0.72 + 0.28 * np.cos(2 * np.pi * y * 6.5))
    u = np.abs(x) / chest.width
    cage = _soft(u - 0.86, 0.02) * _soft(0.07 - np.abs(x), 0.02)
    step = (chest.base - chest.apex + 0.30) / chest.ribs
    for i in range(chest.ribs):
        top = chest.apex + 0.02 + i * step
        posterior = y - top - chest.slope * (0.30 * u + 0.95 * u**3) + 0.07 * _bump(u - 0.25, 0.2)
        anterior = y - top - 0.42 + chest.slope * (u - 0.85) * 1.3
        bones = bones + cage * (0.085 * _bump(posterior, 0.026) + 0.075 * _bump(np.abs(posterior) - 0.024, 0.009))
        bones = bones + 0.035 * cage * _soft(0.45 - u, 0.06) * _bump(anterior, 0.026)
    clavicle = y - chest.apex - 0.03 + 0.16 * u + 0.05 * np.sin(5 * u)
    return chest.bones * (bones + 0.15 * _bump(clavicle, 0.024) * _soft(0.09 - u, 0.03) * _soft(u - 0.80, 0.04))


def _vessels(x: np.ndarray, y: np.ndarray, lungs: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the thickness of lung vessels, which decreases from the hila to the chest wall."""
    noise = rng.standard_normal((3, size, size))
    fine, medium, coarse = (gaussian_filter(n, size * s) for n, s in zip(noise, (0.006, 0.013, 0.03), strict=True))
    ridges = sum(1 - np.clip(np.abs(n / n.std()) * 1.4, 0, 1) for n in (fine, medium))
    hila = _bump(np.hypot((np.abs(x) - 0.22) / 0.32, (y + 0.08) / 0.42), 1.0)
    return lungs * (0.045 * ridges * (0.3 + hila) + 0.09 * hila**2 + 0.012 * coarse / coarse.std())


def _opacities(lungs: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the thickness of one dense and up to three fainter opacities in the lungs, with soft and uneven edges."""
    inside = np.argwhere(lungs > 0.9)
    texture = gaussian_filter(rng.standard_normal((size, size)), size * 0.025)
    patches = np.zeros_like(lungs)
    for i in range(int(rng.integers(1, 5))):
        row, column = inside[rng.integers(len(inside))]
        is_main = i == 0
        across, down = rng.uniform(0.14, 0.26, 2) + 0.08 * is_main
        angle = rng.uniform(0, np.pi)
        right, below = x - x[row, column], y - y[row, column]
        u = right * np.cos(angle) + below * np.sin(angle)
        v = below * np.cos(angle) - right * np.sin(angle)
        distance = np.hypot(u / across, v / down) - 1 + 0.22 * texture / texture.std()
        density = rng.uniform(0.24, 0.36) + 0.10 * is_main
        patches = np.maximum(patches, density * _soft(distance, 0.16))
    return patches * lungs


def _turn(maps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate the maps (k, h, w) by a few degrees, scale and shift them, as patients vary in position."""
    h, w = maps.shape[1:]
    angle = np.deg2rad(rng.normal(0, 2.5))
    scale = rng.uniform(0.94, 1.06)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([h, w]) / 2
    offset = centre - matrix @ centre + rng.normal(0, 0.02, 2) * h
    return np.stack([affine_transform(m, matrix, offset, order=1, mode='nearest') for m in maps])


def _expose(thickness: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Convert thickness to grey levels, with random blur, noise, exposure, contrast and side marker."""
    image = gaussian_filter(thickness, size * rng.uniform(0.002, 0.004))
    image = np.clip((image + 0.02) / rng.uniform(0.85, 1.1), 0, 1) ** rng.uniform(0.8, 1.25)
    grain = gaussian_filter(rng.standard_normal(image.shape), 0.6)
    signal = image * rng.uniform(0.82, 0.98)
    noise = grain * rng.uniform(0.012, 0.03) * np.sqrt(0.1 + image)
    image = signal + noise + rng.uniform(0, 0.04)
    picture = Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255))
    if rng.random() < 0.7:
        at = (int(size * rng.uniform(0.04, 0.10)), int(size * rng.uniform(0.04, 0.12)))
        ImageDraw.Draw(picture).text(at, 'R', fill=int(rng.uniform(200, 255)), font_size=max(10, size // 16))
    return np.asarray(picture)

"""Synthetic frontal chest images with masks of their opacities, in the layout and naming of the real data set.

Drawn from a rough model of what X-rays cross: an image is brighter where more is in their way. They serve first runs,
tests and notebooks, and as ground truth for explanations; they teach nothing about patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy.ndimage import affine_transform, gaussian_filter

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import check_new, writing
from cxr_fastai.core.progress import progress

SHARES = {'train': 0.6, 'val': 0.2, 'test': 0.2}
"""Of the images, in the data set's names for its folders. The real val has 16 images, too few to show anything."""
PNEUMONIA_SHARE = 0.6
KINDS = ('bacteria', 'virus')


@dataclass(frozen=True)
class Chest:
    """One patient's anatomy, in units where the image spans [-1, 1] from left to right and from top to bottom."""

    width: float
    apex: float
    base: float
    heart: float
    ribs: int
    slope: float
    bones: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Chest:
        """A random patient."""
        return cls(
            width=rng.uniform(0.88, 1.06),
            apex=rng.uniform(-0.78, -0.66),
            base=rng.uniform(0.44, 0.62),
            heart=rng.uniform(0.85, 1.15),
            ribs=int(rng.integers(8, 11)),
            slope=rng.uniform(0.25, 0.5),
            bones=rng.uniform(0.7, 1.2),
        )


def make_demo(folder: Path, images: int = 480, size: int = 256, seed: int = 0) -> pd.DataFrame:
    """Write `images` images of `size` pixels a side below `folder`, as JPEG in `train|val|test/NORMAL|PNEUMONIA`, and for
    each pneumonia the mask of its opacities as PNG in `masks/`, under the same name.

    Returns the columns path, label, split (as folders); shows the progress. Raises
    `UsageError` where the folder has something in it or `images` is too small to fill each split with both classes.
    """
    if images < 20 or size < 64:
        raise UsageError(f'--images {images} --size {size}: at least 20 images of 64 px are needed.')
    check_new(folder)
    rows = []
    for path, label, chest, rng in progress(list(_plan(images, seed))):
        image, mask = draw_image(chest, label, size, rng)
        with writing(folder):
            _save(image, folder / path, quality=int(rng.integers(80, 96)))
            if label == 'PNEUMONIA':
                _save(np.uint8(mask) * 255, (folder / 'masks' / path).with_suffix('.png'))
        rows.append((path.as_posix(), label, path.parts[0]))
    return pd.DataFrame(rows, columns=['path', 'label', 'split'])


def draw_image(chest: Chest, label: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image of the patient `chest`: grey uint8 (size, size), and the boolean mask (size, size) of its opacities,
    which is empty for NORMAL."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    lungs = _lungs(chest, x, y)
    opacity = _opacities(lungs, x, y, rng, size) if label == 'PNEUMONIA' else np.zeros_like(x)
    thickness = _tissue(chest, x, y, lungs, size, rng) + opacity
    turned, opacity = _turn(np.stack([thickness, opacity]), rng)
    return _expose(turned, size, rng), opacity > 0.12


def _plan(images: int, seed: int) -> Iterator[tuple[Path, str, Chest, np.random.Generator]]:
    """Path, label, patient and random stream of each image; a patient has one to three, all in one split."""
    rng = np.random.default_rng(seed)
    serial = {'NORMAL': 100, 'bacteria': 0, 'virus': 0}
    for split, share in SHARES.items():
        total = round(images * share)
        sick = round(total * PNEUMONIA_SHARE)
        for label, wanted in (('NORMAL', total - sick), ('PNEUMONIA', sick)):
            while wanted > 0:
                kind = 'NORMAL' if label == 'NORMAL' else str(rng.choice(KINDS))
                serial[kind] += 1
                chest, views = Chest.draw(rng), min(wanted, int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])))
                wanted -= views
                for view in range(views):
                    path = Path(split, label, _name(kind, serial[kind], view))
                    yield path, label, chest, np.random.default_rng(rng.integers(2**63))


def _name(kind: str, patient: int, view: int) -> str:
    if kind == 'NORMAL':
        return f'IM-{patient:04d}-{view + 1:04d}.jpeg'
    return f'person{patient}_{kind}_{10 * patient + view}.jpeg'


def _soft(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 where `distance` is well below 0, 0 where well above, with a soft `edge` between."""
    return 1 / (1 + np.exp(np.clip(distance / edge, -40, 40)))


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-((distance / width) ** 2))


def _lungs(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel is lung, 0 to 1: two fields, narrow at the apex, cut by heart and diaphragm."""
    lungs = np.zeros_like(x)
    height = np.clip((y - chest.apex) / (chest.base - chest.apex), 0, 1.3)
    for side in (-1, 1):
        u = side * x / chest.width
        inner, outer = 0.13 + 0.03 * height, 0.30 + 0.50 * np.sin(np.pi / 2 * np.clip(height, 0, 1) ** 0.7)
        dome = chest.base - 0.16 * _bump(u - 0.34, 0.30) + 0.05 * (side > 0) + 0.30 * np.clip(u - 0.45, 0, 1) ** 1.5
        apex = chest.apex + 1.2 * (u - 0.30) ** 2
        field = _soft(u - outer, 0.014) * _soft(inner - u, 0.014) * _soft(apex - y, 0.018) * _soft(y - dome, 0.012)
        lungs = np.maximum(lungs, field)
    return lungs * (1 - _heart(chest, x, y))


def _heart(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel the heart and the great vessels cover, 0 to 1: leaning to the image's right."""
    u, v = x - 0.13, y - chest.base + 0.20
    turned, along = u * 0.87 - v * 0.5, v * 0.87 + u * 0.5
    heart = _soft((turned / (0.29 * chest.heart)) ** 2 + (along / (0.40 * chest.heart)) ** 2 - 1, 0.16)
    arch = _soft(np.hypot((x - 0.09) / 0.12, (y - chest.apex - 0.36) / 0.11) - 1, 0.10)
    return np.maximum(heart, 0.7 * arch)


def _tissue(
    chest: Chest, x: np.ndarray, y: np.ndarray, lungs: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """What the beam crosses without disease: body, arms, lungs, heart, belly, bones, vessels."""
    flank = chest.width * (0.90 + 0.05 * np.cos(2.2 * (y - 0.2)))
    shoulder = -0.86 + 0.50 * np.clip(np.abs(x) - 0.22, 0, 1) ** 1.6
    body = np.maximum(_soft(np.abs(x) - flank, 0.02) * _soft(shoulder - y, 0.03), _soft(np.abs(x) - 0.21, 0.03))
    arm = _soft(np.abs(np.abs(x) - chest.width * 1.02 - 0.16 * y) - 0.12, 0.03) * _soft(-0.45 - y, 0.05)
    thickness = body * (0.58 - 0.16 * (x / chest.width) ** 2) + 0.30 * arm * (1 - 0.6 * body)
    thickness = thickness - 0.42 * lungs + 0.10 * body * _bump(x, 0.22)
    thickness += 0.17 * _heart(chest, x, y) + 0.17 * body * _soft(chest.base - 0.10 - y, 0.05) * (1 - lungs)
    return thickness + body * (_bones(chest, x, y) + _vessels(x, y, lungs, size, rng))


def _bones(chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spine with its discs, ribs behind (falling outwards, bright-rimmed) and in front (fainter), collar bones."""
    bones = 0.13 * _soft(np.abs(x) - 0.085, 0.014) * (0.72 + 0.28 * np.cos(2 * np.pi * y * 6.5))
    u, cage = np.abs(x) / chest.width, _soft(np.abs(x) / chest.width - 0.86, 0.02) * _soft(0.07 - np.abs(x), 0.02)
    step = (chest.base - chest.apex + 0.30) / chest.ribs
    for i in range(chest.ribs):
        top = chest.apex + 0.02 + i * step
        behind = y - top - chest.slope * (0.30 * u + 0.95 * u**3) + 0.07 * _bump(u - 0.25, 0.2)
        before = y - top - 0.42 + chest.slope * (u - 0.85) * 1.3
        bones = bones + cage * (0.085 * _bump(behind, 0.026) + 0.075 * _bump(np.abs(behind) - 0.024, 0.009))
        bones = bones + 0.035 * cage * _soft(0.45 - u, 0.06) * _bump(before, 0.026)
    collar = y - chest.apex - 0.03 + 0.16 * u + 0.05 * np.sin(5 * u)
    return chest.bones * (bones + 0.15 * _bump(collar, 0.024) * _soft(0.09 - u, 0.03) * _soft(u - 0.80, 0.04))


def _vessels(x: np.ndarray, y: np.ndarray, lungs: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Markings that branch out of the hila and thin out towards the chest wall."""
    noise = rng.standard_normal((3, size, size))
    fine, medium, coarse = (gaussian_filter(n, size * s) for n, s in zip(noise, (0.006, 0.013, 0.03), strict=True))
    ridges = sum(1 - np.clip(np.abs(n / n.std()) * 1.4, 0, 1) for n in (fine, medium))
    hila = _bump(np.hypot((np.abs(x) - 0.22) / 0.32, (y + 0.08) / 0.42), 1.0)
    return lungs * (0.045 * ridges * (0.3 + hila) + 0.09 * hila**2 + 0.012 * coarse / coarse.std())


def _opacities(lungs: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A plain patch, and up to three fainter ones, soft-edged and uneven, inside the lungs."""
    inside = np.argwhere(lungs > 0.9)
    texture = gaussian_filter(rng.standard_normal((size, size)), size * 0.025)
    patches = np.zeros_like(lungs)
    for i in range(int(rng.integers(1, 5))):
        row, column = inside[rng.integers(len(inside))]
        (across, down), turn = rng.uniform(0.14, 0.26, 2) + 0.08 * (i == 0), rng.uniform(0, np.pi)
        right, below = x - x[row, column], y - y[row, column]
        u, v = right * np.cos(turn) + below * np.sin(turn), below * np.cos(turn) - right * np.sin(turn)
        distance = np.hypot(u / across, v / down) - 1 + 0.22 * texture / texture.std()
        patches = np.maximum(patches, (rng.uniform(0.24, 0.36) + 0.10 * (i == 0)) * _soft(distance, 0.16))
    return patches * lungs


def _turn(maps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The maps (k, h, w) as the patient stood: turned by a few degrees, scaled, off the centre."""
    h, w = maps.shape[1:]
    angle, scale = np.deg2rad(rng.normal(0, 2.5)), rng.uniform(0.94, 1.06)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([h, w]) / 2
    offset = centre - matrix @ centre + rng.normal(0, 0.02, 2) * h
    return np.stack([affine_transform(m, matrix, offset, order=1, mode='nearest') for m in maps])


def _expose(thickness: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Thickness to grey levels: blur, noise, exposure and contrast that vary from image to image, and a side marker."""
    image = gaussian_filter(thickness, size * rng.uniform(0.002, 0.004))
    image = np.clip((image + 0.02) / rng.uniform(0.85, 1.1), 0, 1) ** rng.uniform(0.8, 1.25)
    grain = gaussian_filter(rng.standard_normal(image.shape), 0.6)
    image = (
        image * rng.uniform(0.82, 0.98) + grain * rng.uniform(0.012, 0.03) * np.sqrt(0.1 + image) + rng.uniform(0, 0.04)
    )
    picture = Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255))
    if rng.random() < 0.7:
        at = (int(size * rng.uniform(0.04, 0.10)), int(size * rng.uniform(0.04, 0.12)))
        ImageDraw.Draw(picture).text(at, 'R', fill=int(rng.uniform(200, 255)), font_size=max(10, size // 16))
    return np.asarray(picture)


def _save(pixels: np.ndarray, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)

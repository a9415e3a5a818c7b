"""Archives of images for tests: zip files, also with wrong headers, and the array file of MedMNIST."""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = (
    'chest_xray/train/NORMAL/IM-0001-0001.jpeg',
    'chest_xray/train/PNEUMONIA/person1_virus_6.jpeg',
    'chest_xray/test/NORMAL/IM-0002-0001.jpeg',
    'chest_xray/test/PNEUMONIA/person2_bacteria_7.jpeg',
)


def jpeg_bytes(seed: int = 0) -> bytes:
    """A JPEG file of 64 x 64 pixels of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(pixels).save(file, 'JPEG')
    return file.getvalue()


def write_zip(
    path: Path,
    entries: list[tuple[str, bytes]],
    change: Callable[[zipfile.ZipInfo], None] | None = None,
    method: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """Write a zip file of `entries`, pairs of name and content.

    `change` can falsify the last entry of the central directory.
    """
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w', method) as file:
        warnings.simplefilter('ignore')  # names that occur twice are intended
        for name, content in entries:
            entry = zipfile.ZipInfo('placeholder')
            entry.filename, entry.compress_type = name, method  # the constructor would correct the name
            file.writestr(entry, content)
        if change:
            change(file.filelist[-1])
    return path


def write_images_zip(path: Path, *more: tuple[str, bytes], **options: Any) -> Path:
    """Write a zip file of four images in the Kaggle layout, and of `more` entries."""
    images = [(name, jpeg_bytes(seed)) for seed, name in enumerate(NAMES)]
    return write_zip(path, [*images, *more], **options)


def write_arrays(path: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Write eight images as MedMNIST's arrays, with `changes` to them (None removes one), and return the arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (('train', 4), ('val', 2), ('test', 2)):
        arrays[f'{split}_images'] = rng.integers(0, 256, (n, 224, 224), np.uint8)
        arrays[f'{split}_labels'] = (np.arange(n) % 2).astype(np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)
    return arrays

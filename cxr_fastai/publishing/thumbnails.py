"""Small pictures of images and of their maps, for pages that contain hundreds of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.progress import in_threads, progress
from cxr_fastai.images.decode import ImageLike, open_image
from cxr_fastai.images.decoder_pool import DecodeGroup, default_pool
from cxr_fastai.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.interpretation.overlays import Explanation

PICTURE_SIZE = 256
"""Longer side of a picture in pixels."""
JPEG_QUALITY = 78
MAP_SIZE = 64
"""Longer side of the picture of a map in pixels. A map is smooth, so a page can enlarge it."""
MAP_LEVELS = 64
"""Number of colours of a map; with 256, its file is twice as large."""
BURNED_IN = 'not shown: the file says that the image contains text, which may name the patient'


@dataclass(frozen=True)
class Thumbnail:
    """The JPEG file of a small picture; None where `note` says why there is none."""

    image: bytes | None
    note: str = ''


def read_thumbnails(images: Sequence[ImageLike], modality: str = '') -> Iterator[Thumbnail]:
    """Yield the thumbnail of each of the `images`, in order, and show the progress.

    `modality` has the codes of the other DICOM modalities that are accepted. An image that cannot be read, or that may
    name the patient, has no picture.
    """
    preprocessing = Preprocessing(PICTURE_SIZE, modality=modality)  # so that a large JPEG is decoded at fewer pixels
    with DecodeGroup(default_pool()) as group:
        yield from in_threads(partial(_read_thumbnail, group, preprocessing), images)


def _read_thumbnail(group: DecodeGroup, preprocessing: Preprocessing, image: ImageLike) -> Thumbnail:
    try:
        decoded = open_image(image, preprocessing, decode=partial(group.decode, side=PICTURE_SIZE))
    except ImageError as error:
        return Thumbnail(None, f'not shown: {error.code}')
    if decoded.burned_in:
        return Thumbnail(None, BURNED_IN)
    return Thumbnail(compress(decoded.pixels))


def compress(pixels: np.ndarray) -> bytes:
    """Return a small JPEG file of uint8 `pixels` (h, w) or (h, w, 3)."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    file = BytesIO()
    picture.save(file, 'JPEG', quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()


def draw_maps(predictor: Predictor, images: Sequence[ImageLike]) -> Iterator[bytes | None]:
    """Yield a small, transparent PNG file of the Grad-CAM map for pneumonia of each image, and show the progress.

    See `draw_map`. Raises `UsageError` if the network has no maps.
    """
    from cxr_fastai.interpretation.explainer import Explainer, Subject

    explanations = Explainer(predictor).explain(Subject(image, p=0.0) for image in images)
    for explanation in progress(explanations, len(images), 'map'):
        yield draw_map(explanation)


def draw_map(explanation: Explanation | ImageError) -> bytes | None:
    """Return a small, transparent PNG file of the map of an `explanation`, which is laid over the picture of the image.

    It is empty if the map contains no positive evidence, and None for an error.
    """
    if isinstance(explanation, ImageError):
        return None
    return b'' if explanation.is_empty else compress_map(explanation.heat)


def compress_map(heat: np.ndarray) -> bytes:
    """Return a small, transparent PNG file of the map `heat` (h, w), from 0 to 1, in `MAP_LEVELS` colours."""
    from cxr_fastai.interpretation.overlays import map_layer

    height, width = heat.shape
    scale = min(1, MAP_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    reduced = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    levels = np.round(reduced.clip(0, 1) * (MAP_LEVELS - 1)).astype(np.uint8)
    picture = Image.frombytes('P', size, levels.tobytes())
    palette = map_layer(np.linspace(0, 1, MAP_LEVELS)[None])
    picture.putpalette(palette.tobytes(), 'RGBA')
    file = BytesIO()
    picture.save(file, 'PNG', optimize=True)
    return file.getvalue()

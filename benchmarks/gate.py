"""What the input gate of a bundle turns away: held-out chest images, and what is none.

    python benchmarks/gate.py BUNDLE IMAGES

IMAGES is a folder of images that the network was neither trained nor validated on. Pictures are those that scikit-image
and scikit-learn ship; the rest is made of the images. Prints the share turned away, and of how many the network would
have been sure (a probability below .1 or above .9).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from cxr_fastai.data.find import list_images
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor

PICTURES = (
    'astronaut',
    'brick',
    'camera',
    'cat',
    'cell',
    'checkerboard',
    'clock',
    'coffee',
    'coins',
    'colorwheel',
    'grass',
    'gravel',
    'horse',
    'hubble_deep_field',
    'immunohistochemistry',
    'logo',
    'microaneurysms',
    'moon',
    'page',
    'retina',
    'rocket',
    'shepp_logan_phantom',
    'text',
)


def pictures(seen: Preprocessing) -> np.ndarray:
    """What the libraries ship (among it a slice of a CT phantom, and pages of text), as the network would see it."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = [np.asarray(getattr(data, name)()) for name in PICTURES] + load_sample_images().images
    return np.stack([seen.fit(_grey(one)) for one in found])


def _grey(picture: np.ndarray) -> np.ndarray:
    if picture.dtype != np.uint8:
        picture = np.uint8(255 * np.clip(picture.astype(float), 0, 1))
    return np.asarray(Image.fromarray(picture).convert('L'))


def others(images: np.ndarray, seen: Preprocessing) -> Iterator[tuple[str, np.ndarray]]:
    """Name, and what is made of images or of nothing, grey uint8 (n, s, s)."""
    rng, side = np.random.default_rng(0), images.shape[-1]
    half = side // 2
    yield 'pictures', pictures(seen)
    yield 'turned left', np.rot90(images, 1, (1, 2))
    yield 'turned right', np.rot90(images, 3, (1, 2))
    yield 'upside down', images[:, ::-1]
    yield 'negative', 255 - images
    yield 'quarter of an image', np.stack([seen.fit(np.ascontiguousarray(image[:half, :half])) for image in images])
    yield 'halves swapped', np.roll(images, half, axis=1)
    yield 'noise', rng.integers(0, 256, images.shape, dtype=np.uint8)
    clouds = np.stack([gaussian_filter(rng.standard_normal((side, side)), side / 12) for _ in range(50)])
    yield 'clouds', np.uint8(np.clip(128 + 50 * clouds / clouds.std(), 0, 255))
    yield 'blank', np.stack([np.full((side, side), grey, np.uint8) for grey in range(0, 256, 16)])
    yield 'text', np.stack([seen.fit(_page(rng)) for _ in range(30)])


def _page(rng: np.random.Generator) -> np.ndarray:
    page = Image.new('L', (400, 500), 255)
    draw = ImageDraw.Draw(page)
    for y in range(10, 480, 18):
        draw.text((10, y), ''.join(rng.choice(list('abcdefghij klmnop'), 55)), fill=0)
    return np.asarray(page)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--limit', type=int, default=400)
    args = parser.parse_args()
    predictor, rng = Predictor.load(args.bundle), np.random.default_rng(0)
    seen, paths = Preprocessing.of(predictor.config), list_images([args.images])
    images = np.stack([seen.load(paths[i]) for i in rng.permutation(len(paths))[: args.limit]])
    total = []
    for name, pixels in [('held-out images', images), *others(images[:100], seen)]:
        batches = [np.ascontiguousarray(pixels[start : start + 32]) for start in range(0, len(pixels), 32)]
        p, features = (np.concatenate(part) for part in zip(*map(predictor.engine, batches), strict=True))
        away = predictor.gate.measure(features, np.ascontiguousarray(pixels)) > 1
        if name != 'held-out images':
            total += away.tolist()
        sure = (np.abs(p - 0.5) > 0.4).mean()
        print(f'{name:18s} {len(pixels):4d}: {away.mean():6.1%} turned away; sure of {sure:6.1%}')
    print(f'{"no images, in all":18s} {len(total):4d}: {np.mean(total):6.1%} turned away')


if __name__ == '__main__':
    main()

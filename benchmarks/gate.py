"""Measure how many images the input gate (out-of-distribution check) of a bundle rejects.

    python benchmarks/gate.py BUNDLE IMAGES

IMAGES is a folder of images that were used neither for training nor for validation. The other inputs are pictures of
scikit-image and scikit-learn, and images made from IMAGES. Prints the percentage of rejected inputs, and of inputs with
a confident prediction (a probability below 0.1 or above 0.9).
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
"""Pictures of scikit-image, among them a slice of a CT phantom and pages of text."""
BATCH_SIZE = 32


def other_inputs(images: np.ndarray, preprocessing: Preprocessing) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a name, and grey uint8 inputs (n, s, s) that are not chest images or are changed chest `images`."""
    rng = np.random.default_rng(0)
    side = images.shape[-1]
    half = side // 2
    yield 'pictures', load_pictures(preprocessing)
    yield 'rotated left', np.rot90(images, 1, (1, 2))
    yield 'rotated right', np.rot90(images, 3, (1, 2))
    yield 'upside down', images[:, ::-1]
    yield 'negative', 255 - images
    quarters = np.ascontiguousarray(images[:, :half, :half])
    yield 'quarter of an image', np.stack([preprocessing.fit(quarter) for quarter in quarters])
    yield 'halves swapped', np.roll(images, half, axis=1)
    yield 'noise', rng.integers(0, 256, images.shape, dtype=np.uint8)
    clouds = np.stack([gaussian_filter(rng.standard_normal((side, side)), side / 12) for _ in range(50)])
    yield 'clouds', np.uint8(np.clip(128 + 50 * clouds / clouds.std(), 0, 255))
    yield 'blank', np.stack([np.full((side, side), grey, np.uint8) for grey in range(0, 256, 16)])
    yield 'text', np.stack([preprocessing.fit(draw_text(rng)) for _ in range(30)])


def load_pictures(preprocessing: Preprocessing) -> np.ndarray:
    """Return the pictures of scikit-image and scikit-learn as a network would see them: grey uint8 (n, s, s)."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [np.asarray(getattr(data, name)()) for name in PICTURES]
    pictures += load_sample_images().images
    return np.stack([preprocessing.fit(to_grey(picture)) for picture in pictures])


def to_grey(picture: np.ndarray) -> np.ndarray:
    """Return a picture as grey uint8 (h, w)."""
    if picture.dtype != np.uint8:
        picture = np.uint8(255 * np.clip(picture.astype(float), 0, 1))
    return np.asarray(Image.fromarray(picture).convert('L'))


def draw_text(rng: np.random.Generator) -> np.ndarray:
    """Return a page of random letters, grey uint8 (500, 400)."""
    page = Image.new('L', (400, 500), 255)
    draw = ImageDraw.Draw(page)
    for y in range(10, 480, 18):
        draw.text((10, y), ''.join(rng.choice(list('abcdefghij klmnop'), 55)), fill=0)
    return np.asarray(page)


def predict(predictor: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability (n,) of each image, and whether the gate rejects it (n,)."""
    images = np.ascontiguousarray(images)
    probabilities = []
    features = []
    for start in range(0, len(images), BATCH_SIZE):
        p, batch_features = predictor.engine(images[start : start + BATCH_SIZE])
        probabilities.append(p)
        features.append(batch_features)
    rejected = predictor.gate.measure(np.concatenate(features), images) > 1
    return np.concatenate(probabilities), rejected


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path, help='bundle with an input gate')
    parser.add_argument('images', type=Path, help='folder of images that were not used in training')
    parser.add_argument('--limit', type=int, default=400, help='maximum number of these images (default: 400)')
    args = parser.parse_args()
    predictor = Predictor.load(args.bundle)
    preprocessing = Preprocessing.of(predictor.config)
    paths = list_images([args.images])
    order = np.random.default_rng(0).permutation(len(paths))
    images = np.stack([preprocessing.load(paths[i]) for i in order[: args.limit]])
    print_row('held-out images', *predict(predictor, images))
    all_rejected = []
    for name, inputs in other_inputs(images[:100], preprocessing):
        p, rejected = predict(predictor, inputs)
        print_row(name, p, rejected)
        all_rejected += rejected.tolist()
    print(f'{"all other inputs":19s} {len(all_rejected):4d}: {np.mean(all_rejected):6.1%} rejected')


def print_row(name: str, p: np.ndarray, rejected: np.ndarray) -> None:
    """Print the percentages of rejected inputs and of confident predictions."""
    confident = np.abs(p - 0.5) > 0.4
    print(f'{name:19s} {len(p):4d}: {rejected.mean():6.1%} rejected, {confident.mean():6.1%} confident')


if __name__ == '__main__':
    main()

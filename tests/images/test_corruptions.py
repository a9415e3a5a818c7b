"""Corruptions of images, and the equaliser of their sharpness."""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.evaluation.intervals import auc_interval
from cxr_fastai.images.corruptions import CORRUPTIONS, STRENGTHS, Equaliser, corrupt, image_rng, sharpness
from cxr_fastai.images.synthetic import Chest, draw_image

SIDE = 128


def image(seed: int, label: str = 'NORMAL') -> np.ndarray:
    rng = np.random.default_rng(seed)
    return draw_image(Chest.draw(rng), label, SIDE, rng)[0]


IMAGES = [image(seed) for seed in range(6)]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_each_strength_changes_an_image_more_than_the_previous_one(kind):
    for i, square in enumerate(IMAGES):
        corrupted = [corrupt(square, kind, strength, f'{i}.jpeg') for strength in STRENGTHS]
        assert all(h.shape == square.shape and h.dtype == np.uint8 for h in corrupted)
        distances = [distance(square, h) for h in corrupted]
        assert distances[0] > 0 and distances == sorted(distances) and len(set(distances)) == len(STRENGTHS)


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_corruption_is_reproducible_and_leaves_the_original_unchanged(kind):
    square = IMAGES[0].copy()
    first, again = (corrupt(square, kind, 3, 'train/a.jpeg', seed=7) for _ in range(2))
    assert np.array_equal(first, again) and np.array_equal(square, IMAGES[0])


@pytest.mark.parametrize('kind', ['crop and scale', 'noise', 'gamma', 'rotation'])
def test_seed_and_path_determine_the_random_values(kind):
    corrupted = {corrupt(IMAGES[0], kind, 3, f'{i}.jpeg', seed).tobytes() for i in range(8) for seed in range(2)}
    assert len(corrupted) >= 2


def test_random_values_do_not_depend_on_the_process_and_corruptions_load_without_torch():
    code = (
        'import sys; from cxr_fastai.images.corruptions import image_rng; '
        'print("torch" in sys.modules, image_rng(1, "é.jpeg", "blur").integers(2**62))'
    )
    environment = {'PYTHONHASHSEED': '1', 'PYTHONPATH': ':'.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ['False', str(image_rng(1, 'é.jpeg', 'blur').integers(2**62))]


def test_gamma_follows_its_formula_in_both_directions():
    darker, brighter = (np.rint(255 * (IMAGES[0] / 255) ** exponent) for exponent in (2, 1 / 2))
    corrupted = [corrupt(IMAGES[0], 'gamma', 5, str(i)) for i in range(12)]
    is_darker = [np.array_equal(image, darker) for image in corrupted]
    is_brighter = [np.array_equal(image, brighter) for image in corrupted]
    assert any(is_darker) and any(is_brighter)
    assert all(np.logical_xor(is_darker, is_brighter))


def test_contrast_scales_the_deviation_and_keeps_the_mean():
    corrupted = corrupt(IMAGES[0], 'contrast', 4, 'a')
    assert corrupted.std() / IMAGES[0].std() == pytest.approx(0.4, rel=0.01)
    assert corrupted.mean() == pytest.approx(IMAGES[0].mean(), abs=0.5)


def test_jpeg_compression_is_that_of_pillow():
    file = BytesIO()
    Image.fromarray(IMAGES[0]).save(file, 'JPEG', quality=8)
    assert np.array_equal(corrupt(IMAGES[0], 'JPEG quality', 5, 'a'), np.asarray(Image.open(file)))


def test_noise_has_the_given_deviation():
    flat = np.full((SIDE, SIDE), 128, np.uint8)
    assert corrupt(flat, 'noise', 4, 'a').std() == pytest.approx(20, rel=0.05)


def test_the_border_is_black_and_the_rest_unchanged():
    corrupted, edge = corrupt(IMAGES[0], 'border', 5, 'a'), round(0.1 * SIDE)
    inner = slice(edge, -edge)
    assert corrupted[:edge].max() == corrupted[:, -edge:].max() == 0
    assert np.array_equal(corrupted[inner, inner], IMAGES[0][inner, inner])


def test_rotation_goes_in_both_directions_and_leaves_corners_black():
    bar = np.zeros((SIDE, SIDE), np.uint8)
    bar[SIDE // 2 - 2 : SIDE // 2 + 2] = 255
    rotated = [corrupt(bar, 'rotation', 4, str(i)) for i in range(12)]
    slopes = {np.sign(image[:, 20].argmax() - image[:, -20].argmax()) for image in rotated}
    assert slopes == {-1, 1}
    assert corrupt(np.full_like(bar, 200), 'rotation', 1, 'a')[0, 0] == 0


def test_a_crop_enlarges_by_the_inverse_of_its_area():
    disc = np.uint8(np.hypot(*np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]) < 0.3) * 200
    grown = (corrupt(disc, 'crop and scale', 4, 'a') > 100).sum() / (disc > 100).sum()
    assert grown == pytest.approx(1 / 0.5, rel=0.05)


def test_lengths_are_fractions_of_the_side():
    small = IMAGES[0]
    large = np.asarray(Image.fromarray(small).resize((3 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC))
    shrunk = np.asarray(Image.fromarray(corrupt(large, 'blur', 5, 'a')).resize((SIDE, SIDE), Image.Resampling.BOX))
    assert distance(shrunk, corrupt(small, 'blur', 5, 'a')) < 2


def test_equalised_images_are_as_sharp_as_the_least_sharp_tenth():
    squares = [image(seed) for seed in range(20)]
    equaliser = Equaliser.of(squares, [SIDE] * 20)
    after = np.array([sharpness(equaliser(square)) for square in squares])
    # In each direction a tenth of the images is less sharp, and stays so.
    close = np.abs(after / equaliser.target - 1) < 0.03
    assert close.mean(axis=0).min() >= 0.8 and (after / equaliser.target).max() < 1.03


def test_equalising_removes_a_difference_in_sharpness_between_the_classes():
    targs = np.arange(60) % 2 == 0
    blurred = [
        corrupt(image(seed), 'blur', 3 + seed % 3, 'a') if sick else image(seed) for seed, sick in enumerate(targs)
    ]
    equaliser = Equaliser.of(blurred, [SIDE] * 60)
    assert auc_interval(targs, -np.array([sharpness(square)[0] for square in blurred]))['value'] > 0.95
    # The least sharp tenth is a fifth of the blurred class, and no blur makes it sharper: an AUC of 0.6 remains.
    equal = np.array([sharpness(equaliser(square)) for square in blurred]) / equaliser.target
    assert auc_interval(targs, -equal[:, 0].round(1))['value'] < 0.65


def test_all_images_get_the_resolution_of_the_lowest_tenth():
    squares, sides = IMAGES[:4] * 5, [32] * 3 + [SIDE] * 17
    assert Equaliser.of(squares, sides).side == 32
    stripes = np.tile(np.uint8([80, 80, 160, 160]), (SIDE, SIDE // 4))
    assert Equaliser.of(squares, sides)(stripes).std() < 0.1 * stripes.std()

"""Corruptions harm an image the more the stronger they are, always the same way; equalised images are equally sharp."""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.evaluation.intervals import roc_auc
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
def test_each_strength_harms_every_image_more_than_the_one_before(kind):
    for i, square in enumerate(IMAGES):
        harmed = [corrupt(square, kind, strength, f'{i}.jpeg') for strength in STRENGTHS]
        assert all(h.shape == square.shape and h.dtype == np.uint8 for h in harmed)
        distances = [distance(square, h) for h in harmed]
        assert distances[0] > 0 and distances == sorted(distances) and len(set(distances)) == len(STRENGTHS)


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_an_image_is_harmed_the_same_way_each_time_and_left_as_it_was(kind):
    square = IMAGES[0].copy()
    first, again = (corrupt(square, kind, 3, 'train/a.jpeg', seed=7) for _ in range(2))
    assert np.array_equal(first, again) and np.array_equal(square, IMAGES[0])


@pytest.mark.parametrize('kind', ['crop and scale', 'noise', 'gamma', 'rotation'])
def test_seed_and_image_decide_what_is_drawn(kind):
    harmed = {corrupt(IMAGES[0], kind, 3, f'{i}.jpeg', seed).tobytes() for i in range(8) for seed in range(2)}
    assert len(harmed) >= 2


def test_streams_do_not_hang_on_the_process():
    code = 'from cxr_fastai.images.corruptions import image_rng; print(image_rng(1, "é.jpeg", "blur").integers(2**62))'
    told = [
        subprocess.run(
            [sys.executable, '-c', code],
            capture_output=True,
            text=True,
            check=True,
            env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
        ).stdout
        for seed in '12'
    ]
    assert {int(text) for text in told} == {image_rng(1, 'é.jpeg', 'blur').integers(2**62)}


def test_corruptions_load_without_torch():
    code = 'import sys, cxr_fastai.images.corruptions; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': ':'.join(sys.path)})


def test_gamma_is_its_formula_upwards_or_downwards():
    ways = {e: np.rint(255 * (IMAGES[0] / 255) ** e) for e in (2, 1 / 2)}
    drawn = [corrupt(IMAGES[0], 'gamma', 5, str(i)) for i in range(12)]
    assert {next(e for e, way in ways.items() if np.array_equal(way, d)) for d in drawn} == {2, 1 / 2}


def test_contrast_scales_the_deviation_and_keeps_the_mean():
    harmed = corrupt(IMAGES[0], 'contrast', 4, 'a')
    assert harmed.std() / IMAGES[0].std() == pytest.approx(0.4, rel=0.01)
    assert harmed.mean() == pytest.approx(IMAGES[0].mean(), abs=0.5)


def test_jpeg_is_pillows():
    file = BytesIO()
    Image.fromarray(IMAGES[0]).save(file, 'JPEG', quality=8)
    assert np.array_equal(corrupt(IMAGES[0], 'JPEG quality', 5, 'a'), np.asarray(Image.open(file)))


def test_noise_has_its_deviation():
    flat = np.full((SIDE, SIDE), 128, np.uint8)
    assert corrupt(flat, 'noise', 4, 'a').std() == pytest.approx(20, rel=0.05)


def test_the_border_is_black_and_the_rest_untouched():
    harmed, edge = corrupt(IMAGES[0], 'border', 5, 'a'), round(0.1 * SIDE)
    inner = slice(edge, -edge)
    assert harmed[:edge].max() == harmed[:, -edge:].max() == 0
    assert np.array_equal(harmed[inner, inner], IMAGES[0][inner, inner])


def test_rotation_turns_to_both_sides_and_leaves_corners_black():
    bar = np.zeros((SIDE, SIDE), np.uint8)
    bar[SIDE // 2 - 2 : SIDE // 2 + 2] = 255
    slopes = [
        np.sign(h[:, 20].argmax() - h[:, -20].argmax())
        for h in (corrupt(bar, 'rotation', 4, str(i)) for i in range(12))
    ]
    assert set(slopes) == {-1, 1}
    assert corrupt(np.full_like(bar, 200), 'rotation', 1, 'a')[0, 0] == 0


def test_a_crop_enlarges_by_the_area_it_keeps():
    disc = np.uint8(np.hypot(*np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]) < 0.3) * 200
    grown = (corrupt(disc, 'crop and scale', 4, 'a') > 100).sum() / (disc > 100).sum()
    assert grown == pytest.approx(1 / 0.5, rel=0.05)


def test_lengths_are_shares_of_the_side():
    small, large = (
        IMAGES[0],
        np.asarray(Image.fromarray(IMAGES[0]).resize((3 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC)),
    )
    shrunk = np.asarray(Image.fromarray(corrupt(large, 'blur', 5, 'a')).resize((SIDE, SIDE), Image.Resampling.BOX))
    assert distance(shrunk, corrupt(small, 'blur', 5, 'a')) < 2


def test_equalised_images_are_as_sharp_as_the_poorest_tenth():
    squares = [image(seed) for seed in range(20)]
    equaliser = Equaliser.of(squares, [SIDE] * 20)
    after = np.array([sharpness(equaliser(square)) for square in squares])
    # A tenth in each direction is poorer, and stays so.
    close = np.abs(after / equaliser.wanted - 1) < 0.03
    assert close.mean(axis=0).min() >= 0.8 and (after / equaliser.wanted).max() < 1.03


def test_sharpness_planted_in_a_class_is_gone_from_the_equalised_images():
    targs = np.arange(60) % 2 == 0
    blurred = [
        corrupt(image(seed), 'blur', 3 + seed % 3, 'a') if sick else image(seed) for seed, sick in enumerate(targs)
    ]
    equaliser = Equaliser.of(blurred, [SIDE] * 60)
    assert roc_auc(targs, -np.array([sharpness(square)[0] for square in blurred]))['value'] > 0.95
    # A fifth of the blurred class is the poorest tenth of all, which no blur makes sharper: .6 where all else is equal.
    equal = np.array([sharpness(equaliser(square)) for square in blurred]) / equaliser.wanted
    assert roc_auc(targs, -equal[:, 0].round(1))['value'] < 0.65


def test_all_images_get_the_resolution_of_the_poorest_tenth():
    squares, sides = IMAGES[:4] * 5, [32] * 3 + [SIDE] * 17
    assert Equaliser.of(squares, sides).side == 32
    stripes = np.tile(np.uint8([80, 80, 160, 160]), (SIDE, SIDE // 4))
    assert Equaliser.of(squares, sides)(stripes).std() < 0.1 * stripes.std()

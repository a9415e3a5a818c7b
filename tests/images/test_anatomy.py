"""Parts of an image are hidden, and the rest stays as it is."""

import numpy as np
import pytest

from cxr_fastai.images.anatomy import ANATOMY, EXCHANGED, FILLS, HIDINGS, LUNGS, THORAX, Box, exchange_surroundings

SIDE = 100


@pytest.fixture
def square() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), np.uint8)


def hide(name: str, square: np.ndarray, seed: int = 0) -> np.ndarray:
    return HIDINGS[name](square, np.random.default_rng(seed))


def test_a_box_is_given_by_fractions_of_the_side():
    mask = Box(0.1, 0.4, 0.2, 0.7).mask(10)
    assert mask.sum() == 3 * 5 and mask[1:4, 2:7].all()
    assert (LUNGS.mask(SIDE) <= THORAX.mask(SIDE)).all()


@pytest.mark.parametrize('fill', FILLS)
@pytest.mark.parametrize(('part', 'box'), [('lungs hidden', LUNGS), ('thorax hidden', THORAX)])
def test_hiding_changes_the_box_only(part, box, fill, square):
    hidden = hide(f'{part}, {fill}', square)
    mask = box.mask(SIDE)
    assert hidden.dtype == np.uint8 and np.array_equal(hidden[~mask], square[~mask])
    assert (hidden[mask] != square[mask]).mean() > 0.9


@pytest.mark.parametrize('fill', FILLS)
def test_lungs_only_hides_everything_else(fill, square):
    shown = hide(f'lungs only, {fill}', square)
    mask = LUNGS.mask(SIDE)
    assert np.array_equal(shown[mask], square[mask]) and (shown[~mask] != square[~mask]).mean() > 0.9


def test_fills_are_black_the_mean_and_noise_of_the_same_mean_and_deviation(square):
    square = square // 4 + 96  # noise is not cut off
    mask = THORAX.mask(SIDE)
    assert not hide('thorax hidden, black', square)[mask].any()
    assert set(hide('thorax hidden, mean', square)[mask]) == {round(square.mean())}
    noise = hide('thorax hidden, noise', square)[mask]
    assert noise.mean() == pytest.approx(square.mean(), abs=1) and noise.std() == pytest.approx(square.std(), rel=0.05)
    assert np.array_equal(noise, hide('thorax hidden, noise', square)[mask])
    assert not np.array_equal(noise, hide('thorax hidden, noise', square, seed=1)[mask])


def test_an_exchange_keeps_the_lungs_and_takes_the_rest_from_the_other_image_without_an_edge(square):
    dark, light = np.full((SIDE, SIDE), 50, np.uint8), np.full((SIDE, SIDE), 200, np.uint8)
    mixed = exchange_surroundings(dark, light)
    assert mixed[50, 50] == 50 and mixed[2, 50] == 200 and mixed[50, 2] == 200
    assert np.abs(np.diff(mixed.astype(int), axis=0)).max() < 75  # 150 without the transition
    assert np.array_equal(exchange_surroundings(square, square), square)


def test_every_row_about_anatomy_has_a_name():
    assert set(ANATOMY) == {*HIDINGS, EXCHANGED} and len(ANATOMY) == 10

"""Images are measured without a network, and duplicates are found by correlation."""

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.data.image_stats import find_duplicates, measure_images


def test_measurements_are_those_of_the_file_and_of_its_look(tmp_path):
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1))
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    Image.fromarray(ramp).convert('RGB').save(tmp_path / 'b.png')
    table, thumbnails = measure_images(['a.png', 'b.png', 'none.png'], tmp_path)
    assert thumbnails.shape == (3, 32, 32)
    assert table.code.fillna('').to_list() == ['', '', 'E_IO']
    assert table.digest[0] == table.digest[1]
    assert table.colour[:2].to_list() == [0, 1]
    assert table['vertical sharpness'][0] == 0
    assert table['horizontal sharpness'][0] == pytest.approx(254 / 223, rel=0.01)
    assert table['bytes per pixel'][0] == (tmp_path / 'a.png').stat().st_size / 128**2


@pytest.fixture(scope='module')
def thumbnails() -> np.ndarray:
    """300 thumbnails, of which the last hundred resemble the first hundred, and one is black."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    thumbnails[200:] = np.clip(thumbnails[:100] + rng.integers(0, 40, (100, 8, 8)), 0, 255)
    thumbnails[7] = 9
    return thumbnails


@pytest.mark.parametrize('block', [2048, 64, 77])
def test_duplicates_are_pairs_with_a_high_pearson_correlation(thumbnails, block):
    others = np.delete(np.arange(300), 7)
    rows, columns = np.nonzero(np.triu(np.corrcoef(thumbnails[others].reshape(299, -1)), 1) >= 0.9)
    expected = set(zip(others[rows].tolist(), others[columns].tolist(), strict=True))
    assert len(expected) > 50
    assert {(i, j) for i, j, _ in find_duplicates(thumbnails, 0.9, block=block)} == expected


def test_the_search_stops_at_the_largest_number_of_pairs(thumbnails):
    assert len(find_duplicates(thumbnails, 0.9, max_pairs=10)) == 10

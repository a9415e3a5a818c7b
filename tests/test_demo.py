"""Synthetic films in the real layout, the same for the same seed, with masks where the opacities are."""
import numpy as np
import pytest
from PIL import Image

from cxr_fastai.core.errors import UsageError
from cxr_fastai.data.items import read_items
from cxr_fastai.data.splits import count_films
from cxr_fastai.images.synthetic import Chest, draw_film, make_demo


def test_the_layout_and_names_are_the_real_sets(films):
    items = read_items(films)
    assert len(items) == 60 and (count_films(items) > 0).all(axis=None)
    assert set(items.kind) == {'normal', 'bacteria', 'virus'}


def test_a_patient_is_in_one_split_and_some_have_several_films(films):
    patients = read_items(films).groupby('patient')
    assert (patients.split.nunique() == 1).all() and patients.size().max() > 1


def test_every_pneumonia_has_a_mask_inside_the_film_and_no_normal_has(films):
    masks = {path.relative_to(films/'masks').with_suffix('.jpeg').as_posix() for path in films.rglob('masks/*/*/*.png')}
    items = read_items(films)
    assert masks == set(items[items.label == 'PNEUMONIA'].path)
    shares = [np.asarray(Image.open(path)).mean()/255 for path in films.rglob('masks/*/*/*.png')]
    assert min(shares) > 0 and max(shares) < 0.4


def test_the_opacity_is_what_the_mask_covers():
    chest = Chest.draw(np.random.default_rng(1))
    film, mask = draw_film(chest, 'PNEUMONIA', 128, np.random.default_rng(2))
    assert film.dtype == np.uint8 and film.shape == mask.shape == (128, 128) and film.std() > 30
    _, empty = draw_film(chest, 'NORMAL', 128, np.random.default_rng(2))
    assert mask.any() and not empty.any()
    mirrored = mask[:, ::-1] & ~mask  # the same place of the other lung
    assert film[mask].mean() > film[mirrored].mean() + 20


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)): make_demo(tmp_path/name, 20, 64, seed)
    read = lambda name: {p.relative_to(tmp_path/name).as_posix(): p.read_bytes() for p in (tmp_path/name).rglob('*.*')}
    assert read('a') == read('b') != read('c')


def test_a_folder_with_something_in_it_is_left_alone(films, tmp_path):
    with pytest.raises(UsageError, match='exists already'): make_demo(films, 20, 64)
    with pytest.raises(UsageError, match='at least 20 films'): make_demo(tmp_path/'few', 5, 64)

"""Synthetic images in the layout of the real data set, with masks of their opacities."""

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.core.errors import UsageError
from cxr_fastai.data.items import read_items
from cxr_fastai.data.splits import count_images
from cxr_fastai.images.synthetic import Chest, draw_image, make_demo


def test_layout_and_file_names_are_those_of_the_real_data_set(images):
    items = read_items(images)
    assert len(items) == 60 and (count_images(items) > 0).all(axis=None)
    assert set(items.kind) == {'normal', 'bacteria', 'virus'}


def test_no_patient_is_in_two_splits_and_some_have_several_images(images):
    patients = read_items(images).groupby('patient')
    assert (patients.split.nunique() == 1).all() and patients.size().max() > 1


def test_every_pneumonia_has_a_mask_and_no_normal_image_has_one(images):
    masks = {
        path.relative_to(images / 'masks').with_suffix('.jpeg').as_posix() for path in images.rglob('masks/*/*/*.png')
    }
    items = read_items(images)
    assert masks == set(items[items.label == 'PNEUMONIA'].path)
    shares = [np.asarray(Image.open(path)).mean() / 255 for path in images.rglob('masks/*/*/*.png')]
    assert min(shares) > 0 and max(shares) < 0.4


def test_the_mask_covers_the_opacity():
    chest = Chest.draw(np.random.default_rng(1))
    image, mask = draw_image(chest, 'PNEUMONIA', 128, np.random.default_rng(2))
    assert image.dtype == np.uint8 and image.shape == mask.shape == (128, 128) and image.std() > 30
    _, empty = draw_image(chest, 'NORMAL', 128, np.random.default_rng(2))
    assert mask.any() and not empty.any()
    mirrored = mask[:, ::-1] & ~mask  # the same place in the other lung
    assert image[mask].mean() > image[mirrored].mean() + 20


def test_the_seed_determines_every_byte(tmp_path):
    contents = []
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        folder = tmp_path / name
        make_demo(folder, 20, 64, seed)
        contents.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob('*.*')})
    assert contents[0] == contents[1] != contents[2]


def test_a_folder_that_is_not_empty_and_too_few_images_are_refused(images, tmp_path):
    with pytest.raises(UsageError, match='exists already'):
        make_demo(images, 20, 64)
    with pytest.raises(UsageError, match='at least 20 images'):
        make_demo(tmp_path / 'few', 5, 64)

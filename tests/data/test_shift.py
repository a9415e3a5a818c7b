"""The softest normal patients, and random ones with pneumonia, are held out of training as the split `shift`."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.data.items import read_items, read_recipe_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.shift import detail, hold_out_soft, measure_detail
from cxr_fastai.images.corruptions import gaussian_blur
from cxr_fastai.models.architectures import make_recipe

PATIENTS = 20
SOFT = ('IM-0003', 'IM-0007', 'IM-0011', 'IM-0015')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Noise images of 20 patients of each class, two for each; those of four normal patients are blurred."""
    folder = tmp_path_factory.mktemp('soft')
    rng = np.random.default_rng(0)
    for split, first in (('train', 0), ('val', PATIENTS // 2)):
        for number in range(first, first + PATIENTS // 2):
            for copy in (1, 2):
                names = (f'NORMAL/IM-{number:04}-000{copy}.png', f'PNEUMONIA/person{number}_virus_{copy}.png')
                for name in names:
                    square = rng.integers(0, 256, (64, 64), dtype=np.uint8)
                    if name.split('/')[1].startswith(SOFT):
                        square = gaussian_blur(square, 2, 2)
                    path = folder / split / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(square).save(path)
    return folder


def test_the_softest_normal_patients_are_held_out_with_as_many_of_pneumonia(folder):
    items = hold_out_soft(read_items(folder), folder, 0.2)
    shift = items[items.split == SHIFT]
    assert set(shift[shift.label == 'NORMAL'].patient) == set(SOFT)
    assert shift.groupby('label').patient.nunique().to_dict() == {'NORMAL': 4, 'PNEUMONIA': 4}
    assert len(shift) == 16 and not set(shift.patient) & set(items[items.split != SHIFT].patient)


def test_runs_of_any_seed_hold_out_the_same_images(folder):
    splits = [
        read_recipe_items(folder, make_recipe('baseline', valid='patients', seed=seed, shift_pct=0.2))
        for seed in (1, 2)
    ]
    first, second = [set(items[items.split == SHIFT].path) for items in splits]
    assert first == second and len(first) == 16
    valid, other = [set(items[items.split == 'valid'].path) for items in splits]
    assert valid != other and not valid & first


def test_neither_training_nor_validation_sees_them(folder):
    dls = CXRDataLoaders.from_folder(folder, shift_pct=0.2, size=32, bs=4, num_workers=0)
    held_out = set(dls.item_table[dls.item_table.split == SHIFT].path)
    loaded = {path.split(f'{folder}/')[-1] for ds in (dls.train_ds, dls.valid_ds) for path in map(str, ds.items.path)}
    assert len(loaded) == 80 - 16 and not loaded & held_out
    table = read_items(folder)
    of_table = CXRDataLoaders.from_df(table, folder, shift_pct=0.2, size=32, bs=4, num_workers=0)
    assert set(of_table.item_table[of_table.item_table.split == SHIFT].path) == held_out


def test_detail_falls_with_blur_and_does_not_depend_on_brightness(folder):
    square = np.random.default_rng(1).integers(50, 150, (64, 64), dtype=np.uint8)
    assert detail(gaussian_blur(square, 1, 1)) < detail(square)
    assert detail(square + 100) == detail(square)
    assert detail(np.zeros((8, 8), np.uint8)) == 0


def test_an_unreadable_image_has_no_detail(tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no image')
    assert np.isnan(measure_detail(['bad.png'], tmp_path)).all()


@pytest.mark.parametrize('share', [0.01, 0.5])
def test_too_few_patients_are_refused_with_their_number(folder, share):
    items = read_items(folder)
    few = pd.concat([rows[rows.patient.isin(rows.patient.unique()[:3])] for _, rows in items.groupby('label')])
    with pytest.raises(UsageError, match=f'shift_pct {share}: .* found 3 NORMAL and 3 PNEUMONIA patients'):
        hold_out_soft(few.reset_index(drop=True), folder, share)

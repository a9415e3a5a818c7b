"""No patient is in train and valid, and splits that cannot be trained or validated on are refused."""

import re

import pandas as pd
import pytest

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.recipe import Recipe, data_recipe
from cxr_fastai.data.items import ITEM_COLUMNS
from cxr_fastai.data.splits import (
    check_leakage,
    check_trainable,
    count_images,
    describe_validation,
    leaking_patients,
    split_patients,
    validation_warning,
)


def make_items(patients_per_class: int = 20) -> pd.DataFrame:
    """Training images of patients with one to three images each."""
    rows = [
        (f'{label}-{patient}-{view}', label, 'train', f'{label}-{patient}', 'normal')
        for label in ('NORMAL', 'PNEUMONIA')
        for patient in range(patients_per_class)
        for view in range(1 + patient % 3)
    ]
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


def test_no_patient_is_in_train_and_valid():
    items = split_patients(make_items(), seed=3)
    patients = items.groupby('split').patient.agg(set)
    assert not patients['train'] & patients['valid']


def test_about_a_tenth_of_each_class_is_for_validation():
    counts = count_images(split_patients(make_items(patients_per_class=100), seed=0))
    shares = counts.loc['valid'] / counts.loc[['train', 'valid']].sum()
    assert shares.between(0.07, 0.13).all()


def test_only_the_seed_changes_the_split():
    first = split_patients(make_items(), 1)
    assert first.equals(split_patients(make_items(), 1))
    assert not first.equals(split_patients(make_items(), 2))


def test_test_images_stay_test_images():
    items = make_items()
    items['split'] = items.split.where(items.index % 5 > 0, 'test')
    assert (split_patients(items, 0).split == 'test').eq(items.split == 'test').all()


def test_a_split_by_patients_needs_two_patients_of_each_class():
    items = make_items()
    one_normal = items[(items.label == 'PNEUMONIA') | (items.patient == 'NORMAL-0')]
    with pytest.raises(UsageError, match='at least two patients of each class; found 1 NORMAL and 20 PNEUMONIA'):
        split_patients(one_normal, 0)


def test_training_needs_a_validation_image():
    with pytest.raises(UsageError, match='valid holds no image.*--valid patients'):
        check_trainable(make_items())


def test_by_default_recipes_validate_on_patients():
    assert Recipe.valid == data_recipe('reference').valid == data_recipe('tuned').valid == 'patients'


@pytest.mark.parametrize(
    ('fields', 'text'),
    [
        ({}, r'validation: 10% of the patients of train and val \(\d images\)'),
        ({'valid_pct': 0.2}, r'validation: 20% of the patients of train and val \(\d+ images\)'),
        ({'valid': 'official'}, r'validation: val, as the images are split already \(0 images\)'),
        ({'valid': 'none'}, 'validation: none, the images of train and val are all trained on'),
    ],
)
def test_the_validation_is_described(fields, text):
    recipe = data_recipe('reference', **fields)
    items = make_items()
    if recipe.valid == 'patients':
        items = split_patients(items, recipe.seed, recipe.valid_pct)
    assert re.fullmatch(text, describe_validation(items, recipe))


def test_the_validation_by_images_of_unknown_patients_is_described():
    items = make_items().assign(patient=lambda items: 'unknown:' + items.path)
    with pytest.warns(CXRWarning, match='drawn one by one'):
        items = split_patients(items, 0)
    text = describe_validation(items, data_recipe('reference'))
    assert text.startswith('validation: 10% of the images, whose patients are unknown, of train and val')


@pytest.mark.parametrize('n', [0, 1])
def test_training_needs_two_images_of_each_class(n):
    items = make_items()
    few = pd.concat([items[items.label == 'NORMAL'], items[items.label == 'PNEUMONIA'].head(n)])
    with pytest.raises(UsageError, match=f'train holds 39 NORMAL and {n} PNEUMONIA. .* two images of each class'):
        check_trainable(few)


def test_sixteen_validation_images_give_a_warning_with_an_interval():
    items = make_items().groupby('label').head(8).assign(split='valid')
    expected = 'Even with 5 of 5 patients correct, the true rate could be anywhere from 0.57 to 1'
    assert expected in validation_warning(items)
    assert validation_warning(make_items(100).assign(split='valid')) is None


def test_a_patient_in_two_splits_is_refused():
    items = make_items()
    items.loc[items.path == 'PNEUMONIA-1-1', 'split'] = 'test'
    assert leaking_patients(items).to_dict() == {'PNEUMONIA-1': ['test', 'train']}
    with pytest.raises(UsageError, match='patients with images in two splits: 1.*--allow-leakage'):
        check_leakage(items)
    check_leakage(items[items.split != 'test'])

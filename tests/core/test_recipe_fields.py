"""The list of the fields of a recipe is complete, and a recipe from a file is checked field by field."""

import json
from dataclasses import asdict, fields

import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import RECIPES, SETTABLE, Recipe
from cxr_fastai.core.recipe_fields import LIMITS, MEANINGS, OPTIONS, SUMMARIES, list_fields, parse_recipe
from cxr_fastai.core.run import read_recipe
from cxr_fastai.images.preprocessing import MAX_LOW_PASS, RESIZES
from cxr_fastai.models.architectures import make_recipe


def test_every_field_and_every_recipe_is_explained():
    names = {field.name for field in fields(Recipe)}
    assert names == MEANINGS.keys() and SUMMARIES.keys() == RECIPES.keys()
    assert {info.name for info in list_fields()} == names - {'arch', 'phases', 'name'}
    assert {*OPTIONS, *SETTABLE, *LIMITS} <= names and not {*OPTIONS} & {*SETTABLE}


def test_fields_have_the_values_of_the_recipes_and_the_option_that_sets_them():
    infos = {info.name: info for info in list_fields()}
    assert infos['crop'].recipes == {'reference': 1.0, 'tuned': 0.25}
    assert (infos['crop'].option, infos['batch_size'].option) == ('--set crop=', '--batch-size')
    assert infos['optimizer'].values == 'adam, adamw' and infos['clip'].values == '0 or more'
    assert infos['resize'].values == ', '.join(RESIZES) and infos['low_pass'].values == f'0 to {MAX_LOW_PASS}'


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_survives_a_file(name, tmp_path):
    recipe = make_recipe('resnet50', name, lr=3e-4, weights='none', limit=5)
    (tmp_path / 'recipe.json').write_text(json.dumps(asdict(recipe)))
    assert read_recipe(tmp_path / 'recipe.json') == recipe


def test_fields_that_a_file_lacks_have_their_default():
    phase = {'name': 'train', 'epochs': 1, 'lr': 0.1, 'frozen': False}
    recipe = parse_recipe({'arch': 'baseline', 'phases': [phase]})
    assert recipe.size == 224 and recipe.phases[0].lr == 0.1


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'size': '64'}, "the field size is '64': a whole number is needed"),
        ({'size': 64.0}, 'the field size is 64.0: a whole number is needed'),
        ({'size': 0}, 'the field size is 0: a whole number from 1 to 4096 is needed'),
        ({'seed': -1}, 'the field seed is -1: a whole number from 0'),
        ({'limit': True}, 'the field limit is True: a whole number or null is needed'),
        ({'flip': None}, 'the field flip is None: a number is needed'),
        ({'flip': 3}, 'flip 3: a number from 0 to 1 is needed'),
        ({'optimizer': 'sgd'}, 'optimizer sgd: choose adam or adamw'),
        ({'class_weights': 1}, 'the field class_weights is 1: true or false is needed'),
        ({'arch': 3}, 'the field arch is 3: a text is needed'),
        ({'flipp': 1}, 'the field flipp is unknown, did you mean flip?'),
        ({'phases': 'train'}, "the field phases is 'train': a list is needed"),
        ({'phases': [{'epochs': 1}]}, r'phases\[0\] is .*: an object of name, epochs, lr, frozen is needed'),
        (
            {'phases': [{'name': 'a', 'epochs': '1', 'lr': 1.0, 'frozen': False}]},
            r"the field phases\[0\].epochs is '1': a whole",
        ),
    ],
)
def test_errors_about_a_recipe_in_a_file_name_the_field(tmp_path, change, reason):
    path = tmp_path / 'recipe.json'
    path.write_text(json.dumps(asdict(make_recipe('baseline')) | change))
    with pytest.raises(UsageError, match=f'recipe.json: not a recipe of this version: {reason}.* Use the recipe.json'):
        read_recipe(path)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('{', 'damaged'),
        ('{"flip": NaN}', 'damaged .*NaN is not a value of JSON'),
        ('\0', 'damaged'),
        ('[1]', r'not an object of JSON, but \[1\]'),
        ('{}', 'the field arch is missing'),
        ('{"arch": "baseline", "size": 64}', 'the field phases is missing'),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, reason):
    path = tmp_path / 'recipe.json'
    path.write_text(content)
    with pytest.raises(UsageError, match=f'recipe.json: .*{reason}'):
        read_recipe(path)
    with pytest.raises(UsageError, match='nothing.json: no such file. Name the recipe.json of a run'):
        read_recipe(tmp_path / 'nothing.json')

"""Fields of a recipe: what is refused, what is parsed, and what sets two recipes apart."""

from dataclasses import asdict, replace

import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import CHOICES, RANGES, RECIPES, Phase, Recipe, parse_fields
from cxr_fastai.core.recipe_texts import differences
from cxr_fastai.models.architectures import make_recipe, revise_recipe


def test_a_recipe_comes_back_from_its_json():
    recipe = make_recipe('resnet50', 'tuned', epochs=4, low_pass=0.01)
    assert Recipe.from_dict(asdict(recipe)) == recipe


@pytest.mark.parametrize('name', RANGES)
def test_numbers_out_of_range_are_refused(name):
    low, high = RANGES[name]
    for value in (low - 1, high + 1 if high < 1e9 else float('nan')):
        with pytest.raises(UsageError, match=f'{name} .*a number from'):
            make_recipe('baseline', **{name: value})


@pytest.mark.parametrize('name', CHOICES)
def test_words_that_mean_nothing_are_refused(name):
    with pytest.raises(UsageError, match='best: choose '):
        make_recipe('baseline', **{name: 'best'})


def test_fields_are_parsed_by_their_type():
    assert parse_fields(['ema=0', 'class_weights=True', 'schedule=one-cycle', 'jpeg=40']) == {
        'ema': 0.0,
        'class_weights': True,
        'schedule': 'one-cycle',
        'jpeg': 40,
    }


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('emma=0.9', 'no such field: choose ema'),
        ('ema', 'ema=NUMBER is needed'),
        ('jpeg=4.5', 'jpeg=WHOLE NUMBER is needed'),
        ('class_weights=yes', 'class_weights=true or false is needed'),
        ('arch=resnet50', 'not a field for --set: use --arch'),
        ('batch_size=4', 'not a field for --set: use --batch-size'),
        ('phases=3', 'not a field for --set: use --epochs and --lr'),
        ('name=tuned', 'not a field for --set: use --recipe'),
        ('threshold=0.4', 'not a field for --set: `cxr-fastai evaluate` chooses it'),
        ('=1', 'no such field'),
    ],
)
def test_what_is_no_field_is_refused(text, why):
    with pytest.raises(UsageError, match=f'--set {text}: {why}'):
        parse_fields([text])


def test_reference_leaves_everything_at_the_specification():
    assert not RECIPES['reference'] and make_recipe('baseline') == make_recipe('baseline', 'reference')


def test_tuned_differs_from_reference_by_its_table_alone():
    reference, tuned = (make_recipe('baseline', name, epochs=3, lr=1e-3) for name in ('reference', 'tuned'))
    told = {line.split(':')[0] for line in differences(reference, tuned)}
    assert told == {'name', *RECIPES['tuned']}


def test_the_phases_that_ended_early_are_those_with_fewer_epochs_than_planned():
    phases = (Phase('frozen', 2, 1e-3, True), Phase('fine-tune', 4, 1e-4), Phase('extension', 3, 1e-4))
    recipe = Recipe('resnet50', phases, patience=2)
    assert recipe.shortened_phases(['frozen'] * 2 + ['fine-tune'] * 3) == {'fine-tune': 3}
    assert recipe.max_patience == 2 and replace(recipe, patience=0).max_patience == 0


def test_the_number_of_workers_makes_no_difference():
    recipe = make_recipe('baseline')
    assert differences(recipe, replace(recipe, workers=7)) == []
    assert differences(recipe, replace(recipe, size=64)) == ['size: 224, now 64']


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        ({}, []),
        ({'size': 64}, ['size: 224, now 64']),
        ({'ema': 0.5}, ['ema: 0.99, now 0.5']),
        ({'epochs': 4}, []),
        ({'name': 'reference', 'epochs': 4}, None),
    ],
)
def test_a_recipe_is_revised_by_what_is_given_alone(given, told):
    known = make_recipe('baseline', 'tuned', epochs=4, lr=0.0007)
    found = differences(known, revise_recipe(known, **given))
    assert found == told if told is not None else any('name' in line for line in found)

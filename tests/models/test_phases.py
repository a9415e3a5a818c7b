"""The phases of the named recipes as text."""

from cxr_fastai.core.recipe import RECIPES
from cxr_fastai.models.phases import EPOCHS, FROM_SCRATCH, PRETRAINED, describe_shares, distribute


def test_every_recipe_has_epochs_and_phases():
    assert EPOCHS.keys() == FROM_SCRATCH.keys() == PRETRAINED.keys() == RECIPES.keys()


def test_phases_are_described():
    text = 'frozen at 0.001 for 1/3 of the epochs, then fine-tune at 1e-05'
    assert describe_shares(PRETRAINED['reference']) == text
    assert describe_shares(FROM_SCRATCH['tuned']) == 'train at 0.003'


def test_rates_of_all_phases_are_multiplied():
    assert [(p.epochs, p.lr) for p in distribute(6, PRETRAINED['reference'], 10)] == [(2, 1e-2), (4, 1e-4)]

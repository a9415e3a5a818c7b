"""The phases of the named recipes: their text, their rates, and the epochs of the frozen one."""

from dataclasses import replace

import pytest

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.recipe import RECIPES, Phase
from cxr_fastai.models.architectures import make_recipe, revise_recipe
from cxr_fastai.models.phases import (
    EPOCHS,
    FROM_SCRATCH,
    PRETRAINED,
    PhaseShare,
    describe_shares,
    distribute,
    freeze_first,
)


def test_every_recipe_has_epochs_and_phases():
    assert EPOCHS.keys() == FROM_SCRATCH.keys() == PRETRAINED.keys() == RECIPES.keys()


def test_phases_are_described():
    text = 'frozen at 0.001 for 1/3 of the epochs, then fine-tune at 1e-05'
    assert describe_shares(PRETRAINED['reference']) == text
    assert describe_shares(FROM_SCRATCH['tuned']) == 'train at 0.003'


def test_rates_of_all_phases_are_multiplied():
    assert [(p.epochs, p.lr) for p in distribute(6, PRETRAINED['reference'], 10)] == [(2, 1e-2), (4, 1e-4)]


@pytest.mark.parametrize(
    ('epochs', 'frozen', 'phases'),
    [
        (15, 2, [('frozen', 2), ('fine-tune', 13)]),
        (15, 14, [('frozen', 14), ('fine-tune', 1)]),
        (4, 4, [('frozen', 4)]),
    ],
)
def test_the_epochs_of_the_frozen_phase_can_be_set(epochs, frozen, phases):
    recipe = make_recipe('resnet50', epochs=epochs, freeze_epochs=frozen, lr=1e-2)
    assert [(phase.name, phase.epochs) for phase in recipe.phases] == phases
    assert recipe.phases[0].frozen and recipe.phases[0].lr == 1e-2 and recipe.epochs == epochs


def test_later_phases_keep_their_ratio():
    three = (
        PhaseShare('frozen', 0.4, 1e-3, True),
        PhaseShare('a', 0.4, 1e-4, False),
        PhaseShare('b', 0.2, 1e-5, False),
    )
    assert [phase.epochs for phase in distribute(10, freeze_first(10, three, 1))] == [1, 6, 3]


@pytest.mark.parametrize(
    ('arch', 'name', 'frozen', 'message'),
    [
        ('baseline', 'reference', 2, 'this training has no frozen phase, but train at 0.001. Omit --freeze-epochs'),
        ('resnet50', 'tuned', 2, 'this training has no frozen phase'),
        ('resnet50', 'reference', 0, 'the training has 15 epochs. Choose a number from 1 to 15, or more --epochs'),
        ('resnet50', 'reference', 16, 'the training has 15 epochs'),
    ],
)
def test_frozen_epochs_that_a_training_cannot_have_are_refused(arch, name, frozen, message):
    with pytest.raises(UsageError, match=f'--freeze-epochs {frozen}: {message}'):
        make_recipe(arch, name, freeze_epochs=frozen)


def test_frozen_epochs_replace_those_of_a_recipe_file():
    known = make_recipe('resnet50', epochs=6, lr=1e-2)
    assert revise_recipe(known, freeze_epochs=1) == make_recipe('resnet50', epochs=6, lr=1e-2, freeze_epochs=1)


CHOSEN = make_recipe('resnet50', epochs=6, freeze_epochs=4)
HEAD_ONLY = make_recipe('resnet50', epochs=6, freeze_epochs=6)
LONGER = replace(CHOSEN, phases=(*CHOSEN.phases, Phase('extension', 3, 2e-5, patience=2)))


@pytest.mark.parametrize(
    ('known', 'changes', 'expected'),
    [
        (CHOSEN, {'epochs': 12}, [(4, 1e-3), (8, 1e-5)]),
        (CHOSEN, {'lr': 1e-2}, [(4, 1e-2), (2, 1e-4)]),
        (CHOSEN, {'arch': 'efficientnet_lite0'}, [(4, 1e-3), (2, 1e-5)]),
        (HEAD_ONLY, {'epochs': 12}, [(12, 1e-3)]),
        (LONGER, {'lr': 1e-2}, [(4, 1e-2), (2, 1e-4), (3, 2e-4)]),
        (LONGER, {'arch': 'resnet50', 'epochs': 9, 'freeze_epochs': 4}, [(4, 1e-3), (2, 1e-5), (3, 2e-5)]),
        (make_recipe('resnet50', epochs=6), {'epochs': 12}, [(4, 1e-3), (8, 1e-5)]),
    ],
)
def test_the_phases_of_a_recipe_file_are_kept_where_they_make_sense(known, changes, expected):
    if changes.get('arch') == 'efficientnet_lite0':
        pytest.importorskip('timm')
    phases = revise_recipe(known, **changes).phases
    assert [(phase.epochs, pytest.approx(phase.lr)) for phase in phases] == expected


@pytest.mark.parametrize(
    ('known', 'changes', 'message'),
    [
        (
            CHOSEN,
            {'epochs': 3},
            r'--epochs: .*\(4 epochs of frozen at learning rate 0.001 and 2 epochs of fine-tune at .* 1e-05\) are',
        ),
        (CHOSEN, {'arch': 'baseline', 'weights': 'none'}, '--arch: .* by 6 epochs of train at learning rate 0.001'),
        (
            LONGER,
            {'epochs': 6, 'lr': 1e-2},
            '--epochs and --lr: .* 3 epochs of extension at .* 2e-05 with the patience',
        ),
    ],
)
def test_phases_of_a_recipe_file_that_are_replaced_are_named(known, changes, message):
    with pytest.warns(CXRWarning, match=message):
        revise_recipe(known, **changes)

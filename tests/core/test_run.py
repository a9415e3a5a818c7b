"""The run folder and its journal."""

import os

import pandas as pd
import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import write_csv
from cxr_fastai.core.run import Run
from cxr_fastai.models.architectures import make_recipe


def test_a_run_is_not_created_twice_in_a_folder(tmp_path):
    Run.create(tmp_path / 'run')
    with pytest.raises(UsageError, match='exists already and nothing in it was overwritten'):
        Run.create(tmp_path / 'run')


def test_an_empty_folder_can_become_a_run(tmp_path):
    assert (Run.create(tmp_path) / 'figures').is_dir()


def test_a_folder_of_runs_is_refused_with_their_names(tmp_path):
    for number in range(4):
        (tmp_path / f'fold-{number}').mkdir()
        (tmp_path / f'fold-{number}/recipe.json').touch()
    with pytest.raises(
        UsageError, match='a folder of runs and not a run itself. Name one of them: fold-0, fold-1, fold-2, ...'
    ):
        Run.open(tmp_path)


def test_a_folder_without_a_recipe_is_not_a_run(tmp_path):
    with pytest.raises(UsageError, match='is not a run folder.*cxr-fastai train'):
        Run.open(tmp_path)


def test_the_journal_returns_the_last_line_about_an_event(tmp_path):
    run = Run.create(tmp_path)
    assert run.last_event('start') == {}
    for seed in (1, 2):
        run.log_event('start', seed=seed)
    run.log_event('end')
    assert run.last_event('start')['seed'] == 2


def test_the_kept_epoch_is_that_of_the_finished_training(tmp_path):
    run = Run.create(tmp_path / 'run')
    assert run.kept_epoch is None
    run.log_event('end', best={'epoch': 3})
    assert run.kept_epoch == 3
    for unknown in ({}, None, {'epoch': '3'}):  # trained by hand; a changed file
        run.log_event('end', best=unknown)
        assert run.kept_epoch is None


def test_a_line_torn_by_a_crash_spoils_no_later_event(tmp_path):
    run = Run.create(tmp_path)
    run.log_event('start', seed=1)
    with open(run / 'journal.jsonl', 'ab') as journal:
        journal.write(b'{"time": "20')
    run.log_event('end', seed=2)
    assert run.last_event('start')['seed'] == 1
    assert run.last_event('end')['seed'] == 2


def test_patients_stay_text_and_probabilities_keep_every_digit(tmp_path):
    run = Run(tmp_path)
    table = pd.DataFrame({'path': ['a', 'b'], 'label': 'NORMAL', 'split': 'test', 'patient': ['007', 'NA']})
    table = table.assign(p_pneumonia=[0.1 + 0.2, 1 / 3], prediction='PNEUMONIA', loss=0.5)
    write_csv(run / 'predictions.csv', table)
    pd.testing.assert_frame_equal(run.predictions, table, check_exact=True)


def test_evaluating_a_split_keeps_the_rows_of_the_others(tmp_path):
    run = Run(tmp_path)
    others = dict.fromkeys(('strength', 'n', 'auc', 'auc_low', 'auc_high', 'sensitivity', 'specificity'), 0)
    others |= {'model': '', 'sha256': ''}
    for split, paths in (('valid', ['a']), ('test', ['b']), ('valid', ['c', 'd'])):
        run.write_split('robustness.csv', pd.DataFrame({'corruption': paths, 'split': split} | others), split)
    robustness = run.robustness
    assert list(robustness[robustness.split == 'valid'].corruption) == ['c', 'd']
    assert list(robustness[robustness.split == 'test'].corruption) == ['b']


def test_temporary_files_of_a_killed_training_are_removed_and_others_stay(tmp_path):
    own = f'.metrics.json.{os.getpid()}.tmp'  # this process runs, so it may be writing the file
    for name in ('.state.pt.4194305.tmp', '.metrics.json.4194305.tmp', own, '.notes.txt.tmp', 'state.pt'):
        (tmp_path / name).write_text('')
    Run(tmp_path).remove_partial_files()
    assert {path.name for path in tmp_path.iterdir()} == {own, '.notes.txt.tmp', 'state.pt'}


def test_two_processes_cannot_train_into_one_run(tmp_path):
    run = Run.create(tmp_path)
    with run.locked(), pytest.raises(UsageError, match='another process trains there'), Run(tmp_path).locked():
        pass


def test_a_damaged_recipe_is_a_usage_error(tmp_path):
    run = Run.create(tmp_path)
    run.start(make_recipe('baseline'), pd.DataFrame({'path': ['a']}))
    assert Run.open(tmp_path).recipe == make_recipe('baseline')
    for content, message in (('{', 'damaged'), ('{"arch": "baseline"}', 'not a recipe of this version')):
        (run / 'recipe.json').write_text(content)
        with pytest.raises(UsageError, match=message):
            _ = run.recipe


@pytest.mark.parametrize('name', ['bundle', 'bundle.zip'])
def test_a_bundle_that_is_given_as_a_run_is_named(tmp_path, name):
    folder = tmp_path / name
    if name == 'bundle':
        folder.mkdir()
        (folder / 'manifest.json').write_text('{}')
    with pytest.raises(UsageError, match='not a run folder, but a bundle.*Name the run'):
        Run.open(folder)

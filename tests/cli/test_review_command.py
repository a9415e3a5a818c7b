"""`data review` works on folds as `train` leaves them, and refuses everything else in one line."""

import shutil

import pandas as pd

from cxr_fastai.cli import main


def test_folds_are_evaluated_and_reviewed_in_one_command(folds_with_a_copy, tmp_path, capsys):
    folds, out = tmp_path / 'folds', tmp_path / 'out' / 'review'
    shutil.copytree(folds_with_a_copy.path, folds)
    assert main(['data', 'review', str(folds), '--top', '3', '--out', str(out)]) == 0
    output = capsys.readouterr().out
    assert f'{folds}: 5 of ' in output and '2 duplicates with another label' in output
    assert f'{out}: review.csv and review.html. No label was changed.' in output
    assert len(pd.read_csv(out / 'review.csv')) == 5 and (folds / 'out_of_fold.csv').is_file()
    assert main(['data', 'review', str(folds)]) == 0
    assert (folds / 'review.html').is_file()


def test_what_cannot_be_reviewed_is_refused_before_anything_is_computed(folds_with_a_copy, run, tmp_path, capsys):
    assert main(['data', 'review', str(run.path)]) == 2
    assert 'not the folder of `train --folds`' in capsys.readouterr().err
    (tmp_path / 'review.csv').write_text('path,stars\n')
    assert main(['data', 'review', str(folds_with_a_copy.path), '--out', str(tmp_path)]) == 2
    assert 'was not replaced' in capsys.readouterr().err
    assert not (folds_with_a_copy.path / 'out_of_fold.csv').exists()

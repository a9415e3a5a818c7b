"""`combine` prints what it kept and the next command."""

import shutil

import pytest

from cxr_fastai.cli import main
from cxr_fastai.evaluation import robustness, selection


@pytest.fixture
def runs(run, tmp_path) -> list[str]:
    """Two folders with the same run."""
    return [str(shutil.copytree(run.path, tmp_path / name)) for name in ('first', 'second')]


def test_an_ensemble_is_made_by_the_command(runs, tmp_path, capsys):
    out = tmp_path / 'combined'
    assert main(['combine', *runs, '--how', 'ensemble', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert 'an ensemble, the mean logits of first, second' in printed
    assert f'Next: cxr-fastai evaluate {out}' in printed
    assert main(['predict', str(out), str(out.parent / 'nothing')]) != 0  # it is a model, so that the images are wrong


def test_the_figures_of_the_choice_are_printed(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robustness, 'STRENGTHS', (2,))
    monkeypatch.setattr(robustness, 'SQUARE_SIZE', 64)
    monkeypatch.setattr(selection, 'MIN_IMAGES', 1)
    assert main(['combine', *runs, '--out', str(tmp_path / 'combined')]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('clean', 'corrupted', 'shortcut', 'score', 'ensemble of first, second'))
    assert 'the network of first; no combination is better by more than 0.002' in printed


def test_wrong_runs_are_one_error_line(fails, runs, run, tmp_path):
    fails(['combine', *runs, '--how', 'soup', '--out', tmp_path / 'x'], 2, '--how soup: first started from random wei')
    fails(['combine', runs[0], '--out', tmp_path / 'x'], 2, 'at least two runs are needed')
    fails(['combine', *runs, '--how', 'mean', '--out', tmp_path / 'x'], 2, '--how mean: choose auto, soup, ensemble')
    assert not (tmp_path / 'x').exists()

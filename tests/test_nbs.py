"""The notebooks run from top to bottom."""
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1]/'nbs').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    monkeypatch.chdir(tmp_path)
    shell = CaptureShell(path=tmp_path)
    shell.run_all(read_nb(path), exc_stop=True)
    assert not shell.exc

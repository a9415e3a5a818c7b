"""The notebooks run from top to bottom."""
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1]/'nbs').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    from execnb.shell import CaptureShell
    monkeypatch.chdir(tmp_path)
    CaptureShell(tmp_path).execute(path, tmp_path/'run.ipynb', exc_stop=True)
    shown = (tmp_path/'run.ipynb').read_text()
    assert '"output_type": "error"' not in shown and 'image/png' in shown

"""Execute notebooks from top to bottom and store what they show: `python nbs/execute.py [01_items ...]`."""
import os
import sys
import warnings
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.nbio import read_nb, write_nb
from nbdev.clean import clean_nb

from cxr_fastai.core.errors import CXRWarning

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    """Run the notebook `path` in its folder, and write it back with its outputs and without what differs by machine."""
    notebook = read_nb(path)
    CaptureShell(path.parent, mpl_format='png').run_all(notebook, exc_stop=True)
    clean_nb(notebook)
    write_nb(notebook, path)


def show_ours_alone() -> None:
    """Warnings of other packages are for their developers; ours show without the place in the code."""
    warnings.simplefilter('ignore')
    warnings.simplefilter('always', CXRWarning)
    warnings.formatwarning = lambda message, category, *_: f'{category.__name__}: {message}\n'


if __name__ == '__main__':
    os.chdir(HERE)
    show_ours_alone()
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob('*.ipynb')):
        print(f'{name} ...', flush=True)
        execute(HERE/f'{name}.ipynb')

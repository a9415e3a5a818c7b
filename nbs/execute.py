"""Execute notebooks and store their outputs: `python nbs/execute.py [NAME ...]`, for example `01_items`; default: all.

A notebook runs from top to bottom in the folder `nbs`. Execution counts and other metadata are removed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from execnb.shell import CaptureShell
from fastcore.nbio import read_nb, write_nb
from nbdev.clean import clean_nb

from cxr_fastai.core.errors import CXRWarning

FOLDER = Path(__file__).resolve().parent


class CellOutput(logging.StreamHandler):
    """Write log records to the output of the running cell: every cell has its own `sys.stdout`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def execute(path: Path) -> None:
    """Run the notebook `path` and write it back with its outputs. Raises the exception of a failing cell."""
    notebook = read_nb(path)
    CaptureShell(path.parent, mpl_format='png').run_all(notebook, exc_stop=True)
    clean_nb(notebook)
    write_nb(notebook, path)


def show_warnings_of_this_package() -> None:
    """Hide the warnings of other packages, and show those of `cxr_fastai` without their place in the code."""
    warnings.simplefilter('ignore')
    warnings.simplefilter('always', CXRWarning)
    warnings.formatwarning = format_warning


def format_warning(message: Warning | str, category: type[Warning], *_: Any) -> str:
    return f'{category.__name__}: {message}\n'


def main() -> None:
    os.chdir(FOLDER)
    show_warnings_of_this_package()
    logging.getLogger().addHandler(CellOutput())
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob('*.ipynb'))
    for name in names:
        print(f'{name} ...', flush=True)
        execute(FOLDER / f'{name}.ipynb')


if __name__ == '__main__':
    main()

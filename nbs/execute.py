"""Execute notebooks in a Jupyter kernel and store their outputs: `python nbs/execute.py [NAME ...]`.

Without a NAME, for example `01_items`, all notebooks are executed except those with `skip_exec` in their front matter.
A notebook runs from top to bottom in the folder `nbs`. Cells with `#| eval: false` are not run and keep their outputs.
nbdev then removes execution counts and other metadata.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from fastcore.nbio import does_cell_eval, nb_frontmatter, read_nb
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

FOLDER = Path(__file__).resolve().parent
SKIP = 'skip'
"""The tag of cells that the kernel does not run. It is not stored."""


def execute(path: Path) -> None:
    """Run the notebook `path` and write it back with its outputs. Raises `CellExecutionError` if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell, with_directives in zip(notebook.cells, read_nb(path).cells, strict=True):
        if not does_cell_eval(with_directives, default=True):
            cell.metadata.tags = [SKIP]
    options = {'skip_cells_with_tag': SKIP, 'coalesce_streams': True, 'timeout': None, 'kernel_name': 'python3'}
    options['extra_arguments'] = ['--log-level=ERROR']  # the kernel warns about its own connection
    NotebookClient(notebook, resources={'metadata': {'path': FOLDER}}, **options).execute()
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


def is_executed(path: Path) -> bool:
    """Return False for a notebook with `skip_exec` in its front matter, which must be named to be executed."""
    return not nb_frontmatter(read_nb(path)).get('skip_exec')


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob('*.ipynb') if is_executed(path))
    for name in names:
        print(f'{name} ...', flush=True)
        execute(FOLDER / f'{name}.ipynb')


if __name__ == '__main__':
    main()

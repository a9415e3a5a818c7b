"""A notebook displays a figure of `show` exactly once; a terminal displays nothing.

The cells run in a Jupyter kernel, and in execnb, which runs the notebooks in nbdev's test.
"""

import json
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from cxr_fastai.core.figures import axes, show

DEFINE = """
from cxr_fastai.core.figures import axes, show

def plot():
    figure, ax = axes(1, 1)
    ax.plot([0, 1])
    return show(figure)
"""
PLOT = """
from cxr_fastai.core.figures import axes, plotting, save_figure, to_svg

@plotting
def draw():
    figure, ax = axes(1, 1)
    ax.plot([0, 1])
    return figure
"""
CELLS = {
    DEFINE: 0,
    'figure = plot()': 1,
    'figure': 1,  # in a later cell it is displayed as any figure
    'figure = plot()\nfigure': 1,
    'plot()': 1,
    'plot()\nNone': 1,
    'plot();': 1,
    'for _ in range(3):\n    plot()': 3,
    'if True:\n    plot()': 1,
    'plot()\nplot()': 2,
    'show(figure)\nshow(figure)': 1,
    'import matplotlib.pyplot': 0,
    'figure = plot(); figure': 1,
    'axes(1, 1)[0]': 1,  # a figure that is not shown, but the result of the cell
    PLOT: 0,
    'import matplotlib.pyplot as plt': 0,
    'draw()': 1,
    'draw()\nplt.show()': 1,
    'figure = draw()': 1,  # at the end of the cell, as figures of pyplot
    'figure = draw()\nfigure': 1,
    'for _ in range(2):\n    draw()\n    plt.show()': 2,
    'draw()\nplt.subplots()\nplt.show()': 2,
    'figure = show(draw())': 1,
    'to_svg(draw(), "x")': 0,
    '%config InlineBackend.figure_formats = ["svg"]\nplot()': 1,
}
"""Code of a cell -> number of pictures in its outputs."""


def count_pictures(outputs) -> int:
    """The number of outputs with a picture, each in one format only."""
    pictures = [[kind for kind in output.get('data', {}) if kind.startswith('image/')] for output in outputs]
    assert all(len(formats) <= 1 for formats in pictures)
    assert not [output for output in outputs if output['output_type'] == 'error']
    return sum(map(bool, pictures))


def test_jupyter_displays_a_figure_once(monkeypatch):
    monkeypatch.delenv('MPLBACKEND', raising=False)  # commands of other tests set it
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    nbclient.NotebookClient(notebook, kernel_name='python3', extra_arguments=['--log-level=ERROR']).execute()
    assert {cell.source: count_pictures(cell.outputs) for cell in notebook.cells} == CELLS


def test_execnb_displays_a_figure_once():
    code = """
import json, sys
from execnb.shell import CaptureShell

shell = CaptureShell(mpl_format='png')
json.dump([shell.run(cell) for cell in json.load(sys.stdin)], sys.stdout)
"""
    cells = json.dumps(list(CELLS))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], input=cells, stdout=subprocess.PIPE, text=True)
    outputs = json.loads(done.stdout)
    assert dict(zip(CELLS, map(count_pictures, outputs), strict=True)) == CELLS


@pytest.mark.parametrize('program', [[], ['-m', 'IPython', '--no-banner']], ids=['python', 'ipython'])
def test_a_terminal_displays_nothing(program):
    code = f'{DEFINE}\nprint(plot())\nimport sys; print("matplotlib.pyplot" in sys.modules)'
    done = subprocess.run([sys.executable, *program, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['Figure(100x100)', 'False']


def test_a_figure_is_returned_and_imports_nothing_for_notebooks():
    code = f'{DEFINE}\nimport sys; plot(); print({{"IPython", "matplotlib.pyplot"}} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'set()\n'
    figure, _ = axes(1, 1)
    assert show(figure) is figure and isinstance(figure, Figure)

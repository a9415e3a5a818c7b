"""The style that all figures share, and the uses of a figure: PNG files, SVG in HTML pages, outputs of notebooks.

matplotlib is imported with this module and not before; pyplot and IPython are not imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, TypeVar, cast

import matplotlib
from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_fastai.core.files import SOFTWARE, atomic

# The palette of Okabe and Ito (2008), which people with colour vision deficiency can distinguish.
BLUE = '#0072B2'
ORANGE = '#D55E00'
GREEN = '#009E73'
GREY = '#767676'
INK = '#222222'
LINES = (BLUE, ORANGE, GREEN, '#CC79A7', '#E69F00', '#56B4E9', GREY)
"""Colours of several runs in one figure."""

CSS_VARIABLES = {BLUE: 'blue', ORANGE: 'orange', GREEN: 'green', GREY: 'soft', INK: 'ink', '#000000': 'ink'}
"""Colour to the CSS variable of `page.html` that replaces it in an SVG, so that it also suits the dark theme."""
ADOPTING_PYPLOT = (3, 11)
"""Version of matplotlib from which pyplot accepts a figure that it has not made."""
T = TypeVar('T', bound=Callable[..., Figure])
POINTS_PER_INCH = 72
DOTS_PER_INCH = 130


@contextmanager
def own_style() -> Iterator[None]:
    """Use the default settings of matplotlib within the block, or in the decorated function.

    A `matplotlibrc` of the user may ask for LaTeX or fonts that this computer lacks, or for unreadable sizes.
    """
    with style.context('default'):
        yield


class NotebookFigure(Figure):
    """A figure that is displayed in notebooks by `show`, and not again as the result of the same cell."""

    _is_shown = False

    @own_style()
    def savefig(self, fname: Any, **options: Any) -> None:
        """Write the figure as `Figure.savefig` does, with the settings it was drawn with."""
        super().savefig(fname, **options)

    def _ipython_display_(self) -> None:
        """Tell IPython to display nothing, or, by an exception, to display the figure as it displays any other."""
        _take_from_pyplot(self)  # which would display it again at the end of the cell
        if not self._is_shown:
            raise NotImplementedError

    def _repr_png_(self) -> bytes:
        """Return the figure as a PNG, unless the notebook has a format of its own for figures, as pyplot sets it."""
        shell = _notebook_shell()
        formatters = shell.display_formatter.formatters.values() if shell else ()
        if any(Figure in formatter.type_printers for formatter in formatters):
            raise NotImplementedError
        buffer = BytesIO()
        self.savefig(buffer, format='png', bbox_inches='tight')
        return buffer.getvalue()


def plotting(plot: T) -> T:
    """Decorate a function that returns a new figure: it draws in `own_style`, and `plt.show()` displays the figure.

    That holds in notebooks that use pyplot with pictures inside the notebook. There pyplot also displays the figure at
    the end of the cell, as it does its own, unless it has been displayed before. `save_figure` and `to_svg` take a
    figure from pyplot, so those of a report are not displayed.
    """

    @wraps(plot)
    def plot_in_own_style(*args: Any, **options: Any) -> Any:
        with own_style():
            figure = plot(*args, **options)
        _give_to_pyplot(figure)
        return figure

    return cast(T, plot_in_own_style)


def _give_to_pyplot(figure: Figure) -> None:
    pyplot = sys.modules.get('matplotlib.pyplot')
    if pyplot is None or _notebook_shell() is None or matplotlib.__version_info__ < ADOPTING_PYPLOT:
        return
    if 'inline' in matplotlib.get_backend().lower():  # other backends would open a window for each figure of a report
        pyplot.figure(figure)


def _take_from_pyplot(figure: Figure) -> None:
    pyplot = sys.modules.get('matplotlib.pyplot')
    if pyplot is not None:
        pyplot.close(figure)


def show(figure: NotebookFigure) -> NotebookFigure:
    """Return `figure`, and display it if the program runs in a notebook.

    So a notebook displays it exactly once, whether the call is the last expression of a cell or not. In a terminal
    nothing is displayed.
    """
    shell = _notebook_shell()
    if shell is None:
        return figure
    from IPython.display import display

    def forget(*_: Any) -> None:
        figure._is_shown = False
        shell.events.unregister('pre_run_cell', forget)

    if not figure._is_shown:
        display(figure)
        figure._is_shown = True
        shell.events.register('pre_run_cell', forget)  # a later cell can display it again
    return figure


def _notebook_shell() -> Any:
    """Return the IPython shell of the running notebook; None in plain Python and in a terminal."""
    ipython = sys.modules.get('IPython')
    if ipython is None:
        return None
    shell = ipython.get_ipython()
    is_terminal = any(parent.__name__ == 'TerminalInteractiveShell' for parent in type(shell).__mro__)
    return None if is_terminal else shell


def axes(width: float, height: float) -> tuple[NotebookFigure, Axes]:
    """Return a new figure of `width` x `height` inches and its single axes."""
    figure = NotebookFigure(figsize=(width, height), layout='constrained')
    return figure, tidy(figure.subplots())


def tidy(ax: Axes) -> Axes:
    """Hide the top and right border of `ax`, and return it."""
    ax.spines[['top', 'right']].set_visible(False)
    return ax


def set_title(ax: Axes, title: str) -> None:
    """Set the title of `ax` literally: `$` in the name of a run does not start a formula."""
    ax.set_title(title, fontsize=11, parse_math=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG, atomically. Raises `OutputError`."""
    _take_from_pyplot(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, format='png', dpi=DOTS_PER_INCH, metadata={'Software': SOFTWARE})


def to_svg(figure: Figure, alt: str) -> str:
    """Return `figure` as an inline `<svg>` element with the text alternative `alt`.

    Colours follow the theme of the page. Text stays text, in a font that `page.html` sets. Two figures of one page need
    different `alt` texts, because their element ids are derived from it.
    """
    _take_from_pyplot(figure)
    buffer = StringIO()
    with own_style(), rc_context({'svg.fonttype': 'none', 'svg.hashsalt': alt}):
        Figure.savefig(figure, buffer, format='svg', transparent=True)
    # The drawing starts at the first group. The XML header, metadata and global style in front of it suit only a file.
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index('<g ') :]
    for colour, variable in CSS_VARIABLES.items():
        drawing = drawing.replace(colour.lower(), f'var(--{variable})')
    width, height = POINTS_PER_INCH * figure.get_size_inches()
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}">'
    return f'{head}\n{_without_unused_ids(drawing)}'


def _without_unused_ids(drawing: str) -> str:
    """Remove the ids that nothing refers to.

    A page needs unique ids, but matplotlib (3.11) gives the groups of every figure the same ids, without a setting to
    turn them off.
    """
    referenced = set(re.findall(r'#([\w-]+)', drawing))

    def keep_if_referenced(match: re.Match[str]) -> str:
        return match[0] if match[1] in referenced else ''

    return re.sub(r' id="([^"]*)"', keep_if_referenced, drawing)

"""The house style of every figure, and its two ways out: a PNG on disk, or an SVG that takes a page's own colours."""

from __future__ import annotations

import re
from html import escape
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_fastai.core.files import atomic

# Okabe and Ito's colours, told apart also by the colour-blind.
BLUE, ORANGE, GREEN, GREY, INK = '#0072B2', '#D55E00', '#009E73', '#767676', '#222222'
LINES = (BLUE, ORANGE, GREEN, '#CC79A7', '#E69F00', '#56B4E9', GREY)
"""For several runs in one figure."""
VARIABLES = {BLUE: 'blue', ORANGE: 'orange', GREEN: 'green', GREY: 'soft', INK: 'ink', '#000000': 'ink'}
"""Colours that a page has a variable for, so that they suit a dark page as well."""
FONT = re.compile(r'(font: (?:[a-z0-9]+ )*[\d.]+px|font-family:) [^;"]+')
"""How matplotlib names letters: all at once before 3.11, the family alone since."""
NOISE = re.compile(
    r'<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>| xmlns(:\w+)?="[^"]*"|<!--.*?-->', re.DOTALL
)


def axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its only axes."""
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, tidy(figure.subplots())


def tidy(ax: Axes) -> Axes:
    """`ax` without the lines that show nothing."""
    ax.spines[['top', 'right']].set_visible(False)
    return ax


def entitle(ax: Axes, title: str) -> None:
    """Write `title` over `ax`, as it is: a name may look like mathematics."""
    ax.set_title(title, fontsize=11, parse_math=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG, atomically. Raises `OutputError`."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format='png', dpi=130)


def to_svg(figure: Figure, alt: str) -> str:
    """`figure` as an inline `<svg>` that stands for the words `alt`, with its text as text, in the colours and letters
    of the page around it. Two of one page need different `alt`."""
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': alt}):
        figure.savefig(buffer := StringIO(), format='svg', transparent=True, metadata={'Date': None})
    text = NOISE.sub('', buffer.getvalue()[buffer.getvalue().index('<svg') :])
    head = rf'<svg role="img" aria-label="{escape(alt)}" \1>'
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1)
    text = FONT.sub(r'\1 system-ui, sans-serif', text)
    for colour, name in VARIABLES.items():
        text = re.sub(colour, f'var(--{name})', text, flags=re.IGNORECASE)
    used = set(re.findall(r'#([\w-]+)', text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else '', text)

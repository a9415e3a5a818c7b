"""Figures of images with their explanation maps, at the aspect ratio of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from cxr_fastai.core.errors import UsageError, visible
from cxr_fastai.core.figures import NotebookFigure, own_style
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.images.preprocessing import Preprocessing

CAVEAT = 'influenced the score; not a lesion outline'
NO_EVIDENCE = 'no positive evidence'
COLOUR_MAP = 'cividis'
"""Readable with a colour vision deficiency; more evidence is lighter."""
OPACITY = 0.55
"""Opacity of the map where the evidence is strongest."""
MAX_NAME = 36
"""Largest number of characters of a file name above an image."""
PANEL_WIDTH = 2.8
"""Width of an image of a gallery in inches."""
CAPTION_HEIGHT = 0.4
"""Height of the caption of an image, of the title and of the line below a gallery, in inches."""
NARROW = 6
"""Width in inches below which the title of a gallery is broken into lines."""


@dataclass(frozen=True)
class Explanation:
    """An image with the map of the evidence for the class `target`.

    `image` is grey uint8 (h, w). `heat` (h, w) is from 0 to 1, all 0 if there is no positive evidence. `p` is the
    probability of pneumonia, `label` the true class if it is known.
    """

    image: np.ndarray
    heat: np.ndarray
    name: str
    p: float
    threshold: float
    target: str = VOCAB[POSITIVE]
    method: str = 'gradcam'
    label: str | None = None

    @property
    def is_empty(self) -> bool:
        """True if the map contains no positive evidence for the target."""
        return not self.heat.any()

    @property
    def summary(self) -> str:
        """The probability, the threshold, the predicted class and, if known, the true class."""
        prediction = VOCAB[int(self.p >= self.threshold)]
        text = f'p(pneumonia) {self.p:.3f}, threshold {self.threshold:g}: {prediction}'
        if self.label:
            text += f'; true: {self.label}'
        return text

    @property
    def caption(self) -> str:
        """The probability, the true class if it is known, and the file name, in two lines."""
        text = f'p(pneumonia) {self.p:.3f}'
        if self.label:
            text += f' · labelled {self.label}'
        return f'{text}\n{_shorten(visible(PurePosixPath(self.name).name))}'


def _shorten(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    half = MAX_NAME // 2
    return f'{name[: half - 1]}…{name[-half:]}'


@own_style()
def plot_explanation(explanation: Explanation) -> NotebookFigure:
    """Plot the image next to the image with its map, with a colour bar and what the map does not mean."""
    height, width = explanation.image.shape
    figure = NotebookFigure(figsize=(8.6, 3.6 * height / width + 1.0), layout='constrained')
    left, right = figure.subplots(1, 2)
    show_image(left, explanation.image)
    show_overlay(right, explanation)
    note = NO_EVIDENCE
    if not explanation.is_empty:
        note = CAVEAT
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOUR_MAP), ax=[left, right], shrink=0.8, aspect=30)
        bar.set_label(f'evidence for {explanation.target}, relative to the maximum')
    figure.suptitle(explanation.name, fontsize=10, parse_math=False)
    figure.supxlabel(f'{explanation.summary}\n{explanation.method}: {note}', fontsize=9)
    return figure


def blend(explanation: Explanation) -> np.ndarray:
    """Return the image with its map as pixels, uint8 (h, w, 3); the image alone if the map is empty."""
    return blend_map(explanation.image, explanation.heat)


def blend_map(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return `image`, grey uint8 (h, w), with the map `heat` (h, w) from 0 to 1 on top: uint8 (h, w, 3)."""
    alpha = _opacity(heat)[..., None]
    grey = np.repeat(image[..., None], 3, axis=2)
    return np.round(grey * (1 - alpha) + 255 * _colours(heat) * alpha).astype(np.uint8)


def map_layer(heat: np.ndarray) -> np.ndarray:
    """Return the map `heat` (h, w) from 0 to 1 as a transparent picture: red, green, blue, opacity, uint8 (h, w, 4).

    On top of an image it looks like `blend_map`.
    """
    return np.round(255 * np.dstack([_colours(heat), _opacity(heat)])).astype(np.uint8)


def _colours(heat: np.ndarray) -> np.ndarray:
    """Return the colours of a map: (h, w, 3) from 0 to 1."""
    from matplotlib import colormaps

    return colormaps[COLOUR_MAP](heat)[..., :3]


@own_style()
def plot_gallery(
    explanations: Sequence[Explanation],
    title: str = '',
    columns: int = 4,
    heatmap: bool = True,
    figsize: tuple[float, float] | None = None,
) -> NotebookFigure:
    """Plot many images in `columns`, each with its probability, true class and file name above.

    The maps are drawn unless `heatmap` is False. `figsize` is the width and height in inches; by default it fits the
    number and the shape of the images.
    """
    rows = max(math.ceil(len(explanations) / columns), 1)
    figsize = figsize or _gallery_size(explanations, rows, columns, heatmap)
    figure = NotebookFigure(figsize=figsize, layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in panels:
        ax.axis('off')
    for ax, explanation in zip(panels, explanations, strict=False):
        text = explanation.caption
        if heatmap:
            show_overlay(ax, explanation)
            if explanation.is_empty:
                text += f'\n{NO_EVIDENCE}'
        else:
            show_image(ax, explanation.image)
        ax.set_title(text, fontsize=8.5, parse_math=False)
    if figsize[0] < NARROW:
        title = title.replace(' · ', '\n')
    figure.suptitle(title, fontsize=11, parse_math=False)
    if heatmap:
        figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def _gallery_size(explanations: Sequence[Explanation], rows: int, columns: int, heatmap: bool) -> tuple[float, float]:
    """Return the width and height of a gallery in inches that leave little space around the images."""
    shapes = [explanation.image.shape for explanation in explanations]
    highest = max((height / width for height, width in shapes), default=1)
    captions = rows + 1 + heatmap
    return PANEL_WIDTH * columns, PANEL_WIDTH * highest * rows + CAPTION_HEIGHT * captions


@own_style()
def plot_mean_maps(explanations: Sequence[Explanation], size: int = 112) -> NotebookFigure:
    """Plot the mean map of each true class; every map is first stretched to a square of `size` pixels."""
    stretch = Preprocessing().map_to_image
    means: dict[str, np.ndarray] = {}
    titles: dict[str, str] = {}
    for label in VOCAB:
        maps = [stretch(explanation.heat, size, size) for explanation in explanations if explanation.label == label]
        if maps:
            means[label] = np.mean(maps, axis=0)
            titles[label] = f'{label}, mean of {len(maps)}'
    if not means:
        raise UsageError('mean maps need images of a known class, and there are none.')
    maximum = max(mean.max() for mean in means.values()) or 1
    figure = NotebookFigure(figsize=(3.4 * len(means) + 1, 3.6), layout='constrained')
    axes = figure.subplots(1, len(means), squeeze=False)[0]
    for ax, label in zip(axes, means, strict=True):
        ax.imshow(means[label], cmap=COLOUR_MAP, vmin=0, vmax=maximum)
        ax.set_title(titles[label], fontsize=10)
        ax.axis('off')
    bar = figure.colorbar(ScalarMappable(Normalize(0, maximum), COLOUR_MAP), ax=list(axes), shrink=0.8)
    bar.set_label('mean evidence')
    figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def show_image(ax: Axes, image: np.ndarray) -> None:
    """Draw `image`, grey uint8 (h, w), on `ax`."""
    ax.imshow(image, cmap='gray', vmin=0, vmax=255)
    ax.axis('off')


def show_overlay(ax: Axes, explanation: Explanation) -> None:
    """Draw an image with its map on `ax`; more evidence is more opaque. An empty map is not drawn."""
    show_image(ax, explanation.image)
    if not explanation.is_empty:
        ax.imshow(explanation.heat, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=_opacity(explanation.heat))


def _opacity(heat: np.ndarray) -> np.ndarray:
    return OPACITY * np.sqrt(heat)

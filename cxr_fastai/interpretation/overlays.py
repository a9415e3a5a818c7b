"""An image and the map of what influenced its score become a picture, at the image's own aspect ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.images.preprocessing import Preprocessing

CAVEAT = 'influenced the score; not a lesion outline'
NO_EVIDENCE = 'no positive evidence'
MAP = 'cividis'
"""A colour map that looks the same to the colour-blind, and gets lighter with more evidence."""
OPACITY = 0.55


@dataclass(frozen=True)
class Explanation:
    """An image, grey uint8 (h, w), and where in it the evidence for `target` lies: `heat` (h, w) from 0 to 1, all 0 where
    there is none; with its `name`, the probability `p` of pneumonia, the `threshold`, and the true `label` if known."""

    image: np.ndarray
    heat: np.ndarray
    name: str
    p: float
    threshold: float
    target: str = VOCAB[-1]
    method: str = 'gradcam'
    label: str | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing in the image speaks for the target."""
        return not self.heat.any()

    @property
    def words(self) -> str:
        """What the network says, and what is true."""
        called = VOCAB[int(self.p >= self.threshold)]
        return f'p(pneumonia) {self.p:.3f}, threshold {self.threshold:g}: {called}' + (
            f'; true: {self.label}' if self.label else ''
        )


def plot_explanation(found: Explanation) -> Figure:
    """The image, and the image under its map, side by side, with a bar of the map's colours and what it does not mean."""
    height, width = found.image.shape
    figure = Figure(figsize=(8.6, 3.6 * height / width + 1.0), layout='constrained')
    image, overlay = figure.subplots(1, 2)
    show_image(image, found.image)
    show_overlay(overlay, found)
    if not found.empty:
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), MAP), ax=[image, overlay], shrink=0.8, aspect=30)
        bar.set_label(f'evidence for {found.target}, share of the most')
    figure.suptitle(found.name, fontsize=10, parse_math=False)
    figure.supxlabel(f'{found.words}\n{found.method}: {NO_EVIDENCE if found.empty else CAVEAT}', fontsize=9)
    return figure


def blend(found: Explanation) -> np.ndarray:
    """The image under its map as plain pixels, uint8 (h, w, 3); the image alone where the map is empty."""
    return blend_map(found.image, found.heat)


def blend_map(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image, grey uint8 (h, w), under the map `heat` (h, w) from 0 to 1: uint8 (h, w, 3)."""
    from matplotlib import colormaps

    alpha = (OPACITY * heat**0.5)[..., None]
    grey = np.repeat(image[..., None], 3, axis=2)
    return np.uint8(np.round(grey * (1 - alpha) + 255 * colormaps[MAP](heat)[..., :3] * alpha))


def plot_gallery(found: Sequence[Explanation], title: str = '', columns: int = 4, heatmap: bool = True) -> Figure:
    """Many images, under their maps unless `heatmap` is off, with probability and truth over each."""
    rows = max(-(-len(found) // columns), 1)
    figure = Figure(figsize=(2.5 * columns, 2.9 * rows + 0.5), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, one in zip(panels, found, strict=False):
        if heatmap:
            show_overlay(ax, one)
        else:
            show_image(ax, one.image)
        ax.set_title(
            f'{one.p:.3f}, {one.label or "unknown"}' + f'\n{NO_EVIDENCE}' * (heatmap and one.empty), fontsize=9
        )
    for ax in panels:
        ax.axis('off')
    figure.suptitle(title, fontsize=11, parse_math=False)
    if heatmap:
        figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def plot_mean_maps(found: Sequence[Explanation], side: int = 112) -> Figure:
    """Where the network looks on average, by true class: the mean of the maps, each stretched to a square."""
    stretch = Preprocessing().spread
    groups = {label: [stretch(one.heat, side, side) for one in found if one.label == label] for label in VOCAB}
    groups = {label: maps for label, maps in groups.items() if maps}
    figure = Figure(figsize=(3.4 * len(groups) + 1, 3.6), layout='constrained')
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    most = max(np.mean(maps, axis=0).max() for maps in groups.values()) or 1
    for ax, (label, maps) in zip(axes, groups.items(), strict=True):
        ax.imshow(np.mean(maps, axis=0), cmap=MAP, vmin=0, vmax=most)
        ax.set_title(f'{label}, mean of {len(maps)}', fontsize=10)
        ax.axis('off')
    figure.colorbar(ScalarMappable(Normalize(0, most), MAP), ax=list(axes), shrink=0.8).set_label('mean evidence')
    figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def show_image(ax: Axes, image: np.ndarray) -> None:
    """Draw an image, grey uint8 (h, w)."""
    ax.imshow(image, cmap='gray', vmin=0, vmax=255)
    ax.axis('off')


def show_overlay(ax: Axes, found: Explanation) -> None:
    """Draw an image under its map: the more evidence, the less of the image is seen. A map of zeros is not drawn."""
    show_image(ax, found.image)
    if not found.empty:
        ax.imshow(found.heat, cmap=MAP, vmin=0, vmax=1, alpha=OPACITY * found.heat**0.5)

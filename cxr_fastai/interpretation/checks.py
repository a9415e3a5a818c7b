"""Whether a network's maps can be believed, as numbers: each check against what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import write_json
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import find_split
from cxr_fastai.evaluation.plots import plot_check
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.cam import BODY, activation_maps
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.interpretation.faithfulness import correlation, deletion, forgetting, shrink
from cxr_fastai.models.inputs import to_input


@dataclass(frozen=True)
class Check:
    """A number of `check_maps`, in `words`, and the `target` that it must be at least, or at most."""

    words: str
    target: float
    at_least: bool = True
    strict: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` reaches the target."""
        if self.strict and value == self.target:
            return False
        return value >= self.target if self.at_least else value <= self.target

    @property
    def aim(self) -> str:
        """The target with its sign."""
        signs = '><' if self.strict else '≥≤'
        return f'{signs[0] if self.at_least else signs[1]} {self.target:g}'


CHECKS = {
    'cam_error': Check(
        'greatest difference of Grad-CAM to the exact CAM, where one Linear follows the pooling', 1e-5, False
    ),
    'pointing': Check('share of maps whose highest point lies in the opacity', 0.85),
    'energy_ratio': Check("share of a map in the opacity, over the opacity's share of the image", 5),
    'ssim_margin': Check(
        'how much less alike (SSIM) maps of a network with random layers are than maps of two images, '
        'at the stage where that is least',
        0,
        strict=True,
    ),
    'spearman_margin': Check("the same, by Spearman's correlation", 0, strict=True),
    'drop_ratio': Check(
        'probability lost where the highest 5 % of a map look like a normal image, over that of random pixels', 5
    ),
    'repeat_error': Check('greatest difference of a map made twice', 0, False),
    'batch_error': Check('greatest difference of a map made alone and in a batch', 1e-5, False),
    'mirror': Check('correlation of the map of the mirrored image with the mirrored map', 0.8),
    'outside': Check('share of a map outside the box of the thorax; more is a sign of a shortcut', 0.3, False),
    'border': Check('share of a map in the border of 5 %; more is a sign of a shortcut', 0.3, False),
    'empty': Check('share of images of pneumonia without positive evidence, whose map is not drawn', 0.1, False),
}
IMAGES = 64
"""Images of pneumonia whose maps are checked, drawn from a split; as many normal ones make the mean normal image."""
THORAX = (0.08, 0.06, 0.92, 0.94)
"""Left, top, right and bottom of the box that holds the thorax in a frontal image, as shares of its sides."""
BORDER = 0.05
ALONE = 16
"""Maps that are also made alone."""


def check_run(run: Run, split: str = 'test', data: Path | None = None, **how: str) -> dict[str, Any]:
    """`check_maps` of the network of `run` on up to `IMAGES` images of pneumonia of `split`, written to its
    `figures/cam_check.json` and drawn beside it. `how` are `method` and `layer` of `Explainer`.

    Masks are looked for in the folder `masks` beside the images, as `data demo` writes them. Raises `CXRError`.
    """
    explainer, (root, items) = Explainer(Predictor.load(run.path), **how), find_split(run, data, split)
    seen = Preprocessing.of(explainer.predictor.config)
    chosen = {label: rows.sample(min(IMAGES, len(rows)), random_state=0) for label, rows in items.groupby('label')}
    if len(chosen) < len(VOCAB):
        raise UsageError(f'--split {split}: a check of maps needs images of both classes.')
    normal, images = (read_squares(chosen[label], root, seen)[0] for label in VOCAB)
    masks = _read_masks(chosen[VOCAB[POSITIVE]], root, seen)
    found = check_maps(explainer, images, np.uint8(normal.mean(axis=0).round()), masks)
    about = {'split': split, 'method': explainer.method, 'layer': explainer.place, 'model': identify_network(run.path)}
    check = {**about, **found, 'verdicts': judge(found)}
    write_json(run / 'figures' / 'cam_check.json', check)
    picture = run / 'figures' / 'cam_check.png'
    if 'stages' in found:
        save_figure(plot_check(check, f'{run.recipe.arch}, {split} split'), picture)
    else:
        picture.unlink(missing_ok=True)
    return check


def check_maps(
    explainer: Explainer, images: np.ndarray, normal: np.ndarray, masks: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """The numbers of `CHECKS` for the maps of `images`, grey uint8 (n, s, s), which show pneumonia, and what they come
    from; `normal` is the mean normal image, uint8 (s, s), `masks`, boolean (n, s, s), where the opacities are, if known.

    Images whose map is empty are counted, and left out of what needs one; where all are, most numbers are None.
    """
    rng, heat = np.random.default_rng(seed), explainer.maps(images)
    shown = heat.any(axis=(1, 2))
    found: dict[str, Any] = {
        'images': len(images),
        **dict.fromkeys(CHECKS),
        'empty': float((~shown).mean()),
        'cam_error': cam_error(explainer.predictor.model, to_input(images[:ALONE])),
    }
    if not shown.any():
        return found
    if masks is not None:
        found |= locate(heat[shown], masks[shown])
    found |= stability(explainer, images, heat) | outside(heat[shown])
    found |= deletion(explainer, images[shown], heat[shown], normal, rng)
    return found | forgetting(explainer, images[shown], heat[shown], rng)


def tell(value: float | None) -> str:
    """A number of `check_maps` in three digits; without one there were no masks, or no maps."""
    return 'not known' if value is None else f'{value:.3g}'


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """Whether each number that was found reaches its target."""
    return {name: check.holds(found[name]) for name, check in CHECKS.items() if found.get(name) is not None}


def cam_error(model: nn.Sequential, images: Tensor, seed: int = 0) -> float:
    """The greatest difference of Grad-CAM and the exact CAM, relative to the greatest value, on the body of `model`
    under a random head of average pooling and one Linear."""
    linear = nn.Linear(model[0](images[:1]).shape[1], len(VOCAB))
    weights = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        linear.weight.copy_(weights)
    simple = nn.Sequential(model[0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))
    exact, by_gradient = (activation_maps(simple, images, POSITIVE, method, BODY) for method in ('cam', 'gradcam'))
    area = exact.shape[-1] * exact.shape[-2]  # the mean of the pooling divides every gradient by it
    return float((by_gradient * area - exact).abs().max() / exact.abs().max().clamp(min=1e-12))


def locate(heat: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """`pointing`: how often the greatest value of a map lies in the image's mask (Zhang et al. 2018); `energy`: the
    share of the map within it; `energy_ratio`: that over the mask's share of the area."""
    known = masks.any(axis=(1, 2))
    if not known.any():
        return {}
    flat, inside = (maps[known].reshape(int(known.sum()), -1) for maps in (heat, masks))
    energy = (flat * inside).sum(axis=1) / flat.sum(axis=1)
    return {
        'pointing': float(inside[np.arange(len(flat)), flat.argmax(axis=1)].mean()),
        'energy': float(energy.mean()),
        'area': float(inside.mean()),
        'energy_ratio': float((energy / inside.mean(axis=1)).mean()),
    }


def stability(explainer: Explainer, images: np.ndarray, heat: np.ndarray) -> dict[str, float]:
    """How far a map is from itself again, from that of its image alone, and from that of the mirrored image."""
    again, alone = explainer.maps(images), np.concatenate([explainer.maps(image[None]) for image in images[:ALONE]])
    mirrored = explainer.maps(np.ascontiguousarray(images[:, :, ::-1]))[:, :, ::-1]
    alike = [correlation(a, b) for a, b in zip(heat, mirrored, strict=True) if a.any()]
    return {
        'repeat_error': float(np.abs(again - heat).max()),
        'batch_error': float(np.abs(alone - heat[:ALONE]).max()),
        'mirror': float(np.mean(alike)),
    }


def outside(heat: np.ndarray) -> dict[str, float]:
    """The share of the maps outside the box `THORAX`, and in the image's border; and their mean, at a low resolution."""
    side, whole = heat.shape[-1], heat.sum(axis=(1, 2))
    left, top, right, bottom = (round(share * side) for share in THORAX)
    edge = max(round(BORDER * side), 1)
    box, middle = heat[:, top:bottom, left:right].sum(axis=(1, 2)), heat[:, edge:-edge, edge:-edge].sum(axis=(1, 2))
    return {
        'outside': float((1 - box / whole).mean()),
        'border': float((1 - middle / whole).mean()),
        'thorax': THORAX,
        'mean_map': shrink(heat.mean(axis=0)).round(3).tolist(),
    }


def _read_masks(items: pd.DataFrame, root: Path, seen: Preprocessing) -> np.ndarray | None:
    """The masks (n, s, s) of the images of `items`, as the network would see them; None where there are none."""
    paths = [(root / 'masks' / path).with_suffix('.png') for path in items.path]
    if not all(path.is_file() for path in paths):
        return None
    return np.stack([seen.square(np.asarray(Image.open(path).convert('L'))) > 127 for path in paths])

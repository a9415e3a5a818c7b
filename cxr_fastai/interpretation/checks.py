"""Measures whether the explanation maps of a network can be trusted; `check_targets` defines what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import StrPath, write_json
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.evaluation.plots import plot_cam_check
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.images.anatomy import LUNGS
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import identify_network
from cxr_fastai.interpretation.cam import BODY, activation_maps
from cxr_fastai.interpretation.check_targets import CHECKS, verdicts
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.interpretation.faithfulness import correlation, deletion, randomisation, shrink
from cxr_fastai.models.inputs import to_input

MAX_IMAGES = 64
"""Number of pneumonia images whose maps are checked, and of normal images in the mean normal image."""
CHEST = (0.08, 0.06, 0.92, 0.94)
"""Left, top, right and bottom of a box around the thorax in a frontal image, as fractions of its sides."""
BORDER = 0.05
"""Width of the border of an image, as a fraction of its side."""
N_ALONE = 16
"""Number of maps that are also computed alone."""


def check_run(
    run: Run | StrPath,
    split: str = 'test',
    data: StrPath | None = None,
    method: str = 'gradcam',
    layer: str | None = None,
    device: str = 'auto',
) -> dict[str, Any]:
    """Check the maps of `run` on pneumonia images of `split`, and write `figures/cam_check.json` and a figure.

    `data` is the data root (default: where the run was trained); `method`, `layer` and `device` are those of
    `Explainer.load`. The folder `masks` in the data root, as `data demo` writes it, is used if it exists. Returns the
    numbers of `check_maps` with their verdicts. Raises `CXRError`.
    """
    run = as_run(run)
    data = Path(data) if data is not None else None
    explainer = Explainer.load(run.path, method=method, layer=layer, device=device)
    root, items = find_split(run, data, split)
    preprocessing = explainer.predictor.preprocessing
    samples = {label: rows.sample(min(MAX_IMAGES, len(rows)), random_state=0) for label, rows in items.groupby('label')}
    if len(samples) < len(VOCAB):
        raise UsageError(f'--split {split}: checking maps needs images of both classes. Choose another split.')
    normal, pneumonia = (read_squares(samples[label], root, preprocessing)[0] for label in VOCAB)
    mean_normal = normal.mean(axis=0).round().astype(np.uint8)
    masks = _read_masks(samples[VOCAB[POSITIVE]], root, preprocessing)
    results = check_maps(explainer, pneumonia, mean_normal, masks)
    check = {
        'split': split,
        'method': explainer.method,
        'layer': explainer.layer_name,
        'model': identify_network(run.path),
        **results,
        'verdicts': verdicts(results),
    }
    write_json(run / 'figures' / 'cam_check.json', check)
    figure_path = run / 'figures' / 'cam_check.png'
    if 'stages' in check:
        save_figure(plot_cam_check(check, f'{run.recipe.arch}, {split} split'), figure_path)
    else:
        figure_path.unlink(missing_ok=True)
    return check


def _read_masks(items: pd.DataFrame, root: Path, preprocessing: Preprocessing) -> np.ndarray | None:
    """The masks (n, s, s) of the images in `items`, resized like the images; None if any is missing."""
    paths = [(root / 'masks' / path).with_suffix('.png') for path in items.path]
    if not all(path.is_file() for path in paths):
        return None
    return np.stack([preprocessing.square(np.asarray(Image.open(path).convert('L'))) > 127 for path in paths])


def check_maps(
    explainer: Explainer, images: np.ndarray, normal: np.ndarray, masks: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measure the numbers of `CHECKS` for the maps of `images`, grey uint8 (n, s, s), which show pneumonia.

    `normal` is the mean normal image, uint8 (s, s). `masks`, boolean (n, s, s), show the opacities if they are known.
    The result also contains the values behind the numbers, for the figures. Images with an empty map are counted, and
    left out of what needs a map; if all maps are empty, most numbers are None.
    """
    rng = np.random.default_rng(seed)
    heat = explainer.maps(images)
    has_evidence = heat.any(axis=(1, 2))
    results: dict[str, Any] = {
        'images': len(images),
        **dict.fromkeys(CHECKS),
        'empty': float((~has_evidence).mean()),
        'cam_error': cam_error(explainer.model, to_input(images[:N_ALONE], explainer.predictor.device)),
    }
    if not has_evidence.any():
        return results
    if masks is not None:
        results |= locate(heat[has_evidence], masks[has_evidence])
    results |= stability(explainer, images, heat)
    results |= outside(heat[has_evidence])
    results |= deletion(explainer, images[has_evidence], heat[has_evidence], normal, rng)
    results |= randomisation(explainer, images[has_evidence], heat[has_evidence], rng)
    return results


def cam_error(model: nn.Module, images: Tensor, seed: int = 0) -> float:
    """Return the largest difference between Grad-CAM and the exact CAM, relative to the largest value of the CAM.

    Both are computed on the body of `model` with a random head of average pooling and one linear layer, for which they
    are equal up to a constant factor (Selvaraju et al. 2017). `images` are normalised, (n, 3, s, s).
    """
    body, _ = model.children()
    linear = nn.Linear(body(images[:1]).shape[1], len(VOCAB), device=images.device)
    weights = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        linear.weight.copy_(weights)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    simple_model = nn.Sequential(body, head)
    exact = activation_maps(simple_model, images, POSITIVE, 'cam', BODY)
    gradcam = activation_maps(simple_model, images, POSITIVE, 'gradcam', BODY)
    area = exact.shape[-1] * exact.shape[-2]  # average pooling divides every gradient by the area
    return float((gradcam * area - exact).abs().max() / exact.abs().max().clamp(min=1e-12))


def locate(heat: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Compare maps `heat` (n, s, s) with boolean `masks` (n, s, s); images with an empty mask are left out.

    `pointing` is the share of maps with their maximum in the mask (Zhang et al. 2018), `energy` the mean share of a map
    in the mask, `area` the mean share of the mask in the image, `energy_ratio` the mean ratio of the two.
    """
    has_mask = masks.any(axis=(1, 2))
    n = int(has_mask.sum())
    if n == 0:
        return {}
    values = heat[has_mask].reshape(n, -1)
    inside = masks[has_mask].reshape(n, -1)
    energy = (values * inside).sum(axis=1) / values.sum(axis=1)
    return {
        'pointing': float(inside[np.arange(n), values.argmax(axis=1)].mean()),
        'energy': float(energy.mean()),
        'area': float(inside.mean()),
        'energy_ratio': float((energy / inside.mean(axis=1)).mean()),
    }


def stability(explainer: Explainer, images: np.ndarray, heat: np.ndarray) -> dict[str, float]:
    """Compare the maps `heat` of `images` with maps computed again, computed alone, and of the mirrored images."""
    repeated = explainer.maps(images)
    alone = np.concatenate([explainer.maps(image[None]) for image in images[:N_ALONE]])
    mirrored = explainer.maps(np.ascontiguousarray(images[:, :, ::-1]))[:, :, ::-1]
    correlations = [correlation(a, b) for a, b in zip(heat, mirrored, strict=True) if a.any()]
    return {
        'repeat_error': float(np.abs(repeated - heat).max()),
        'batch_error': float(np.abs(alone - heat[:N_ALONE]).max()),
        'mirror': float(np.mean(correlations)),
    }


def outside(heat: np.ndarray) -> dict[str, Any]:
    """Return the mean share of the maps `heat` (n, s, s) outside the box `CHEST`, in the border, and in `LUNGS`.

    `mean_map` is the mean of the maps at a low resolution, for the figure.
    """
    side = heat.shape[-1]
    left, top, right, bottom = (round(fraction * side) for fraction in CHEST)
    border = max(round(BORDER * side), 1)
    total = heat.sum(axis=(1, 2))
    in_lungs = heat[:, LUNGS.mask(side)].sum(axis=1)
    in_thorax = heat[:, top:bottom, left:right].sum(axis=(1, 2))
    in_centre = heat[:, border:-border, border:-border].sum(axis=(1, 2))
    return {
        'outside': float((1 - in_thorax / total).mean()),
        'border': float((1 - in_centre / total).mean()),
        'lungs': float((in_lungs / total).mean()),
        'thorax': CHEST,
        'mean_map': shrink(heat.mean(axis=0)).round(3).tolist(),
    }

"""Tests of faithfulness: how scores react when pixels are removed, and how maps react when layers are randomised."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import uniform_filter
from scipy.stats import spearmanr

from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.interpretation.explainer import Explainer

TOP = 0.05
"""The fraction of the pixels whose removal `drop` measures."""
STEPS = (0.0, TOP, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The fractions of the pixels at which the deletion and insertion curves are computed."""
MIN_RANDOM_DROP = 0.01
"""Lower limit of the drop for random pixels, in the denominator of `drop_ratio`."""
N_PAIRS = 50
"""Number of pairs of images whose maps are compared."""
N_REPEATS = 8
"""Number of times that the layers are randomised."""
MAX_BODY_STAGES = 12
"""Maximum number of stages in which the layers of the body are randomised."""
N_IMAGES = 16
"""Number of images whose maps are computed with randomised layers."""
COMPARISON_SIZE = 56
"""Side, in pixels, at which maps are compared; maps have no finer detail than their layer."""
SSIM_WINDOW = 7
"""Side of the windows of SSIM in pixels."""
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2
"""The constants that stabilise the ratios of SSIM for values from 0 to 1 (Wang et al. 2004)."""


def deletion(
    explainer: Explainer, images: np.ndarray, heat: np.ndarray, normal: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Measure the mean score of `images` while pixels are replaced by the mean normal image (Petsiuk et al. 2018).

    `images` are grey uint8 (n, s, s), `heat` their maps, `normal` the mean normal image (s, s). Returns the curves over
    `STEPS`: `deletion` (pixels with the highest map values first), `deletion_random` (random order) and `insertion`
    (starting from the normal image, highest values first); `drop` and `drop_random`, the drop after the first `TOP` of
    the pixels; and their ratio.

    A normal image is used because a network has never seen black, grey or blurred regions (Sturmfels, Lundberg and Lee
    2020), and because smooth opacities survive a blur.
    """
    by_heat = ranks(heat + 1e-9 * rng.random(heat.shape))  # the noise orders equal values randomly
    at_random = ranks(rng.random(heat.shape))

    def mean_scores(rank: np.ndarray, insert: bool = False) -> list[float]:
        scores = []
        for fraction in STEPS:
            is_original = rank < fraction if insert else rank >= fraction
            scores.append(float(explainer.scores(np.where(is_original, images, normal)).mean()))
        return scores

    curve = mean_scores(by_heat)
    random_curve = mean_scores(at_random)
    top = STEPS.index(TOP)
    drop = curve[0] - curve[top]
    random_drop = curve[0] - random_curve[top]
    return {
        'steps': STEPS,
        'deletion': curve,
        'deletion_random': random_curve,
        'insertion': mean_scores(by_heat, insert=True),
        'drop': drop,
        'drop_random': random_drop,
        'drop_ratio': drop / max(random_drop, MIN_RANDOM_DROP),
    }


def ranks(heat: np.ndarray) -> np.ndarray:
    """Return the rank of each pixel of the maps (n, s, s) as a fraction of all pixels; 0 is the highest value."""
    order = np.argsort(-heat.reshape(len(heat), -1), axis=1, kind='stable')
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(order.shape[1])[None], axis=1)
    return (places / order.shape[1]).reshape(heat.shape)


def randomisation(
    explainer: Explainer, images: np.ndarray, heat: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Measure the similarity of maps before and after layers are randomised, from the last to the first layer.

    This is the cascading randomisation test of Adebayo et al. (2018): a map that stays similar does not depend on what
    the network has learned. `images` are grey uint8 (n, s, s), `heat` their maps; the first `N_IMAGES` are used.

    Returns `pairs`, the mean similarity of the maps of two different images; `stages`, the mean similarity after each
    stage over `N_REPEATS` repeats (a random head of two classes equals the trained one as often as its opposite), with
    `*_above`, the share of repeats above `pairs`; and `*_margin`, the similarity of `pairs` minus the highest
    similarity of any stage. Returns an empty dict for fewer than two images.
    """
    if len(heat) < 2:
        return {}
    index_pairs = [rng.choice(len(heat), 2, replace=False) for _ in range(N_PAIRS)]
    pairs = similarity([(heat[i], heat[j]) for i, j in index_pairs])
    repeats: dict[str, list[dict[str, float]]] = {}
    for seed in range(N_REPEATS):
        for layer, maps in _randomised_maps(explainer, images[:N_IMAGES], seed):
            repeats.setdefault(layer, []).append(similarity(list(zip(heat[:N_IMAGES], maps, strict=True))))
    stages = [_summarise_stage(layer, similarities, pairs) for layer, similarities in repeats.items()]
    margins = {f'{name}_margin': value - max(stage[name] for stage in stages) for name, value in pairs.items()}
    return {'pairs': pairs, 'stages': stages, **margins}


def _summarise_stage(layer: str, similarities: list[dict[str, float]], pairs: dict[str, float]) -> dict[str, Any]:
    stage: dict[str, Any] = {'layer': layer}
    for name in pairs:
        stage[name] = float(np.mean([repeat[name] for repeat in similarities]))
    for name, value in pairs.items():
        stage[f'{name}_above'] = float(np.mean([repeat[name] > value for repeat in similarities]))
    return stage


def _randomised_maps(explainer: Explainer, images: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Randomise the layers in stages, from the last; yield the name of the first layer of each stage and the maps."""
    model = copy.deepcopy(explainer.model)
    randomised = replace(
        explainer, predictor=replace(explainer.predictor, engine=TorchEngine(model, explainer.predictor.device))
    )
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, 'reset_parameters')}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for names in randomisation_stages(list(layers)[::-1]):
            for name in names:
                layers[name].reset_parameters()
            yield names[-1], randomised.maps(images)


def randomisation_stages(names: Sequence[str]) -> list[list[str]]:
    """Return the layer `names`, ordered from the last to the first, grouped into the stages of `randomisation`.

    Each layer of the head is a stage; the layers of the body are divided into at most `MAX_BODY_STAGES` stages.
    """
    head = [name for name in names if name.startswith('1.')]
    body = np.arange(len(head), len(names))
    parts = np.array_split(body, min(MAX_BODY_STAGES, len(body)))
    return [[name] for name in head] + [[names[i] for i in part] for part in parts]


def similarity(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return the mean `ssim` and `spearman` of pairs of maps (s, s) from 0 to 1."""
    small = [(shrink(a), shrink(b)) for a, b in pairs]
    return {
        'ssim': float(np.mean([ssim(a, b) for a, b in small])),
        'spearman': float(np.mean([rank_correlation(a, b) for a, b in small])),
    }


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean structural similarity of two maps (s, s) from 0 to 1, with square windows (Wang et al. 2004)."""

    def local_mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(uniform_filter(values.astype(np.float64), SSIM_WINDOW))

    mean_a = local_mean(a)
    mean_b = local_mean(b)
    variances = local_mean(a * a) + local_mean(b * b) - mean_a * mean_a - mean_b * mean_b
    covariance = local_mean(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    denominator = (mean_a * mean_a + mean_b * mean_b + SSIM_C1) * (variances + SSIM_C2)
    return float((numerator / denominator).mean())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two maps; 0 if one of them is constant."""
    if _is_constant(a) or _is_constant(b):
        return 0.0
    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation of two maps; 0 if one of them is constant."""
    if _is_constant(a) or _is_constant(b):
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) == 0)


def shrink(heat: np.ndarray, side: int = COMPARISON_SIZE) -> np.ndarray:
    """Return a map (s, s) resized to (side, side) by averaging; a map that is not larger is returned unchanged."""
    if len(heat) <= side:
        return heat
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BOX))

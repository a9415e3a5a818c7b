"""What maps are worth where pixels, or what layers have learned, are taken away."""

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
"""The share of the pixels that is taken away first."""
STEPS = (0.0, TOP, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of the pixels at which the curves of deletion and insertion are measured."""
LEAST_DROP = 0.01
"""A loss of probability by random pixels that is smaller, or a gain, counts as this much."""
PAIRS, DRAWS, STAGES, FEW = 50, 8, 12, 16
"""Pairs of images whose maps are compared; how often layers are drawn anew, in how many stages at most, and for how many
images."""


def deletion(
    explainer: Explainer, images: np.ndarray, heat: np.ndarray, normal: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """The mean probability while pixels become those of the mean normal image, the highest of the map first
    (`deletion`) or by chance (`deletion_random`), and while they come back (`insertion`), as Petsiuk, Das and Saenko
    have it (2018); `drop`: what the first `TOP` cost.

    Black, a blur, or the mean grey in place of a pixel is no image that the network knows (Sturmfels, Lundberg and Lee
    2020), and smooth opacities outlive a blur."""
    order, chance = ranks(heat + 1e-9 * rng.random(heat.shape)), ranks(rng.random(heat.shape))  # ties fall by chance

    def curve(ranked: np.ndarray, back: bool = False) -> list[float]:
        return [float(explainer.scores(np.where((ranked >= share) ^ back, images, normal)).mean()) for share in STEPS]

    curves = {'deletion': curve(order), 'deletion_random': curve(chance), 'insertion': curve(order, back=True)}
    whole = curves['deletion'][0]
    drop, by_chance = (whole - curves[name][STEPS.index(TOP)] for name in ('deletion', 'deletion_random'))
    return {
        'steps': STEPS,
        **curves,
        'drop': drop,
        'drop_random': by_chance,
        'drop_ratio': drop / max(by_chance, LEAST_DROP),
    }


def forgetting(explainer: Explainer, images: np.ndarray, heat: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """How alike the first `FEW` maps stay while layers lose what they learned, from the last to the first (Adebayo et
    al. 2018), beside pairs of maps of different images: `stages`, `pairs`, and by how much the pairs are more alike at
    the stage that is worst. Each stage is the mean of `DRAWS`, since a random head of two classes is as often like the
    trained one as like its opposite; `ssim_above` and `spearman_above` are the shares of draws above the pairs."""
    if len(heat) < 2:
        return {}
    chosen = [rng.choice(len(heat), 2, replace=False) for _ in range(PAIRS)]
    pairs, stages = likeness([(heat[i], heat[j]) for i, j in chosen]), {}
    for draw in range(DRAWS):
        for layer, maps in _forget(explainer, images[:FEW], draw):
            stages.setdefault(layer, []).append(likeness(list(zip(heat[:FEW], maps, strict=True))))
    rows = [
        {
            'layer': layer,
            **{name: float(np.mean([one[name] for one in found])) for name in pairs},
            **{f'{name}_above': float(np.mean([one[name] > base for one in found])) for name, base in pairs.items()},
        }
        for layer, found in stages.items()
    ]
    margins = {f'{name}_margin': base - max(row[name] for row in rows) for name, base in pairs.items()}
    return {'pairs': pairs, 'stages': rows, **margins}


def ranks(heat: np.ndarray) -> np.ndarray:
    """The place of each pixel from the highest on, as a share of all: (n, s, s)."""
    order = np.argsort(-heat.reshape(len(heat), -1), axis=1, kind='stable')
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(order.shape[1])[None], axis=1)
    return (places / order.shape[1]).reshape(heat.shape)


def _forget(explainer: Explainer, images: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """The maps after the layers of each stage, from the last, are drawn anew beside those before; and the name of the
    stage's first layer."""
    model = copy.deepcopy(explainer.predictor.model)
    random = replace(explainer, predictor=replace(explainer.predictor, engine=TorchEngine(model)))
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, 'reset_parameters')][::-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for stage in _stages([name for name, _ in layers]):
            for i in stage:
                layers[i][1].reset_parameters()
            yield layers[stage[-1]][0], random.maps(images)


def _stages(names: list[str]) -> list[np.ndarray]:
    """Which of the layers, from the last, are drawn anew together: each of the head alone, then parts of the body."""
    head = sum(name.startswith('1.') for name in names)
    body = np.arange(head, len(names))
    return [*np.arange(head)[:, None], *np.array_split(body, min(STAGES, len(body)))]


SIDE = 56
"""Pixels that maps are compared at: finer ones hold no more than their layer gave."""
WINDOW = 7
STABLE = 0.01**2, 0.03**2
"""What keeps the ratios of SSIM finite, for values up to 1, as its authors have it."""


def likeness(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The mean `ssim` and `spearman` of pairs of maps (s, s) from 0 to 1."""
    small = [(shrink(a), shrink(b)) for a, b in pairs]
    return {
        'ssim': float(np.mean([ssim(a, b) for a, b in small])),
        'spearman': float(np.mean([rank_correlation(a, b) for a, b in small])),
    }


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The structural similarity of two maps from 0 to 1, over square windows (Wang et al. 2004)."""
    mean, (c1, c2) = lambda x: uniform_filter(x.astype(np.float64), WINDOW), STABLE
    at, bt = mean(a), mean(b)
    spread, both = mean(a * a) + mean(b * b) - at * at - bt * bt, mean(a * b) - at * bt
    return float(((2 * at * bt + c1) * (2 * both + c2) / ((at * at + bt * bt + c1) * (spread + c2))).mean())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two maps; 0 where one is flat."""
    return float(spearmanr(a.ravel(), b.ravel()).statistic) if _vary(a, b) else 0.0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two maps; 0 where one is flat."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if _vary(a, b) else 0.0


def shrink(heat: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A map (s, s) as the means of (side, side) parts; a smaller one as it is."""
    if len(heat) <= side:
        return heat
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BOX))


def _vary(*maps: np.ndarray) -> bool:
    return all(np.ptp(heat) > 0 for heat in maps)

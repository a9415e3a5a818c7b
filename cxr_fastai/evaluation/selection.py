"""Greedy selection of the networks that improve a combination: the best single network, a soup, and an ensemble.

As Caruana et al. (2004) choose the members of an ensemble, and Wortsman et al. (2022) those of a soup, the networks are
sorted by their score, and each is added if the score of the combination does not decrease. All are judged on validation
images that none of them was trained on, never on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit
from torch import nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.evaluation.robustness import empty_squares, make_images, score_images, summarise
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import logits
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import Predictor, mirror
from cxr_fastai.models.ensembles import MAX_MEMBERS
from cxr_fastai.training.learner import roc_auc

SINGLE = 'single'
SOUP = 'soup'
ENSEMBLE = 'ensemble'
MARGIN = 0.002
"""Largest loss of score for which a simpler combination is preferred. Scores of seeds differ by more than that."""
MIN_IMAGES = 10
"""Smallest number of shared validation images of each class on which combinations are judged."""
ADVICE = (
    'Train runs with the same validation images (--valid official, or the same --seed with another recipe), or choose '
    '--how soup or --how ensemble, which combine all runs.'
)


@dataclass(frozen=True)
class Candidate:
    """A combination with its AUC on clean, corrupted and equally sharp images (see `robustness.summarise`).

    `how` is `single`, `soup` or `ensemble`; `members` are the names of the runs, in the order in which they were added.
    """

    how: str
    members: tuple[str, ...]
    clean: float
    corrupted: float
    shortcut: float

    @property
    def score(self) -> float:
        """The mean of the three AUCs, which combinations are chosen by."""
        return (self.clean + self.corrupted + self.shortcut) / 3


@dataclass(frozen=True)
class Judge:
    """Judges combinations on images whose `labels` (n,) are the classes.

    `images`, grey uint8 (v * n, size, size), are those of each of the v kinds of `corruptions` in turn. They are made
    once for all combinations. With `tta`, probabilities are means over test-time views, as those of a `Predictor`.
    """

    labels: np.ndarray
    corruptions: Sequence[str]
    images: np.ndarray
    batch_size: int
    tta: bool = False

    @classmethod
    def open(
        cls, items: pd.DataFrame, root: Path, preprocessing: Preprocessing, batch_size: int, tta: bool = False
    ) -> Judge:
        """Read and corrupt the images of `items` for networks with `preprocessing`. Raises `ImageError`."""
        names, made = make_images(items, root, preprocessing, hidden=False)
        images = empty_squares(len(names) * len(items), preprocessing.size)
        for position, image in enumerate(made):
            images[position] = image
        labels = (items.label == VOCAB[POSITIVE]).to_numpy().astype(int)
        return cls(labels, [corruption for corruption, _ in names], images, batch_size, tta)

    def predict(self, predictor: Predictor) -> np.ndarray:
        """Return the probabilities of the images, (1, v * n), or (2, v * n) with those of their mirror images."""
        views: list[Iterable[np.ndarray]] = [self.images]
        if self.tta:
            views.append(map(mirror, self.images))
        return np.stack([score_images(predictor, view, self.batch_size) for view in views])

    def candidate(self, how: str, names: Sequence[str], scores: np.ndarray) -> Candidate:
        """Return the candidate that combines the networks `names` and gives the images the `scores` of `predict`."""
        aucs = [roc_auc(self.labels, p) for p in scores.mean(axis=0).reshape(len(self.corruptions), -1)]
        summary = summarise(pd.DataFrame({'corruption': self.corruptions, 'auc': aucs}))
        return Candidate(how, tuple(names), summary['clean'], summary['corrupted'], summary['shortcut'])


@dataclass(frozen=True)
class Selection:
    """The `chosen` candidate, the `contenders` that it was chosen from, and the `singles`, best first."""

    chosen: Candidate
    contenders: tuple[Candidate, ...]
    singles: tuple[Candidate, ...]


def shared_validation(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the items that are validation images in all items tables `tables`, so that no run was trained on them.

    Raises `UsageError` if there are fewer than `MIN_IMAGES` of a class.
    """
    valid = [table[table.split == 'valid'] for table in tables]
    shared = set.intersection(*(set(table.path) for table in valid))
    items = valid[0][valid[0].path.isin(shared)].reset_index(drop=True)
    counts = {label: int((items.label == label).sum()) for label in VOCAB}
    if min(counts.values()) < MIN_IMAGES:
        found = ' and '.join(f'{count} {label}' for label, count in counts.items())
        raise UsageError(
            f'--how auto: the runs share {found} validation images, but {MIN_IMAGES} of each class are needed to judge '
            f'combinations on images that none of them was trained on. {ADVICE}'
        )
    return items


def select(
    predictors: Mapping[str, Predictor],
    items: pd.DataFrame,
    root: Path,
    make_soup: Callable[[Sequence[str]], nn.Module] | None = None,
    batch_size: int = 32,
    tta: bool = False,
) -> Selection:
    """Choose the simplest of the best single network, the greedy soup and the greedy ensemble that is good enough.

    Good enough is a score of at most `MARGIN` below the highest. The order is single, soup, ensemble: a soup predicts
    as fast as a single network, an ensemble takes as long as all its members.

    Args:
        predictors: the networks by name.
        items: the images on which they are judged, with the columns `path`, relative to `root`, and `label`.
        make_soup: function of names that returns their averaged network; None if they cannot be averaged.
        batch_size: number of images predicted at once.
        tta: judge by the means over test-time views.

    Raises `ImageError` for an unreadable image.
    """

    def judge_soup(names: Sequence[str]) -> Candidate:
        assert make_soup is not None
        engine = TorchEngine(make_soup(names), first.device)
        return judge.candidate(SOUP, names, judge.predict(Predictor(engine, first.config)))

    def judge_ensemble(names: Sequence[str]) -> Candidate:
        return judge.candidate(ENSEMBLE, names, mean_logits([scores[name] for name in names]))

    first, *_ = predictors.values()
    judge = Judge.open(items, root, Preprocessing.of(first.config), batch_size, tta)
    scores = {name: judge.predict(predictor) for name, predictor in predictors.items()}
    singles = [judge.candidate(SINGLE, [name], scores[name]) for name in predictors]
    singles.sort(key=lambda candidate: -candidate.score)
    contenders = [singles[0]]
    if make_soup is not None:
        contenders.append(add_greedily(singles, judge_soup))
    contenders.append(add_greedily(singles, judge_ensemble))
    several = [candidate for candidate in contenders[1:] if len(candidate.members) > 1]
    contenders = [singles[0], *several]
    return Selection(choose(contenders), tuple(contenders), tuple(singles))


def add_greedily(singles: Sequence[Candidate], judge_names: Callable[[Sequence[str]], Candidate]) -> Candidate:
    """Add the networks of `singles`, best first, each if the score of the combination does not decrease."""
    best, *others = singles
    for other in others:
        if len(best.members) == MAX_MEMBERS:
            break
        tried = judge_names([*best.members, *other.members])
        if tried.score >= best.score:
            best = tried
    return best


def choose(contenders: Sequence[Candidate]) -> Candidate:
    """Return the first of the `contenders`, simplest first, whose score is at most `MARGIN` below the highest."""
    highest = max(candidate.score for candidate in contenders)
    good = [candidate for candidate in contenders if candidate.score >= highest - MARGIN]
    return good[0]


def mean_logits(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Return the probabilities of an ensemble, whose logits are the means of those of its members' `scores`."""
    return np.asarray(expit(np.mean([logits(p) for p in scores], axis=0)))

"""Networks are added to a combination as long as its score does not decrease, and a simple one is preferred."""

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.evaluation.selection import (
    MARGIN,
    MIN_IMAGES,
    Candidate,
    add_greedily,
    choose,
    mean_logits,
    shared_validation,
)


def candidate(score: float, *names: str, how: str = 'single') -> Candidate:
    return Candidate(how, names, score, score, score)


def test_the_score_is_the_mean_of_three_aucs():
    assert Candidate('single', ('a',), 0.9, 0.6, 0.75).score == pytest.approx(0.75)


def test_a_network_is_added_if_the_score_does_not_decrease():
    scores = {'ab': 0.8, 'abc': 0.7, 'abd': 0.85}
    tried = []

    def judge(names):
        tried.append(''.join(names))
        return candidate(scores[tried[-1]], *names, how='soup')

    singles = [candidate(score, name) for name, score in zip('abcd', (0.8, 0.7, 0.6, 0.5), strict=True)]
    best = add_greedily(singles, judge)
    assert tried == ['ab', 'abc', 'abd']
    assert (best.how, best.members, best.score) == ('soup', ('a', 'b', 'd'), pytest.approx(0.85))


def test_an_ensemble_has_at_most_twenty_members():
    singles = [candidate(0.8, str(number)) for number in range(25)]
    assert len(add_greedily(singles, lambda names: candidate(0.8, *names)).members) == 20


def test_the_simplest_candidate_is_chosen_that_is_not_worse_by_more_than_the_margin():
    single, soup, ensemble = candidate(0.9, 'a'), candidate(0.9 + MARGIN / 2, 'a', 'b'), candidate(0.9, 'a', 'c')
    assert choose([single, soup, ensemble]) is single
    better = candidate(0.9 + 2 * MARGIN, 'a', 'b')
    assert choose([single, soup, better]) is better
    assert choose([single, better, candidate(0.9 + 2.5 * MARGIN, 'a', 'c')]) is better


def test_the_probabilities_of_an_ensemble_are_those_of_the_mean_logit():
    logits = np.array([[-2.0, 0.5], [1.0, 3.0]])
    expected = 1 / (1 + np.exp(-logits.mean(axis=0)))
    assert mean_logits(list(1 / (1 + np.exp(-logits)))) == pytest.approx(expected)


def items(**splits: str) -> pd.DataFrame:
    """Items with a letter for the split of each of 12 images of each class."""
    words = {'t': 'train', 'v': 'valid', 'x': 'test'}
    rows = [
        (f'{label}{number}', label, words[letter])
        for label, letters in splits.items()
        for number, letter in enumerate(letters)
    ]
    return pd.DataFrame(rows, columns=['path', 'label', 'split'])


def test_only_images_that_all_runs_validate_on_are_shared():
    first = items(NORMAL='v' * 12, PNEUMONIA='v' * 11 + 't')
    second = items(NORMAL='v' * 10 + 'tx', PNEUMONIA='v' * 12)
    shared = shared_validation([first, second])
    assert shared.label.value_counts().to_dict() == {'NORMAL': 10, 'PNEUMONIA': 11} and MIN_IMAGES == 10


def test_few_shared_images_are_refused_with_advice():
    first = items(NORMAL='v' * 12, PNEUMONIA='v' * 12)
    second = items(NORMAL='v' * 9 + 'ttt', PNEUMONIA='v' * 12)
    with pytest.raises(UsageError, match=r'share 9 NORMAL and 12 PNEUMONIA.*10 of each class.*--valid official'):
        shared_validation([first, second])

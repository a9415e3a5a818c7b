"""How a probability becomes a decision: threshold and temperature, chosen on validation films alone, by a rule.

    fixed:0.5          the number itself
    sensitivity:0.95   the highest threshold that keeps this sensitivity, with the margin that few films demand
    youden             the greatest sensitivity + specificity
    cost:10/1          the least cost, where a missed pneumonia costs 10 and a false alarm 1
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.files import UsageError, write_json
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.calibration import fit_temperature
from cxr_fastai.evaluation.metrics import SHARES, TARGETS, Calls, Sample

DEFAULT = 'sensitivity:0.95'
DIGITS = range(2, 18)
"""Decimals that a threshold may have; as few as tell it from the scores on both sides."""


@dataclass(frozen=True)
class Decision:
    """`decision.json` in the run folder is this. `model` is the SHA-256 of the network that it was chosen for; `valid`
    says on which films, and what the threshold does there; `margin` is what the rule adds for their number, in words.
    """
    threshold: float
    rule: str
    temperature: float = 1.0
    model: str = ''
    margin: str = ''
    valid: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, model: str) -> Decision | None:
        """What was decided for `run`; None where nothing was, or for another `model`."""
        if not (known := run.decision): return None
        try: decision = cls(**known)
        except TypeError as error:
            raise UsageError(f'{run/"decision.json"}: damaged ({error}): delete it and evaluate again.') from None
        if not all(isinstance(number, int | float) for number in (decision.threshold, decision.temperature)):
            raise UsageError(f'{run/"decision.json"}: damaged (no numbers): delete it and evaluate again.')
        return decision if decision.model == model else None

    @classmethod
    def behind(cls, run: Run, metrics: dict[str, Any]) -> Decision | None:
        """What was decided for `run`, where the `metrics` of a split are of that; None where they are of another."""
        known = cls.of(run, metrics['model'])
        return known if known and known.fits(metrics) else None

    def fits(self, metrics: dict[str, Any]) -> bool:
        """Whether the `metrics` of a split are of this decision."""
        return (self.threshold, self.rule, self.model) == tuple(
            metrics.get(name) for name in ('threshold', 'threshold_rule', 'model'))

    def save(self, run: Run) -> None:
        """Write it into `run`."""
        write_json(run/'decision.json', asdict(self))


def decide(valid: pd.DataFrame, rule: str, model: str = '') -> Decision:
    """The threshold that `rule` chooses on `valid`, a predictions table, and the temperature fitted there.

    Raises `UsageError` for a rule that does not exist, and for one that needs films of both classes and has not.
    """
    choose, numbers = parse_rule(rule)
    sample = Sample.of(valid)
    targs, p = sample.targs, sample.p
    if choose is not fixed and (targs.all() or not targs.any()):
        raise UsageError(f'--threshold {rule}: the validation films are all {valid.label.iloc[0]}, which shows no '
                         'threshold: use films of both classes.')
    threshold, margin = choose(targs, p, *numbers)
    calls = Calls(sample, threshold)
    found = {'n': len(p), 'positives': int(targs.sum()), **{name: calls.share(*SHARES[name]) for name in TARGETS}}
    return Decision(threshold, rule, fit_temperature(targs, p), model, margin, found)


def fixed(targs: np.ndarray, p: np.ndarray, threshold: float) -> tuple[float, str]:
    """The `threshold` itself."""
    return threshold, ''


def keep_sensitivity(targs: np.ndarray, p: np.ndarray, target: float) -> tuple[float, str]:
    """The highest threshold at which the next pneumonia is called with a probability of at least `target`.

    Of n positive scores a new one, exchangeable with them, falls below the j-th lowest with a probability of j/(n + 1)
    (the order statistics of conformal prediction; Vovk, Gammerman and Shafer 2005). So j is the largest number with
    j/(n + 1) <= 1 - target: no more margin than n films demand.
    """
    n = int(targs.sum())
    wanted = math.floor((1 - target)*(n + 1) + 1e-9)
    j = max(wanted, 1)
    threshold = _below(np.sort(p[targs])[j - 1], p)
    if not wanted: return threshold, (f'{n} validation films of pneumonia are too few to show a sensitivity of '
                                      f'{target:g}: all are called, and {n/(n + 1):.2f} is to be expected of others.')
    called = int((p[targs] >= threshold).sum())
    return threshold, (f'{called} of {n} validation films of pneumonia are called ({called/n:.4f}), so that at least '
                       f'{1 - j/(n + 1):.4f} are to be expected of others: the margin for {n} films.')


def youden(targs: np.ndarray, p: np.ndarray) -> tuple[float, str]:
    """The threshold of the greatest sensitivity + specificity (Youden 1950); the lowest where it ties."""
    return _best(targs, p, lambda missed, alarms: missed/targs.sum() + alarms/(~targs).sum()), ''


def least_cost(targs: np.ndarray, p: np.ndarray, missed_cost: float, alarm_cost: float) -> tuple[float, str]:
    """The threshold of the least cost at the prevalence of these films; the lowest where it ties."""
    return _best(targs, p, lambda missed, alarms: missed_cost*missed + alarm_cost*alarms), (
        f'The least cost at a prevalence of {targs.mean():.2f}, which is that of the validation films.')


RULES: dict[str, tuple[Callable[..., tuple[float, str]], str, str]] = {
    'fixed': (fixed, 'T', 'a number from 0 to 1'),
    'sensitivity': (keep_sensitivity, 'S', 'a number above 0 and below 1'),
    'youden': (youden, '', 'nothing'),
    'cost': (least_cost, 'FN/FP', 'two positive numbers'),
}
"""Rule -> what chooses, the form of its numbers, and those numbers in words."""


def parse_rule(rule: str) -> tuple[Callable[..., tuple[float, str]], tuple[float, ...]]:
    """The function and the numbers that `rule` means. Raises `UsageError`."""
    name, _, text = rule.partition(':')
    if name not in RULES:
        known = ', '.join(f'{name}:{form}' if form else name for name, (_, form, _) in RULES.items())
        raise UsageError(f'--threshold {rule}: choose a rule: {known}.')
    choose, form, words = RULES[name]
    try: numbers = tuple(float(number) for number in text.split('/')) if text else ()
    except ValueError: numbers = (math.nan,)
    fits = {'fixed': lambda t: 0 <= t <= 1, 'sensitivity': lambda s: 0 < s < 1, 'youden': lambda: True,
            'cost': lambda fn, fp: 0 < fn < math.inf and 0 < fp < math.inf}[name]
    if len(numbers) != (form.count('/') + 1 if form else 0) or not fits(*numbers):
        raise UsageError(f'--threshold {rule}: after {name} comes {words}{": " + name + ":" + form if form else ""}.')
    return choose, numbers


def _best(targs: np.ndarray, p: np.ndarray, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """The threshold of the least `cost(missed, alarms)`, which takes the numbers of films for every cut."""
    cuts = np.append(np.unique(p), np.inf)
    missed = np.searchsorted(np.sort(p[targs]), cuts)
    alarms = (~targs).sum() - np.searchsorted(np.sort(p[~targs]), cuts)
    return _below(cuts[np.argmin(cost(missed, alarms))], p)


def _below(score: float, p: np.ndarray) -> float:
    """A short number between `score` and the next lower one in `p`: it calls the same films as `score` itself, also
    where the last digits of a prediction differ."""
    lower = p[p < score]
    low, high = (lower.max() if len(lower) else 0.0), min(score, np.nextafter(1, 2))
    return next((t for digits in DIGITS if low < (t := round(float(low + high)/2, digits)) <= high), float(high))

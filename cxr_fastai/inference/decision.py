"""The decision of a run: the threshold that turns a probability into a class, the rule behind it, the temperature.

Errors about a decision say how to choose another one for the model that the user named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.inference.bundle import is_bundle
from cxr_fastai.inference.pretrained import name_model

DEFAULT_RULE = 'sensitivity:0.95'
"""Rule that chooses the threshold if none was ever given."""
VIEWS_OPTIONS = ('--tta', '--no-tta')


@dataclass(frozen=True)
class Decision:
    """The contents of `decision.json` in the run folder, which `evaluate` writes.

    `rule` is the rule that chose the threshold, `margin` the safety margin that it added for the number of images, in
    words. `temperature` is None if there were no validation images to fit it to. `model` is the SHA-256 of the network.
    `valid` describes the validation images that were used; it is empty if they were not found. `is_default` is True if
    no rule was given either, so that the threshold is that of the recipe. `tta` is True if the probabilities were means
    over test-time views (see `Predictor`).
    """

    threshold: float
    rule: str
    temperature: float | None = None
    model: str = ''
    margin: str = ''
    valid: dict[str, Any] = field(default_factory=dict)
    is_default: bool = False
    tta: bool = False

    @classmethod
    def from_run(cls, run: Run, model: str) -> Decision | None:
        """Return the decision of `run` for the network with the SHA-256 `model`; None if there is none.

        Raises `UsageError` if `decision.json` is damaged.
        """
        facts = run.decision
        if not facts:
            return None
        names = [field.name for field in fields(cls)]
        decision = cls(**{name: facts[name] for name in names if name in facts})
        return decision if decision.model == model else None

    @classmethod
    def from_metrics(cls, run: Run, metrics: dict[str, Any]) -> Decision | None:
        """Return the decision of `run` that the `metrics` of a split were computed with; None if it was another one."""
        decision = cls.from_run(run, metrics['model'])
        if decision is None or not decision.matches(metrics):
            return None
        return decision

    def matches(self, metrics: dict[str, Any]) -> bool:
        """Return True if the `metrics` of a split were computed with this decision."""
        return (
            metrics.get('threshold') == self.threshold
            and metrics.get('threshold_rule') == self.rule
            and metrics.get('model') == self.model
            and metrics.get('tta', False) == self.tta
            and metrics.get('calibrated', {}).get('temperature') == self.temperature
        )


def refuse_other_views(source: Path | None, tta: bool, rule: str, threshold: float, temperature: float | None) -> None:
    """Raise `UsageError` if the decision of the model `source` was made on other views than `tta` says, and is used.

    A `threshold` by a fixed `rule` fits all views. `temperature` is None unless probabilities are calibrated.
    """
    option, manner = (VIEWS_OPTIONS[0], 'without') if tta else (VIEWS_OPTIONS[1], 'with')
    name = name_model(source) if source else 'this model'
    evaluation = or_evaluate(source, option) if source else ''
    if not rule.startswith('fixed:'):
        raise UsageError(
            f'{option}: the threshold {threshold:.3g} of {name} was chosen on probabilities {manner} test-time views, '
            f'so it does not fit others. Omit {option}, or set another threshold by --threshold T{evaluation}.'
        )
    if temperature is not None:
        raise UsageError(
            f'{option} and --calibrated: the temperature {temperature:.3g} of {name} was fitted to probabilities '
            f'{manner} test-time views, so it does not fit others. Omit one of the options{evaluation}.'
        )


def find_run(model: Path) -> Run | None:
    """Return the run that the file or folder `model` is, or that contains it; None if there is none."""
    for folder in (model, model.parent):
        if (folder / 'recipe.json').is_file():
            return Run(folder)
    return None


def describe_evaluation(model: Path, option: str = '') -> str:
    """Return how to choose the decision of `model` again, by `evaluate` with the `option`, as words after "to".

    Empty if the user cannot: for a learner that is in no run, for a bundle of the package or of the Hub, and for a run
    whose validation images are all of one class.
    """
    run = find_run(model)
    if run is None:
        is_own = is_bundle(model) and name_model(model) == str(model)
        with_option = f' with {option}' if option else ''
        return f'evaluate the run that it was exported from{with_option}, and export it again' if is_own else ''
    if run.has_one_class:
        return ''
    needs_folds = run.has_out_of_fold and option in VIEWS_OPTIONS  # its predictions were made with other views
    command = run.out_of_fold_evaluation() if needs_folds else run.first_evaluation()
    export = f', then `cxr-fastai export {quote(str(run.path))}`' if is_bundle(model) else ''
    return f'evaluate the run: `{f"{command} {option}".rstrip()}`{export}'


def or_evaluate(model: Path, option: str = '') -> str:
    """Return `describe_evaluation` as the last of several possibilities in a sentence; empty as that one."""
    evaluation = describe_evaluation(model, option)
    return f', or {evaluation}' if evaluation else ''

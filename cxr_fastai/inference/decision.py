"""The decision of a run: the threshold that turns a probability into a class, the rule behind it, the temperature."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from cxr_fastai.core.run import Run


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

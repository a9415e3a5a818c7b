"""The decision of a run: the threshold that turns a probability into a class, the rule behind it, the temperature."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import write_json
from cxr_fastai.core.run import Run


@dataclass(frozen=True)
class Decision:
    """The contents of `decision.json` in the run folder, which `evaluate` writes.

    `rule` is the rule that chose the threshold, `margin` the safety margin that it added for the number of images, in
    words. `model` is the SHA-256 of the network. `valid` describes the validation images that were used.
    """

    threshold: float
    rule: str
    temperature: float = 1.0
    model: str = ''
    margin: str = ''
    valid: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_run(cls, run: Run, model: str) -> Decision | None:
        """Return the decision of `run` for the network with the SHA-256 `model`; None if there is none.

        Raises `UsageError` if `decision.json` is damaged.
        """
        facts = run.decision
        if not facts:
            return None
        try:
            decision = cls(**facts)
        except TypeError as error:
            raise UsageError(_damaged(run, str(error))) from None
        for name in ('threshold', 'temperature'):
            value = getattr(decision, name)
            if not isinstance(value, int | float):
                raise UsageError(_damaged(run, f'{name} {value!r:.80} is not a number'))
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
        )

    def save(self, run: Run) -> None:
        """Write `decision.json` into `run`."""
        write_json(run / 'decision.json', asdict(self))


def _damaged(run: Run, reason: str) -> str:
    return f'{run / "decision.json"}: damaged ({reason}). Delete it and evaluate the run again.'

"""The threshold and temperature that turn a probability into a class, with their rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import write_json
from cxr_fastai.core.run import Run


@dataclass(frozen=True)
class Decision:
    """`decision.json` in the run folder is this. `model` is the SHA-256 of the network that it was chosen for; `valid`
    says on which images, and what the threshold does there; `margin` is what the rule adds for their number, in words.
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
        if not (known := run.decision):
            return None
        try:
            decision = cls(**known)
        except TypeError as error:
            raise UsageError(f'{run / "decision.json"}: damaged ({error}): delete it and evaluate again.') from None
        if not all(isinstance(number, int | float) for number in (decision.threshold, decision.temperature)):
            raise UsageError(f'{run / "decision.json"}: damaged (no numbers): delete it and evaluate again.')
        return decision if decision.model == model else None

    @classmethod
    def behind(cls, run: Run, metrics: dict[str, Any]) -> Decision | None:
        """What was decided for `run`, where the `metrics` of a split are of that; None where they are of another."""
        known = cls.of(run, metrics['model'])
        return known if known and known.fits(metrics) else None

    def fits(self, metrics: dict[str, Any]) -> bool:
        """Whether the `metrics` of a split are of this decision."""
        return (self.threshold, self.rule, self.model) == tuple(
            metrics.get(name) for name in ('threshold', 'threshold_rule', 'model')
        )

    def save(self, run: Run) -> None:
        """Write it into `run`."""
        write_json(run / 'decision.json', asdict(self))

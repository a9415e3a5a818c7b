"""The numbers that `explain --check` measures, what each one means, and the target that it has to reach.

This module is separate from `checks`, which measures them, so that the report can show them without loading torch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

RELATIONS = {'≥': operator.ge, '>': operator.gt, '≤': operator.le}


@dataclass(frozen=True)
class Check:
    """A number of `checks.check_maps`, which passes if it is `relation` (a key of `RELATIONS`) `target`."""

    description: str
    relation: str
    target: float

    def passes(self, value: float) -> bool:
        """Return True if `value` reaches the target."""
        return bool(RELATIONS[self.relation](value, self.target))

    @property
    def target_text(self) -> str:
        """The target with its relation, for example `≥ 0.85`."""
        return f'{self.relation} {self.target:g}'


CHECKS = {
    'cam_error': Check(
        'largest difference between Grad-CAM and the exact CAM, with a head of average pooling and one linear layer',
        '≤',
        1e-5,
    ),
    'pointing': Check('share of maps with their maximum inside the opacity', '≥', 0.85),
    'energy_ratio': Check("share of a map inside the opacity, divided by the opacity's share of the image", '≥', 5),
    'ssim_margin': Check(
        'similarity (SSIM) of the maps of two images, minus the similarity of maps before and after layers are '
        'randomised; the worst stage counts',
        '>',
        0,
    ),
    'spearman_margin': Check("the same with Spearman's rank correlation", '>', 0),
    'drop_ratio': Check(
        'drop in probability when the top 5% of the pixels of a map are replaced by the mean normal image, divided by '
        'the drop for random pixels',
        '≥',
        5,
    ),
    'repeat_error': Check('largest difference between two computations of the same map', '≤', 0),
    'batch_error': Check('largest difference between a map computed alone and in a batch', '≤', 1e-5),
    'mirror': Check('correlation of the map of the mirrored image with the mirrored map', '≥', 0.8),
    'outside': Check('share of a map outside the box around the thorax; a high value indicates a shortcut', '≤', 0.3),
    'border': Check('share of a map in the outer 5% of the image; a high value indicates a shortcut', '≤', 0.3),
    'lungs': Check('share of a map inside the box of the lungs, which is 56% of the image', '≥', 0.7),
    'empty': Check('share of pneumonia images without positive evidence, which get no map', '≤', 0.1),
}
"""Name of each number -> what it measures and its target."""


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """Return whether each number in `results` reaches its target; numbers that are None are left out."""
    return {name: check.passes(results[name]) for name, check in CHECKS.items() if results.get(name) is not None}


@dataclass(frozen=True)
class CheckRow:
    """A row of the table of checks, as text; `passed` is None if the number was not measured."""

    description: str
    value: str
    target: str
    passed: bool | None


def check_rows(check: dict[str, Any]) -> list[CheckRow]:
    """Return the rows of the table of checks of `cam_check.json`, with three digits of each number."""
    rows = []
    for name, definition in CHECKS.items():
        value = check.get(name)  # an earlier version measured fewer
        text = 'not measured' if value is None else f'{value:.3g}'
        rows.append(CheckRow(definition.description, text, definition.target_text, check['verdicts'].get(name)))
    return rows

"""The error lines about images that could not be used: one for each image, or one for many of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cxr_fastai.cli.output import print_error
from cxr_fastai.core.errors import ImageError

EXAMPLES = 3
"""Number of images of one kind that have a line of their own, and that the line about more of them names."""


class Failure(NamedTuple):
    """An image that cannot be used: `status` is `error` or `rejected`, `reason` contains the code, such as E_EMPTY."""

    status: str
    path: str
    code: str
    reason: str

    @classmethod
    def from_error(cls, error: ImageError) -> Failure:
        """Return the failure that `error`, which has a path, describes."""
        path, _, reason = str(error).partition(f': {error.code}: ')
        return cls(error.status, path, error.code, f'{error.code}: {reason}')


def print_failures(failures: Iterable[Failure]) -> None:
    """Print the failures to stderr, those of the same status and code together."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.status, failure.code), []).append(failure)
    for group in groups.values():
        for line in _describe(group):
            print_error(line)


def _describe(group: Sequence[Failure]) -> list[str]:
    """Return a line for each failure of a `group` with the same code, or one line for all if there are many."""
    if len(group) <= EXAMPLES:
        return [f'{failure.status}: {failure.path}: {failure.reason}' for failure in group]
    first = group[0]
    examples = ', '.join(failure.path for failure in group[:EXAMPLES])
    return [f'{first.status}: {len(group):,} images with {first.code}, such as {examples}. The first: {first.reason}']

"""Rules for the values in a foreign JSON object: the type and the range of each field.

A schema is a table of field name to rule::

    DECISION = {'threshold': Number(0, 1), 'rule': Text(200), 'temperature': Number(1e-3, 1e3, optional=True)}
    facts = check_object(read_json(path), DECISION, path)
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.foreign import FIX


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What a value may be. With `optional` it may also be null; with `required=False` its field may be missing."""

    optional: bool = False
    required: bool = True

    def accepts(self, value: Any) -> bool:
        """Return whether `value` follows the rule."""
        return (self.optional and value is None) or self._accepts(value)

    @property
    def words(self) -> str:
        """What the rule accepts, for an error message."""
        return f'{self._words} or null' if self.optional else self._words

    @abstractmethod
    def _accepts(self, value: Any) -> bool: ...

    @property
    @abstractmethod
    def _words(self) -> str: ...


@dataclass(frozen=True)
class Number(Rule):
    """A finite number from `low` to `high`. True and false are not numbers."""

    low: float = -math.inf
    high: float = math.inf

    def _accepts(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return -math.inf < value < math.inf and self.low <= value <= self.high

    @property
    def _words(self) -> str:
        return f'a number{_range(self.low, self.high)}'


@dataclass(frozen=True)
class Integer(Rule):
    """A whole number from `low` to `high`, without a decimal point."""

    low: float = -math.inf
    high: float = math.inf

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def _words(self) -> str:
        return f'a whole number{_range(self.low, self.high)}'


@dataclass(frozen=True)
class Text(Rule):
    """A text of at most `max_length` characters; with `pattern` it must match that regular expression as a whole."""

    max_length: int = 1000
    pattern: str | None = None

    def _accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or len(value) > self.max_length:
            return False
        return self.pattern is None or re.fullmatch(self.pattern, value) is not None

    @property
    def _words(self) -> str:
        form = f' of the form {self.pattern}' if self.pattern else ''
        return f'a text of at most {self.max_length} characters{form}'


@dataclass(frozen=True)
class Flag(Rule):
    """True or false."""

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    @property
    def _words(self) -> str:
        return 'true or false'


@dataclass(frozen=True)
class Choice(Rule):
    """One of the texts or numbers in `values`."""

    values: tuple[str | int, ...]

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, str | int) and not isinstance(value, bool) and value in self.values

    @property
    def _words(self) -> str:
        return ', '.join(str(value) for value in self.values)


@dataclass(frozen=True)
class ListOf(Rule):
    """A list of at most `max_length` values that follow the rule `item`."""

    item: Rule
    max_length: int = 1_000_000

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, list) and len(value) <= self.max_length and all(map(self.item.accepts, value))

    @property
    def _words(self) -> str:
        return f'a list of at most {self.max_length:,} values, each {self.item.words}'


@dataclass(frozen=True)
class Table(Rule):
    """An object with at most `max_length` keys of the form `key`, whose values follow the rule `item`."""

    item: Rule
    key: str = '.{1,500}'
    max_length: int = 100_000

    def _accepts(self, value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > self.max_length:
            return False
        return all(re.fullmatch(self.key, name) and self.item.accepts(entry) for name, entry in value.items())

    @property
    def _words(self) -> str:
        return f'an object of at most {self.max_length:,} keys of the form {self.key}, each {self.item.words}'


@dataclass(frozen=True)
class Fields(Rule):
    """An object that follows the schema `fields`; other keys are accepted and ignored."""

    fields: Mapping[str, Rule] = field(default_factory=dict)

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, dict) and not _find_problem(value, self.fields)

    @property
    def _words(self) -> str:
        rules = [f'{name} ({rule.words})' for name, rule in self.fields.items()]
        return f'an object with {", ".join(rules)}'


@dataclass(frozen=True)
class Anything(Rule):
    """Any value that JSON can express."""

    def _accepts(self, value: Any) -> bool:
        return True

    @property
    def _words(self) -> str:
        return 'any value'


def check_object(
    values: Any,
    schema: Mapping[str, Rule],
    source: str | os.PathLike[str],
    fix: str = FIX,
    error: type[CXRError] = CXRError,
) -> dict[str, Any]:
    """Return the fields of `values` that the `schema` names; the file `source` contains them.

    Raises `error`, which names the field, its value and what is allowed, and advises `fix`.
    """
    if not isinstance(values, dict):
        raise error(f'{source}: not an object of JSON, but {_show(values)}. {fix}')
    problem = _find_problem(values, schema)
    if problem:
        raise error(f'{source}: {problem}. {fix}')
    return {name: values[name] for name in schema if name in values}


def _find_problem(values: dict[str, Any], schema: Mapping[str, Rule]) -> str:
    """Return what is wrong with the first field of `values` that does not follow the `schema`; empty if all do."""
    for name, rule in schema.items():
        if name not in values:
            if rule.required:
                return f'{name} is missing'
        elif not rule.accepts(values[name]):
            return f'{name} is {_show(values[name])}, but must be {rule.words}'
    return ''


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return '' if low == -math.inf else f' of at least {low:g}'
    return f' from {low:g} to {high:g}'


def _show(value: Any) -> str:
    return f'{value!r:.80}'

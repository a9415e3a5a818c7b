"""The form in which nbdev's `show_doc` shows a function or class in the notebooks: `renderer` in pyproject.toml."""

from __future__ import annotations

import inspect
import os
import re
from inspect import Parameter
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
WIDTH = 88
"""Columns of a signature that a page of the site can show."""
SECTION = re.compile(r'^(Args|Parameters|Attributes|Returns)(?::|\n-+)\n(.+?)(?=\n\n|\Z)', re.M | re.S)
"""A section of a docstring: its title, and its lines `name: text` or `name : text`, or what is returned."""
STARS = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}


class Reference:
    """Signature and docstring of `sym` as Markdown, with the parameters as a list and a link to the source."""

    def __init__(self, sym: Any, name: str | None = None, title_level: int = 3) -> None:
        self.sym = sym
        self.name = name or sym.__qualname__
        self.title_level = title_level

    def __repr__(self) -> str:
        return f'{signature(self.sym)}\n\n{inspect.getdoc(self.sym)}'

    def _repr_markdown_(self) -> str:
        heading = f'{"#" * self.title_level} {self.name}'
        text = SECTION.sub(list_entries, inspect.getdoc(self.sym) or '')
        source = os.path.relpath(inspect.getfile(inspect.unwrap(self.sym)), FOLDER)
        return f'---\n\n{heading}\n\n```python\n{signature(self.sym)}\n```\n\n{text}\n\n[Source]({source})'


def signature(sym: Any) -> str:
    """Return the signature of a function or class, in one line or with a line for each parameter.

    nbdev evaluates annotations, which fails for names that are imported only for type checkers. Here they stay text.
    """
    found = inspect.signature(sym)
    parameters = [format_parameter(parameter) for parameter in found.parameters.values()]
    head = f'{"class" if inspect.isclass(sym) else "def"} {sym.__name__}('
    returns = '' if inspect.isclass(sym) else format_annotation(' -> ', found.return_annotation)
    line = f'{head}{", ".join(parameters)}){returns}'
    if len(line) <= WIDTH:
        return line
    return '\n    '.join([head, *(f'{parameter},' for parameter in parameters)]) + f'\n){returns}'


def format_parameter(parameter: Parameter) -> str:
    name = STARS.get(parameter.kind, '') + parameter.name
    annotation = format_annotation(': ', parameter.annotation)
    if parameter.default is parameter.empty:
        return name + annotation
    default = getattr(parameter.default, '__name__', repr(parameter.default))
    return f'{name}{annotation} = {default}' if annotation else f'{name}={default}'


def format_annotation(separator: str, annotation: Any) -> str:
    if annotation is Parameter.empty:
        return ''
    return separator + (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def list_entries(section: re.Match[str]) -> str:
    """Return a section of a docstring as a Markdown list, or as a text if it has no names."""
    if section[1] == 'Returns':
        return f'**Returns** {" ".join(section[2].split())}'
    entries = re.split(r'\n(?=\S)', inspect.cleandoc(section[2]))
    items = [re.sub(r'^([\w*, ]+?) ?: ', r'`\1`: ', ' '.join(entry.split())) for entry in entries]
    return f'**{section[1]}**\n\n' + '\n'.join(f'- {item}' for item in items)

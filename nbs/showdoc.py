"""The form in which nbdev's `show_doc` shows a function or class in the notebooks: `renderer` in pyproject.toml."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from fastcore.docments import MarkdownRenderer

FOLDER = Path(__file__).resolve().parent
HEADINGS = ('Args', 'Parameters', 'Attributes', 'Returns')


class Reference(MarkdownRenderer):
    """Signature and docstring as Markdown, with the parameters as a list and a link to the source."""

    def __init__(self, sym: Any, name: str | None = None, title_level: int = 3, maxline: int = 88) -> None:
        super().__init__(sym, name, title_level, maxline)
        text = inspect.getdoc(self.sym) or ''
        if find_section(text):
            # The list below the signature describes the parameters.
            for parameter in self.dm.dm.values():
                parameter.pop('docment', None)
        self.docs = list_parameters(text)

    def _repr_markdown_(self) -> str:
        heading = f'{"#" * self.title_level} {self.nm}'
        source = os.path.relpath(inspect.getfile(self.sym), FOLDER)
        return f'---\n\n{heading}\n\n```python\n{self.dm}\n```\n\n{self.docs}\n\n[Source]({source})'


def find_section(text: str) -> re.Match[str] | None:
    """Return the first section of a docstring, `Args:` or `Parameters` with its underline, and its lines."""
    title = f'({"|".join(HEADINGS)})'
    return re.search(rf'^{title}(?::|\n-+)\n(.+?)(?=\n\n|\Z)', text, re.M | re.S)


def list_parameters(text: str) -> str:
    """Return the docstring `text` with each section as a Markdown list."""
    while section := find_section(text):
        lines = inspect.cleandoc(section[2])
        entries = [' '.join(entry.split()) for entry in re.split(r'\n(?=\S)', lines)]
        named = [re.sub(r'^([\w*, ]+?) ?: ', r'`\1`: ', entry) for entry in entries]
        items = '\n'.join(f'- {entry}' for entry in named)
        text = text[: section.start()] + f'**{section[1]}**\n\n{items}' + text[section.end() :]
    return text

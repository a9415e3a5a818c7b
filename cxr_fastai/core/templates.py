"""Templates become text: pages that need nothing else, in which no name can become markup."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def fill(template: str, **values: Any) -> str:
    """The package's `template` with `values`; in HTML everything that is not marked as markup is escaped. Raises
    jinja2's `UndefinedError` for a value that is missing."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    folders = sorted(Path(__file__).parents[1].glob('*/templates'))
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=select_autoescape(['html']),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def markdown(text: str) -> Markup:
    """Markdown as HTML; what looks like markup in it stays text, and links lead nowhere but to the web."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    return Markup(MarkdownIt('commonmark', {'html': False}).enable('table').render(text))


def data_uri(picture: bytes, kind: str) -> str:
    """The bytes of a `picture` of the media type `kind`, as an address that holds it."""
    return f'data:{kind};base64,{base64.b64encode(picture).decode()}'

"""Rendering of the Jinja templates of all rooms, and of Markdown, into self-contained text and HTML pages."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.progress import counted

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render_template(template: str, **values: Any) -> str:
    """Return the text of `template`, a file name in the `templates/` folder of a room, rendered with `values`.

    In HTML templates every value is escaped, unless it is a `Markup`. Templates can call `counted`. Raises
    `jinja2.UndefinedError` if a value is missing.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    package = Path(__file__).parents[1]
    environment = Environment(
        loader=FileSystemLoader(sorted(package.glob('*/templates'))),
        autoescape=select_autoescape(['html']),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals['counted'] = counted
    return environment


def markdown(text: str) -> Markup:
    """Convert Markdown (CommonMark with tables) to HTML. HTML tags in it stay text, and unsafe links are dropped."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt('commonmark', {'html': False}).enable('table')
    return Markup(parser.render(text))


def data_uri(content: bytes, media_type: str) -> str:
    """Return a `data:` URI that contains `content`, such as an image of the media type `image/png`."""
    return f'data:{media_type};base64,{base64.b64encode(content).decode()}'

"""Templates and Markdown become safe, self-contained HTML."""

import pytest
from jinja2 import UndefinedError

from cxr_fastai.core.templates import data_uri, markdown, render_template


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        render_template('space.md')


def test_markdown_keeps_html_as_text_and_drops_unsafe_links():
    html = markdown('<script>x</script> [a](javascript:alert) [b](https://example.org)\n\n| a |\n|---|\n| b |')
    assert '&lt;script&gt;' in html and '<script>' not in html
    assert 'href="javascript' not in html
    assert 'href="https://example.org"' in html
    assert '<table>' in html


def test_a_data_uri_contains_the_bytes():
    assert data_uri(b'abc', 'image/png') == 'data:image/png;base64,YWJj'

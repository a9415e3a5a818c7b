"""Figures as PNG files and as inline SVG elements."""

import re

import pytest
from matplotlib import rc_context

from cxr_fastai.core.figures import BLUE, INK, NotebookFigure, axes, own_style, save_figure, set_title, to_svg
from cxr_fastai.core.templates import render_template


@pytest.fixture
def figure():
    figure, ax = axes(4, 3)
    ax.plot([0, 1], [1, 0], color=BLUE, marker='o', label='<b>&"')
    ax.annotate('words', (0.5, 0.5), color=INK)
    ax.legend().get_texts()[0].set_parse_math(False)
    set_title(ax, r'$\bad$ <i>')
    return figure


def test_text_stays_text_and_markup_is_escaped(figure):
    svg = to_svg(figure, 'a "figure" <of> mine')
    assert svg.startswith('<svg role="img" aria-label="a &quot;figure&quot; &lt;of&gt; mine" viewBox="0 0 288 216">')
    assert '>words</text>' in svg
    assert '&lt;b&gt;&amp;' in svg
    assert r'$\bad$ &lt;i&gt;' in svg
    assert '<i>' not in svg


def test_colours_follow_the_theme_of_the_page(figure):
    svg = to_svg(figure, 'x')
    page = render_template('page.html')
    for variable in re.findall(r'var\((--\w+)\)', svg):
        assert page.count(f'{variable}: ') == 2, f'{variable} needs a value for the light and for the dark theme'
    assert {'--blue', '--ink'} <= set(re.findall(r'var\((--\w+)\)', svg))
    assert not re.search(f'{BLUE}|{INK}|#000000', svg, re.IGNORECASE)


def test_the_page_sets_the_font_of_the_text(figure):
    assert re.search(
        r'svg :is\(text, tspan\) { font-family: system-ui, sans-serif !important; }', render_template('page.html')
    )


def test_an_svg_refers_to_nothing_outside_itself(figure):
    svg = to_svg(figure, 'x')
    assert not re.search(r'https?:|xmlns|<metadata|<style|<!--|<\?xml', svg)
    assert svg.count('<svg') == 1 and svg.rstrip().endswith('</svg>')


def test_two_svgs_of_a_page_share_no_ids(figure):
    first, second = to_svg(figure, 'one'), to_svg(figure, 'two')
    first_ids, second_ids = (set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second))
    assert first_ids and not first_ids & second_ids
    assert all(f'#{name}' in first for name in first_ids)
    assert to_svg(figure, 'one') == first


def test_a_png_is_written_completely(figure, tmp_path):
    save_figure(figure, tmp_path / 'f.png')
    assert (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG')
    assert len(list(tmp_path.iterdir())) == 1


def test_settings_of_the_user_for_matplotlib_do_not_reach_the_figures(tmp_path):
    rates = [0.1, 0.2]
    images = []
    for settings in ({}, {'text.usetex': True, 'font.size': 40, 'figure.facecolor': 'red', 'savefig.dpi': 5}):
        with rc_context(settings):
            figure = draw(rates)
            save_figure(figure, tmp_path / 'figure.png')
            images.append(((tmp_path / 'figure.png').read_bytes(), to_svg(figure, 'text')))
    assert images[0] == images[1]


@own_style()
def draw(values: list[float]) -> NotebookFigure:
    figure, ax = axes(2, 2)
    ax.plot(values)
    set_title(ax, 'title')
    return figure

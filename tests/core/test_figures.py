"""A figure on a page takes the page's colours and letters, and brings nothing from elsewhere."""

import re

import pandas as pd
import pytest

from cxr_fastai.core.figures import BLUE, INK, axes, entitle, save_figure, to_svg
from cxr_fastai.evaluation.plots import plot_rates
from cxr_fastai.training.lr_finder import Rates


@pytest.fixture
def figure():
    figure, ax = axes(4, 3)
    ax.plot([0, 1], [1, 0], color=BLUE, marker='o', label='<b>&"')
    ax.annotate('words', (0.5, 0.5), color=INK)
    ax.legend().get_texts()[0].set_parse_math(False)
    entitle(ax, r'$\bad$ <i>')
    return figure


def test_words_stay_words_and_markup_stays_text(figure):
    svg = to_svg(figure, 'a "figure" <of> mine')
    assert svg.startswith('<svg role="img" aria-label="a &quot;figure&quot; &lt;of&gt; mine" viewBox=')
    assert '>words</text>' in svg and '&lt;b&gt;&amp;' in svg and r'$\bad$ &lt;i&gt;' in svg and '<i>' not in svg


def test_colours_and_letters_are_the_pages(figure):
    svg = to_svg(figure, 'x')
    assert 'var(--blue)' in svg and 'var(--ink)' in svg and not re.search(f'{BLUE}|{INK}|#000000', svg, re.IGNORECASE)
    assert 'system-ui, sans-serif' in svg and 'DejaVu' not in svg


def test_nothing_comes_from_elsewhere_and_identifiers_do_not_meet(figure):
    first, second = to_svg(figure, 'one'), to_svg(figure, 'two')
    assert not re.search(r'https?:|xmlns|<metadata|<style|<!--', first)
    names = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert names[0] and not names[0] & names[1]
    assert all(f'#{name}' in first for name in names[0]) and to_svg(figure, 'one') == first


def test_a_picture_is_written_whole(figure, tmp_path):
    save_figure(figure, tmp_path / 'f.png')
    assert (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG') and len(list(tmp_path.iterdir())) == 1


def test_a_learning_rates_curve_is_whole_up_to_the_suggestion_also_where_a_lucky_batch_comes_first():
    curve = pd.DataFrame({'lr': [1e-7, 1e-5, 1e-3, 1e-2, 1], 'loss': [0.65, 0.70, 0.72, 0.66, 5]})
    low, high = plot_rates(Rates(curve, 1e-3)).axes[0].get_ylim()
    assert low < 0.65 and 0.72 < high < 1

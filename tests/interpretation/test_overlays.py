"""Figures of explanations show the image, the score and the caveat, and no map without evidence."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from cxr_fastai.core.errors import UsageError
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.interpretation.overlays import (
    CAVEAT,
    NO_EVIDENCE,
    Explanation,
    plot_explanation,
    plot_gallery,
    plot_mean_maps,
)

RNG = np.random.default_rng(0)


def words(figure: Figure) -> str:
    return ' '.join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text')))


def explanation(heat=None, **how) -> Explanation:
    heat = np.clip(RNG.random((60, 90)), 0, 1) if heat is None else heat
    return Explanation(RNG.integers(0, 255, (60, 90), dtype=np.uint8), heat, r'$\bad$.jpeg', 0.7, 0.4, **how)


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_a_map_covers_what_the_network_saw(resize):
    image = np.zeros((300, 200), np.uint8)
    image[150:180, 60:90] = 255
    seen = Preprocessing(64, resize)
    over = seen.map_to_image(seen.square(image) / 255, 300, 200)
    assert over.shape == (300, 200)
    y, x = np.unravel_index(over.argmax(), over.shape)
    assert 145 <= y <= 185 and 55 <= x <= 95
    if resize == 'crop':
        assert not over[:45].any() and not over[-45:].any()


def test_a_figure_shows_the_score_and_the_caveat():
    shown = words(plot_explanation(explanation(label='NORMAL')))
    summary = 'p(pneumonia) 0.700, threshold 0.4: PNEUMONIA; true: NORMAL'
    assert all(text in shown for text in (CAVEAT, summary, 'evidence for PNEUMONIA', r'$\bad$'))


def test_an_empty_map_is_not_drawn():
    empty = explanation(np.zeros((60, 90)))
    figure = plot_explanation(empty)
    assert NO_EVIDENCE in words(figure) and CAVEAT not in words(figure) and len(figure.axes) == 2  # no colour bar
    assert [len(ax.images) for ax in figure.axes] == [1, 1]  # only the image
    assert NO_EVIDENCE in words(plot_gallery([empty]))


def test_a_caption_has_the_probability_the_label_and_the_file_name():
    assert explanation(label='NORMAL').caption == 'p(pneumonia) 0.700 · labelled NORMAL\n' + r'$\bad$.jpeg'
    long_name = replace(explanation(), name=f'train/NORMAL/{"a" * 40}\u202e{"b" * 40}.jpeg').caption.splitlines()[1]
    assert long_name == f'{"a" * 17}…{"b" * 13}.jpeg'
    shown = words(plot_gallery([explanation(), explanation(label='NORMAL')], 'mine · threshold 0.4', columns=1))
    assert r'$\bad$.jpeg' in shown and 'mine\nthreshold 0.4' in shown and CAVEAT in shown


@pytest.mark.parametrize('shape', [(60, 90), (90, 60)])
@pytest.mark.parametrize('heatmap', [True, False])
def test_a_gallery_fits_its_images_and_captions_do_not_overlap(shape, heatmap):
    image = np.zeros(shape, np.uint8)
    shown = replace(explanation(np.ones(shape), label='PNEUMONIA'), image=image, name='person1000_bacteria_2931.jpeg')
    figure = plot_gallery([shown] * 8, 'title', heatmap=heatmap)
    figure.draw_without_rendering()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    assert all(left.x1 < right.x0 for left, right in zip(titles[:3], titles[1:4], strict=True))
    area = sum(ax.get_window_extent().width * ax.get_window_extent().height for ax in figure.axes)
    assert area / figure.bbox.width / figure.bbox.height > 0.6


def test_images_keep_their_aspect_ratio():
    figure = plot_explanation(explanation())
    figure.draw_without_rendering()
    for ax in figure.axes[:2]:
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(1.5, rel=0.02)


def test_mean_maps_are_the_means_of_each_class():
    figure = plot_mean_maps(
        [
            explanation(np.full((60, 90), share), label=label)
            for share, label in ((0.2, 'NORMAL'), (0.4, 'NORMAL'), (1.0, 'PNEUMONIA'))
        ]
    )
    means = [ax.images[0].get_array().mean() for ax in figure.axes[:2]]
    assert means == pytest.approx([0.3, 1.0]) and 'NORMAL, mean of 2' in words(figure)
    with pytest.raises(UsageError, match='mean maps need images of a known class'):
        plot_mean_maps([explanation()])

"""Figures show the numbers of the tables that they are drawn from."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxr_fastai.core.figures import NotebookFigure, to_svg
from cxr_fastai.evaluation.curves import (
    plot_calibration,
    plot_comparison,
    plot_net_benefit,
    plot_precision_recall,
    plot_risk_coverage,
    plot_roc,
    plot_scores,
)
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.evaluation.metrics import measure
from cxr_fastai.evaluation.plots import plot_confusion_matrix, plot_history, plot_rates
from cxr_fastai.training.lr_finder import Rates

TARGS = np.arange(40) < 25
PREDICTIONS = pd.DataFrame(
    {
        'label': np.where(TARGS, 'PNEUMONIA', 'NORMAL'),
        'p_pneumonia': np.clip(TARGS * 0.4 + np.linspace(0, 0.7, 40)[::-1], 0, 1),
    }
)
METRICS = measure(PREDICTIONS, 0.5, 'fixed:0.5')


HISTORY = pd.DataFrame(
    np.linspace(0.1, 0.9, 15).reshape(3, 5),
    columns=['train_loss', 'valid_loss', 'roc_auc', 'sensitivity', 'specificity'],
).assign(phase=['frozen', 'fine-tune', 'fine-tune'], epoch=[1, 2, 3])


def scores(centre: float, width: float, shift: float = 1.5, n: int = 300) -> pd.DataFrame:
    """Return predictions within `width` around `centre`; the AUC increases with `shift`."""
    targs = np.arange(n) < 0.6 * n
    raw = np.random.default_rng(0).normal(size=n) + shift * targs
    p = centre + width * ((raw - raw.min()) / np.ptp(raw) - 0.5)
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p})


def draw(plot, predictions: pd.DataFrame, threshold: float = 0.5) -> Figure:
    """Return a figure with the positions that constrained layout gives its parts."""
    figure = plot(predictions, measure(predictions, threshold, f'fixed:{threshold}'), 'a run')
    figure.draw_without_rendering()
    return figure


def words(figure: Figure) -> str:
    return ' '.join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text')))


def test_the_confusion_matrix_shows_counts_and_row_percentages():
    c, shown = METRICS['confusion'], words(plot_confusion_matrix(METRICS, 'a run'))
    for n, row in ((c['tn'], c['tn'] + c['fp']), (c['fn'], c['fn'] + c['tp'])):
        assert f'{n}\n{n / row:.1%}' in shown
    assert 'n = 40, threshold 0.5' in shown


def test_the_roc_curve_shows_the_auc_and_the_operating_point():
    figure = plot_roc(PREDICTIONS, METRICS, 'a run')
    assert format_estimate(METRICS['auc']) in words(figure)
    points = [line.get_xydata()[0].tolist() for line in figure.axes[0].lines if line.get_marker() == 'o']
    assert points == [[1 - METRICS['specificity']['value'], METRICS['sensitivity']['value']]]


def test_the_history_names_its_phases():
    shown = words(plot_history(HISTORY))
    assert all(name in shown for name in ('frozen', 'fine-tune', 'valid loss', 'AUC'))


def test_the_history_names_the_threshold_of_sensitivity_and_specificity():
    shown = words(plot_history(HISTORY))
    assert 'sensitivity at threshold 0.5' in shown and 'specificity at threshold 0.5' in shown


def test_the_history_marks_the_kept_epoch_in_both_panels():
    for ax in plot_history(HISTORY, kept_epoch=2).axes:
        assert [line.get_xdata() for line in ax.lines if line.get_label() == 'kept epoch: 2'] == [[2, 2]]
    for epoch in (None, 9):
        assert 'kept epoch' not in words(plot_history(HISTORY, epoch))


def test_the_history_of_a_training_without_validation_shows_its_training_loss_alone():
    columns = ['valid_loss', 'accuracy', 'roc_auc', 'sensitivity', 'specificity']
    figure = plot_history(HISTORY.assign(**dict.fromkeys(columns, float('nan'))), kept_epoch=2)
    assert len(figure.axes) == 1
    assert figure.axes[0].get_legend_handles_labels()[1] == ['train loss', 'kept epoch: 2']


def test_the_history_of_one_epoch_has_ticks_at_whole_epochs():
    for ax in plot_history(HISTORY.head(1), kept_epoch=1).axes:
        assert 1 in ax.get_xticks() and all(tick.is_integer() for tick in ax.get_xticks())


def test_a_phase_that_comes_again_is_shaded_again():
    history = pd.DataFrame({'phase': ['frozen', 'unfrozen', 'frozen', 'unfrozen'], 'epoch': [1, 2, 3, 4]})
    history = history.assign(train_loss=0.7, valid_loss=0.7, roc_auc=0.5, sensitivity=0.5, specificity=0.5)
    ax = plot_history(history).axes[0]
    assert [(span.get_x(), span.get_width()) for span in ax.patches] == [(0.5, 1), (1.5, 1), (2.5, 1), (3.5, 1)]
    assert [text.get_text() for text in ax.texts] == history.phase.tolist()


def test_a_figure_of_several_panels_is_a_picture_in_a_notebook_without_pyplot():
    """IPython shows other figures as text until the notebook draws one with pyplot."""
    history = pd.DataFrame({'phase': 'train', 'epoch': [1], 'train_loss': [0.7], 'valid_loss': [0.7]})
    history = history.assign(roc_auc=0.5, sensitivity=0.5, specificity=0.5)
    for figure in (plot_history(history), plot_calibration(PREDICTIONS, METRICS)):
        assert isinstance(figure, NotebookFigure)  # tests/core shows such figures in a kernel


@pytest.mark.parametrize(
    ('plot', 'labels'),
    [
        (plot_roc, ('1 - specificity', 'sensitivity', '95% bootstrap band', 'both targets met')),
        (plot_precision_recall, ('sensitivity (recall)', 'PPV (precision)', 'chance level (prevalence 0.625)')),
        (plot_calibration, ('predicted probability of pneumonia', 'perfect calibration', 'temperature 2.00')),
        (plot_scores, ('normal (n = 15)', 'pneumonia (n = 25)', 'threshold 0.4', 'threshold 0.5')),
        (plot_net_benefit, ('threshold probability', 'treat all', 'treat none', 'model')),
        (plot_risk_coverage, ('coverage', 'accuracy on these images')),
    ],
)
def test_axes_and_lines_of_a_curve_are_labelled(plot, labels):
    shown = words(plot(PREDICTIONS, measure(PREDICTIONS, 0.4, 'fixed:0.4', temperature=2.0), 'a run'))
    assert all(label in shown for label in labels)


@pytest.mark.parametrize('centre', [0.015, 0.3, 0.5, 0.62, 0.984])
@pytest.mark.parametrize('width', [0.02, 0])
def test_scores_that_lie_close_together_have_different_tick_labels(centre, width):
    ax = draw(plot_scores, scores(centre, width)).axes[0]
    low, high = ax.get_xlim()
    labels = [label for label, tick in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True) if low <= tick <= high]
    assert len({label.get_text() for label in labels}) == len(labels) >= 3
    boxes = [label.get_window_extent() for label in labels]
    assert not any(box.overlaps(after) for box, after in zip(boxes, boxes[1:], strict=False))


def test_the_scores_of_a_wide_range_keep_the_usual_tick_labels():
    labels = [label.get_text() for label in draw(plot_scores, scores(0.5, 0.99)).axes[0].get_xticklabels()]
    assert labels == ['0.01', '0.1', '0.5', '0.9', '0.99']


@pytest.mark.parametrize('predictions', [PREDICTIONS, scores(0.5, 0.9), scores(0.5, 0.02)])
def test_the_legend_of_the_scores_covers_no_bar_and_no_line(predictions):
    figure = draw(plot_scores, predictions, 0.4)
    legend = figure.legends[0].get_window_extent()
    ax = figure.axes[0]
    assert ax.patches and not any(legend.overlaps(bar.get_window_extent()) for bar in ax.patches)
    assert not legend.overlaps(ax.bbox)


def test_a_threshold_that_is_no_score_of_the_figure_is_named_as_such():
    assert 'threshold 0.5, below all images' in words(draw(plot_scores, scores(0.98, 0.02)))
    assert 'threshold 0.5, above all images' in words(draw(plot_scores, scores(0.02, 0.02)))


@pytest.mark.parametrize('width', [0.02, 0.5, 0.99])
def test_no_two_error_bars_of_a_calibration_are_in_one_place(width):
    predictions = scores(0.5, width)
    ax = draw(plot_calibration, predictions).axes[0]
    positions = ax.containers[0].lines[0].get_xdata()
    assert (np.diff(positions) >= 0.05).all()
    assert len(positions) == (1 if width == 0.02 else len(positions)) <= 10


@pytest.mark.parametrize(('shift', 'n_insets'), [(0.5, 0), (1.5, 0), (3.3, 1), (9, 1)])
def test_the_roc_curve_of_a_good_model_has_an_inset_of_the_upper_left(shift, n_insets):
    predictions = scores(0.5, 0.98, shift)
    figure = draw(plot_roc, predictions)
    insets = figure.axes[0].child_axes
    assert len(insets) == n_insets
    for inset in insets:
        assert inset.get_xlim() == pytest.approx((-0.01, 0.2)) and inset.get_ylim() == pytest.approx((0.8, 1.01))
        assert [line.get_marker() for line in inset.lines].count('o') == 1  # the operating point is in it
        box = inset.get_tightbbox()
        assert not box.overlaps(figure.axes[0].get_legend().get_window_extent())
    assert '#ffffff' not in to_svg(figure, 'x')  # which would be a white box on the dark page of a report


def test_the_legend_of_a_roc_curve_shows_markers_without_error_bars():
    handles = draw(plot_roc, PREDICTIONS, 0.4).axes[0].get_legend().legend_handles
    assert [handle.get_marker() for handle in handles if isinstance(handle, Line2D)] == ['None', 'o', 's']
    assert not [handle for handle in handles if isinstance(handle, ErrorbarContainer)]


@pytest.mark.parametrize('predictions', [PREDICTIONS, scores(0.5, 0.9, 0.2), scores(0.5, 0.9, 2), scores(0.5, 0.9, -2)])
def test_the_labels_of_accuracy_by_coverage_are_not_on_the_line(predictions):
    ax = draw(plot_risk_coverage, predictions).axes[0]
    line = ax.lines[0].get_path().transformed(ax.transData)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3 and not any(line.intersects_bbox(box, filled=False) for box in boxes)
    assert not any(box.overlaps(after) for box, after in zip(boxes, boxes[1:], strict=False))


def test_a_comparison_shows_the_auc_and_the_metrics_of_every_run():
    figure = plot_comparison({'first': PREDICTIONS, '$second$': PREDICTIONS}, {'first': METRICS, '$second$': METRICS})
    shown = words(figure)
    for name in ('first', '$second$'):
        assert f'{name}: AUC {format_estimate(METRICS["auc"])}' in shown
    assert all(name in shown for name in ('AUC', 'sensitivity', 'specificity', 'accuracy', 'target'))


def test_a_title_is_not_parsed_as_mathematics():
    for figure in (plot_confusion_matrix(METRICS, r'$\bad$'), plot_roc(PREDICTIONS, METRICS, r'$\bad$')):
        figure.savefig('/dev/null', format='png')


def test_the_learning_rate_curve_is_complete_up_to_the_suggestion_also_if_the_first_loss_is_low():
    curve = pd.DataFrame({'lr': [1e-7, 1e-5, 1e-3, 1e-2, 1], 'loss': [0.65, 0.70, 0.72, 0.66, 5]})
    low, high = plot_rates(Rates(curve, 1e-3)).axes[0].get_ylim()
    assert low < 0.65 and 0.72 < high < 1

"""Figures show the numbers of the tables that they are drawn from."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cxr_fastai.core.figures import NotebookFigure
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
    columns = ['train_loss', 'valid_loss', 'roc_auc', 'sensitivity', 'specificity']
    history = pd.DataFrame(np.linspace(0.1, 0.9, 15).reshape(3, 5), columns=columns).assign(
        phase=['frozen', 'fine-tune', 'fine-tune'], epoch=[1, 2, 3]
    )
    shown = words(plot_history(history))
    assert all(name in shown for name in ('frozen', 'fine-tune', 'valid loss', 'AUC'))


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

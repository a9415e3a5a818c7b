"""`CXRInterpretation` sorts the predictions of a run, shows them with maps, and does not predict them again."""

import shutil

import pytest
from matplotlib.figure import Figure

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.figures import shown_images
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.interpretation import CXRInterpretation
from cxr_fastai.publishing import reporting


@pytest.fixture(scope='module')
def interpretation(evaluated, images) -> CXRInterpretation:
    return CXRInterpretation.from_run(evaluated, 'test', images)


def test_known_probabilities_are_not_predicted_again(evaluated, images, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError('predicted again')

    monkeypatch.setattr(Predictor, 'scores', refuse)
    interpretation = CXRInterpretation.from_run(evaluated, 'test', images)
    assert len(interpretation.predictions) == 12
    assert len(interpretation.cam(interpretation.top_losses(2))) == 2


def test_errors_are_sorted_by_loss_and_uncertain_predictions_by_distance_to_the_threshold(interpretation):
    errors = interpretation.most_confident_errors(5)
    assert (errors.prediction != errors.label).all() and errors.loss.is_monotonic_decreasing
    assert set(interpretation.errors('false positive').label) <= {'NORMAL'}
    assert set(interpretation.errors('false negative').label) <= {'PNEUMONIA'}
    predictions = interpretation.predictions
    distance = (predictions.p_pneumonia - interpretation.metrics['threshold']).abs()
    assert interpretation.most_uncertain(1).path.iloc[0] == predictions.path[distance.idxmin()]
    with pytest.raises(UsageError, match='not a kind of error'):
        interpretation.errors('wrong')


def test_explanations_have_the_probability_label_and_name_of_their_image(interpretation):
    rows = interpretation.top_losses(3)
    explanations = interpretation.cam(rows)
    assert [explanation.p for explanation in explanations] == pytest.approx(rows.p_pneumonia.to_list(), abs=1e-5)
    assert [explanation.label for explanation in explanations] == rows.label.to_list()
    assert [explanation.name for explanation in explanations] == rows.path.to_list()
    for explanation in explanations:
        assert explanation.heat.shape == explanation.image.shape
        assert 0 <= explanation.heat.min() <= explanation.heat.max() <= 1


@pytest.mark.parametrize('plot', ['plot_top_losses', 'plot_uncertain', 'plot_confusion_matrix', 'plot_mean_maps'])
def test_every_plot_is_a_figure(interpretation, plot):
    assert isinstance(getattr(interpretation, plot)(), Figure)


def test_the_command_explains_the_highest_losses_and_the_report_shows_maps(evaluated, images, tmp_path, monkeypatch):
    run = Run(tmp_path / 'run')
    shutil.copytree(evaluated.path, run.path)
    monkeypatch.setattr(reporting, 'draw', lambda *_: {})  # the curves are slow and tested elsewhere
    assert 'class="cam"' not in reporting.report(run).read_text()
    options = f'--top-losses 3 --split test --data {images} --method gradcam++ --target NORMAL'
    assert main(['explain', str(run.path), *options.split()]) == 0
    assert len(list((run / 'figures/explained').iterdir())) == 3
    for name in ('top_losses', 'uncertain', 'mean_maps'):
        assert (run / f'figures/{name}_test.png').is_file()
    n_shown = len(shown_images(run.predicted('test')))
    assert len(list((run / 'figures/cams').iterdir())) == n_shown
    page = reporting.report(run).read_text()
    assert page.count('class="cam"') == n_shown and 'not a lesion outline' in page

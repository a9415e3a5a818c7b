"""`CXRInterpretation` sorts the predictions of a run, shows them with maps, and does not predict them again."""

import shutil

import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from matplotlib.figure import Figure

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.figures import shown_images, typical_correct
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.galleries import save_galleries
from cxr_fastai.interpretation.interpretation import ERROR_KINDS, CXRInterpretation
from cxr_fastai.publishing import reporting


@pytest.fixture(scope='module')
def interpretation(evaluated, images) -> CXRInterpretation:
    return CXRInterpretation.from_run(evaluated, 'test', images)


@pytest.fixture
def refuse_predictions(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError('predicted again')

    monkeypatch.setattr(Predictor, 'scores', refuse)
    monkeypatch.setattr(Learner, 'get_preds', refuse)


def captions(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def test_known_probabilities_are_not_predicted_again(evaluated, images, refuse_predictions, capsys):
    interpretation = CXRInterpretation.from_run(evaluated, 'test', images)
    assert len(interpretation.predictions) == 12
    assert len(interpretation.cam(interpretation.hardest(2))) == 2
    inputs, preds, targs, decoded, losses = interpretation[[1, 3]]
    assert inputs.shape == (2, 3, 64, 64) and losses.tolist() == interpretation.losses[[1, 3]].tolist()
    interpretation.show_results([0, 1])
    interpretation.print_classification_report()
    assert 'PNEUMONIA' in capsys.readouterr().out


def test_the_attributes_of_fastai_are_the_stored_predictions_at_the_threshold_of_the_run(interpretation, evaluated):
    assert isinstance(interpretation, ClassificationInterpretation)
    stored = evaluated.predicted('test')
    threshold = evaluated.metrics['test']['threshold']
    assert interpretation.threshold == threshold
    assert interpretation.preds[:, 1].tolist() == stored.p_pneumonia.to_list()
    assert interpretation.losses.tolist() == stored.loss.to_list()
    assert [interpretation.vocab[i] for i in interpretation.targs] == stored.label.to_list()
    assert [interpretation.vocab[i] for i in interpretation.decoded] == stored.prediction.to_list()
    cells = evaluated.metrics['test']['confusion']
    assert interpretation.confusion_matrix().tolist() == [[cells['tn'], cells['fp']], [cells['fn'], cells['tp']]]
    losses, positions, items = interpretation.top_losses(3, items=True)
    assert positions.tolist() == interpretation.hardest(3).index.to_list()
    assert [path.endswith(name) for path, name in zip(items.path, interpretation.hardest(3).path, strict=True)]
    assert len(interpretation.dl.items) == len(interpretation.top_losses()[0]) == len(interpretation.top_losses(99)[0])


def test_the_learner_is_needed_only_for_the_inputs_of_the_network(evaluated, images, tmp_path):
    run = Run(tmp_path / 'run')
    shutil.copytree(evaluated.path, run.path)
    (run / 'learner.pkl').unlink()
    interpretation = CXRInterpretation.from_run(run, 'test', images)
    assert len(captions(interpretation.plot_top_losses(2))) == 2
    interpretation.most_confused()
    with pytest.raises(UsageError, match='learner.pkl: no such file. This method of fastai needs'):
        interpretation.show_results([0])


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
    rows = interpretation.hardest(3)
    explanations = interpretation.cam(rows)
    assert [explanation.p for explanation in explanations] == pytest.approx(rows.p_pneumonia.to_list(), abs=1e-5)
    assert [explanation.label for explanation in explanations] == rows.label.to_list()
    assert [explanation.name for explanation in explanations] == rows.path.to_list()
    for explanation in explanations:
        assert explanation.heat.shape == explanation.image.shape
        assert 0 <= explanation.heat.min() <= explanation.heat.max() <= 1


def test_images_are_chosen_by_rows_positions_or_a_mask(interpretation, evaluated):
    path = interpretation.predictions.path
    for rows in ([2, 5], range(2, 6, 3), torch.tensor([2, 5]), np.array([2, 5]), np.isin(np.arange(len(path)), [2, 5])):
        assert [subject.name for subject in interpretation.subjects(rows)] == [path[2], path[5]]
    for row in (3, torch.tensor(3), np.int64(3)):
        assert [subject.name for subject in interpretation.subjects(row)] == [path[3]]
    every_split = evaluated.predictions  # its rows of the split have other positions
    chosen = typical_correct(every_split[every_split.split == 'test'])
    assert [subject.name for subject in interpretation.subjects(chosen)] == chosen.path.to_list()
    with pytest.raises(UsageError, match='not an image of these predictions'):
        interpretation.cam(every_split[every_split.split == 'valid'])


@pytest.mark.parametrize('plot', ['plot_top_losses', 'plot_uncertain', 'plot_confusion_matrix', 'plot_mean_maps'])
def test_every_plot_is_a_figure(interpretation, plot):
    assert isinstance(getattr(interpretation, plot)(), Figure)


def test_top_losses_are_plotted_by_number_or_rank_in_the_grid_of_fastai(interpretation):
    names = [path.rsplit('/', 1)[1] for path in interpretation.hardest(99).path]
    figure = interpretation.plot_top_losses(5, nrows=1, figsize=(15, 4))
    assert [caption.splitlines()[1] for caption in captions(figure)] == names[:5]
    assert len(figure.axes) == 5 and figure.get_size_inches().tolist() == [15, 4]
    for ranks in (range(4, 6), [4, 5], slice(4, 6), torch.tensor([4, 5])):
        figure = interpretation.plot_top_losses(ranks, heatmap=False)
        assert [caption.splitlines()[1] for caption in captions(figure)] == names[4:6]
    lowest = captions(interpretation.plot_top_losses(1, largest=False, heatmap=False))
    assert names[-1] in lowest[0] and len(captions(interpretation.plot_top_losses(range(10, 99)))) == 2
    assert len(interpretation.plot_top_losses(7, ncols=3, heatmap=False).axes) == 9
    assert 'threshold 0.' in figure.get_suptitle()


def test_the_confusion_matrix_has_the_options_of_fastai(interpretation):
    counts = interpretation.confusion_matrix()
    shares = counts / counts.sum(axis=1, keepdims=True)

    def texts(**options) -> list[str]:
        return [text.get_text() for text in interpretation.plot_confusion_matrix(**options).axes[0].texts]

    assert [text.splitlines()[0] for text in texts()] == [str(count) for count in counts.ravel()]
    assert texts(normalize=True, norm_dec=3) == [f'{share:.3f}' for share in shares.ravel()]
    assert texts(plot_txt=False) == []
    figure = interpretation.plot_confusion_matrix(title='Mine', cmap='Reds', figsize=(3, 3), dpi=60)
    assert figure.axes[0].get_title().startswith('Mine') and figure.axes[0].images[0].get_cmap().name == 'Reds'
    assert figure.get_size_inches().tolist() == [3, 3] and figure.dpi == 60


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


SETUP = """
import warnings; warnings.simplefilter('ignore')
from pathlib import Path
from cxr_fastai.core.run import Run
from cxr_fastai.interpretation.galleries import save_galleries
from cxr_fastai.interpretation.interpretation import CXRInterpretation
interp = CXRInterpretation.from_run(Run(Path({run!r})), 'test', Path({images!r}))
"""
PLOTS = [f'interp.{name}()' for name in vars(CXRInterpretation) if name.startswith('plot_') and name != 'plot_errors']
PLOTS += [f'interp.plot_errors({kind!r}, heatmap=False)' for kind in ERROR_KINDS]


def test_a_notebook_shows_each_figure_once_and_saved_galleries_not_at_all(evaluated, images, tmp_path):
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    run = tmp_path / 'run'
    shutil.copytree(evaluated.path, run)
    cells = {SETUP.format(run=str(run), images=str(images)): 0, 'len(save_galleries(interp, 2))': 0}
    cells |= {plot: 1 for plot in PLOTS} | {f'figure = {plot}': 1 for plot in PLOTS[:3]}
    cells['for k in (1, 2):\n    interp.plot_top_losses(k)'] = 2
    cells['interp.show_results([0, 1])'] = 1
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    nbclient.NotebookClient(notebook, kernel_name='python3', extra_arguments=['--log-level=ERROR']).execute()
    shown = {
        cell.source: sum('image/png' in output.get('data', {}) for output in cell.outputs) for cell in notebook.cells
    }
    assert shown == cells and len(PLOTS) == 6


def test_the_galleries_of_a_learner_have_no_run_folder(interpretation, images, monkeypatch):
    learner = CXRInterpretation.from_learner(interpretation.learn, dl=interpretation.dl)
    with pytest.raises(UsageError, match='saved in a run folder. Save the learner with save_run'):
        save_galleries(learner)

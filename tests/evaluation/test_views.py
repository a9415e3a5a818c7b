"""A threshold for test-time views is chosen with them, and prediction follows the views that it was chosen with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.results import VIEWS
from cxr_fastai.evaluation.thresholds import decide
from cxr_fastai.images.decode import read_image
from cxr_fastai.inference.predictor import Predictor, load_undecided
from cxr_fastai.inference.tables import predict_to_table
from cxr_fastai.publishing.model_card import render_card, reproduce
from cxr_fastai.publishing.reporting import render


@pytest.fixture(scope='module')
def viewed(once, run, images) -> Run:
    """A copy of the run, evaluated with test-time views through the command line; not to be changed by a test."""

    def make(folder: Path) -> None:
        shutil.copytree(run.path, folder)
        assert main(['evaluate', str(folder), '--data', str(images), '--tta', '--threshold', 'youden']) == 0

    return Run.open(once('viewed', make))


@pytest.fixture(scope='module')
def viewed_bundle(once, viewed) -> Path:
    return once('viewed_bundle', lambda folder: main(['export', str(viewed.path), '--out', str(folder)]))


@pytest.fixture
def copy(viewed, tmp_path) -> Run:
    return Run(Path(shutil.copytree(viewed.path, tmp_path / 'run')))


def plain_means(run: Run, images: Path, paths: list[str]) -> np.ndarray:
    """The means of the probabilities of each image and its mirror image, computed one by one."""
    predictor = load_undecided(run)
    means = []
    for path in paths:
        square = predictor.preprocessing.square(read_image(images / path))
        p = [float(predictor.engine(np.ascontiguousarray(view)[None])[0][0]) for view in (square, square[:, ::-1])]
        means.append(sum(p) / 2)
    return np.array(means)


def test_the_predictions_are_the_means_over_an_image_and_its_mirror_image(viewed, evaluated, images):
    for split in ('test', 'valid'):
        predictions = viewed.predicted(split)
        assert np.allclose(predictions.p_pneumonia, plain_means(viewed, images, predictions.path), atol=1e-6)
    assert np.abs(viewed.predicted('test').p_pneumonia - evaluated.predicted('test').p_pneumonia).max() > 1e-6


def test_threshold_and_temperature_are_chosen_on_these_means_and_recorded_with_them(viewed):
    expected = decide(viewed.predicted('valid'), 'youden')
    assert (viewed.decision['threshold'], viewed.decision['temperature']) == (expected.threshold, expected.temperature)
    assert viewed.decision['tta'] and all(metrics['tta'] for metrics in viewed.metrics.values())


def test_another_evaluation_keeps_the_views_until_it_is_told_otherwise(copy, evaluated, images):
    evaluate(copy, images, 'valid')
    assert copy.decision['tta'] and set(copy.metrics) == {'test', 'valid'}
    with pytest.warns(CXRWarning, match='metrics of test were computed with test-time views, so they are dropped'):
        evaluate(copy, images, 'valid', tta=False)
    assert not copy.decision['tta'] and set(copy.metrics) == {'valid'}
    assert np.allclose(copy.predicted('valid').p_pneumonia, evaluated.predicted('valid').p_pneumonia, atol=1e-6)


def test_views_are_not_changed_where_the_threshold_cannot_be_chosen_again(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'images/test')
    (copy / 'journal.jsonl').unlink()  # so that nothing tells where the validation images are
    before = (copy / 'decision.json').read_bytes()
    with pytest.raises(UsageError, match='--no-tta: the threshold has to be chosen again, and not all validation'):
        evaluate(copy, tmp_path / 'images', tta=False)
    assert (copy / 'decision.json').read_bytes() == before


def test_an_edited_record_of_the_views_is_noticed(copy):
    decision = json.loads((copy / 'decision.json').read_text())
    (copy / 'decision.json').write_text(json.dumps(decision | {'tta': False}))
    with pytest.raises(UsageError, match='another decision than that in decision.json'):
        Predictor.load(copy.path)


def test_a_run_and_its_bundle_predict_with_the_views_of_their_threshold(viewed, viewed_bundle, images):
    predictions = viewed.predicted('test')
    paths = [images / path for path in predictions.path]
    for model in (viewed.path, viewed_bundle):
        rows = predict_to_table(model, paths, use_gate=False).rows
        assert np.allclose([row['p_pneumonia'] for row in rows], predictions.p_pneumonia, atol=1e-5)
        assert {row['threshold'] for row in rows} == {viewed.decision['threshold']}
    assert json.loads((viewed_bundle / 'config.json').read_text())['tta'] is True


def test_a_service_averages_and_says_so(viewed_bundle, bundle):
    pytest.importorskip('fastapi', reason='needs pip install "cxr_fastai[serve]"')
    from cxr_fastai.serving.service import Service

    for path, tta in ((viewed_bundle, True), (bundle, False)):
        service = Service.open(path)
        assert service.predictor.tta is tta and service.model_facts()['tta'] is tta


def test_card_report_and_commands_say_it(viewed, viewed_bundle, evaluated):
    card = (viewed_bundle / 'MODEL_CARD.md').read_text()
    assert VIEWS in card and VIEWS in render(viewed, 'test')
    assert '--threshold youden --tta' in reproduce(viewed, 'test')
    assert VIEWS not in render_card(evaluated, 'test') and '--tta' not in reproduce(evaluated, 'test')


def test_predict_says_that_it_averages(viewed_bundle, bundle, images, capsys):
    image = str(next((images / 'test/NORMAL').iterdir()))
    assert main(['predict', str(viewed_bundle), image, '--no-gate']) == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert 'with the same test-time views by the rule youden. Each probability is the mean over the image and' in text
    assert main(['predict', str(bundle), image, '--no-gate', '--json']) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)['tta'] is False and 'mean over' not in shown.err


def test_a_threshold_of_other_views_is_refused_and_a_given_one_is_not(bundle, viewed_bundle, images):
    paths = sorted((images / 'test/NORMAL').iterdir())[:1]
    for model, tta, option, manner in ((bundle, True, '--tta', 'without'), (viewed_bundle, False, '--no-tta', 'with')):
        with pytest.raises(UsageError, match=f'^{option}: the threshold .* {manner} test-time views'):
            predict_to_table(model, paths, tta=tta)
        (row,) = predict_to_table(model, paths, tta=tta, threshold=0.4, use_gate=False).rows
        assert row['threshold'] == 0.4
        with pytest.raises(UsageError, match=f'^{option} and --calibrated: the temperature .* {manner} test-time'):
            predict_to_table(model, paths, tta=tta, threshold=0.4, calibrated=True)


def test_the_refusal_of_views_advises_what_works_with_the_model(evaluated, bundle, images, tmp_path):
    paths = sorted((images / 'test/NORMAL').iterdir())[:1]
    run = Path(shutil.copytree(evaluated.path, tmp_path / 'a run', ignore=shutil.ignore_patterns('bundle')))
    shared = Path(shutil.copytree(bundle, tmp_path / 'shared'))
    inside = Path(shutil.copytree(bundle, run / 'bundle'))
    learner = Path(shutil.copy(run / 'learner.pkl', tmp_path))
    evaluate = f"`cxr-fastai evaluate '{run}' --tta`"
    advice = {
        run: f', or evaluate the run: {evaluate}.',
        run / 'learner.pkl': f', or evaluate the run: {evaluate}.',
        inside: f", or evaluate the run: {evaluate}, then `cxr-fastai export '{run}'`.",
        shared: ', or evaluate the run that it was exported from with --tta, and export it again.',
        'pretrained': '.',
    }
    for model, end in advice.items():
        with pytest.raises(UsageError) as refused:
            predict_to_table(model, paths, tta=True)
        message = str(refused.value)
        assert message.endswith(f'Omit --tta, or set another threshold by --threshold T{end}')
        assert f' of {model} was chosen' in message
        with pytest.raises(UsageError) as refused:
            predict_to_table(model, paths, tta=True, threshold=0.4, calibrated=True)
        assert str(refused.value).endswith(f'Omit one of the options{end}')
    with pytest.raises(UsageError, match='learner.pkl: --calibrated needs a temperature.*images. Omit --calibrated.$'):
        predict_to_table(learner, paths, calibrated=True)

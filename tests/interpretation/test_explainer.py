"""What an image's map says in a picture, and a run's errors in fastai's manner."""

import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.interpretation import CXRInterpretation, shown_images
from cxr_fastai.interpretation.overlays import (
    CAVEAT,
    NO_EVIDENCE,
    Explanation,
    plot_explanation,
    plot_gallery,
    plot_mean_maps,
)
from cxr_fastai.publishing.reporting import report

RNG = np.random.default_rng(0)


def words(figure: Figure) -> str:
    return ' '.join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text')))


def explanation(heat=None, **how) -> Explanation:
    heat = np.clip(RNG.random((60, 90)), 0, 1) if heat is None else heat
    return Explanation(RNG.integers(0, 255, (60, 90), dtype=np.uint8), heat, r'$\bad$.jpeg', 0.7, 0.4, **how)


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_a_map_lies_over_what_the_network_saw(resize):
    image = np.zeros((300, 200), np.uint8)
    image[150:180, 60:90] = 255
    seen = Preprocessing(64, resize)
    over = seen.spread(seen.square(image) / 255, 300, 200)
    assert over.shape == (300, 200)
    y, x = np.unravel_index(over.argmax(), over.shape)
    assert 145 <= y <= 185 and 55 <= x <= 95
    if resize == 'crop':
        assert not over[:45].any() and not over[-45:].any()


def test_a_picture_says_what_it_shows_and_what_it_does_not():
    shown = words(plot_explanation(explanation(label='NORMAL')))
    said = 'p(pneumonia) 0.700, threshold 0.4: PNEUMONIA; true: NORMAL'
    assert all(words in shown for words in (CAVEAT, said, 'evidence for PNEUMONIA', r'$\bad$'))


def test_a_map_of_zeros_is_never_drawn_as_noise():
    empty = explanation(np.zeros((60, 90)))
    figure = plot_explanation(empty)
    assert NO_EVIDENCE in words(figure) and CAVEAT not in words(figure) and len(figure.axes) == 2  # no bar of colours
    assert [len(ax.images) for ax in figure.axes] == [1, 1]  # the image alone
    assert NO_EVIDENCE in words(plot_gallery([empty]))


def test_images_keep_their_aspect():
    figure = plot_explanation(explanation())
    figure.draw_without_rendering()
    for ax in figure.axes[:2]:
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(1.5, rel=0.02)


def test_mean_maps_are_means_by_class():
    figure = plot_mean_maps(
        [
            explanation(np.full((60, 90), share), label=label)
            for share, label in ((0.2, 'NORMAL'), (0.4, 'NORMAL'), (1.0, 'PNEUMONIA'))
        ]
    )
    means = [ax.images[0].get_array().mean() for ax in figure.axes[:2]]
    assert means == pytest.approx([0.3, 1.0]) and 'NORMAL, mean of 2' in words(figure)


@pytest.fixture(scope='module')
def interpretation(evaluated, images) -> CXRInterpretation:
    return CXRInterpretation.from_run(evaluated, 'test', images)


def test_an_interpretation_predicts_nothing_that_is_known(evaluated, images, monkeypatch):
    def refuse(*_):
        raise AssertionError('predicted again')

    monkeypatch.setattr('cxr_fastai.evaluation.evaluation.predict_items', refuse)
    assert len(CXRInterpretation.from_run(evaluated, 'test', images).predictions) == 12


def test_errors_are_told_by_kind_and_certainty(interpretation):
    wrong = interpretation.most_confident_errors(5)
    assert (wrong.prediction != wrong.label).all() and wrong.loss.is_monotonic_decreasing
    positive, negative = (interpretation.errors(kind) for kind in ('false positive', 'false negative'))
    assert set(positive.label) <= {'NORMAL'} and set(negative.label) <= {'PNEUMONIA'}
    off = (interpretation.predictions.p_pneumonia - interpretation.metrics['threshold']).abs()
    assert interpretation.most_uncertain(1).path.iloc[0] == interpretation.predictions.path[off.idxmin()]
    with pytest.raises(UsageError, match='no kind of error'):
        interpretation.errors('wrong')


def test_maps_of_images_come_with_their_scores(interpretation):
    rows = interpretation.top_losses(3)
    found = interpretation.cam(rows)
    assert [one.p for one in found] == pytest.approx(rows.p_pneumonia.to_list(), abs=1e-5)
    assert [one.label for one in found] == rows.label.to_list() and [one.name for one in found] == rows.path.to_list()
    assert all(one.heat.shape == one.image.shape and 0 <= one.heat.min() <= one.heat.max() <= 1 for one in found)


@pytest.mark.parametrize('plot', ['plot_top_losses', 'plot_uncertain', 'plot_confusion_matrix', 'plot_mean_maps'])
def test_every_picture_is_a_figure(interpretation, plot):
    assert isinstance(getattr(interpretation, plot)(), Figure)


def test_the_command_writes_a_picture_an_image_and_names_what_it_cannot_use(evaluated, images, tmp_path, capsys):
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    image = next((images / 'test').rglob('*.jpeg'))
    words = ['explain', evaluated.path, image, tmp_path / 'bad.jpeg', image, '--out', tmp_path / 'e']
    code = main([str(word) for word in words])
    assert code == 3 and sorted(path.name for path in (tmp_path / 'e').iterdir()) == ['0001.png', '0003.png']
    shown = capsys.readouterr()
    before = (tmp_path / 'e/0001.png').read_bytes()
    assert main(['explain', str(evaluated.path), str(image), '--out', str(tmp_path / 'e')]) == 2
    assert (tmp_path / 'e/0001.png').read_bytes() == before
    assert 'bad.jpeg: E_EMPTY' in shown.err and 'p(pneumonia)' in shown.out
    with Image.open(tmp_path / 'e/0001.png') as picture:
        assert picture.size[0] > 500


def test_the_command_explains_the_greatest_losses_and_the_report_shows_maps(evaluated, images, tmp_path, monkeypatch):
    shutil.copytree(evaluated.path, tmp_path / 'run')
    run = Run(tmp_path / 'run')
    monkeypatch.setattr('cxr_fastai.publishing.reporting.draw', lambda *_: {})
    assert 'class="cam"' not in report(run).read_text()
    assert (
        main(
            [
                'explain',
                str(tmp_path / 'run'),
                '--top-losses',
                '3',
                '--split',
                'test',
                '--data',
                str(images),
                '--method',
                'gradcam++',
                '--target',
                'NORMAL',
            ]
        )
        == 0
    )
    assert len(list((run / 'figures/explained').iterdir())) == 3 and all(
        (run / f'figures/{name}_test.png').is_file() for name in ('top_losses', 'uncertain', 'mean_maps')
    )
    shown = shown_images(run.predicted('test'))
    assert len(list((run / 'figures/cams').iterdir())) == len(shown)
    page = report(run).read_text()
    assert page.count('class="cam"') == len(shown) and 'not a lesion outline' in page


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ([], 'name images, or give --top-losses'),
        (['image.jpeg', '--data', '.'], 'where the images of a split are'),
        (['image.jpeg', '--top-losses', '3'], 'one of them'),
        (['image.jpeg', '--method', 'magic'], '--method magic: choose'),
        (['image.jpeg', '--target', 'CAT'], '--target CAT: choose'),
        (['image.jpeg', '--layer', '7'], '--layer 7: no such layer'),
    ],
)
def test_wrong_options_are_told(evaluated, images, capsys, monkeypatch, tmp_path, options, says):
    shutil.copy(next((images / 'test').rglob('*.jpeg')), tmp_path / 'image.jpeg')
    monkeypatch.chdir(tmp_path)
    assert main(['explain', str(evaluated.path), *options, '--out', str(tmp_path / 'e')]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / 'e').exists()


def test_an_image_that_may_name_its_patient_is_not_shown_unless_allowed(tmp_path):
    from imagefiles import dicom

    from cxr_fastai.models.architectures import build_model

    (tmp_path / 'a.dcm').write_bytes(dicom(BurnedInAnnotation='YES'))
    explainer = Explainer(Predictor(TorchEngine(build_model('baseline')), ModelConfig('baseline', 48, 0.5)))
    (refused,) = explainer.explain([Subject(tmp_path / 'a.dcm')])
    assert isinstance(refused, ImageError) and 'may name the patient' in str(refused)
    (shown,) = explainer.explain([Subject(tmp_path / 'a.dcm')], burned_in=True)
    assert isinstance(shown, Explanation)


def test_known_probabilities_are_not_predicted_again(interpretation, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Predictor, 'scores', refuse)
    assert len(interpretation.cam(interpretation.top_losses(2))) == 2


def test_a_bundle_explains_images_that_are_named(bundle, images, tmp_path, capsys):
    image = str(next((images / 'test').rglob('*.jpeg')))
    assert main(['explain', str(bundle), image]) == 2 and 'name one by --out' in capsys.readouterr().err
    assert main(['explain', str(bundle), image, '--out', str(tmp_path / 'e')]) == 0
    assert (tmp_path / 'e/0001.png').is_file()


def test_an_unknown_class_is_refused():
    with pytest.raises(UsageError, match='--target x: choose NORMAL or PNEUMONIA'):
        Explainer(None, 'x')


def test_predictions_are_a_table_of_the_run(interpretation):
    assert isinstance(interpretation.predictions, pd.DataFrame)

"""`Explainer` explains images, and the command `explain` saves the explanations as figures."""

import shutil

import pytest
from imagefiles import dicom
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.overlays import Explanation
from cxr_fastai.models.architectures import build_model


def test_the_command_writes_one_figure_per_image_and_reports_unusable_ones(evaluated, images, tmp_path, capsys):
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


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ([], 'give either images, or --top-losses'),
        (['image.jpeg', '--data', '.'], 'locate the images of a split'),
        (['image.jpeg', '--top-losses', '3'], 'give either images'),
        (['image.jpeg', '--method', 'magic'], '--method magic: choose'),
        (['image.jpeg', '--target', 'CAT'], '--target CAT: choose'),
        (['image.jpeg', '--layer', '7'], '--layer 7: no such layer'),
    ],
)
def test_wrong_options_are_rejected(evaluated, images, capsys, monkeypatch, tmp_path, options, message):
    shutil.copy(next((images / 'test').rglob('*.jpeg')), tmp_path / 'image.jpeg')
    monkeypatch.chdir(tmp_path)
    assert main(['explain', str(evaluated.path), *options, '--out', str(tmp_path / 'e')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'e').exists()


def test_an_image_that_may_name_the_patient_is_shown_only_if_allowed(tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(BurnedInAnnotation='YES'))
    explainer = Explainer(Predictor(TorchEngine(build_model('baseline')), ModelConfig('baseline', 48, 0.5)))
    (error,) = explainer.explain([Subject(tmp_path / 'a.dcm')])
    assert isinstance(error, ImageError) and 'may name the patient' in str(error)
    assert '`cxr-fastai explain MODEL IMAGE --allow-burned-in` shows it.' in str(error)
    (shown,) = explainer.explain([Subject(tmp_path / 'a.dcm')], allow_burned_in=True)
    assert isinstance(shown, Explanation)


def test_a_bundle_explains_given_images(bundle, images, tmp_path, capsys):
    image = str(next((images / 'test').rglob('*.jpeg')))
    assert (
        main(['explain', str(bundle), image]) == 2
        and 'Choose a folder for the figures with --out' in capsys.readouterr().err
    )
    assert main(['explain', str(bundle), image, '--out', str(tmp_path / 'e')]) == 0
    assert (tmp_path / 'e/0001.png').is_file()


def test_an_unknown_class_is_rejected():
    with pytest.raises(UsageError, match='--target x: choose NORMAL or PNEUMONIA'):
        Explainer(None, 'x')

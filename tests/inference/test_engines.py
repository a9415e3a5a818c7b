"""The two engines compute the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_fastai.core.errors import CXRError
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import build_model
from cxr_fastai.publishing.onnx import to_onnx
from cxr_fastai.training.restoring import load_learner


@pytest.fixture(scope='module')
def squares(images) -> np.ndarray:
    """120 images of 64 px: all synthetic ones, and the same upside down."""
    preprocessing = Preprocessing(64)
    upright = np.stack([preprocessing.load(path) for path in sorted(images.rglob('*.jpeg'))])
    return np.concatenate([upright, upright[:, ::-1]])


def test_every_form_of_a_model_predicts_the_same(bundle, evaluated, squares):
    opened = Bundle.open(bundle)
    p_run, features_run = Predictor.load(evaluated.path).engine(squares)
    threshold = opened.config.threshold
    engines = [
        opened.engine('torch'),
        opened.engine('onnx'),
        TorchEngine(load_learner(bundle / 'learner.pkl').model),
    ]
    assert len(squares) >= 100 and p_run.std() > 0.001
    for engine in engines:
        p, features = engine(squares)
        assert np.abs(p - p_run).max() <= 1e-4
        assert np.array_equal(p >= threshold, p_run >= threshold)
        assert np.allclose(features, features_run, atol=1e-4)


@pytest.mark.parametrize(
    'arch', ['baseline', *(pytest.param(arch, marks=pytest.mark.slow) for arch in ('resnet50', 'efficientnet_lite0'))]
)
def test_an_onnx_file_takes_grey_images_of_8_bits(arch):
    import onnxruntime

    torch.manual_seed(0)
    model = build_model(arch).train()
    with torch.no_grad():
        model[0](torch.randn(8, 3, 64, 64))
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    expected = TorchEngine(model)(images)
    data = to_onnx(model, 64, temperature=2.0)
    results = OnnxEngine(data, Path('m.onnx'))(images)
    for result, array in zip(results, expected, strict=True):
        assert np.allclose(result, array, atol=1e-5)
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    assert [(value.name, value.type) for value in session.get_inputs()] == [('images', 'tensor(uint8)')]
    (calibrated,) = session.run(['p_calibrated'], {'images': images[:1, None]})
    p = expected[0][0]
    logit = np.log(p / (1 - p))
    assert calibrated[0] == pytest.approx(1 / (1 + np.exp(-logit / 2)), abs=1e-5)


def test_a_file_that_is_not_onnx_is_an_error():
    with pytest.raises(CXRError, match='m.onnx: refused, because it is not an ONNX file'):
        OnnxEngine(b'x', Path('m.onnx'))

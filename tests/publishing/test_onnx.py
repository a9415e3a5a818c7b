"""The ONNX file takes grey images by the name `images`, and export warns if it cannot be written."""

import sys

import numpy as np
import pytest
import torch

from cxr_fastai.core.errors import CXRWarning
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.models.architectures import build_model
from cxr_fastai.models.inputs import normalize
from cxr_fastai.publishing import exporting
from cxr_fastai.publishing.onnx import fold_normalisation, to_onnx


def test_the_file_takes_images_and_agrees_with_the_network():
    pytest.importorskip('onnx', reason='needs pip install "cxr_fastai[onnx]"')
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs pip install "cxr_fastai[onnx]"')
    torch.manual_seed(0)
    model = build_model('baseline').eval()
    session = onnxruntime.InferenceSession(to_onnx(model, 48, temperature=2.0), providers=['CPUExecutionProvider'])
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ('images', 'tensor(uint8)')
    assert [output.name for output in session.get_outputs()] == ['p_pneumonia', 'p_calibrated', 'features']

    grey = np.random.default_rng(0).integers(0, 256, (5, 48, 48), dtype=np.uint8)
    p, p_calibrated, features = session.run(None, {'images': grey[:, None]})
    expected_p, expected_features = TorchEngine(model)(grey)
    assert p == pytest.approx(expected_p, abs=1e-5)
    assert features == pytest.approx(expected_features, abs=1e-4)
    logits = np.log(expected_p / (1 - expected_p))
    assert p_calibrated == pytest.approx(1 / (1 + np.exp(-logits / 2)), abs=1e-5)


def test_folding_the_normalisation_is_exact_even_at_the_border():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1))
    grey = torch.rand(2, 1, 8, 8)
    expected = model(normalize(grey.clone()))
    assert fold_normalisation(model)
    assert torch.allclose(model(torch.cat([grey, torch.ones_like(grey)], 1)), expected, atol=1e-5)
    assert not fold_normalisation(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)))


def test_export_without_the_package_onnx_warns_and_writes_no_onnx_file(evaluated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)  # as if it were not installed
    with pytest.warns(CXRWarning, match=r'no model\.onnx.*pip install "cxr_fastai\[onnx\]"') as warnings:
        exporting.write_files(evaluated, tmp_path)
    assert len(warnings) == 1 and '\n' not in str(warnings[0].message)
    assert (tmp_path / 'model.safetensors').is_file() and not (tmp_path / 'model.onnx').exists()

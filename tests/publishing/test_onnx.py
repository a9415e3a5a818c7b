"""The ONNX file takes grey images by the name `images`, and export warns if it cannot be written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_fastai.core.errors import CXRError, CXRWarning
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine
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


class Branches(torch.nn.Module):
    """Two convolutions of the same image, as in RepVGG."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.narrow = torch.nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return self.wide(images) + self.narrow(images)


def small_network(body: torch.nn.Module) -> torch.nn.Sequential:
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    return torch.nn.Sequential(body, head).eval()


@pytest.mark.parametrize('body', [Branches(), torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3))])
def test_networks_whose_normalisation_cannot_be_folded_are_exported_too(body):
    model = small_network(body)
    grey = np.random.default_rng(0).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    engine = OnnxEngine(to_onnx(model, 48), Path('model.onnx'))
    assert engine(grey)[0] == pytest.approx(TorchEngine(model)(grey)[0], abs=1e-5)


def test_a_network_that_cannot_be_expressed_is_an_error_of_one_line(capfd):
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), FoldAll(), torch.nn.Conv2d(4, 4, 1))
    with pytest.raises(CXRError, match='torch cannot express this network as ONNX'):
        to_onnx(small_network(body), 48)


class FoldAll(torch.nn.Module):
    """An operator that has no counterpart in the ONNX version of the files."""

    def forward(self, maps):
        return torch.nn.functional.fold(maps.flatten(2), maps.shape[-2:], 1)


def test_export_without_the_package_onnx_warns_and_writes_no_onnx_file(evaluated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)  # as if it were not installed
    with pytest.warns(CXRWarning, match=r'no model\.onnx.*pip install "cxr_fastai\[onnx\]"') as warnings:
        exporting.write_files(evaluated, tmp_path)
    assert len(warnings) == 1 and '\n' not in str(warnings[0].message)
    assert (tmp_path / 'model.safetensors').is_file() and not (tmp_path / 'model.onnx').exists()

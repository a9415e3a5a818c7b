"""The device on which a network computes is chosen by name, and a missing one is an error of one line."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models import devices
from cxr_fastai.models.devices import choose_device, describe_device, may_have_gpu

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def forget():
    devices._best_device.cache_clear()
    yield
    devices._best_device.cache_clear()


@pytest.mark.parametrize('name', ['gpu', 'cuda:x', 'cuda:', 'CPU', '', 'cuda:1000', 'cpu:0', 'xla'])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UsageError, match=r'unknown. Choose auto, cpu, cuda, cuda:N or mps'):
        choose_device(name)


def test_the_processor_is_always_there():
    assert choose_device('cpu') == choose_device(torch.device('cpu')) == torch.device('cpu')
    assert ' core' in describe_device(torch.device('cpu'))


MISSING = {
    'a build without CUDA': (False, False, 0, 'cuda', 'is built without CUDA. Install a build with it'),
    'no GPU': (True, False, 0, 'cuda', 'no NVIDIA GPU with a driver was found. Install'),
    'a number too high': (True, True, 2, 'cuda:2', r'this machine has 2 of them, numbered from cuda:0'),
}


@pytest.mark.parametrize(('built', 'available', 'count', 'name', 'message'), MISSING.values(), ids=MISSING)
def test_a_missing_gpu_says_what_to_do(built, available, count, name, message, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: built)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: available)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    with pytest.raises(UsageError, match=f'^--device {name}: .*{message}'):
        choose_device(name)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason='this is such a Mac')
def test_the_gpu_of_a_mac_is_missing_elsewhere():
    with pytest.raises(UsageError, match='Mac with Apple silicon'):
        choose_device('mps')


def test_a_gpu_that_does_not_compute_is_not_used(monkeypatch, caplog):
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError('CUDA error: no kernel image is available')

    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch, 'ones', fail)
    with pytest.raises(UsageError, match='does not compute .*no kernel image'):
        choose_device('cuda')
    with caplog.at_level(logging.DEBUG, 'cxr_fastai.models.devices'):
        assert choose_device('auto').type in ('cpu', 'mps')
    assert 'no kernel image' in caplog.text


def test_a_gpu_is_out_of_the_question_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.sys, 'platform', 'linux')
    monkeypatch.setattr(devices, 'DRIVERS', (tmp_path / 'driver',))
    assert not may_have_gpu()
    (tmp_path / 'driver').touch()
    assert may_have_gpu()


def test_a_missing_device_is_an_error_of_every_model_file(evaluated, bundle):
    for model in (evaluated.path, bundle):
        with pytest.raises(UsageError, match='--device cuda:999'):
            Predictor.load(model, device='cuda:999')


def test_onnx_runtime_computes_in_single_precision_on_cpu_or_cuda(bundle):
    with pytest.raises(UsageError, match='ONNX files compute in fp32'):
        Predictor.load(bundle, engine='onnx', precision='bf16')
    with pytest.raises(UsageError, match='ONNX Runtime computes on cpu or cuda'):
        Predictor.load(bundle, engine='onnx', device='mps')
    with pytest.raises(UsageError, match='--precision fp16: choose fp32 or bf16'):
        Predictor.load(bundle, precision='fp16')


def test_half_precision_changes_probabilities_a_little(bundle):
    images = np.random.default_rng(0).integers(0, 256, (4, *2 * [Predictor.load(bundle).config.size]), dtype=np.uint8)
    exact = Predictor.load(bundle, device='cpu').scores(images)
    half = Predictor.load(bundle, device='cpu', precision='bf16').scores(images)
    assert half.dtype == exact.dtype == np.float64
    assert 0 < np.abs(half - exact).max() < 0.05


@pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')
def test_a_gpu_gives_the_probabilities_of_the_processor(bundle, images):
    paths = sorted(Path(images).rglob('*.jpeg'))[:16]
    rows = {
        device: list(Predictor.load(bundle, engine='torch', gate=False, device=device).predict(paths))
        for device in ('cpu', 'cuda')
    }
    for cpu, gpu in zip(rows['cpu'], rows['cuda'], strict=True):
        assert gpu['p_pneumonia'] == pytest.approx(cpu['p_pneumonia'], abs=1e-4)

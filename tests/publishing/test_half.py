"""Export with --half: weights as float16 in an ONNX file alone, computed in float32, with the same decisions."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core import environment
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.inference.bundle import CARD, CONFIG, FILES, GATE, MANIFEST, ONNX, SELFTEST, Bundle
from cxr_fastai.inference.engines import OnnxEngine
from cxr_fastai.inference.onnx_format import check_onnx
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.selftest import ParityError
from cxr_fastai.publishing import exporting
from cxr_fastai.publishing.exporting import export, verify
from cxr_fastai.publishing.half import MAX_CHANGE, MIN_VALUES, measure_parity, store_half
from cxr_fastai.publishing.onnx import to_onnx

onnx = pytest.importorskip('onnx', reason='needs pip install "cxr_fastai[onnx]"')


@pytest.fixture(scope='module')
def network(evaluated) -> Predictor:
    return Predictor.load(evaluated.path, device='cpu')


@pytest.fixture(scope='module')
def valid_images(evaluated, network) -> np.ndarray:
    root, items = find_split(evaluated, None, 'valid')
    return read_squares(items, root, network.preprocessing)[0]


@pytest.fixture(scope='module')
def full(network) -> bytes:
    return to_onnx(network.model, network.config.size, network.config.temperature)


def initializers(data: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(data).graph.initializer}


def with_largest(data: bytes, change) -> bytes:
    """The file `data` after `change` of the values of its largest tensor."""
    model = onnx.load_from_string(data)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest).copy()
    largest.CopyFrom(onnx.numpy_helper.from_array(change(values), largest.name))
    return bytes(model.SerializeToString())


def test_the_bundle_has_one_network_and_verifies(half_bundle):
    assert set(os.listdir(half_bundle)) == {ONNX, SELFTEST, GATE, CARD, CONFIG, MANIFEST}
    assert set(Bundle.open(half_bundle).manifest) <= set(FILES)
    verify(half_bundle)


def test_large_tensors_are_stored_in_half_the_space_and_converted_to_float32(full):
    before, after = initializers(full), initializers(store_half(full))
    large = {name for name, values in before.items() if values.dtype == np.float32 and values.size >= MIN_VALUES}
    stored = {name for name, values in after.items() if values.dtype == np.float16}
    assert large and stored == {f'{name}_float16' for name in large}
    for name in before.keys() - large:
        assert np.array_equal(after[name], before[name])
    casts = [node for node in onnx.load_from_string(store_half(full)).graph.node if set(node.input) & stored]
    assert {node.output[0] for node in casts} == large
    assert all(node.op_type == 'Cast' and node.attribute[0].i == onnx.TensorProto.FLOAT for node in casts)
    assert len(store_half(full)) < 0.6 * len(full)
    check_onnx(store_half(full), Path('m.onnx'))


@pytest.mark.parametrize('value', [1e5, np.inf, np.nan])
def test_a_tensor_that_float16_cannot_express_is_unchanged(full, value):
    def change(values: np.ndarray) -> np.ndarray:
        values.flat[0] = value
        return values

    before = with_largest(full, change)
    name = max(initializers(before).items(), key=lambda item: item[1].nbytes)[0]
    assert initializers(store_half(before))[name].dtype == np.float32


def test_onnx_runtime_converts_the_weights_once_when_it_loads_the_file(full, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs pip install "cxr_fastai[onnx]"')
    operators = []
    for data in (full, store_half(full)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / 'optimised.onnx')
        onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        operators.append(sorted(node.op_type for node in onnx.load(tmp_path / 'optimised.onnx').graph.node))
    assert operators[0] == operators[1]


def test_the_decisions_are_those_of_the_run_and_the_change_is_recorded(half_bundle, network, valid_images):
    half = Predictor.load(half_bundle)
    expected, actual = network.scores(valid_images), half.scores(valid_images)
    assert ((expected >= half.threshold) == (actual >= half.threshold)).all()
    weights = json.loads((half_bundle / CONFIG).read_text())['weights']
    change = weights.pop('largest_change')
    assert 0 < change <= MAX_CHANGE and change == pytest.approx(np.abs(expected - actual).max(), abs=1e-6)
    n = len(valid_images)
    assert weights == {'stored': 'float16', 'computed': 'float32', 'split': 'valid', 'images': n}
    card = (half_bundle / CARD).read_text()
    assert f'stored as float16, computed in float32. On the {n} valid images, no decision changed' in card


def test_a_change_of_a_probability_is_an_error(evaluated, network):
    def engine(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, features = network.engine(images)
        return np.where(p > 0.5, p - 0.002, p + 0.002), features

    lowest = replace(network, config=replace(network.config, threshold=0.0))
    with pytest.raises(ParityError, match=r'0 of \d+ valid images differently, and a probability changes by 0.002'):
        measure_parity(evaluated, lowest, replace(network, engine=engine))


def test_a_changed_decision_is_an_error_even_if_the_probability_hardly_changes(evaluated, network, valid_images):
    def engine(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, features = network.engine(images)
        return p + 2e-5, features

    p = float(network.scores(valid_images).min())
    at_the_edge = replace(network, config=replace(network.config, threshold=p + 1e-5))
    with pytest.raises(ParityError, match=r'classifies [1-9]\d* of \d+ valid images differently'):
        measure_parity(evaluated, at_the_edge, replace(network, engine=engine))


def test_without_parity_nothing_is_exported(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'store_half', lambda data: with_largest(data, lambda values: values * 1.5))
    with pytest.raises(ParityError, match=r'nothing was exported\. Export without --half'):
        export(evaluated, tmp_path / 'b', half=True)
    assert os.listdir(tmp_path) == []


def test_images_that_are_not_found_are_an_error(evaluated, network, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, 'images', tmp_path / 'gone')
    monkeypatch.setenv('CXR_DATA', str(tmp_path / 'gone'))
    with pytest.raises(UsageError, match='--half compares probabilities on the valid images, but'):
        measure_parity(evaluated, network, network)


def test_a_run_without_validation_images_is_compared_on_its_training_images(evaluated, network, monkeypatch):
    items = evaluated.items.assign(split=evaluated.items.split.replace('valid', 'train'))
    monkeypatch.setattr(Run, 'items', items)
    parity = measure_parity(evaluated, network, network)
    assert (parity.split, parity.images) == ('train', (items.split == 'train').sum())


def test_export_needs_the_package_onnx(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, 'is_installed', lambda name: name != 'onnx')
    with pytest.raises(UsageError, match=r'export --half needs the package onnx,.*cxr_fastai\[onnx\]'):
        export(evaluated, tmp_path / 'b', half=True)


def test_a_zip_file_can_be_exported_too(evaluated, tmp_path):
    path = export(evaluated, tmp_path / 'b.zip', as_zip=True, half=True)
    assert isinstance(Predictor.load(path).engine, OnnxEngine)


@pytest.mark.parametrize(
    'options', [['--engine', 'torch'], ['--precision', 'bf16'], ['--explain', '--out', 'table.csv']], ids=' '.join
)
def test_what_needs_torch_is_an_error_of_one_line(half_bundle, images, options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['predict', str(half_bundle), str(images / 'test'), *options]) == 2
    error = capsys.readouterr().err
    assert f'{options[0]}' in error and 'needs the weights for torch (model.safetensors)' in error
    assert len(error.strip().splitlines()) == 1 and os.listdir(tmp_path) == []


def test_explain_is_an_error_of_one_line(half_bundle, images, capsys):
    assert main(['explain', str(half_bundle), str(images / 'test')]) == 2
    assert 'explain needs the weights for torch' in capsys.readouterr().err


def test_a_bundle_without_onnx_runtime_names_the_extra(half_bundle, monkeypatch):
    monkeypatch.setattr(environment, 'is_installed', lambda name: name != 'onnxruntime')
    with pytest.raises(UsageError, match=r'which has only model.onnx, needs.*pip install "cxr_fastai\[onnx\]"'):
        Predictor.load(half_bundle)

"""Hostile bundles and runs run no code, show no traceback, and end `predict` with an error of one line."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundlefiles import change_tensors, flipped, make_learner_pickle, seal
from onnx import numpy_helper
from safetensors.numpy import load

from cxr_fastai.cli import main
from cxr_fastai.inference import learner_files
from cxr_fastai.inference.bundle import CONFIG, GATE, MANIFEST, ONNX, SELFTEST
from cxr_fastai.inference.config import LEARNER, WEIGHTS
from cxr_fastai.inference.pickles import trust


def rewrite(folder: Path, name: str, change) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit(data: bytes) -> bytes:
    return flipped(data, len(data) // 2)


@pytest.mark.parametrize(
    'change',
    [one_bit, half, lambda data: data + b' ', lambda data: b''],
    ids=['a flipped bit', 'half', 'a byte more', 'nothing'],
)
@pytest.mark.parametrize(
    'name, engine', [(WEIGHTS, 'torch'), (ONNX, 'onnx'), (SELFTEST, 'auto'), (GATE, 'auto'), (CONFIG, 'auto')]
)
def test_a_damaged_file_of_a_bundle_is_detected_by_its_hash(name, engine, change, changed, refused):
    rewrite(changed, name, change)
    assert refused(changed, '--engine', engine) == 1


@pytest.mark.parametrize('name, engine', [(WEIGHTS, 'torch'), (ONNX, 'onnx'), (SELFTEST, 'auto'), (GATE, 'auto')])
def test_a_truncated_file_with_a_valid_hash_is_refused(name, engine, changed, refused):
    rewrite(changed, name, half)
    seal(changed)
    assert refused(changed, '--engine', engine) == 1


@pytest.mark.parametrize(
    'field, value',
    [
        ('vocab', ['PNEUMONIA', 'NORMAL']),
        ('vocab', None),
        ('vocab', 5),
        ('vocab', ['x' * 10**5]),
        ('vocab', '\x1b[2J'),
        ('size', '64'),
        ('size', None),
        ('size', 64.5),
        ('size', True),
        ('size', 0),
        ('size', 32),
        ('size', 10**9),
        ('size', 10**30),
        ('threshold', 'x'),
        ('threshold', 2),
        ('threshold', float('nan')),
        ('threshold', []),
        ('resize', []),
        ('resize', {}),
        ('resize', None),
        ('low_pass', 'x'),
        ('low_pass', float('nan')),
        ('temperature', 'x'),
        ('temperature', -1),
        ('temperature', float('nan')),
        ('arch', 5),
        ('arch', None),
        ('arch', '\x1b[2J'),
        ('schema', 1),
        ('schema', 3),
        ('schema', []),
    ],
    ids=lambda value: f'{value!r:.20}',
)
def test_an_invalid_setting_with_a_valid_hash_is_refused(field, value, changed, refused):
    config = json.loads((changed / CONFIG).read_text())
    (changed / CONFIG).write_text(json.dumps(config | {field: value}))
    seal(changed)
    assert refused(changed) == 1


@pytest.mark.parametrize('arch', ['nope', '../x', '', 'resnet50', 'hf-hub:x/y', 'x' * 500])
def test_another_network_than_that_of_the_weights_is_refused(arch, changed, refused):
    config = json.loads((changed / CONFIG).read_text())
    (changed / CONFIG).write_text(json.dumps(config | {'arch': arch}))
    seal(changed)
    assert refused(changed, '--engine', 'torch') in (1, 2)


@pytest.mark.parametrize('name', [CONFIG, MANIFEST])
@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'null',
        b'[]',
        b'{"schema": 2',
        b'\xff\xfe\x00',
        b'[' * 10**5 + b']' * 10**5,
        b'{"a":' * 10**5 + b'1' + b'}' * 10**5,
        b'{"a": "' + b'x' * 2**21 + b'"}',
        b'{"size": ' + b'9' * 5000 + b'}',
        b'{"files": {}}',
        b'{"files": []}',
    ],
    ids=[
        'empty',
        'null',
        'a list',
        'cut',
        'no text',
        'deep lists',
        'deep objects',
        'huge',
        'an endless number',
        'no files',
        'a list of files',
    ],
)
def test_json_of_another_kind_is_refused(name, content, changed, refused):
    (changed / name).write_bytes(content)
    if name != MANIFEST:
        seal(changed)
    assert refused(changed) == 1


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', './config.json', 'a/b', 'config.json\0', '', 'evil.pkl'])
def test_a_manifest_that_names_another_place_is_refused(name, changed, refused):
    manifest = json.loads((changed / MANIFEST).read_text())
    manifest['files'][name] = {'sha256': '0' * 64, 'size': 1}
    (changed / MANIFEST).write_text(json.dumps(manifest))
    assert refused(changed) == 1


@pytest.mark.parametrize(
    'facts', [None, 5, [], {}, {'sha256': 5, 'size': 'x'}, {'sha256': None, 'size': None}], ids=repr
)
def test_a_manifest_without_hashes_is_refused(facts, changed, refused):
    manifest = json.loads((changed / MANIFEST).read_text())
    manifest['files'][CONFIG] = facts
    (changed / MANIFEST).write_text(json.dumps(manifest))
    assert refused(changed) == 1


@pytest.mark.parametrize('name', [CONFIG, MANIFEST, ONNX])
def test_a_pipe_or_device_is_not_read(name, changed, refused):
    (changed / name).rename(changed / 'aside')
    if name == ONNX:
        os.mkfifo(changed / name)
    else:
        (changed / name).symlink_to('/dev/zero')
    assert refused(changed, '--engine', 'onnx') in (1, 2)


# Its numbers.


def header(facts: bytes, rest: bytes = b'') -> bytes:
    return struct.pack('<Q', len(facts)) + facts + rest


def tensor(dtype: str, shape: str, size: int) -> bytes:
    facts = f'{{"images": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, {size}]}}}}'
    return header(facts.encode(), b'0' * size)


@pytest.mark.parametrize(
    'content',
    [
        struct.pack('<Q', 2**62) + b'{}',
        b'\xff' * 8 + b'{}',
        header(b' ' * 2**23),
        b'\1',
        header(b'[' * 10**5),
        header(b'[]'),
        header(b'{"__metadata__": 5}'),
        tensor('U8', '[-1]', 4),
        tensor('U8', f'[{2**62}, 4]', 4),
        tensor('U8', f'[0, {2**63 - 1}]', 0),
        tensor('F4', '[8]', 4),
        tensor('BF16', '[2]', 4),
        tensor('X', '[2]', 4),
        tensor('U8', '[4]', 4).replace(b'images', b'\\u001b[2J\\nx'),
    ],
    ids=[
        'a huge header',
        'a header of -1',
        'a long header',
        'a byte',
        'deep',
        'a list',
        'metadata',
        'shape below 0',
        'shape over all',
        'empty and endless',
        'half bytes',
        'half floats',
        'no type',
        'a name with commands',
    ],
)
@pytest.mark.parametrize('name', [WEIGHTS, SELFTEST, pytest.param(GATE, marks=pytest.mark.slow)])
def test_a_safetensors_file_with_a_wrong_header_is_refused(name, content, changed, refused):
    (changed / name).write_bytes(content)
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 1


@pytest.mark.parametrize('engine', ['torch', pytest.param('onnx', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'change, expected',
    [
        (lambda images, p: (images, p * np.nan), 1),
        (lambda images, p: (images, p * np.inf), 1),
        (lambda images, p: (images, None), 1),
        (lambda images, p: (None, p), 1),
        (lambda images, p: (images, p[:, None]), 1),
        (lambda images, p: (images[:0], p[:0]), 1),
        (lambda images, p: (images, p.astype(np.complex64)), 1),
        (lambda images, p: (images, p > 0.5), 1),
        (lambda images, p: (images.astype(np.float32), p), 1),
        (lambda images, p: (images[:, :1, :1], p), 1),
        (lambda images, p: (images[:, :0, :0], p), 1),
        (lambda images, p: (images[:, :17], p), 1),
        (lambda images, p: (images, 1 - p), 5),
        (lambda images, p: (255 - images, p), 5),
    ],
    ids=[
        'not a number',
        'infinite',
        'no probabilities',
        'no images',
        'a table',
        'none',
        'complex',
        'true',
        'images of floats',
        'one pixel',
        'no pixel',
        'no square',
        'other probabilities',
        'other images',
    ],
)
def test_reference_images_that_do_not_fit_are_refused(change, expected, engine, changed, refused):
    tensors = load((changed / SELFTEST).read_bytes())
    images, p = change(tensors['images'], tensors['p'])
    change_tensors(changed, SELFTEST, images=images, p=p)
    seal(changed)
    assert refused(changed, '--engine', engine) == expected


def test_a_network_smaller_than_its_images_is_refused(changed, refused):
    config = json.loads((changed / CONFIG).read_text())
    (changed / CONFIG).write_text(json.dumps(config | {'size': 1}))
    change_tensors(changed, SELFTEST, images=np.zeros((8, 1, 1), np.uint8))
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 5
    assert refused(changed, '--engine', 'onnx') == 1


@pytest.mark.parametrize('shape', [(), (0,), (3,), (3, 3), (2, 2, 2)], ids=str)
def test_a_gate_of_another_network_is_refused(shape, changed, refused):
    change_tensors(changed, GATE, bank=np.ones(shape, np.float32))
    seal(changed)
    assert refused(changed) == 1


def test_a_gate_with_a_tensor_of_another_shape_is_refused(changed, refused):
    whole = (changed / GATE).read_bytes()
    for name in load(whole):
        (changed / GATE).write_bytes(whole)
        change_tensors(changed, GATE, **{name: np.ones((2, 2, 2), np.float32)})
        seal(changed)
        assert refused(changed) == 1


def test_other_weights_with_a_valid_hash_are_detected_by_the_self_test(changed, refused):
    weights = load((changed / WEIGHTS).read_bytes())
    change_tensors(changed, WEIGHTS, **{'1.6.bias': weights['1.6.bias'] + np.float32([0, 3])})
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 5


def test_other_weights_in_the_onnx_file_are_detected_by_the_self_test(changed, refused):
    model = onnx.load_from_string((changed / ONNX).read_bytes())
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith('6.bias'))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([0, 3]), bias.name))
    (changed / ONNX).write_bytes(model.SerializeToString())
    seal(changed)
    assert refused(changed) == refused(changed, '--engine', 'onnx') == 5


@pytest.mark.parametrize('field', ['weight', 'running_var', 'bias'])
def test_nan_weights_are_detected_by_the_self_test(field, changed, refused):
    weights = load((changed / WEIGHTS).read_bytes())
    nan_arrays = {name: array * np.nan for name, array in weights.items() if name.endswith(field)}
    change_tensors(changed, WEIGHTS, **nan_arrays)
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 5


# Its zip.


def zipped(folder: Path, place: Path, spoil=lambda archive: None) -> Path:
    with zipfile.ZipFile(place, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
        spoil(archive)
    return place


def declare(size: int, name: str):
    """Write into the directory of a zip file that the file `name` has `size` bytes."""

    def spoil(archive: zipfile.ZipFile) -> None:
        archive.getinfo(name).file_size = size

    return spoil


@pytest.mark.parametrize('name', [MANIFEST, *(pytest.param(name, marks=pytest.mark.slow) for name in (CONFIG, ONNX))])
@pytest.mark.parametrize('size', [2**31 + 1, 2**40, 0, 7])
def test_a_zip_with_a_wrong_size_is_refused(name, size, bundle, tmp_path, refused):
    assert refused(zipped(bundle, tmp_path / 'b.zip', declare(size, name))) == 1


def test_a_zip_whose_json_unpacks_to_a_gigabyte_is_not_unpacked(bundle, tmp_path, refused, monkeypatch):
    file = zipped(bundle, tmp_path / 'b.zip', declare(2**30, MANIFEST))

    def fail(*_: object) -> None:
        raise AssertionError('it was unpacked')

    monkeypatch.setattr(zipfile.ZipFile, 'read', fail)
    assert refused(file) == 1


@pytest.mark.parametrize(
    'change',
    [
        half,
        lambda data: data[:-1],
        lambda data: data[:-30],
        lambda data: b'',
        lambda data: b'PK\5\6' + bytes(18),
        lambda data: data.replace(b'config', b'../fig'),
    ],
    ids=['half', 'a byte less', 'no directory', 'nothing', 'no files', 'a name with dots'],
)
def test_a_damaged_zip_is_refused(change, bundle, tmp_path, refused):
    rewrite(tmp_path, zipped(bundle, tmp_path / 'b.zip').name, change)
    assert refused(tmp_path / 'b.zip') in (1, 2)


@pytest.mark.parametrize('name', [CONFIG, SELFTEST, ONNX])
def test_a_flipped_bit_in_a_zip_file_is_detected(name, bundle, tmp_path, refused):
    zipped(bundle, tmp_path / 'b.zip')
    with zipfile.ZipFile(tmp_path / 'b.zip') as archive:
        entry = archive.getinfo(name)
    for off in (3, entry.compress_size // 3, entry.compress_size // 2):
        spoiled = flipped((tmp_path / 'b.zip').read_bytes(), entry.header_offset + 30 + len(name) + off)
        (tmp_path / 'c.zip').write_bytes(spoiled)
        assert refused(tmp_path / 'c.zip') == 1


@pytest.mark.parametrize(
    'field, value',
    [(6, 1), (8, 99), (8, 12), (8, 14), (14, 1)],
    ids=['a password', 'unknown packing', 'bzip2', 'lzma', 'a checksum'],
)
def test_a_zip_with_another_compression_is_refused(field, value, bundle, tmp_path, refused):
    data = bytearray(zipped(bundle, tmp_path / 'b.zip').read_bytes())
    with zipfile.ZipFile(tmp_path / 'b.zip') as archive:
        start = archive.getinfo(MANIFEST).header_offset
    entry = data.rindex(b'PK\1\2', 0, data.rindex(MANIFEST.encode()))
    data[start + field] = data[entry + field + 2] = value
    (tmp_path / 'b.zip').write_bytes(data)
    assert refused(tmp_path / 'b.zip') == 1


@pytest.mark.parametrize(
    'name, value',
    [
        ('size', -1),
        ('size', 10**9),
        ('size', '64'),
        ('resize', []),
        ('low_pass', 'x'),
        ('low_pass', None),
        ('arch', 5),
        ('arch', []),
    ],
    ids=repr,
)
def test_a_run_with_an_invalid_recipe_is_refused(name, value, evaluated, tmp_path, refused):
    run = Path(shutil.copytree(evaluated.path, tmp_path / 'run'))
    recipe = json.loads((run / 'recipe.json').read_text())
    (run / 'recipe.json').write_text(json.dumps(recipe | {name: value}))
    assert refused(run) == 2


def test_the_pickle_in_a_bundle_is_not_opened(changed, marker, image, monkeypatch):
    hostile = make_learner_pickle(partial(exec, f'open({str(marker)!r}, "w").close()'))
    (changed / LEARNER).write_bytes(hostile)
    seal(changed)
    trust(hashlib.sha256(hostile).hexdigest(), 'test')

    def fail(*_: object, **__: object) -> None:
        raise AssertionError('it was opened')

    for module, name in ((pickle, 'Unpickler'), (torch, 'load'), (learner_files, 'read_pickle')):
        monkeypatch.setattr(module, name, fail)
    assert main(['predict', str(changed), str(image), '--no-gate']) == 0
    assert main(['predict', str(zipped(changed, changed.parent / 'b.zip')), str(image), '--no-gate']) == 0
    assert not marker.exists()

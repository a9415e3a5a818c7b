"""Hostile model files run nothing, show no traceback, and end `predict` with an error of one line."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load

from cxr_fastai.cli import main
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.inference.bundle import CANARY, CONFIG, GATE, INT8, MANIFEST, ONNX
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, tensor_bytes
from cxr_fastai.inference.pickles import load_learner, save_learner, trust
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training import learner as ours


@pytest.fixture(scope='module')
def image(images) -> Path:
    return next((images / 'test').rglob('*.jpeg'))


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What every attack would write; trust given here ends with the test."""
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    return tmp_path / 'marker'


@pytest.fixture
def refused(image, marker, capfd):
    """Predicts with a model file: nothing runs, nothing leaves `main`, and one line says why; gives the exit code."""

    def predict(model: Path, *words: str) -> int:
        capfd.readouterr()
        code = main(['predict', str(model), str(image), *words])
        lines = capfd.readouterr().err.splitlines(keepends=True)
        said = ''.join(line for line in lines if 'has no input gate' not in line)
        assert not marker.exists()
        assert code != 0 and said.startswith('error: ') and said.count('\n') == 1 and said.endswith('\n'), (code, said)
        assert len(said) < 1000 and said.strip().isprintable()
        return code

    return predict


# Pickles: a good learner's bytes and what the attack should write become the bytes of an attack.


class Bomb:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return exec, (order(self.marker),)


def order(marker: Path) -> str:
    return f'open({str(marker)!r}, "w").close()'


def text(word: str) -> bytes:
    return b'X' + struct.pack('<I', len(word.encode())) + word.encode()


def named(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def called(func: bytes, *args: bytes) -> bytes:
    return func + b'(' + b''.join(args) + b'tR'


def attribute(of: bytes, name: str) -> bytes:
    return called(named('builtins', 'getattr'), of, text(name))


def saved(thing: object, **how) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save(thing, buffer := BytesIO(), pickle_module=pickle, **how)
    return buffer.getvalue()


def rezipped(data: bytes, change, more: dict[str, bytes] | None = None, pack: int = zipfile.ZIP_STORED) -> bytes:
    """The zip `data` with its data.pkl as `change` makes it, and with `more` files."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(buffer, 'w', pack) as new, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a second file of one name
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith('/data.pkl') else old.read(name))
        for name, content in (more or {}).items():
            new.writestr(name, content)
    return buffer.getvalue()


def injected(good: bytes, instructions: bytes) -> bytes:
    """The learner, whose pickle first does what the `instructions` say."""
    return rezipped(good, lambda old: old[:2] + instructions + b'0' + old[2:])


def keep(old: bytes) -> bytes:
    return old


def system(good: bytes, marker: Path) -> bytes:
    return injected(good, called(named('os', 'system'), text(f'touch {marker}')))


def dunder(good: bytes, marker: Path) -> bytes:
    return injected(good, attribute(attribute(named('pathlib', 'Path'), '__init__'), '__globals__'))


def method(good: bytes, marker: Path) -> bytes:
    writes = attribute(called(named('pathlib', 'Path'), text(str(marker))), 'write_text')
    return injected(good, called(writes, text('x')))


def globals_by_columns(good: bytes, marker: Path) -> bytes:
    """fastai's ColReader is an allowed class, and takes any attribute of what has `_fields`."""

    def column(name: str, of: bytes) -> bytes:
        return called(called(named('fastai.data.transforms', 'ColReader'), text(name)), of)

    func = (
        named('cxr_fastai.training.learner', 'roc_auc') + b'}' + text('_fields') + b']' + text('__globals__') + b'asb'
    )
    run = column('exec', column('__builtins__', column('__globals__', func)))
    return injected(good, called(run, text(order(marker))))


def rebuilt_tensor(good: bytes, marker: Path) -> bytes:
    """It calls whatever function it is given."""
    arguments = named('builtins', 'exec'), named('torch', 'Size'), text(order(marker)) + b'\x85', b'}'
    return injected(good, called(named('torch._tensor', '_rebuild_from_type_v2'), *arguments))


def old_instruction(good: bytes, marker: Path) -> bytes:
    return injected(good, b'(' + text(order(marker)) + b'ibuiltins\nexec\n')


def object_instruction(good: bytes, marker: Path) -> bytes:
    return injected(good, b'(' + named('builtins', 'exec') + text(order(marker)) + b'o')


def foreign_layer(good: bytes, marker: Path) -> bytes:
    return injected(good, called(named('timm.layers.config', 'os.system'), text(f'touch {marker}')))


def tar(good: bytes, marker: Path) -> bytes:
    """torch's format of before 2017."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            ('storages', pickle.dumps(Bomb(marker))),
            ('tensors', pickle.dumps(0)),
            ('pickle', pickle.dumps(0)),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return buffer.getvalue()


def script(good: bytes, marker: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), buffer := BytesIO())
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def after_stop(good: bytes, marker: Path) -> bytes:
    return rezipped(good, lambda old: old + pickle.dumps(Bomb(marker)))


def nested(good: bytes, marker: Path) -> bytes:
    return rezipped(good, keep, {'archive/more.pkl': saved(Bomb(marker))})


ARMED = {
    'code in a zip of torch': lambda good, marker: saved(Bomb(marker)),
    'a bare pickle': lambda good, marker: pickle.dumps(Bomb(marker)),
    'instructions in a good learner': system,
    'a method by getattr': method,
    'globals by an allowed class': globals_by_columns,
    'a function that rebuilds tensors': rebuilt_tensor,
    'an old instruction': old_instruction,
    'an instruction for objects': object_instruction,
    'the tar of old': tar,
    'the pickles of old': lambda good, marker: saved(Bomb(marker), _use_new_zipfile_serialization=False),
    'a pickle before the zip': lambda good, marker: pickle.dumps(Bomb(marker)) + good,
    'a compressed zip': lambda good, marker: rezipped(saved(Bomb(marker)), keep, pack=zipfile.ZIP_DEFLATED),
}
"""What runs where torch or pickle opens it without a list."""
UNARMED = {
    'inner parts of Python by getattr': dunder,
    'a name with a dot': foreign_layer,
    'a class is changed': lambda good, marker: injected(
        good, named('fastai.learner', 'Recorder') + b'N}' + text('bad') + text('x') + b's\x86b'
    ),
    'a zip in the zip': nested,
    'a second pickle of the same name': lambda good, marker: rezipped(
        good, keep, {'archive/data.pkl': pickle.dumps(Bomb(marker))}
    ),
    'a second pickle after the end': after_stop,
    'code beside the pickle': lambda good, marker: rezipped(good, keep, {'archive/code/a.py': order(marker).encode()}),
    'a program of torch': script,
    'half a file': lambda good, marker: good[: len(good) // 2],
    'a byte less': lambda good, marker: good[:-1],
    'a flipped bit in the pickle': lambda good, marker: flipped(good, good.index(b'fastai.learner')),
    'a flipped bit in the weights': lambda good, marker: flipped(good, len(good) // 2),
    'an unknown compression': lambda good, marker: flipped(good, good.rindex(b'PK\1\2') + 10),
    'a password': lambda good, marker: flipped(good, good.rindex(b'PK\1\2') + 8),
    'nothing': lambda good, marker: b'',
    'an endless number': lambda good, marker: injected(good, b'L' + b'9' * 10**5 + b'L\n'),
    'no end': lambda good, marker: rezipped(good, lambda old: old[:-1]),
    'a persistent object': lambda good, marker: injected(good, text('x') + b'Q'),
    'a stack that is empty': lambda good, marker: injected(good, b'000R'),
}
PICKLES = ARMED | UNARMED


@pytest.fixture(scope='module')
def good(bundle) -> bytes:
    return (bundle / LEARNER).read_bytes()


@pytest.fixture
def pickled(good, marker, tmp_path, request) -> Path:
    """The file of the attack that the test is called with."""
    (tmp_path / 'model.pkl').write_bytes(PICKLES[request.param](good, marker))
    return tmp_path / 'model.pkl'


def vouched(path: Path) -> Path:
    trust(hashlib.sha256(path.read_bytes()).hexdigest(), 'test')
    return path


@pytest.mark.parametrize('pickled', ARMED, indirect=True)
def test_an_attack_would_run_where_nothing_is_checked(pickled, marker):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with suppress(Exception):
            torch.load(pickled, weights_only=False)
    vars(ours.roc_auc).pop('_fields', None)
    assert marker.exists()


@pytest.mark.parametrize('pickled', PICKLES, indirect=True)
def test_a_hostile_pickle_is_not_opened_unless_trusted(pickled, refused, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError('it was opened')

    for name in (
        'pickle.Unpickler',
        'pickle._Unpickler',
        'pickle.load',
        'pickle.loads',
        'torch.load',
        'torch.jit.load',
        'fastai.learner.load_learner',
        'cxr_fastai.inference.pickles.Unpickler',
        'zipfile.ZipFile',
    ):
        monkeypatch.setattr(name, fail)
    assert refused(pickled) == 4


@pytest.mark.parametrize('pickled', PICKLES, indirect=True)
def test_a_hostile_pickle_runs_nothing_when_trusted(pickled, refused):
    from fastai.learner import Recorder

    assert refused(vouched(pickled)) == 1
    assert not hasattr(Recorder, 'bad') and not hasattr(ours.roc_auc, '_fields')


def nan_canary(learn) -> None:
    learn.config['canary']['p'] = [float('nan')] * 8


def other_weights(learn) -> None:
    learn.model[1][-1].bias.data[1] += 3


def printing_part(learn) -> None:
    learn.model[0]._modules['0'] = print


def hook(learn) -> None:
    learn.model.register_forward_hook(print)


def own_method(learn) -> None:
    learn.model.forward = print


def own_call(learn) -> None:
    learn.dls.cpu = partial(print, 'x')


def no_network(learn) -> None:
    learn.model = None


def no_tensor(learn) -> None:
    learn.model[1][-1]._parameters['bias'] = 5


def huge_images(learn) -> None:
    learn.config['size'] = 10**9


def huge_canary(learn) -> None:
    learn.config['canary']['size'] = 2**70


def no_config(learn) -> None:
    del learn.config


def classes_turned(learn) -> None:
    learn.config['vocab'] = ['PNEUMONIA', 'NORMAL']


def small_canary(learn) -> None:
    learn.config['canary'] |= {'images': b'0' * 8, 'size': 1}


@pytest.mark.parametrize(
    'change, expected',
    [
        (nan_canary, 1),
        (other_weights, 5),
        (printing_part, 1),
        (hook, 1),
        (own_method, 1),
        (own_call, 1),
        (no_network, 1),
        (no_tensor, 1),
        (huge_images, 1),
        (huge_canary, 1),
        (no_config, 1),
        (classes_turned, 1),
        (small_canary, 5),
    ],
)
def test_a_changed_learner_is_refused_though_trusted(change, expected, learn, tmp_path, marker, refused):
    changed = copy.deepcopy(learn)
    change(changed)
    (tmp_path / 'model.pkl').write_bytes(saved(changed))
    assert refused(tmp_path / 'model.pkl') == 4
    assert refused(vouched(tmp_path / 'model.pkl')) == expected


@pytest.fixture(scope='module')
def learn(bundle):
    return load_learner(bundle / LEARNER)


def test_the_learner_as_it_was_is_let_through(learn, tmp_path, marker, image):
    (tmp_path / 'model.pkl').write_bytes(saved(learn))
    assert main(['predict', str(vouched(tmp_path / 'model.pkl')), str(image)]) == 0


def test_a_learner_with_layers_of_torchvision_is_let_through(images, tmp_path, marker):
    recipe = make_recipe('resnet50', size=48, batch_size=8, weights='none')
    made = ours.make_learner(make_dls(read_items(images), images, recipe), recipe)
    save_learner(made, tmp_path / 'model.pkl', ModelConfig.of(recipe))
    assert len(load_learner(tmp_path / 'model.pkl').model) == 2


# Bundles: what an attack makes of the folder of a good one.


@pytest.fixture
def changed(bundle, tmp_path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(bundle, tmp_path / 'bundle'))


def seal(folder: Path) -> None:
    """Give the manifest the hashes of what is there now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}
    manifest['files'] = {
        name: {
            'sha256': hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            'size': (folder / name).stat().st_size,
        }
        for name in sorted(names)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


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
    'name, engine', [(WEIGHTS, 'torch'), (ONNX, 'onnx'), (CANARY, 'auto'), (GATE, 'auto'), (CONFIG, 'auto')]
)
def test_a_damaged_file_of_a_bundle_is_told_by_its_hash(name, engine, change, changed, refused):
    rewrite(changed, name, change)
    assert refused(changed, '--engine', engine) == 1


@pytest.mark.parametrize('name, engine', [(WEIGHTS, 'torch'), (ONNX, 'onnx'), (CANARY, 'auto'), (GATE, 'auto')])
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
        ('schema', 2),
        ('schema', []),
    ],
    ids=lambda value: f'{value!r:.20}',
)
def test_a_config_that_cannot_be_is_refused_with_a_valid_hash(field, value, changed, refused):
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
        b'{"schema": 1',
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
def test_json_that_is_none_of_ours_is_refused(name, content, changed, refused):
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
def test_what_is_no_regular_file_is_not_read(name, changed, refused):
    (changed / name).rename(changed / 'aside')
    if name == ONNX:
        os.mkfifo(changed / name)
    else:
        (changed / name).symlink_to('/dev/zero')
    assert refused(changed, '--engine', 'onnx') in (1, 2)


# Its numbers.


def save_tensors(folder: Path, name: str, **more: np.ndarray | None) -> None:
    tensors = load((folder / name).read_bytes()) | more
    (folder / name).write_bytes(tensor_bytes({key: value for key, value in tensors.items() if value is not None}))


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
@pytest.mark.parametrize('name', [WEIGHTS, CANARY, GATE])
def test_a_safetensors_file_that_lies_about_itself_is_refused(name, content, changed, refused):
    (changed / name).write_bytes(content)
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 1


@pytest.mark.parametrize('engine', ['torch', 'onnx'])
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
def test_canary_images_that_do_not_fit_are_refused(change, expected, engine, changed, refused):
    tensors = load((changed / CANARY).read_bytes())
    images, p = change(tensors['images'], tensors['p'])
    save_tensors(changed, CANARY, images=images, p=p)
    seal(changed)
    assert refused(changed, '--engine', engine) == expected


@pytest.mark.parametrize(
    'p', [np.full(8, np.nan), np.zeros(3), np.zeros((8, 2))], ids=['not a number', 'few', 'a table']
)
def test_canary_images_of_8_bits_are_checked_as_well(p, changed, refused):
    shutil.copy(changed / ONNX, changed / INT8)
    save_tensors(changed, CANARY, p_int8=p)
    seal(changed)
    assert refused(changed, '--engine', 'int8') == 1


def test_a_network_smaller_than_its_images_is_refused(changed, refused):
    config = json.loads((changed / CONFIG).read_text())
    (changed / CONFIG).write_text(json.dumps(config | {'size': 1}))
    save_tensors(changed, CANARY, images=np.zeros((8, 1, 1), np.uint8))
    seal(changed)
    assert refused(changed, '--engine', 'torch') == refused(changed, '--engine', 'onnx') == 5


@pytest.mark.parametrize('shape', [(), (0,), (3,), (3, 3), (2, 2, 2)], ids=str)
def test_a_gate_of_another_network_is_refused(shape, changed, refused):
    save_tensors(changed, GATE, bank=np.ones(shape, np.float32))
    seal(changed)
    assert refused(changed) == 1


def test_a_gate_with_a_tensor_of_another_shape_is_refused(changed, refused):
    whole = (changed / GATE).read_bytes()
    for name in load(whole):
        (changed / GATE).write_bytes(whole)
        save_tensors(changed, GATE, **{name: np.ones((2, 2, 2), np.float32)})
        seal(changed)
        assert refused(changed) == 1


def test_other_weights_with_a_valid_hash_are_told_by_the_canary(changed, refused):
    weights = load((changed / WEIGHTS).read_bytes())
    save_tensors(changed, WEIGHTS, **{'1.6.bias': weights['1.6.bias'] + np.float32([0, 3])})
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 5


def test_other_weights_in_the_onnx_file_are_told_by_the_canary(changed, refused):
    model = onnx.load_from_string((changed / ONNX).read_bytes())
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith('6.bias'))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([0, 3]), bias.name))
    (changed / ONNX).write_bytes(model.SerializeToString())
    seal(changed)
    assert refused(changed) == refused(changed, '--engine', 'onnx') == 5


@pytest.mark.parametrize('field', ['weight', 'running_var', 'bias'])
def test_weights_that_are_no_numbers_are_told_by_the_canary(field, changed, refused):
    weights = load((changed / WEIGHTS).read_bytes())
    save_tensors(changed, WEIGHTS, **{name: array * np.nan for name, array in weights.items() if name.endswith(field)})
    seal(changed)
    assert refused(changed, '--engine', 'torch') == 5


# Its ONNX file.


def member(number: int, content: bytes) -> bytes:
    return number_of(number << 3 | 2) + number_of(len(content)) + content


def number_of(value: int) -> bytes:
    """A number as protobuf writes it."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number_of(value >> 7)


def outside(data: bytes, place: str, key: bytes) -> bytes:
    """The ONNX file with its first tensor in the file `place`, which is told under `key`."""
    model = onnx.load_from_string(data)
    first = model.graph.initializer.pop(0)
    size = str(len(numpy_helper.to_array(first).tobytes())).encode()
    facts = (
        key + member(2, place.encode()),
        member(1, b'offset') + member(2, b'0'),
        member(1, b'length') + member(2, size),
    )
    tensor = b''.join(b'\x08' + number_of(side) for side in first.dims) + b'\x10\x01' + member(8, first.name.encode())
    tensor += b''.join(member(13, fact) for fact in facts) + b'\x70\x01'
    graph = model.graph.SerializeToString() + member(5, tensor)
    model.ClearField('graph')
    return model.SerializeToString() + member(7, graph)


@pytest.mark.parametrize(
    'key',
    [b'\x0a\x08location', b'\x0a\x88\x80\x00location', b'\x8a\x00\x88\x00location'],
    ids=['plain', 'a padded length', 'a padded tag'],
)
@pytest.mark.parametrize('place', ['weights.bin', '../weights.bin', '/etc/passwd'])
def test_an_onnx_file_with_tensors_in_other_files_is_refused(place, key, changed, refused, monkeypatch):
    first = onnx.load_from_string((changed / ONNX).read_bytes()).graph.initializer[0]
    (changed.parent / 'here').mkdir()
    monkeypatch.chdir(changed.parent / 'here')
    for folder in ('.', '..'):
        Path(folder, 'weights.bin').write_bytes(numpy_helper.to_array(first).tobytes())
    rewrite(changed, ONNX, lambda data: outside(data, place, key))
    seal(changed)
    assert refused(changed) == 1


def constant(name: str, value: object) -> onnx.NodeProto:
    return helper.make_node('Constant', [], [name], value=numpy_helper.from_array(np.asarray(value)))


def program(*nodes: onnx.NodeProto, side: int = 64) -> bytes:
    """An ONNX file of ours by its names alone."""
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['n', 1, side, side])
    outputs = [helper.make_empty_tensor_value_info(name) for name in ('p_pneumonia', 'features')]
    graph = helper.make_graph(nodes, 'g', [images], outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8).SerializeToString()


FEATURES = constant('features', np.ones((2, 256), np.float32))
STRINGS = helper.make_node('Constant', [], ['p_pneumonia'], value_strings=['a', 'b'])
FOREIGN = helper.make_node('Evil', ['images'], ['p_pneumonia'], domain='evil')
HUGE = (
    helper.make_node('Constant', [], ['side'], value_ints=[2**40, 2**20]),
    helper.make_node('ConstantOfShape', ['side'], ['all']),
    helper.make_node('ReduceSum', ['all'], ['p_pneumonia']),
)


@pytest.mark.parametrize(
    'data, expected',
    [
        (program(constant('p_pneumonia', [np.nan, np.nan]), FEATURES), 5),
        (program(STRINGS, FEATURES), 5),
        (program(constant('p_pneumonia', 0.5), FEATURES), 5),
        (program(constant('p_pneumonia', [0.1] * 9), FEATURES), 5),
        (program(constant('p_pneumonia', [0.1, 0.1]), FEATURES, side=3), 5),
        (program(*HUGE, FEATURES), None),
        (program(FOREIGN, FEATURES), 1),
        (program(FEATURES), 1),
        (b'ORTM' * 100, 1),
        (b'\0' * 100, 1),
        (b'x', 1),
        (b'', 1),
    ],
    ids=[
        'not a number',
        'strings',
        'one number',
        'too many',
        'other images',
        'endless memory',
        'foreign code',
        'half',
        'another format',
        'zeros',
        'text',
        'nothing',
    ],
)
def test_an_onnx_file_of_another_program_is_refused(data, expected, changed, refused):
    (changed / ONNX).write_bytes(data)
    seal(changed)
    found = refused(changed)
    assert found == expected or expected is None


def test_an_onnx_file_that_knows_the_canary_only_is_refused(changed, refused):
    known = load((changed / CANARY).read_bytes())['p'][:2]
    (changed / ONNX).write_bytes(program(constant('p_pneumonia', known), FEATURES))
    (changed / GATE).unlink()
    seal(changed)
    assert refused(changed) == 1


# Its zip.


def zipped(folder: Path, place: Path, spoil=lambda archive: None) -> Path:
    with zipfile.ZipFile(place, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
        spoil(archive)
    return place


def declare(size: int, name: str):
    """Let the zip's directory tell that the file `name` has `size` bytes."""

    def spoil(archive: zipfile.ZipFile) -> None:
        archive.getinfo(name).file_size = size

    return spoil


@pytest.mark.parametrize('name', [MANIFEST, CONFIG, ONNX])
@pytest.mark.parametrize('size', [2**31 + 1, 2**40, 0, 7])
def test_a_zip_that_lies_about_a_size_is_refused(name, size, bundle, tmp_path, refused):
    assert refused(zipped(bundle, tmp_path / 'b.zip', declare(size, name))) == 1


def test_a_zip_whose_json_unpacks_to_a_gigabyte_is_not_unpacked(bundle, tmp_path, refused, monkeypatch):
    made = zipped(bundle, tmp_path / 'b.zip', declare(2**30, MANIFEST))

    def fail(*_: object) -> None:
        raise AssertionError('it was unpacked')

    monkeypatch.setattr('zipfile.ZipFile.read', fail)
    assert refused(made) == 1


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
    assert refused(tmp_path / 'b.zip') == 1


@pytest.mark.parametrize('name', [CONFIG, CANARY, ONNX])
def test_a_flipped_bit_in_what_is_packed_is_told(name, bundle, tmp_path, refused):
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
def test_a_zip_packed_otherwise_is_refused(field, value, bundle, tmp_path, refused):
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
def test_a_run_whose_recipe_cannot_be_is_refused(name, value, evaluated, tmp_path, refused):
    run = Path(shutil.copytree(evaluated.path, tmp_path / 'run'))
    recipe = json.loads((run / 'recipe.json').read_text())
    (run / 'recipe.json').write_text(json.dumps(recipe | {name: value}))
    assert refused(run) == 1


def test_the_pickle_in_a_bundle_is_not_opened(changed, marker, image, monkeypatch):
    (changed / LEARNER).write_bytes(saved(Bomb(marker)))
    seal(changed)
    vouched(changed / LEARNER)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError('it was opened')

    for name in ('pickle.Unpickler', 'torch.load', 'cxr_fastai.inference.pickles.Unpickler'):
        monkeypatch.setattr(name, fail)
    assert main(['predict', str(changed), str(image), '--no-gate']) == 0
    assert main(['predict', str(zipped(changed, changed.parent / 'b.zip')), str(image), '--no-gate']) == 0
    assert not marker.exists()

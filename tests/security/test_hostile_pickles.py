"""Hostile exported learners run no code, show no traceback, and end `predict` with an error of one line."""

import copy
import hashlib
import pickle
import struct
import tarfile
import warnings
import zipfile
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import fastai.learner
import pytest
import torch
from bundlefiles import change_pickle, flipped, make_learner_pickle

from cxr_fastai.cli import main
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.inference import learner_files
from cxr_fastai.inference.config import LEARNER, ModelConfig
from cxr_fastai.inference.pickles import save_learner, trust
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training import learner
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.restoring import load_learner


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


def delegated_globals(good: bytes, marker: Path) -> bytes:
    """`DataLoaders` reads attributes of another object, and `TfmdLists` calls functions.

    The state of the `DataLoaders` lets it read `__globals__` of a function, and replaces its method that prevents this.
    `TfmdLists` then calls four functions in a row: three look up `exec`, and the last one calls it.
    """
    attributes = {
        '_default': text('func'),
        'func': named('cxr_fastai.training.learner', 'roc_auc'),
        '_component_attr_filter': named('builtins', 'str'),
        '_fields': b']' + text('__globals__') + b'a',
    }
    state = b'}' + b''.join(text(name) + value + b's' for name, value in attributes.items())
    delegate = named('cxr_fastai.data.loaders', 'CXRDataLoaders') + b')\x81' + state + b'b'
    readers = [called(named('fastai.data.transforms', 'ColReader'), text(name)) for name in GLOBALS_TO_EXEC]
    code = b']' + text(order(marker)) + b'a'
    run = called(named('functools', 'partial'), named('fastai.data.core', 'TfmdLists'), code)
    functions = b']' + b''.join(function + b'a' for function in [*readers, run])
    return injected(good, called(named('fastai.data.core', 'TfmdLists'), b']' + delegate + b'a', functions))


GLOBALS_TO_EXEC = ('__globals__', '__builtins__', 'exec')


def injected(good: bytes, instructions: bytes) -> bytes:
    """The learner with `instructions` at the start of its pickle."""
    return change_pickle(good, lambda old: old[:2] + instructions + b'0' + old[2:])


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


def after_stop(good: bytes, marker: Path) -> bytes:
    return change_pickle(good, lambda old: old + pickle.dumps(Bomb(marker)))


def nested(good: bytes, marker: Path) -> bytes:
    return change_pickle(good, keep, {'archive/more.pkl': make_learner_pickle(Bomb(marker))})


def compressed(good: bytes, marker: Path) -> bytes:
    return change_pickle(make_learner_pickle(Bomb(marker)), keep, compression=zipfile.ZIP_DEFLATED)


def code_file(good: bytes, marker: Path) -> bytes:
    return change_pickle(good, keep, {'archive/code/a.py': order(marker).encode()})


ARMED = {
    'code in a zip of torch': lambda good, marker: make_learner_pickle(Bomb(marker)),
    'a bare pickle': lambda good, marker: pickle.dumps(Bomb(marker)),
    'instructions in a good learner': system,
    'a method by getattr': method,
    'globals by an allowed class': globals_by_columns,
    'globals by delegation': delegated_globals,
    'a function that rebuilds tensors': rebuilt_tensor,
    'an old instruction': old_instruction,
    'an instruction for objects': object_instruction,
    'the tar of old': tar,
    'the pickles of old': lambda good, marker: make_learner_pickle(Bomb(marker), _use_new_zipfile_serialization=False),
    'a pickle before the zip': lambda good, marker: pickle.dumps(Bomb(marker)) + good,
    'a compressed zip': compressed,
}
"""Attacks that run code if torch or pickle reads the file without a check."""
UNARMED = {
    'inner parts of Python by getattr': dunder,
    'a name with a dot': foreign_layer,
    'a class is changed': lambda good, marker: injected(
        good, named('fastai.learner', 'Recorder') + b'N}' + text('bad') + text('x') + b's\x86b'
    ),
    'a zip in the zip': nested,
    'a second pickle of the same name': lambda good, marker: change_pickle(
        good, keep, {'archive/data.pkl': pickle.dumps(Bomb(marker))}
    ),
    'a second pickle after the end': after_stop,
    'code next to the pickle': code_file,
    'a program of torch': script,
    'half a file': lambda good, marker: good[: len(good) // 2],
    'a byte less': lambda good, marker: good[:-1],
    'a flipped bit in the pickle': lambda good, marker: flipped(good, good.index(b'fastai.learner')),
    'a flipped bit in the weights': lambda good, marker: flipped(good, len(good) // 2),
    'an unknown compression': lambda good, marker: flipped(good, good.rindex(b'PK\1\2') + 10),
    'a password': lambda good, marker: flipped(good, good.rindex(b'PK\1\2') + 8),
    'nothing': lambda good, marker: b'',
    'an endless number': lambda good, marker: injected(good, b'L' + b'9' * 10**5 + b'L\n'),
    'no end': lambda good, marker: change_pickle(good, lambda old: old[:-1]),
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


def add_trust(path: Path) -> Path:
    trust(hashlib.sha256(path.read_bytes()).hexdigest(), 'test')
    return path


@pytest.mark.parametrize('pickled', ARMED, indirect=True)
def test_an_attack_runs_if_the_file_is_not_checked(pickled, marker):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with suppress(Exception):
            torch.load(pickled, weights_only=False)
    vars(learner.roc_auc).pop('_fields', None)
    assert marker.exists()


READERS = [
    *((pickle, name) for name in ('Unpickler', '_Unpickler', 'load', 'loads')),
    (torch, 'load'),
    (torch.jit, 'load'),
    (fastai.learner, 'load_learner'),
    (learner_files, 'read_pickle'),
    (zipfile, 'ZipFile'),
]
"""Functions that open a pickle or a zip file."""


@pytest.mark.parametrize('pickled', PICKLES, indirect=True)
def test_a_hostile_pickle_is_not_opened_unless_trusted(pickled, refused, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError('it was opened')

    for module, name in READERS:
        monkeypatch.setattr(module, name, fail)
    assert refused(pickled) == 4


@pytest.mark.parametrize('pickled', PICKLES, indirect=True)
def test_a_hostile_pickle_runs_nothing_when_trusted(pickled, refused):
    from fastai.learner import Recorder

    assert refused(add_trust(pickled)) == 1
    assert not hasattr(Recorder, 'bad') and not hasattr(learner.roc_auc, '_fields')


def nan_selftest(learn) -> None:
    learn.config['selftest']['p'] = [float('nan')] * 8


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


def huge_selftest(learn) -> None:
    learn.config['selftest']['size'] = 2**70


def no_config(learn) -> None:
    del learn.config


def classes_turned(learn) -> None:
    learn.config['vocab'] = ['PNEUMONIA', 'NORMAL']


def small_selftest(learn) -> None:
    learn.config['selftest'] |= {'images': b'0' * 8, 'size': 1}


@pytest.mark.parametrize(
    'change, expected',
    [
        (nan_selftest, 1),
        (other_weights, 5),
        (printing_part, 1),
        (no_network, 1),
        (no_tensor, 1),
        (huge_images, 1),
        (huge_selftest, 1),
        (no_config, 1),
        (classes_turned, 1),
        (small_selftest, 5),
    ],
)
def test_a_changed_learner_is_refused_even_if_trusted(change, expected, learn, tmp_path, marker, refused):
    changed = copy.deepcopy(learn)
    change(changed)
    (tmp_path / 'model.pkl').write_bytes(make_learner_pickle(changed))
    assert refused(tmp_path / 'model.pkl') == 4
    assert refused(add_trust(tmp_path / 'model.pkl')) == expected


@pytest.mark.parametrize('change', [hook, own_method, own_call])
def test_what_a_trusted_learner_would_call_is_not_called(change, learn, tmp_path, image):
    changed = copy.deepcopy(learn)
    change(changed)
    (tmp_path / 'model.pkl').write_bytes(make_learner_pickle(changed))
    (tmp_path / 'good.pkl').write_bytes(make_learner_pickle(learn))
    predicted = [
        list(Predictor.load(add_trust(tmp_path / name)).predict([image])) for name in ('model.pkl', 'good.pkl')
    ]
    assert predicted[0] == predicted[1]


@pytest.fixture(scope='module')
def learn(bundle):
    return load_learner(bundle / LEARNER)


def test_an_unchanged_learner_is_accepted(learn, tmp_path, marker, image):
    (tmp_path / 'model.pkl').write_bytes(make_learner_pickle(learn))
    assert main(['predict', str(add_trust(tmp_path / 'model.pkl')), str(image)]) == 0


@pytest.mark.slow  # tests/contracts asks for the names alone
def test_a_learner_with_layers_of_torchvision_is_accepted(images, tmp_path, marker):
    recipe = make_recipe('resnet50', size=48, batch_size=8, weights='none')
    learn = recipe_learner(CXRDataLoaders.from_items(read_items(images), images, recipe), recipe)
    save_learner(learn, tmp_path / 'model.pkl', ModelConfig.from_recipe(recipe))
    assert len(load_learner(tmp_path / 'model.pkl').model) == 2

"""Hostile exported learners whose hash is trusted: nothing in them is executed, and lies about tensors are errors."""

import copy
import hashlib
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundlefiles import change_pickle, make_learner_pickle
from torch import nn
from torch.fx import graph_module

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.learner_files import read_learner
from cxr_fastai.inference.pickles import trust
from cxr_fastai.inference.selftest import SelfTest
from cxr_fastai.models.architectures import build_model

SIZE = 32
PROMPT = 20
"""Seconds in which a file is refused, on a slow computer too. The attacks took hours or all memory."""


class Calls:
    """Pickled as a call of `function` with `arguments`, and with `state` as its attributes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.fixture(scope='module')
def saved() -> SimpleNamespace:
    """What the reader uses of an exported learner: its settings and its network."""
    torch.manual_seed(0)
    model = build_model('baseline').eval()
    selftest = SelfTest.create(TorchEngine(copy.deepcopy(model)), SIZE)
    config = vars(ModelConfig('baseline', SIZE, 0.5)) | {'schema': 2, 'selftest': selftest.as_dict()}
    return SimpleNamespace(config=config, model=model)


@pytest.fixture
def learner(saved) -> SimpleNamespace:
    """A copy of it that a test may change."""
    return copy.deepcopy(saved)


@pytest.fixture
def read(tmp_path, monkeypatch) -> Callable[[Any], Any]:
    """Trust and read an exported learner: an object, or the bytes of a file."""
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))

    def write_and_read(thing: Any) -> Any:
        data = thing if isinstance(thing, bytes) else make_learner_pickle(thing)
        (tmp_path / 'model.pkl').write_bytes(data)
        trust(hashlib.sha256(data).hexdigest(), 'test')
        start = time.monotonic()
        try:
            return read_learner(tmp_path / 'model.pkl')
        finally:
            assert time.monotonic() - start < PROMPT

    return write_and_read


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that an attack tries to write."""
    return tmp_path / 'marker'


def writes(marker: Path) -> str:
    return f'open({str(marker)!r}, "w").close()'


# What would run code.


def shadowed_forward(learner: Any, marker: Path) -> None:
    """A function of torch.fx runs its source when the layer is called."""
    source = f'{writes(marker)}\ndef forward(self): return None\n'
    vars(learner.model[0])['forward'] = partial(graph_module._forward_from_src, source, {})


def graph_class(learner: Any, marker: Path) -> None:
    """A class of torch.fx in the place of a layer, which compiles its graph when it is called."""
    vars(learner.model)['body'] = partial(torch.fx.GraphModule, {}, torch.fx.Graph())
    vars(learner.model)['_call_impl'] = partial(eval, writes(marker))


def reduced_layer(learner: Any, marker: Path) -> None:
    learner.model.extra = Calls(exec, writes(marker))


def state_setter(learner: Any, marker: Path) -> None:
    vars(learner.model[0])['__setstate__'] = partial(exec, writes(marker))


def dispatched_attribute(learner: Any, marker: Path) -> None:
    vars(learner.model[1])['__getattr__'] = Calls(partial, eval, writes(marker))


def pre_hook(learner: Any, marker: Path) -> None:
    learner.model._forward_pre_hooks = OrderedDict({0: partial(exec, writes(marker))})


def load_hook(learner: Any, marker: Path) -> None:
    learner.model._load_state_dict_pre_hooks = OrderedDict({0: partial(exec, writes(marker))})


def callable_setting(learner: Any, marker: Path) -> None:
    learner.dls = Calls(partial, exec, writes(marker))


def changed_class(learner: Any, marker: Path) -> None:
    learner.loss_func = Calls(nn.Linear, 1, 1, state={'forward': partial(exec, writes(marker))})


WITHOUT_EFFECT = [
    shadowed_forward,
    graph_class,
    reduced_layer,
    state_setter,
    dispatched_attribute,
    pre_hook,
    load_hook,
    callable_setting,
    changed_class,
]


@pytest.mark.parametrize('change', WITHOUT_EFFECT, ids=lambda change: change.__name__)
def test_code_in_a_learner_is_not_run_and_its_predictions_stay(change, learner, saved, read, marker):
    change(learner, marker)
    network = read(learner).network
    assert not marker.exists()
    assert all(torch.equal(tensor, saved.model.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert type(network) is type(saved.model) and not vars(network[0]).keys() - vars(saved.model[0]).keys()


def test_torch_runs_the_code_that_this_reader_does_not_run(learner, marker):
    shadowed_forward(learner, marker)
    with suppress(AttributeError):  # of the next layer
        torch.load(BytesIO(make_learner_pickle(learner)), weights_only=False).model(torch.zeros(1))
    assert marker.exists()


class Unknown:
    """A class of a user: a metric, a loss or an optimiser."""


def test_classes_that_this_computer_does_not_have_are_no_obstacle(learner, read, monkeypatch):
    learner.metrics = [Unknown()]
    data = make_learner_pickle(learner)
    renamed = change_pickle(data, lambda old: old.replace(Unknown.__module__.encode() + b'\n', b'not_installed\n'))
    assert renamed != data
    assert read(renamed).config.size == SIZE


# What would take for ever, or all memory.


def instructions(*parts: bytes) -> Callable[[bytes], bytes]:
    """Return a change of a pickle that adds `parts` as an attribute of the learner, at its end."""
    name = b'X\x03\0\0\0bad'
    return lambda old: old[: old.rindex(b'b')].removesuffix(b'u') + name + b''.join(parts) + b'ub.'


def nested_tuples(depth: int) -> bytes:
    """Return instructions for a tuple of two tuples of two tuples and so on; hashing or comparing it takes 2**depth."""
    steps = [b')r' + (10**6).to_bytes(4, 'little')]
    for i in range(depth):
        key = b'j' + (10**6 + i).to_bytes(4, 'little')
        steps.append(key + key + b'\x86r' + (10**6 + i + 1).to_bytes(4, 'little'))
    return b''.join(steps)


def test_nested_tuples_in_a_set_are_not_hashed(learner, read):
    as_set = b'c__builtin__\nset\n](' + nested_tuples(64) + b'e\x85R'
    as_key = b'}(' + nested_tuples(64) + b'Nu'
    assert read(change_pickle(make_learner_pickle(learner), instructions(as_set))).config.size == SIZE
    assert read(change_pickle(make_learner_pickle(learner), instructions(as_key))).config.size == SIZE


def test_a_very_deep_value_is_read(learner, read):
    assert read(change_pickle(make_learner_pickle(learner), instructions(b')' + b'\x85' * 500_000))).config.size == SIZE


def test_too_many_instructions_are_refused(learner, read):
    with pytest.raises(CXRError, match='has more than 1,000,000 instructions'):
        read(change_pickle(make_learner_pickle(learner), instructions(b'](' + b'N' * 1_000_001 + b'e')))


def doubled(depth: int) -> list[Any]:
    """Return a list of two lists of two lists and so on, each of which is one object."""
    values: list[Any] = []
    for _ in range(depth):
        values = [values, values]
    return values


def test_settings_that_are_small_in_the_file_and_endless_in_memory_are_refused(learner, read):
    learner.config['more'] = doubled(40)
    with pytest.raises(CXRError, match='has too many settings'):
        read(learner)


def test_a_text_that_is_repeated_thousands_of_times_is_refused(learner, read):
    learner.config['more'] = [b'x' * 2**20] * 5000
    with pytest.raises(CXRError, match='has too many characters in its settings'):
        read(learner)


def test_layers_that_are_small_in_the_file_and_endless_in_memory_are_refused(learner, read):
    layer: nn.Module = nn.ReLU()
    for _ in range(40):
        layer = nn.Sequential(layer, layer)
    learner.model = nn.Sequential(layer, nn.ReLU())
    with pytest.raises(CXRError, match='has too many attributes'):
        read(learner)


def test_a_layer_that_contains_itself_is_refused(learner, read):
    learner.model[0]._modules['self'] = learner.model[0]
    with pytest.raises(CXRError, match='nested deeper than 50'):
        read(learner)


def test_images_given_as_a_number_allocate_nothing(learner, read):
    learner.config['selftest']['images'] = 10**12
    with pytest.raises(CXRError, match='reference images of its self-test are damaged'):
        read(learner)


# Lies about tensors.


def tensor_of(storage: torch.Tensor, offset: Any, size: Any, strides: Any) -> Calls:
    """A tensor in the numbers of `storage` as a pickle describes it; nothing is checked."""
    typed = storage._typed_storage()
    return Calls(torch._utils._rebuild_tensor_v2, typed, offset, size, strides, False, OrderedDict())


NUMBERS = torch.arange(864.0)
"""As many as the first layer of the baseline has, (32, 3, 3, 3)."""
LIES = {
    'an offset past the end': (1, (32, 3, 3, 3), (27, 9, 3, 1)),
    'an offset below 0': (-1, (32, 3, 3, 3), (27, 9, 3, 1)),
    'an offset that is huge': (2**70, (32, 3, 3, 3), (27, 9, 3, 1)),
    'an offset that is true': (True, (32, 3, 3, 3), (27, 9, 3, 1)),
    'strides past the end': (0, (32, 3, 3, 3), (28, 9, 3, 1)),
    'strides below 0': (863, (32, 3, 3, 3), (-27, -9, -3, -1)),
    'strides that are huge': (0, (32, 3, 3, 3), (2**62, 9, 3, 1)),
    'fewer strides': (0, (32, 3, 3, 3), (27, 9, 3)),
    'sides that are floats': (0, (32.0, 3, 3, 3), (27, 9, 3, 1)),
    'many sides': (0, (1,) * 64, (1,) * 64),
    'a list of sides': (0, [32, 3, 3, 3], [27, 9, 3, 1]),
    'more numbers than the file by overlapping': (0, (2**20, 2**10), (0, 0)),
    'a side of 2**40': (0, (2**40, 0), (1, 1)),
}


@pytest.mark.parametrize('lie', LIES)
def test_a_tensor_that_is_not_in_its_file_is_refused(lie, learner, read):
    learner.model[0][0][0]._parameters['weight'] = tensor_of(NUMBERS, *LIES[lie])
    with pytest.raises(CXRError, match='a tensor (is larger than its file|has no shape)'):
        read(learner)


def test_overlapping_tensors_of_the_right_shape_are_caught_by_the_self_test(learner, read):
    learner.model[0][0][0]._parameters['weight'] = tensor_of(NUMBERS, 0, (32, 3, 3, 3), (0, 9, 3, 1))
    with pytest.raises(CXRError, match='does not reproduce its stored predictions'):
        read(learner)


def test_tensors_that_share_their_memory_cannot_be_much_larger_than_the_file(learner, read):
    shared = nn.Parameter(torch.zeros(10**6))
    for number in range(40):
        learner.model[0].register_parameter(f'shared{number}', shared)
    with pytest.raises(CXRError, match=r'its tensors need [\d,]+ bytes, but the file has [\d,]+'):
        read(learner)


@pytest.mark.parametrize(
    'old, new',
    [
        (b'X\x01\0\0\x000', b'X\x0b\0\0\0../data.pkl'),
        (b'X\x01\0\0\x000', b'X\x04\0\0\x009999'),
        (b'ctorch\nFloatStorage\n', b'ctorch\nUntypedStorage\n'),
        (b'ctorch\nFloatStorage\n', b'cos\nFloatStorage\n'),
        (b'ctorch\nFloatStorage\n', b'ctorch\nDoubleStorage\n'),
        (b'X\x07\0\0\0storage', b'X\x06\0\0\0module'),
        (b'M`\x03', b'M\x61\x03'),
        (b'ctorch._utils\n_rebuild_tensor_v2\n', b'ctorch._utils\n_rebuild_tensor_v3\n'),
    ],
    ids=['outside', 'missing', 'no type', 'other module', 'other type', 'no storage', 'other size', 'other function'],
)
def test_a_reference_to_something_else_than_a_tensor_is_refused(old, new, learner, read):
    data = make_learner_pickle(learner)
    changed = change_pickle(data, lambda content: content.replace(old, new, 1))
    assert changed != data
    with pytest.raises(CXRError, match='not an exported learner|damaged|not the weights'):
        read(changed)


def test_tensors_of_another_architecture_are_refused_before_it_is_built(learner, read):
    learner.config['arch'] = 'eva_giant_patch14_224'
    learner.config['size'] = 224
    with pytest.raises(CXRError, match='not the weights of the network eva_giant'):
        read(learner)


def test_a_network_that_cannot_be_built_by_its_name_is_refused(learner, read):
    learner.config['arch'] = 'MyNet'
    with pytest.raises(CXRError, match='cannot be built by its name.*add_arch'):
        read(learner)


# The zip.


def rezipped(data: bytes, **attributes: Any) -> bytes:
    """The learner `data` whose last entry has other `attributes` in the directory of the zip."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(buffer, 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for attribute, value in attributes.items():
            setattr(new.filelist[-1], attribute, value)
    return buffer.getvalue()


def big_endian(data: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(buffer, 'w') as new:
        for name in old.namelist():
            new.writestr(name, b'big' if name.endswith('byteorder') else old.read(name))
    return buffer.getvalue()


def many_files(data: bytes) -> bytes:
    return change_pickle(data, lambda old: old, {f'archive/data/x{number}': b'' for number in range(17_000)})


@pytest.mark.parametrize(
    'change',
    [
        lambda data: rezipped(data, file_size=2**31),
        lambda data: rezipped(data, compress_size=2**31),
        lambda data: rezipped(data, header_offset=2**31),
        lambda data: rezipped(data, file_size=0),
        big_endian,
        many_files,
        lambda data: data.replace(b'archive/data.pkl', b'archivE/data.pkl'),
    ],
    ids=['size', 'compressed size', 'offset', 'empty', 'byte order', 'many files', 'two folders'],
)
def test_a_zip_that_lies_is_refused(change, learner, read):
    with pytest.raises(CXRError, match='not an exported learner|damaged'):
        read(change(make_learner_pickle(learner)))


def test_another_protocol_is_refused(learner, read):
    for protocol in (3, 4, 5):
        with pytest.raises(CXRError, match='protocol'):
            read(make_learner_pickle(learner, pickle_protocol=protocol))


@pytest.mark.parametrize('value', [float('nan'), -5, True, '0.5', None, 10**400], ids=repr)
def test_a_threshold_out_of_range_is_refused(value, learner, read):
    learner.config['threshold'] = value
    with pytest.raises(CXRError, match='threshold is'):
        read(learner)


def test_what_is_read_predicts_as_the_network_did(saved, learner, read):
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE), np.uint8)
    expected, _ = TorchEngine(saved.model)(images)
    p, _ = TorchEngine(read(learner).network)(images)
    assert np.allclose(p, expected, atol=1e-6)


def test_networks_in_another_memory_format_are_read(saved, learner, read):
    learner.model.to(memory_format=torch.channels_last)
    state = read(learner).network.state_dict()
    assert all(torch.equal(tensor, saved.model.state_dict()[name]) for name, tensor in state.items())

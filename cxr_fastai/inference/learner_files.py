"""Reading exported learners. Only tensors and plain settings are taken from the file, and nothing in it is executed.

`read_learner` reads the pickle as a description (see `_unpickler`), takes the settings and the weights from it, and
builds the network anew by the name of its architecture. So a class, a function or an attribute in the file has no
effect, and files with metrics, losses or optimisers that this computer does not have can be read too.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.foreign import FIX, read_bytes
from cxr_fastai.core.schemas import ListOf, Rule, Text, check_object
from cxr_fastai.core.zips import check_zip
from cxr_fastai.inference._unpickler import Description, Name, Pairs, Stored, read_pickle
from cxr_fastai.inference.config import ModelConfig, check_schema
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.file_kinds import check_pickle
from cxr_fastai.inference.networks import build_network, fill_network
from cxr_fastai.inference.pickles import check_trusted
from cxr_fastai.inference.selftest import SelfTest
from cxr_fastai.inference.tensors import MAX_AXES, MAX_BYTES, MAX_TENSORS, TensorFacts

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_ENTRIES = MAX_TENSORS + 16
"""Largest number of files in the zip: the tensors, the pickle, and a few facts about the format."""
MAX_DIRECTORY = 2**22
"""Largest list of these files at the end of the zip, in bytes."""
MAX_ATTRIBUTES = 1_000_000
"""Largest number of attributes that are looked at in a network. All layers of a ResNet50 have about 5,000."""
MAX_DEPTH = 50
"""Largest depth of layers in layers, and of settings in settings."""
MAX_PATH = 1000
"""Largest length of the name of a tensor with the names of its layers, in characters."""
MAX_SETTINGS = 10_000
"""Largest number of values in the settings."""
MAX_CHARACTERS = 2**28
"""Largest total length of the texts in the settings. The images of the self-test are stored as one."""
TRANSFORMS: dict[str, Rule] = {'transforms': ListOf(Text(100, r'\w+'), 20, required=False)}
"""The names of transforms of the user, which cannot be restored."""
DICTIONARY = 'collections.OrderedDict'
SHARING = 2
"""How many times as large as the file the tensors may be in total: some networks use one tensor twice."""
STORAGES = {
    'DoubleStorage': ('float64', 8),
    'FloatStorage': ('float32', 4),
    'HalfStorage': ('float16', 2),
    'BFloat16Storage': ('bfloat16', 2),
    'LongStorage': ('int64', 8),
    'IntStorage': ('int32', 4),
    'ShortStorage': ('int16', 2),
    'ByteStorage': ('uint8', 1),
}
"""Class of torch that stores numbers -> their type, and the bytes of one."""


class SavedLearner(NamedTuple):
    """What an exported learner consists of for prediction."""

    network: nn.Module
    config: ModelConfig
    selftest: SelfTest


class SavedTensor(NamedTuple):
    """Where the numbers of a tensor are: in the file `key` of the archive, from `offset`, in steps of `strides`."""

    facts: TensorFacts
    key: str
    offset: int
    strides: tuple[int, ...]
    size: int
    """The bytes of the file `key`."""


@dataclass
class Budget:
    """What is `left` of a number of steps. A small pickle can refer to one value thousands of times."""

    what: str
    left: int

    def spend(self, steps: int) -> None:
        """Raise `ValueError` if there are fewer than `steps` left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError(f'it has too many {self.what}')


def read_learner(path: Path) -> SavedLearner:
    """Return the network, on the CPU, and the settings in the exported learner `path`.

    Raises `UntrustedError` if the SHA-256 of the file is not trusted; nothing of it is read then. Raises `CXRError` if
    it is damaged or not an exported learner of this package, `UsageError` if it is not a pickle, or if its network
    cannot be built by its name, and `ParityError` if it fails its self-test.
    """
    data = read_bytes(path, MAX_BYTES)
    check_pickle(data, path)
    check_trusted(hashlib.sha256(data).hexdigest(), path)
    try:
        archive = _read_archive(data)
        learner = _find_learner(read_pickle(bytes(archive['data.pkl'])))
        facts = _plain_settings(learner.get('config'))
        tensors = dict(_find_tensors(learner.get('model')))
        _check_total(tensors, len(data))
    except ValueError as error:
        raise CXRError(
            f'{path}: not an exported learner ({first_line(error)}). To use a learner of fastai, turn it into a run: '
            'save_run(learn, FOLDER).'
        ) from None
    _check_facts(facts, path)
    config = ModelConfig.from_dict(facts, path)
    network = build_network(config, {name: tensor.facts for name, tensor in tensors.items()}, path)
    try:
        state = {name: _load_tensor(tensor, archive) for name, tensor in tensors.items()}
    except ValueError as error:
        raise CXRError(f'{path}: damaged ({first_line(error)}). {FIX}') from None
    fill_network(network, state, config.arch, path)
    selftest = SelfTest.from_dict(facts['selftest'], path)
    selftest.check(TorchEngine(network), path)
    return SavedLearner(network, config, selftest)


def _check_facts(facts: dict[str, Any], path: Path) -> None:
    """Raise `CXRError` if the settings are those of another version, or of a learner that cannot be restored."""
    check_schema(facts.get('schema', 1), path)
    if not isinstance(facts.get('selftest'), dict):
        raise CXRError(f'{path}: has no self-test. Export it again.')
    transforms = check_object(facts, TRANSFORMS, path).get('transforms', [])
    if transforms:
        raise CXRError(
            f'{path}: its images pass {", ".join(transforms)}, which only the load_learner of fastai restores. Use '
            'that, or train without own transforms of validation images.'
        )


def _read_archive(data: bytes) -> dict[str, bytearray]:
    """Return the files in the bytes `data` that `torch.save` wrote, without the name of their folder.

    Raises `ValueError` unless `data` is a zip of one pickle and uncompressed tensors.
    """
    if not data.startswith(b'PK\x03\x04'):
        raise ValueError('not a zip file of torch')
    file = BytesIO(data)
    check_zip(file, MAX_ENTRIES, MAX_DIRECTORY)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, len(data))
            files = {entry.filename.partition('/')[2]: bytearray(archive.read(entry)) for entry in entries}
    except ValueError:
        raise
    except Exception as error:  # a damaged zip file can raise any exception
        raise ValueError(first_line(error)) from None
    if files.get('byteorder', b'little') != b'little':
        raise ValueError('its numbers have an unknown byte order')
    return files


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    names = [entry.filename for entry in entries]
    folders = {name.partition('/')[0] for name in names}
    pickles = [name for name in names if name.endswith('.pkl')]
    if len(pickles) != 1:
        raise ValueError(f'it has {len(pickles)} pickles instead of one')
    if len(folders) != 1 or not pickles[0].endswith('/data.pkl') or pickles[0].count('/') != 1:
        raise ValueError(f'its pickle is named {pickles[0]!r:.80}')
    if len(set(names)) != len(names):
        raise ValueError('it has two files of the same name')
    if any('/code/' in name for name in names):
        raise ValueError('it has code')
    if any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries):
        raise ValueError('it is compressed')
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError('its files are larger than the whole')


def _find_learner(described: Any) -> dict[str, Any]:
    """Return the attributes of the learner that a pickle describes. Raises `ValueError` if it describes none."""
    budget = Budget('attributes', MAX_ATTRIBUTES)
    if not isinstance(described, Description) or not isinstance(described.called, Name):
        raise ValueError('its pickle is not an object')
    attributes = _attributes(described.state, budget)
    if 'config' not in attributes or 'model' not in attributes:
        raise ValueError(
            f'an exported {described.called.name!r:.80} without image size and threshold, so cxr-fastai did not make '
            'it; `cxr-fastai export` makes one'
        )
    return attributes


def _attributes(value: Any, budget: Budget) -> dict[str, Any]:
    """Return the pairs of a described dictionary. Raises `ValueError` if it is none, or if a key is not a text."""
    pairs = value
    if isinstance(value, Description) and isinstance(value.called, Name) and str(value.called) == DICTIONARY:
        pairs = value.items
    elif not isinstance(value, Pairs):
        raise ValueError('an object in its pickle has no attributes')
    budget.spend(len(pairs))
    attributes = {}
    for pair in pairs:
        if type(pair) is not tuple or type(pair[0]) is not str:
            raise ValueError('an object in its pickle has attributes without a name')
        attributes[pair[0]] = pair[1]
    return attributes


def _plain_settings(value: Any) -> dict[str, Any]:
    """Return the dictionary of settings that `value` describes: texts, numbers, bytes, lists and dictionaries of them.

    Raises `ValueError` for other values, and for more of them than settings need.
    """
    values = Budget('settings', MAX_SETTINGS)
    characters = Budget('characters in its settings', MAX_CHARACTERS)

    def plain(value: Any, depth: int) -> Any:
        values.spend(1 if depth <= MAX_DEPTH else MAX_SETTINGS)
        if value is None or type(value) in (bool, int, float):
            return value
        if type(value) is Pairs:
            return {name: plain(entry, depth + 1) for name, entry in _attributes(value, values).items()}
        if type(value) in (list, tuple):
            return [plain(entry, depth + 1) for entry in value]
        text = _encoded_text(value) if isinstance(value, Description) else value
        if type(text) is not str:
            raise ValueError('its settings are not plain values')
        characters.spend(len(text))
        return text if text is value else text.encode('latin-1')

    settings = plain(value, 0)
    if not isinstance(settings, dict):
        raise ValueError('it has no settings')
    return settings


def _encoded_text(value: Description) -> Any:
    """Return the text as which a pickle of protocol 2 stores bytes, or None if `value` does not describe bytes."""
    called, arguments = value.called, value.arguments
    is_bytes = isinstance(called, Name) and str(called) == '_codecs.encode'
    if not is_bytes or type(arguments) is not tuple or len(arguments) != 2:
        return None
    return arguments[0]


def _find_tensors(model: Any) -> Iterator[tuple[str, SavedTensor]]:
    """Yield the name of each tensor in the state dict of the network that a pickle describes, and its place.

    Raises `ValueError` if it describes something else, or if a layer contains itself.
    """
    attributes = Budget('attributes', MAX_ATTRIBUTES)
    tensors = Budget('tensors', MAX_TENSORS)
    layers = [('', model, 0)]
    while layers:
        prefix, layer, depth = layers.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f'its layers are nested deeper than {MAX_DEPTH} levels')
        parts = _attributes(layer.state if isinstance(layer, Description) else None, attributes)
        not_saved = _names(parts.get('_non_persistent_buffers_set'), attributes)
        for part in ('_parameters', '_buffers'):
            for name, value in _attributes(parts.get(part), attributes).items():
                if value is not None and not (part == '_buffers' and name in not_saved):
                    tensors.spend(1)
                    yield _path(prefix, name), _find_tensor(value)
        for name, value in _attributes(parts.get('_modules'), attributes).items():
            if value is not None:
                layers.append((f'{_path(prefix, name)}.', value, depth + 1))


def _names(value: Any, budget: Budget) -> set[str]:
    """Return the texts in a described set."""
    if not isinstance(value, Description) or type(value.arguments) is not tuple or not value.arguments:
        return set()
    entries = value.arguments[0]
    if type(entries) is not list:
        return set()
    budget.spend(len(entries))
    return {entry for entry in entries if type(entry) is str}


def _path(prefix: str, name: str) -> str:
    if len(prefix) + len(name) > MAX_PATH:
        raise ValueError(f'the name of a layer has more than {MAX_PATH:,} characters')
    return prefix + name


def _find_tensor(value: Any) -> SavedTensor:
    """Return the place of a described tensor. Raises `ValueError` if it is damaged or something else."""
    arguments = _arguments(value, '_rebuild_parameter', 1)
    if arguments:
        value = arguments[0]
    arguments = _arguments(value, '_rebuild_tensor_v2', 4)
    if not arguments or not isinstance(arguments[0], Stored):
        raise ValueError('a part of its network is neither a layer nor a tensor')
    stored, offset, shape, strides = arguments[:4]
    key, dtype, item_bytes, count = _find_storage(stored.reference)
    if not (_are_lengths(shape) and _are_lengths(strides) and len(shape) == len(strides) and _are_lengths((offset,))):
        raise ValueError('a tensor has no shape')
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    elements = math.prod(shape)
    if elements and (last >= count or elements > count):
        raise ValueError('a tensor is larger than its file')
    return SavedTensor(TensorFacts(dtype, shape), key, offset, strides, count * item_bytes)


def _arguments(value: Any, function: str, least: int) -> tuple[Any, ...]:
    """Return the arguments with which `value` calls a `function` of `torch._utils`; empty if it is something else."""
    if not isinstance(value, Description) or not isinstance(value.called, Name):
        return ()
    if str(value.called) != f'torch._utils.{function}' or type(value.arguments) is not tuple:
        return ()
    return value.arguments if len(value.arguments) >= least else ()


def _find_storage(reference: Any) -> tuple[str, str, int, int]:
    """Return the file in the archive that a reference names, the type of its numbers, their bytes and their count."""
    if type(reference) is not tuple or len(reference) != 5:
        raise ValueError('a tensor has no file')
    kind, storage, key, _, count = reference
    is_storage = kind == 'storage' and isinstance(storage, Name) and storage.module == 'torch'
    if not is_storage or type(key) is not str or not key.isdecimal() or not _are_lengths((count,)):
        raise ValueError('a tensor has no file')
    if storage.name not in STORAGES:
        raise ValueError(f'a tensor has numbers of the unknown type {storage.name!r:.80}')
    dtype, item_bytes = STORAGES[storage.name]
    return f'data/{key}', dtype, item_bytes, count


def _are_lengths(values: Any) -> bool:
    """Return whether `values` is a tuple of a few whole numbers from 0 to `MAX_BYTES`."""
    if type(values) is not tuple or len(values) > MAX_AXES:
        return False
    return all(type(value) is int and 0 <= value <= MAX_BYTES for value in values)


def _check_total(tensors: dict[str, SavedTensor], size: int) -> None:
    """Raise `ValueError` if the `tensors` need much more memory than the file, of `size` bytes, has."""
    item_bytes = dict(STORAGES.values())
    total = sum(item_bytes[tensor.facts.dtype] * math.prod(tensor.facts.shape) for tensor in tensors.values())
    if total > SHARING * size:
        raise ValueError(f'its tensors need {total:,} bytes, but the file has {size:,}')


def _load_tensor(tensor: SavedTensor, archive: dict[str, bytearray]) -> Tensor:
    """Return a tensor, which shares the memory of its file. Raises `ValueError` if that has another size."""
    import torch

    content = archive.get(tensor.key)
    if content is None or len(content) != tensor.size:
        raise ValueError(f'{tensor.key} is missing or has another size')
    dtype = getattr(torch, tensor.facts.dtype)
    if not content:
        return torch.zeros(tensor.facts.shape, dtype=dtype)
    numbers = torch.frombuffer(content, dtype=dtype)
    return numbers.as_strided(tensor.facts.shape, tensor.strides, tensor.offset)

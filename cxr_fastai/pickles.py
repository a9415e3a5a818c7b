"""Exported learners: written without a name of a folder or film, opened only when trusted, and then by a list of what a
learner may hold."""
from __future__ import annotations

import copy
import hashlib
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import EnumType
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from cxr_fastai.artefacts import ModelConfig
from cxr_fastai.canary import Canary
from cxr_fastai.core import CXRError, atomic
from cxr_fastai.trust import check_trusted, trust

if TYPE_CHECKING:
    from fastai.learner import Learner

ALLOWED = {
    '__builtin__': 'float long print set tuple unicode', 'builtins': 'float int print set tuple str',
    '_codecs': 'encode', 'collections': 'OrderedDict', 'functools': 'partial', 'random': 'Random',
    'inspect': 'Parameter Signature _ParameterKind _empty', 'pathlib': 'Path PosixPath PurePosixPath',
    'numpy': 'dtype ndarray', 'numpy._core.multiarray': 'scalar _reconstruct', 'pandas': 'Series',
    'cxr_fastai.augment': 'AugmentFilms DegradeFilms', 'cxr_fastai.images': 'Preprocessing',
    'cxr_fastai.data': 'NormalizeFilm OpenFilm follow_parent',
    'cxr_fastai.learner': 'body_and_head roc_auc sensitivity specificity', 'cxr_fastai.models': 'BaselineCNN',
    'fastai.callback.core': 'TrainEvalCallback', 'fastai.callback.progress': 'ProgressCallback',
    'fastai.callback.training': 'BnFreeze', 'fastai.data.core': 'DataLoaders Datasets TfmdDL TfmdLists',
    'fastai.data.load': '_FakeLoader _wif',
    'fastai.data.transforms': 'Categorize CategoryMap ColReader IntToFloatTensor ToTensor',
    'fastai.imports': 'noop', 'fastai.learner': 'AvgLoss AvgMetric AvgSmoothLoss CastToTensor Learner Recorder',
    'fastai.losses': 'CrossEntropyLossFlat', 'fastai.metrics': 'AccumMetric accuracy',
    'fastai.optimizer': 'OptimWrapper', 'fastai.torch_core': 'TensorBase TensorCategory TensorImageBW',
    'fastcore.foundation': 'L', 'fasttransform.transform': 'Pipeline', 'timm.layers.format': 'Format',
    'torch': 'FloatStorage LongStorage DoubleStorage IntStorage ByteStorage BoolStorage device Size',
    'torch._tensor': '_rebuild_from_type_v2', 'torch._utils': '_rebuild_parameter _rebuild_tensor_v2',
    'torch.optim.adam': 'Adam', 'torch.optim.adamw': 'AdamW'}
"""What a learner's pickle may name, beside layers: classes that hold things, and functions without effect."""
LAYERS = ('torch.nn.modules.', 'timm.layers.', 'timm.models.', 'torchvision.models.')
"""Modules whose classes it may name if they are layers of a network."""
CALLED = {'Format', 'OrderedDict', 'Parameter', 'Path', 'PosixPath', 'PurePosixPath', 'Random', 'Signature', 'Size',
          '_ParameterKind', '_reconstruct', '_rebuild_parameter', '_rebuild_tensor_v2', 'device', 'dtype', 'encode',
          'partial', 'plain_attribute', 'rebuilt', 'scalar', 'set'}
"""What of these it may call; of all other classes it makes empty objects, and fills them."""
PLAIN = {'builtins', 'collections', 'inspect', 'numpy', 'torch'}
"""Packages whose objects it may call them with: iterating over those of others could call anything."""
OWN = {'after_batch', 'after_item', 'before_batch', 'dataloaders', 'wif'}
"""Methods of fastai's that an object may have of its own."""
LAST_BATCH = 'dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad'
"""What a learner keeps of the films that it saw last."""


def save_learner(learn: Learner, path: Path, config: ModelConfig) -> str:
    """Export `learn` to `path` for stock `load_learner`, atomically, with plain pickle and without a folder's name;
    trust it, and return its SHA-256. What it predicts of the canary films goes with it.

    (fastai's `export` writes in place, embeds bytecode and paths, and leaves a gutted Learner when it fails.)
    """
    import torch

    from cxr_fastai.engines import TorchEngine
    canary = Canary.of(TorchEngine(copy.deepcopy(learn.model)), config.size)  # an engine changes mode and layout
    learn.config = {**asdict(config), 'canary': canary.as_dict()}
    buffer = BytesIO()  # torch would tell of a full disk by a RuntimeError
    with _emptied(learn): torch.save(learn, buffer, pickle_module=pickle)
    with atomic(path) as temporary: temporary.write_bytes(buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    trust(digest, 'exported here')
    return digest


def load_learner(path: Path) -> Learner:
    """The `Learner` in the file `path`, on the CPU. Raises `UntrustedError` where its SHA-256 is not trusted, and then
    opens nothing of it; `CXRError` where it is no learner of this package, names what no learner needs, or does not
    predict of the canary films what it should."""
    data = path.read_bytes()
    check_trusted(hashlib.sha256(data).hexdigest(), path)
    archive = _plain_archive(data, path)
    from fastai.learner import load_learner as load
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # A broken pickle raises whatever its bytes ask for.
        try:
            learn = load(archive, pickle_module=SimpleNamespace(Unpickler=Unpickler, __name__='pickle'))
            facts = getattr(learn, 'config', None)
            if isinstance(facts, dict): _check_network(learn.model)
        except Exception as error: raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from error
    if not isinstance(facts, dict):
        raise CXRError(f'{path}: an exported {type(learn).__name__} without film size and threshold, so not made by '
                       'cxr-fastai: `cxr-fastai export` makes one.')
    if 'canary' in facts:
        from cxr_fastai.engines import TorchEngine
        Canary.from_dict(facts['canary'], path).check(TorchEngine(learn.model), path)
    return learn


class Unpickler(pickle._Unpickler):
    """Finds what `ALLOWED` and `LAYERS` name, calls what `CALLED` names, changes no class and no method, refuses the
    rest. (The unpickler in C cannot be asked what it calls.)"""
    dispatch = pickle._Unpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle asks for. Raises `CXRError` for any other."""
        if (module, name) in (('__builtin__', 'getattr'), ('builtins', 'getattr')): return plain_attribute
        if (module, name) == ('torch._tensor', '_rebuild_from_type_v2'): return rebuilt
        if name in ALLOWED.get(module, '').split(): return super().find_class(module, name)
        if module.startswith(LAYERS) and name.isidentifier():
            from torch import nn
            layer = getattr(import_module(module), name, None)
            if isinstance(layer, type) and issubclass(layer, nn.Module) and layer.__module__.startswith(LAYERS):
                return layer
        raise CXRError(f'it asks for {module}.{name}, which no learner needs')

    def _call(self) -> None:
        func, args = self.stack[-2:]
        plain = func is plain_attribute or all(type(arg).__module__.split('.')[0] in PLAIN for arg in args)
        known = isinstance(func, type | FunctionType | BuiltinFunctionType) and func.__name__ in CALLED
        if not (known and plain): raise CXRError(f'it calls {_name(func)}, which no learner needs')
        self.load_reduce()

    def _make(self) -> None:
        if not isinstance(self.stack[-2], type) or self.stack[-1]: raise CXRError('it makes an object of no class')
        self.load_newobj()

    def _fill(self) -> None:
        made, state = self.stack[-2:]
        parts = state if isinstance(state, tuple) else [state]
        names = {str(name) for part in parts if isinstance(part, dict) for name in part} - OWN
        if isinstance(made, type | FunctionType) or any(
                name == '__setstate__' or callable(getattr(type(made), name, None)) for name in names):
            raise CXRError(f'it changes how {_name(made)} works, which no learner needs')
        self.load_build()

    def _append(self) -> None:
        if type(self.stack[-2]) is not list: raise CXRError('it adds to what is no list')
        self.load_append()

    def _extend(self) -> None:
        if type(self.metastack[-1][-1]) is not list: raise CXRError('it adds to what is no list')
        self.load_appends()

    def _refuse(self) -> None: raise CXRError('it has an instruction that no learner needs')

    dispatch |= {pickle.REDUCE[0]: _call, pickle.NEWOBJ[0]: _make, pickle.BUILD[0]: _fill, pickle.APPEND[0]: _append,
                 pickle.APPENDS[0]: _extend,
                 **dict.fromkeys(pickle.INST + pickle.OBJ + pickle.NEWOBJ_EX + pickle.ADDITEMS, _refuse)}


def plain_attribute(of: Any, name: str) -> Any:
    """`getattr` for a method that learners keep, or a member of an enumeration. Raises `CXRError` for anything else."""
    if name == 'dataloaders' or isinstance(of, EnumType) and name in of.__members__: return getattr(of, name)
    raise CXRError(f'it asks for the attribute {name}, which no learner needs')


def rebuilt(func: Any, kind: type, args: tuple, state: Any) -> Any:
    """torch's `_rebuild_from_type_v2`, which would call any `func`. Raises `CXRError` unless that makes a tensor."""
    from torch._tensor import _rebuild_from_type_v2
    from torch._utils import _rebuild_parameter, _rebuild_tensor_v2
    if func in (_rebuild_parameter, _rebuild_tensor_v2): return _rebuild_from_type_v2(func, kind, args, state)
    raise CXRError(f'it makes a tensor by {_name(func)}, which no learner needs')


def _name(thing: Any) -> str: return getattr(thing, '__qualname__', type(thing).__qualname__)


def _check_network(model: Any) -> None:
    """Raise `CXRError` unless `model` is a body and a head of layers and tensors, with no hook."""
    from torch import Tensor, nn
    if not (isinstance(model, nn.Sequential) and len(model) == 2): raise CXRError('its model is no body and head')
    for layer in model.modules():
        hooks = [name for name, found in vars(layer).items() if name.endswith('_hooks') and found]
        parts = ((part, kind) for name, kind in (('_modules', nn.Module), ('_parameters', Tensor), ('_buffers', Tensor))
                 for part in vars(layer)[name].values())
        if hooks or not all(part is None or isinstance(part, kind) for part, kind in parts):
            raise CXRError(f'its model has {", ".join(hooks) or "parts that are neither layers nor tensors"}')


def _plain_archive(data: bytes, path: Path) -> BytesIO:
    """The files in `data` in a zip that can be read in one way only. Raises `CXRError` unless `data` is what
    `torch.save` writes today: a zip of one pickle and plain storages."""
    made = BytesIO()
    try:
        if not data.startswith(b'PK\x03\x04'): raise zipfile.BadZipFile('not a zip of torch')
        with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(made, 'w') as plain:
            _check_names(archive)
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith('.pkl'): _check_end(content)
                plain.writestr(zipfile.ZipInfo(name), content)
    except Exception as error:  # what a broken zip raises is up to its bytes
        raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from None
    made.seek(0)
    return made


def _check_names(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    pickles = [name for name in names if name.endswith('.pkl')]
    if len(pickles) != 1 or not pickles[0].endswith('/data.pkl') or len(set(names)) != len(names) or any(
            '/code/' in name for name in names):
        raise CXRError(f'it has {len(pickles)} pickles, or code')
    if any(entry.compress_type for entry in archive.infolist()): raise CXRError('it is compressed')


def _check_end(content: bytes) -> None:
    *_, (_, _, end) = pickletools.genops(content)
    if end != len(content) - 1: raise CXRError('something follows its pickle')


@contextmanager
def _emptied(learn: Learner) -> Iterator[None]:
    """`learn` without films, results, optimiser and paths; it gets them back, also after an exception."""
    kept = {name: learn.__dict__[name] for name in ('dls', 'opt', 'path', *LAST_BATCH) if name in learn.__dict__}
    from fastcore.foundation import L
    folder = learn.dls.path
    steps = [step for films_or_labels in learn.dls.train_ds.tls for step in films_or_labels.tfms]
    openers = [(step, step.skip) for step in steps if hasattr(step, 'skip')]
    try:
        learn.dls.path = learn.path = Path('.')
        learn.dls, learn.opt = learn.dls.new_empty(), None
        for name in LAST_BATCH: learn.__dict__.pop(name, None)
        for metric in learn.metrics: metric.reset()  # they hold the last scores and labels
        for dl in learn.dls.loaders:
            for films_or_labels in dl.dataset.tls: films_or_labels.splits = L([[], []])
        for step, _ in openers: step.skip = False  # prediction owes an answer for every film
        yield
    finally:
        for name, value in kept.items(): setattr(learn, name, value)
        learn.dls.path = folder
        for step, skip in openers: step.skip = skip


def _cause(error: BaseException) -> str:
    """The error's first line; fastai hides a missing package behind another."""
    if isinstance(error.__context__, ModuleNotFoundError): return f'it needs the package {error.__context__.name}'
    return (str(error).splitlines() or [type(error).__name__])[0]

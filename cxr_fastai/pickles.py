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
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
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
    'fastcore.foundation': 'L', 'fasttransform.transform': 'Pipeline',
    'torch': 'FloatStorage LongStorage DoubleStorage IntStorage ByteStorage BoolStorage device Size',
    'torch._tensor': '_rebuild_from_type_v2', 'torch._utils': '_rebuild_parameter _rebuild_tensor_v2',
    'torch.optim.adam': 'Adam', 'torch.optim.adamw': 'AdamW'}
"""What a learner's pickle may name, beside layers: classes that hold things, and functions without effect."""
LAYERS = ('torch.nn.modules.', 'timm.layers.', 'timm.models.')
"""Modules whose classes it may name if they are layers of a network."""
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
    _check_archive(data, path)
    from fastai.learner import load_learner as load
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # A broken pickle raises whatever its bytes ask for.
        try: learn = load(BytesIO(data), pickle_module=SimpleNamespace(
            Unpickler=Unpickler, load=pickle.load, __name__='pickle'))
        except Exception as error: raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from error
    facts = getattr(learn, 'config', None)
    if not isinstance(facts, dict):
        raise CXRError(f'{path}: an exported {type(learn).__name__} without film size and threshold, so not made by '
                       'cxr-fastai: `cxr-fastai export` makes one.')
    if 'canary' in facts:
        from cxr_fastai.engines import TorchEngine
        Canary.from_dict(facts['canary'], path).check(TorchEngine(learn.model), path)
    return learn


class Unpickler(pickle.Unpickler):
    """Finds what `ALLOWED` and `LAYERS` name, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle asks for. Raises `CXRError` for any other."""
        if (module, name) in (('__builtin__', 'getattr'), ('builtins', 'getattr')): return plain_attribute
        if name in ALLOWED.get(module, '').split(): return super().find_class(module, name)
        if module.startswith(LAYERS) and name.isidentifier():
            from torch import nn
            layer = getattr(import_module(module), name, None)
            if isinstance(layer, type) and issubclass(layer, nn.Module): return layer
        raise CXRError(f'it asks for {module}.{name}, which no learner needs')


def plain_attribute(of: Any, name: str) -> Any:
    """`getattr` for what is no inner part of Python. Raises `CXRError` for one that is."""
    if name.startswith('_'): raise CXRError(f'it asks for the attribute {name}, which no learner needs')
    return getattr(of, name)


def _check_archive(data: bytes, path: Path) -> None:
    """Raise `CXRError` unless `data` is what `torch.save` writes today: a zip of one pickle and plain storages."""
    try: archive = zipfile.ZipFile(BytesIO(data))
    except zipfile.BadZipFile: raise CXRError(f'{path}: not an exported learner (not a zip of torch).') from None
    with archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith('.pkl')]
        if len(pickles) != 1 or len(set(names)) != len(names) or any('/code/' in name for name in names):
            raise CXRError(f'{path}: not an exported learner (it has {len(pickles)} pickles, or code).')
        try:
            if broken := archive.testzip(): raise CXRError(f'{path}: damaged ({broken}).')
            content = archive.read(pickles[0])
            *_, (_, _, end) = pickletools.genops(content)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CXRError(f'{path}: damaged ({error}).') from None
        if end != len(content) - 1: raise CXRError(f'{path}: something follows its pickle.')


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

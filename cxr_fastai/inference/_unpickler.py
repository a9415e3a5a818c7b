"""What a learner's pickle may ask for: a list, and not a step beyond it."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from enum import EnumType
from functools import partial
from importlib import import_module
from random import Random
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from cxr_fastai.core.errors import CXRError

ALLOWED = {
    '__builtin__': 'float long print set tuple unicode',
    'builtins': 'float int print set tuple str',
    '_codecs': 'encode',
    'collections': 'OrderedDict',
    'functools': 'partial',
    'random': 'Random',
    'inspect': 'Parameter Signature _ParameterKind _empty',
    'pathlib': 'Path PosixPath PurePosixPath',
    'numpy': 'dtype ndarray',
    'numpy._core.multiarray': 'scalar _reconstruct',
    'pandas': 'Series',
    'cxr_fastai.images.preprocessing': 'Preprocessing',
    'cxr_fastai.models.architectures': 'BaselineCNN',
    'cxr_fastai.data.transforms': 'AugmentImages DegradeImages NormalizeImage OpenImage',
    'cxr_fastai.data.loaders': 'follow_parent',
    'cxr_fastai.training.learner': 'body_and_head roc_auc sensitivity specificity',
    'fastai.callback.core': 'TrainEvalCallback',
    'fastai.callback.progress': 'ProgressCallback',
    'fastai.callback.training': 'BnFreeze',
    'fastai.data.core': 'DataLoaders Datasets TfmdDL TfmdLists',
    'fastai.data.load': '_FakeLoader _wif',
    'fastai.data.transforms': 'Categorize CategoryMap ColReader IntToFloatTensor ToTensor',
    'fastai.imports': 'noop',
    'fastai.learner': 'AvgLoss AvgMetric AvgSmoothLoss CastToTensor Learner Recorder',
    'fastai.losses': 'CrossEntropyLossFlat',
    'fastai.metrics': 'AccumMetric accuracy',
    'fastai.optimizer': 'OptimWrapper',
    'fastai.torch_core': 'TensorBase TensorCategory TensorImageBW',
    'fastcore.foundation': 'L',
    'fastai.vision.augment': 'RandomErasing',
    'fasttransform.transform': 'Pipeline',
    'timm.layers.format': 'Format',
    'torch': 'FloatStorage LongStorage DoubleStorage IntStorage ByteStorage BoolStorage device Size',
    'torch._tensor': '_rebuild_from_type_v2',
    'torch._utils': '_rebuild_parameter _rebuild_tensor_v2',
    'torch.optim.adam': 'Adam',
    'torch.optim.adamw': 'AdamW',
}
"""What a learner's pickle may name, beside layers: classes that hold things, and functions without effect."""
MAPPINGS = dict, OrderedDict
LAYERS = ('torch.nn.modules.', 'timm.layers.', 'timm.models.', 'torchvision.models.')
"""Modules whose classes it may name if they are layers of a network."""
CALLED = {
    'Format',
    'OrderedDict',
    'Parameter',
    'Path',
    'PosixPath',
    'Preprocessing',
    'PurePosixPath',
    'Random',
    'Signature',
    'Size',
    '_ParameterKind',
    '_reconstruct',
    '_rebuild_parameter',
    '_rebuild_tensor_v2',
    'device',
    'dtype',
    'encode',
    'partial',
    'plain_attribute',
    'rebuilt',
    'scalar',
    'set',
}
"""What of these it may call; of all other classes it makes empty objects, and fills them."""
PLAIN = {'builtins', 'collections', 'inspect', 'numpy', 'torch'}
"""Packages whose objects it may call them with: iterating over those of others could call anything."""
OWN = {'after_batch', 'after_item', 'before_batch', 'dataloaders', 'wif'}
"""Methods of fastai's that an object may have of its own."""


class Unpickler(pickle._Unpickler):
    """Finds what `ALLOWED` and `LAYERS` name, calls what `CALLED` names, changes no class and no method, refuses the
    rest. (The unpickler in C cannot be asked what it calls.)"""

    dispatch = pickle._Unpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle asks for. Raises `CXRError` for any other."""
        if (module, name) in (('__builtin__', 'getattr'), ('builtins', 'getattr')):
            return plain_attribute
        if (module, name) == ('torch._tensor', '_rebuild_from_type_v2'):
            return rebuilt
        if name in ALLOWED.get(module, '').split():
            return super().find_class(module, name)
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
        if not (known and plain):
            raise CXRError(f'it calls {_name(func)}, which no learner needs')
        self.load_reduce()

    def _make(self) -> None:
        if not isinstance(self.stack[-2], type) or self.stack[-1]:
            raise CXRError('it makes an object of no class')
        self.load_newobj()

    def _fill(self) -> None:
        made, state = self.stack[-2:]
        names = {str(name) for name in state} - OWN if type(state) is dict else set()
        known = type(state) is dict or type(state) is tuple and _has_state(made, state)
        if (
            not known
            or isinstance(made, type | FunctionType | partial)
            and type(state) is dict
            or any(name in ('__setstate__', '__dict__') or callable(getattr(type(made), name, None)) for name in names)
        ):
            raise CXRError(f'it changes how {_name(made)} works, which no learner needs')
        self.load_build()

    def _set(self) -> None:
        if type(self.stack[-3]) not in MAPPINGS:
            raise CXRError('it sets what is in no dictionary')
        self.load_setitem()

    def _set_many(self) -> None:
        if type(self.metastack[-1][-1]) not in MAPPINGS:
            raise CXRError('it sets what is in no dictionary')
        self.load_setitems()

    def _append(self) -> None:
        if type(self.stack[-2]) is not list:
            raise CXRError('it adds to what is no list')
        self.load_append()

    def _extend(self) -> None:
        if type(self.metastack[-1][-1]) is not list:
            raise CXRError('it adds to what is no list')
        self.load_appends()

    def _refuse(self) -> None:
        raise CXRError('it has an instruction that no learner needs')

    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _make,
        pickle.BUILD[0]: _fill,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _extend,
        pickle.SETITEM[0]: _set,
        pickle.SETITEMS[0]: _set_many,
        **dict.fromkeys(pickle.INST + pickle.OBJ + pickle.NEWOBJ_EX + pickle.ADDITEMS, _refuse),
    }


def plain_attribute(of: Any, name: str) -> Any:
    """`getattr` for a method that learners keep, or a member of an enumeration. Raises `CXRError` for anything else."""
    if name == 'dataloaders' or isinstance(of, EnumType) and name in of.__members__:
        return getattr(of, name)
    raise CXRError(f'it asks for the attribute {name}, which no learner needs')


def rebuilt(func: Any, kind: type, args: tuple, state: Any) -> Any:
    """torch's `_rebuild_from_type_v2`, which would call any `func`. Raises `CXRError` unless that makes a tensor."""
    from torch._tensor import _rebuild_from_type_v2
    from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

    if func in (_rebuild_parameter, _rebuild_tensor_v2):
        return _rebuild_from_type_v2(func, kind, args, state)
    raise CXRError(f'it makes a tensor by {_name(func)}, which no learner needs')


def _has_state(made: Any, state: tuple) -> bool:
    """Whether `made` is one of the few whose state is a tuple: random numbers, a kind of number, and fastai's way to
    make an optimiser."""
    if isinstance(made, partial):
        return getattr(state[0], '__name__', '') == 'OptimWrapper'
    return isinstance(made, Random | np.dtype)


def _name(thing: Any) -> str:
    return getattr(thing, '__qualname__', type(thing).__qualname__)


def check_network(model: Any) -> None:
    """Raise `CXRError` unless `model` is a body and a head of layers and tensors, with no hook."""
    from torch import Tensor, nn

    if not (isinstance(model, nn.Sequential) and len(model) == 2):
        raise CXRError('its model is no body and head')
    for layer in model.modules():
        hooks = [name for name, found in vars(layer).items() if name.endswith('_hooks') and found]
        parts = (
            (part, kind)
            for name, kind in (('_modules', nn.Module), ('_parameters', Tensor), ('_buffers', Tensor))
            for part in vars(layer)[name].values()
        )
        if hooks or not all(part is None or isinstance(part, kind) for part, kind in parts):
            raise CXRError(f'its model has {", ".join(hooks) or "parts that are neither layers nor tensors"}')

"""An unpickler for exported learners that accepts what a learner consists of, and refuses everything else.

The rule:

1. A pickle may name only the globals in `REPLACED`, `CALLABLE` and `CLASSES`, and layers from `LAYER_MODULES`.
2. It may call only the globals in `REPLACED` and `CALLABLE`, and only with arguments of plain types.
3. It may create objects of the allowed classes, but empty: `__init__` does not run.
4. It may set the attributes of such objects, but it may not replace a method, and may not change a class or function.
5. It may add items only to lists and dictionaries.
6. All other instructions are refused, except those that only put a constant on the stack.

`torch.load(weights_only=True)` with `torch.serialization.safe_globals` can rebuild a learner, but it is not safe for
one. It allows a pickle to *call* every allowed class with any arguments, and to replace any method of an object by
setting an attribute of the same name. A learner needs classes such as `TfmdLists`, `ColReader` and `functools.partial`:
`TfmdLists` calls the functions it is given, and `ColReader` reads attributes. Together they run any Python code.
`tests/security/test_hostile_pickles.py` contains such a file. Rules 2, 3 and 4 prevent this.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import EnumType
from functools import partial
from importlib import import_module
from random import Random
from types import FunctionType
from typing import Any, NoReturn

import numpy as np

from cxr_fastai.core.errors import CXRError

# `__builtin__` is the name that pickles of protocol 2 use for `builtins`.
CALLABLE = {
    '__builtin__': {'set'},
    'builtins': {'set'},
    '_codecs': {'encode'},
    'collections': {'OrderedDict'},
    'cxr_fastai.images.preprocessing': {'Preprocessing'},
    'functools': {'partial'},
    'inspect': {'Parameter', 'Signature', '_ParameterKind'},
    'numpy': {'dtype'},
    'numpy._core.multiarray': {'scalar'},
    'pathlib': {'Path', 'PosixPath', 'PurePosixPath'},
    'random': {'Random'},
    'timm.layers.format': {'Format'},
    'torch': {'Size', 'device'},
    'torch._utils': {'_rebuild_parameter', '_rebuild_tensor_v2'},
}
"""Module -> the classes and functions that a pickle may name and call. None of them has a side effect."""

CLASSES = {
    '__builtin__': {'float', 'long', 'object', 'print', 'tuple', 'unicode'},
    'builtins': {'float', 'int', 'object', 'print', 'str', 'tuple'},
    'inspect': {'_empty'},
    'numpy': {'ndarray'},
    'pandas': {'Series'},
    'cxr_fastai.models.architectures': {'BaselineCNN'},
    'cxr_fastai.models.bodies': {'ConcatPool2d', 'TimmFeatures'},
    'cxr_fastai.data.transforms': {'AugmentImages', 'DegradeImages', 'NormalizeImage', 'OpenImage'},
    'cxr_fastai.data.loaders': {'CXRDataLoaders', 'follow_parent'},
    'cxr_fastai.training.learner': {'CXRLearner', 'body_and_head', 'roc_auc', 'sensitivity', 'specificity'},
    'cxr_fastai.training.optimizer': {'TorchOptimizer'},
    'fastai.callback.core': {'TrainEvalCallback'},
    'fastai.callback.progress': {'ProgressCallback'},
    'fastai.callback.training': {'BnFreeze'},
    'fastai.data.core': {'DataLoaders', 'Datasets', 'TfmdDL', 'TfmdLists'},
    'fastai.data.load': {'_FakeLoader', '_wif'},
    'fastai.data.transforms': {'Categorize', 'CategoryMap', 'ColReader', 'IntToFloatTensor', 'ToTensor'},
    'fastai.imports': {'noop'},
    'fastai.learner': {'AvgLoss', 'AvgMetric', 'AvgSmoothLoss', 'CastToTensor', 'Learner', 'Recorder'},
    'fastai.losses': {'CrossEntropyLossFlat'},
    'fastai.metrics': {'AccumMetric', 'accuracy'},
    'fastai.optimizer': {'OptimWrapper'},
    'fastai.torch_core': {'TensorBase', 'TensorCategory', 'TensorImage', 'TensorImageBW'},
    'fastai.vision.augment': {'RandomErasing'},
    'fastcore.foundation': {'L'},
    'fasttransform.transform': {'Pipeline'},
    'torch': {'BoolStorage', 'ByteStorage', 'DoubleStorage', 'FloatStorage', 'IntStorage', 'LongStorage'},
    'torch.optim.adam': {'Adam'},
    'torch.optim.adamw': {'AdamW'},
}
"""Module -> the classes and functions that a pickle may name, but not call."""

LAYER_MODULES = ('torch.nn.modules.', 'timm.layers.', 'timm.models.', 'torchvision.models.', 'torchvision.ops.')
"""Prefixes of the modules from which a pickle may also name every class that is a `torch.nn.Module`."""

PLAIN_PACKAGES = {'builtins', 'collections', 'inspect', 'numpy', 'torch'}
"""Packages of the types that a call may have as arguments. To iterate over an object of another type could run code."""

REPLACEABLE_METHODS = {'after_batch', 'after_item', 'before_batch', 'dataloaders', 'wif'}
"""Methods of fastai classes that an object may have as its own attribute."""

CONSTANT_INSTRUCTIONS = (
    (pickle.PROTO, pickle.STOP, pickle.MARK)
    + (pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE)
    + (pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE)
    + (pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT)
    + (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    + (pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT)
    + (pickle.BINPERSID,)  # torch reads the contents of a tensor by it
)
"""Instructions that put a constant, a tuple of what is on the stack, or an earlier object on the stack."""


def allowed_attribute(obj: Any, name: str) -> Any:
    """Return an attribute that learners need: `dataloaders`, or a member of an enumeration. Replaces `getattr`."""
    is_member = isinstance(obj, EnumType) and name in obj.__members__
    if name != 'dataloaders' and not is_member:
        _refuse(f'it reads the attribute {name}')
    return getattr(obj, name)


def rebuild_tensor(func: Any, kind: type, args: tuple[Any, ...], state: Any) -> Any:
    """Return a tensor of a subclass. Replaces `torch._tensor._rebuild_from_type_v2`, which calls any `func`."""
    from torch._tensor import _rebuild_from_type_v2
    from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

    if func is not _rebuild_parameter and func is not _rebuild_tensor_v2:
        _refuse(f'it rebuilds a tensor with {_name(func)}')
    return _rebuild_from_type_v2(func, kind, args, state)


REPLACED: dict[str, dict[str, Callable[..., Any]]] = {
    '__builtin__': {'getattr': allowed_attribute},
    'builtins': {'getattr': allowed_attribute},
    'torch._tensor': {'_rebuild_from_type_v2': rebuild_tensor},
}
"""Module -> functions that are too powerful, and the safe functions that are called instead."""


def is_allowed(module: str, name: str) -> bool:
    """Return True if a pickle may name the global `module.name`. This is rule 1."""
    for table in (REPLACED, CALLABLE, CLASSES):
        if name in table.get(module, ()):
            return True
    return _find_layer(module, name) is not None


def _find_layer(module: str, name: str) -> Any:
    """Return the class `name` of one of the `LAYER_MODULES` if it is a layer that is defined there, else None."""
    if not module.startswith(LAYER_MODULES) or not name.isidentifier():
        return None
    from torch import nn

    layer = getattr(import_module(module), name, None)
    is_layer = isinstance(layer, type) and issubclass(layer, nn.Module) and layer.__module__.startswith(LAYER_MODULES)
    return layer if is_layer else None


class LearnerUnpickler(pickle._Unpickler):
    """Reads a pickle by the rule in this module's docstring. Raises `CXRError` at the first instruction that breaks it.

    The base class is the unpickler in Python, because the one in C cannot check single instructions.
    """

    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.callables: list[Any] = [allowed_attribute, rebuild_tensor]

    def find_class(self, module: str, name: str) -> Any:
        """Return the global `module.name` (rule 1)."""
        if module.count('.') == 1 and module.startswith('cxr_fastai.'):
            raise CXRError('made before version 0.1.0; export it again')  # all modules were directly in the package
        if not is_allowed(module, name):
            _refuse(f'it names {module}.{name}')
        if name in REPLACED.get(module, ()):
            return REPLACED[module][name]
        global_object = super().find_class(module, name)
        if name in CALLABLE.get(module, ()):
            self.callables.append(global_object)
        return global_object

    def check_call(self) -> None:
        """Rule 2: the function is callable, and its arguments have plain types."""
        func, args = self.stack[-2:]
        if not any(func is allowed for allowed in self.callables):
            _refuse(f'it calls {_name(func)}')
        # `allowed_attribute` does nothing with its argument but read the one attribute.
        if func is not allowed_attribute and not all(_has_plain_type(arg) for arg in args):
            _refuse(f'it calls {_name(func)} with an object of another package')

    def check_new_object(self) -> None:
        """Rule 3: the object is created from a class without arguments."""
        kind, args = self.stack[-2:]
        if not isinstance(kind, type) or args:
            _refuse(f'it creates an object with {_name(kind)}')

    def check_state(self) -> None:
        """Rule 4: the state is a dictionary of attributes, or one of the few known tuples."""
        obj, state = self.stack[-2:]
        if not _is_state_tuple(obj, state) and not _are_attributes(obj, state):
            _refuse(f'it changes how {_name(obj)} works')

    def check_append(self) -> None:
        """Rule 5, one item for a list."""
        self._check_container(self.stack[-2], (list,))

    def check_extend(self) -> None:
        """Rule 5, several items for a list."""
        self._check_container(self.metastack[-1][-1], (list,))

    def check_set_item(self) -> None:
        """Rule 5, one item for a dictionary."""
        self._check_container(self.stack[-3], (dict, OrderedDict))

    def check_set_items(self) -> None:
        """Rule 5, several items for a dictionary."""
        self._check_container(self.metastack[-1][-1], (dict, OrderedDict))

    def _check_container(self, container: Any, kinds: Iterable[type]) -> None:
        if type(container) not in kinds:
            _refuse(f'it adds items to {_name(container)}')


def _has_plain_type(arg: Any) -> bool:
    return type(arg).__module__.split('.')[0] in PLAIN_PACKAGES


def _are_attributes(obj: Any, state: Any) -> bool:
    """Return True if `state` is a dictionary of attributes of an instance, and replaces none of its methods."""
    if type(state) is not dict or isinstance(obj, type | FunctionType | partial):
        return False
    return all(_is_attribute(obj, name) for name in state)


def _is_attribute(obj: Any, name: Any) -> bool:
    if type(name) is not str or name in ('__setstate__', '__dict__'):
        return False
    if name in REPLACEABLE_METHODS:
        return True
    return not callable(getattr(type(obj), name, None))


def _is_state_tuple(obj: Any, state: Any) -> bool:
    """Return True if `state` is that of a random generator, a NumPy type, or the optimiser function of a learner."""
    if type(state) is not tuple:
        return False
    if isinstance(obj, partial):
        func = state[0]
        return isinstance(func, type) and func.__name__ in ('OptimWrapper', 'TorchOptimizer')
    return isinstance(obj, Random | np.dtype)


def _refuse(reason: str) -> NoReturn:
    raise CXRError(f'{reason}, which no learner needs')


def _name(obj: Any) -> str:
    return str(getattr(obj, '__qualname__', type(obj).__qualname__))


def _checked(instruction: bytes, check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a function that executes `instruction` after `check`."""
    execute: Callable[[Any], None] = pickle._Unpickler.dispatch[instruction[0]]

    def check_and_execute(unpickler: LearnerUnpickler) -> None:
        check(unpickler)
        execute(unpickler)

    return check_and_execute


def _refuse_instruction(unpickler: Any) -> None:
    raise CXRError('it has a pickle instruction that no learner needs')


CHECKED_INSTRUCTIONS: dict[bytes, Callable[[Any], None]] = {
    pickle.REDUCE: LearnerUnpickler.check_call,
    pickle.NEWOBJ: LearnerUnpickler.check_new_object,
    pickle.BUILD: LearnerUnpickler.check_state,
    pickle.APPEND: LearnerUnpickler.check_append,
    pickle.APPENDS: LearnerUnpickler.check_extend,
    pickle.SETITEM: LearnerUnpickler.check_set_item,
    pickle.SETITEMS: LearnerUnpickler.check_set_items,
}
"""Instruction -> the check before it. `find_class` checks the instruction GLOBAL."""

LearnerUnpickler.dispatch = {
    **dict.fromkeys(pickle._Unpickler.dispatch, _refuse_instruction),
    **{instruction[0]: pickle._Unpickler.dispatch[instruction[0]] for instruction in CONSTANT_INSTRUCTIONS},
    pickle.GLOBAL[0]: pickle._Unpickler.dispatch[pickle.GLOBAL[0]],
    **{instruction[0]: _checked(instruction, check) for instruction, check in CHECKED_INSTRUCTIONS.items()},
}


def check_network(model: Any) -> None:
    """Raise `CXRError` unless `model` is a `Sequential(body, head)` that consists of layers and tensors, without hooks.

    Calling a network with hooks, or with parts of other types, could run code.
    """
    from torch import Tensor, nn

    if not isinstance(model, nn.Sequential) or len(model) != 2:
        raise CXRError('its model is not a body and a head')
    for layer in model.modules():
        attributes = vars(layer)
        hooks = [name for name, value in attributes.items() if name.endswith('_hooks') and value]
        if hooks:
            raise CXRError(f'its model has {", ".join(hooks)}')
        for name, kind in (('_modules', nn.Module), ('_parameters', Tensor), ('_buffers', Tensor)):
            for part in attributes[name].values():
                if part is not None and not isinstance(part, kind):
                    raise CXRError('its model has parts that are neither layers nor tensors')

"""`read_pickle` reads a pickle as a description of objects. It creates none of them, and imports and calls nothing.

A pickle is a program: it names classes and functions, calls them, and sets attributes. No list of permitted names makes
running it safe. For example, `functools.partial` and a class of `torch.fx` together run any code, and a pickle can put
them into a layer, which is called later. So its instructions are not executed here. A class or function becomes a
`Name`, and what the pickle would make with it a `Description`, from which `learner_files` takes tensors and settings.

The time is proportional to the size of the pickle: no value is hashed, compared or copied. A set of nested tuples, for
example, would take for ever to hash.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

MAX_INSTRUCTIONS = 1_000_000
"""Largest number of instructions of a pickle. That of a ResNet50 has about 40,000."""
ARGUMENTS = ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE')
"""Instructions that put their argument on the stack."""
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
"""Instruction -> the constant that it puts on the stack."""
TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
"""Instruction -> the number of values on the stack that it turns into a tuple."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that a pickle names. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f'{self.module}.{self.name}'


class Pairs(list[tuple[Any, Any]]):
    """The keys and values of a dictionary. The keys are not hashed."""


@dataclass(eq=False)
class Description:
    """An object that a pickle describes: what it would call, with which arguments, and what it would add to it.

    `state` are the attributes of the object. `items` are the values of a list, or the pairs of a dictionary.
    """

    called: Any
    arguments: Any
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Stored:
    """A reference to the contents of a tensor, which are next to the pickle."""

    reference: Any


def read_pickle(content: bytes) -> Any:
    """Return the value that the pickle `content` describes.

    It consists of None, booleans, numbers, texts, lists, tuples, `Pairs`, `Name`, `Description` and `Stored`. Raises
    `ValueError` if the pickle is damaged, too long, or has an instruction that `torch.save` does not write.
    """
    reader = _Reader()
    try:
        for number, (instruction, argument, position) in enumerate(pickletools.genops(content)):
            if number >= MAX_INSTRUCTIONS:
                raise ValueError(f'its pickle has more than {MAX_INSTRUCTIONS:,} instructions')
            reader.run(instruction.name, argument)
            reader.end = position
    except (IndexError, KeyError):  # an empty stack, or an object that is not in the memo
        raise ValueError('its pickle is damaged') from None
    if reader.end != len(content) - 1:
        raise ValueError('it has bytes after its pickle')
    return reader.result


def check_keys(described: Any) -> None:
    """Raise `ValueError` unless all keys of dictionaries, and all entries of sets, are texts, numbers or None.

    Hashing a key of tuples in tuples can take for ever. The time of this function is linear.
    """
    waiting = [described]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, list | tuple | Description | Stored) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Pairs):
            _check_plain(key for key, _ in value)
        if isinstance(value, Description):
            _check_plain(item[0] for item in value.items if isinstance(item, tuple) and item)
            is_set = isinstance(value.called, Name) and value.called.name == 'set'
            if is_set:
                _check_plain(entry for argument in value.arguments for entry in argument)
            waiting += [value.called, value.arguments, value.state, value.items]
        elif isinstance(value, Stored):
            waiting.append(value.reference)
        else:
            waiting += value


def _check_plain(keys: Iterable[Any]) -> None:
    for key in keys:
        if not (key is None or isinstance(key, str | int | float)):
            raise ValueError('a key in its pickle is neither a text nor a number')


class _Reader:
    """The stack and the memo of a pickle, and its instructions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None
        self.end: int | None = None

    def run(self, name: str, argument: Any) -> None:
        """Execute the instruction `name`."""
        if name in ARGUMENTS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self._push_tuple(TUPLES[name])
        elif name in INSTRUCTIONS:
            INSTRUCTIONS[name](self, argument)
        else:
            raise ValueError(f'its pickle has the instruction {name}, which no learner needs')

    def _push_tuple(self, length: int) -> None:
        start = len(self.stack) - length
        if start < 0:
            raise IndexError
        self.stack[start:] = [tuple(self.stack[start:])]

    def protocol(self, number: int) -> None:
        if number != 2:
            raise ValueError(f'its pickle has the protocol {number} instead of 2')

    def stop(self, _: None) -> None:
        self.result = self.stack.pop()

    def mark(self, _: None) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def empty_list(self, _: None) -> None:
        self.stack.append([])

    def empty_dict(self, _: None) -> None:
        self.stack.append(Pairs())

    def long_tuple(self, _: None) -> None:
        values = self._pop_marked()
        self.stack.append(tuple(values))

    def global_name(self, names: str) -> None:
        module, _, name = names.partition(' ')
        if module.count('.') == 1 and module.startswith('cxr_fastai.'):
            raise ValueError('made before version 0.1.0; export it again')  # all modules were directly in the package
        self.stack.append(Name(module, name))

    def persistent(self, _: None) -> None:
        self.stack.append(Stored(self.stack.pop()))

    def call(self, _: None) -> None:
        arguments = self.stack.pop()
        self.stack.append(Description(self.stack.pop(), arguments))

    def build(self, _: None) -> None:
        state = self.stack.pop()
        described = self.stack[-1]
        if not isinstance(described, Description) or described.state is not None:
            _refuse_change(described)
        described.state = state

    def append(self, _: None) -> None:
        value = self.stack.pop()
        self._items(list).append(value)

    def extend(self, _: None) -> None:
        values = self._pop_marked()
        self._items(list).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._items(Pairs).append((key, value))

    def set_items(self, _: None) -> None:
        values = self._pop_marked()
        if len(values) % 2:
            raise IndexError
        self._items(Pairs).extend(zip(values[::2], values[1::2], strict=True))

    def _items(self, container: type[list[Any]]) -> list[Any]:
        """Return the list to which the value on top of the stack takes items: a `container`, or a described object."""
        target = self.stack[-1]
        if isinstance(target, Description):
            return target.items
        if type(target) is not container:
            _refuse_change(target)
        items: list[Any] = target
        return items

    def _pop_marked(self) -> list[Any]:
        values = self.stack
        self.stack = self.outer_stacks.pop()
        return values


def _refuse_change(target: Any) -> NoReturn:
    what = str(target) if isinstance(target, Name) else type(target).__name__
    raise ValueError(f'its pickle changes {what!r:.80}, which no learner needs')


INSTRUCTIONS: dict[str, Callable[..., None]] = {
    'PROTO': _Reader.protocol,
    'STOP': _Reader.stop,
    'MARK': _Reader.mark,
    'BINPUT': _Reader.put,
    'LONG_BINPUT': _Reader.put,
    'BINGET': _Reader.get,
    'LONG_BINGET': _Reader.get,
    'EMPTY_LIST': _Reader.empty_list,
    'EMPTY_DICT': _Reader.empty_dict,
    'TUPLE': _Reader.long_tuple,
    'GLOBAL': _Reader.global_name,
    'BINPERSID': _Reader.persistent,
    'REDUCE': _Reader.call,
    'NEWOBJ': _Reader.call,
    'BUILD': _Reader.build,
    'APPEND': _Reader.append,
    'APPENDS': _Reader.extend,
    'SETITEM': _Reader.set_item,
    'SETITEMS': _Reader.set_items,
}
"""The other instructions of the pickles of `torch.save`, which have protocol 2."""

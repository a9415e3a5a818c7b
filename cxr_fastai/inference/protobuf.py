"""A strict reader of the Protocol Buffers wire format: every byte is accounted for, and each value has one encoding.

Other readers accept several encodings of the same value and skip fields that they do not know. A file could then mean
one thing here and another thing there, so such files are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_VARINT = 10
"""Largest number of bytes of an integer."""
SCALARS = {'int': 0, 'double': 1, 'float': 5}
"""Kind of a number -> its wire type: variable length, 8 bytes, 4 bytes."""
WIDTHS = {'double': 8, 'float': 4}
"""Kind of a number with a fixed length -> bytes of a value."""
LENGTH_DELIMITED = 2
"""The wire type of texts, bytes, messages and packed numbers."""


@dataclass(frozen=True)
class Field:
    """A field of a message: its `name`, and its `kind`.

    The kind is `int`, `float`, `double`, `text`, `bytes`, or the name of a message. The value of a `repeated` field is
    a list; of numbers in `float` and `double` only the count is read.
    """

    name: str
    kind: str
    repeated: bool = False


@dataclass(frozen=True)
class Refused:
    """A field that is known and refused; `what` it contains."""

    what: str


Schema = Mapping[str, Mapping[int, Field | Refused]]
"""Name of a message -> number of a field -> the field."""
Message = dict[str, Any]
"""Name of a field -> its value. Fields that are absent are missing; a repeated field is always there."""


class Reader:
    """Reads messages of a `schema` with at most `max_fields` fields and numbers, nested at most `max_depth` deep."""

    def __init__(self, schema: Schema, max_fields: int, max_depth: int, max_text: int) -> None:
        self.schema = schema
        self.fields_left = max_fields
        self.max_depth = max_depth
        self.max_text = max_text

    def read(self, data: memoryview, message: str, depth: int = 1) -> Message:
        """Return the `message` in `data`. Raises `ValueError`, which says what is wrong, and in which field."""
        if depth > self.max_depth:
            raise ValueError(f'{message} is nested deeper than {self.max_depth} levels')
        fields = self.schema[message]
        values: Message = {field.name: [] for field in fields.values() if isinstance(field, Field) and field.repeated}
        position = 0
        while position < len(data):
            tag, position = read_varint(data, position)
            number, wire_type = tag >> 3, tag & 7
            field = fields.get(number)
            if isinstance(field, Refused):
                raise ValueError(f'it contains {field.what}')
            if field is None:
                raise ValueError(f'{message} has the unknown field {number}')
            self._count_fields(1)
            position = self._read_field(data, position, field, wire_type, values, f'{message}.{field.name}', depth)
        return values

    def _count_fields(self, count: int) -> None:
        self.fields_left -= count
        if self.fields_left < 0:
            raise ValueError('it has too many fields')

    def _read_field(
        self,
        data: memoryview,
        position: int,
        field: Field,
        wire_type: int,
        values: Message,
        place: str,
        depth: int,
    ) -> int:
        """Read the value of `field` at `position` into `values`, and return the position behind it."""
        is_packed = field.repeated and field.kind in SCALARS and wire_type == LENGTH_DELIMITED
        if not is_packed and wire_type != SCALARS.get(field.kind, LENGTH_DELIMITED):
            raise ValueError(f'{place} has the wire type {wire_type}')
        if wire_type == LENGTH_DELIMITED:
            content, position = _read_content(data, position, place)
            new = self._read_packed(content, field.kind, place) if is_packed else self._convert(content, field, depth)
        elif field.kind == 'int':
            new, position = read_varint(data, position)
            new = to_signed(new)
        else:
            new = bytes(data[position : position + WIDTHS[field.kind]])
            position += WIDTHS[field.kind]
            if position > len(data):
                raise ValueError(f'{place} is cut off')
        _store(values, field, new, is_packed, place)
        return position

    def _convert(self, content: memoryview, field: Field, depth: int) -> Any:
        if field.kind == 'bytes':
            return content
        if field.kind != 'text':
            return self.read(content, field.kind, depth + 1)
        if len(content) > self.max_text:
            raise ValueError(f'{field.name} has {len(content):,} bytes')
        try:
            return str(content, 'utf-8')
        except UnicodeDecodeError:
            raise ValueError(f'{field.name} is not UTF-8') from None

    def _read_packed(self, content: memoryview, kind: str, place: str) -> list[Any]:
        """Return packed numbers. Numbers of a fixed length are only counted, because nobody needs their values."""
        if kind in WIDTHS:
            if len(content) % WIDTHS[kind]:
                raise ValueError(f'{place} is cut off')
            count = len(content) // WIDTHS[kind]
            self._count_fields(count)
            return [None] * count
        numbers = []
        position = 0
        while position < len(content):
            self._count_fields(1)
            number, position = read_varint(content, position)
            numbers.append(to_signed(number))
        return numbers


def _read_content(data: memoryview, position: int, place: str) -> tuple[memoryview, int]:
    length, position = read_varint(data, position)
    if length > len(data) - position:
        raise ValueError(f'{place} is cut off')
    return data[position : position + length], position + length


def _store(values: Message, field: Field, new: Any, is_packed: bool, place: str) -> None:
    if is_packed:
        values[field.name] += new
    elif field.repeated:
        values[field.name].append(new)
    elif field.name in values:
        raise ValueError(f'{place} occurs twice')
    else:
        values[field.name] = new


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the unsigned integer at `position`, and the position behind it.

    Raises `ValueError` if it is cut off, has more than 64 bits, or more bytes than it needs.
    """
    value = 0
    for count in range(MAX_VARINT):
        if position + count >= len(data):
            raise ValueError('it is cut off')
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if byte == 0 and count > 0:
                raise ValueError('an integer has more bytes than it needs')
            if value >= 2**64:
                raise ValueError('an integer has more than 64 bits')
            return value, position + count + 1
    raise ValueError('an integer has more than 64 bits')


def to_signed(value: int) -> int:
    """Return the unsigned integer `value` of 64 bits as a signed one."""
    return value - 2**64 if value >= 2**63 else value

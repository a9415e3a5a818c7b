"""Damaged variants of valid files, as a Hypothesis strategy that can shrink a failing input."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

Mutate = Callable[[bytes, random.Random], bytes]

MAX_CHANGES = 6
"""Largest number of changes of one input."""
MAX_SPAN = 64
"""Largest number of bytes that one change deletes, repeats or inserts."""
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
"""Integers at which lengths and offsets often go wrong."""


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes], mutate: Mutate | None = None) -> bytes:
    """Draw one of the `seeds` with a few changes: those of `mutate`, which knows the format, and changes of bytes."""
    data = draw(st.sampled_from(seeds))
    if mutate and draw(st.booleans()):
        data = mutate(data, draw(st.randoms(use_true_random=False)))
        least = 0
    else:
        least = 1
    for _ in range(draw(st.integers(least, MAX_CHANGES))):
        change = draw(st.sampled_from(CHANGES))
        data = change(draw, data, seeds)
    return data


def _position(draw: st.DrawFn, data: bytes) -> int:
    return draw(st.integers(0, len(data)))


def _flip_bit(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    bit = draw(st.integers(0, 7))
    return data[:place] + bytes(byte ^ (1 << bit) for byte in data[place : place + 1]) + data[place + 1 :]


def _write_bytes(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    new = draw(st.binary(min_size=1, max_size=8))
    return data[:place] + new + data[place + len(new) :]


def _write_extreme(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    width = draw(st.sampled_from((1, 2, 4, 8)))
    order = draw(st.sampled_from(('little', 'big')))
    value = draw(st.sampled_from(EXTREMES)) % 256**width
    return data[:place] + value.to_bytes(width, order) + data[place + width :]


def _insert(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    return data[:place] + draw(st.binary(min_size=1, max_size=MAX_SPAN)) + data[place:]


def _delete(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    return data[:place] + data[place + draw(st.integers(1, MAX_SPAN)) :]


def _repeat(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    place = _position(draw, data)
    span = data[place : place + draw(st.integers(1, MAX_SPAN))]
    return data[:place] + span * draw(st.integers(2, 32)) + data[place + len(span) :]


def _truncate(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    return data[: _position(draw, data)]


def _splice(draw: st.DrawFn, data: bytes, seeds: list[bytes]) -> bytes:
    other = draw(st.sampled_from(seeds))
    return data[: _position(draw, data)] + other[_position(draw, other) :]


CHANGES = (_flip_bit, _write_bytes, _write_extreme, _insert, _delete, _repeat, _truncate, _splice)

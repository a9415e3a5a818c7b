"""The process in which a `DecoderPool` decodes images: its limits, its messages, and its loop.

It imports only what decoding needs, and reads requests from its standard input until that ends. A message is a fixed
header, facts in JSON, and raw bytes: the contents of a file in a request, and pixels in an answer.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.foreign import parse_json
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.preprocessing import Preprocessing

HEADER = struct.Struct('<IQ')
"""The start of a message: the number of bytes of its facts, and of its raw bytes."""
MAX_FACTS = 2**16
"""Maximum number of bytes of the facts in a message."""
MAX_TEXT = 500
"""Maximum length of a note or an error message in an answer."""
MAX_NOTES = 16
"""Maximum number of notes in an answer."""
DESCRIPTION = ('format', 'mode', 'bits', 'width', 'height', 'burned_in')
"""Fields of `DecodedImage` that an answer contains as they are."""
OUT_OF_MEMORY = {'error': 'E_TOO_LARGE', 'message': 'reading the image needs more memory than it may use'}
MEMORY_EXIT_CODE = 99
"""Exit code of a process that has no memory left to answer."""
ALARM_MARGIN = 2
"""Seconds after its deadline when the process ends by itself, if the one that started it is gone."""


def write_message(stream: BinaryIO, facts: dict[str, Any], *parts: bytes | memoryview) -> None:
    """Write one message with the raw bytes `parts` to an unbuffered stream. Raises `OSError`."""
    text = json.dumps(facts).encode()
    size = sum(len(part) for part in parts)
    for part in (HEADER.pack(len(text), size) + text, *parts):
        rest = memoryview(part)
        while rest:
            rest = rest[stream.write(rest) :]


def read_facts(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the facts of the next message, and the number of its raw bytes, which follow.

    Raises `EOFError` at the end of the stream, and `CXRError` if the facts are not JSON.
    """
    length, size = HEADER.unpack(read_exactly(stream, HEADER.size))
    if length > MAX_FACTS:
        raise EOFError
    return parse_json(bytes(read_exactly(stream, length)), 'message'), size


def read_exactly(stream: BinaryIO, size: int) -> bytearray:
    """Return the next `size` bytes of `stream`. Raises `EOFError` if there are fewer."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = stream.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def main() -> None:
    """Answer requests until the standard input ends. The arguments are memory in bytes, priority, and modules."""
    memory, priority, *modules = sys.argv[1:]
    # Decoders may print to the standard output, so the answers get a stream of their own.
    answers = os.fdopen(os.dup(1), 'wb', buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in modules:
        with suppress(ImportError):
            import_module(name)
    Image.preinit()  # loads the decoders of Pillow
    restrict(int(memory), int(priority))
    requests = os.fdopen(0, 'rb')
    try:
        write_message(answers, {'cpu': time.process_time()})  # ready
        while True:
            facts, size = read_facts(requests)
            described, *parts = answer(requests.read(size), facts)
            write_message(answers, described | {'cpu': time.process_time()}, *parts)
    except (EOFError, BrokenPipeError):
        pass
    except MemoryError:
        os._exit(MEMORY_EXIT_CODE)


def restrict(memory: int, priority: int) -> None:
    """Limit this process to `memory` bytes, lower its priority, and forbid it to write to files.

    An interrupt from the terminal is left to the process that started this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'SIGALRM'):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if hasattr(os, 'nice'):
        os.nice(priority)
    try:
        import resource
    except ImportError:  # on Windows
        return
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # not supported here, or lower already
            resource.setrlimit(limit, (value, value))


def answer(data: bytes, facts: dict[str, Any]) -> tuple[Any, ...]:
    """Decode the contents of a file; return the facts and the raw bytes of the answer.

    `facts` of the request are the fields of the `preprocessing` or null, the `suffix` of the file, the other `modality`
    that is accepted, the `side` to which the pixels are reduced (see `reduce_to`), and the `seconds` of the deadline.
    """
    try:
        with _alarm(facts['seconds'] + ALARM_MARGIN):
            preprocessing = facts['preprocessing'] and Preprocessing(**facts['preprocessing'])
            image = decode_image(data, preprocessing, facts['suffix'], facts['modality'])
            arrays = [reduce_to(image.pixels, facts['side'])]
            if preprocessing:
                arrays.append(preprocessing.fit(image.pixels))
    except ImageError as error:
        if _is_out_of_memory(error):
            return (OUT_OF_MEMORY,)
        return ({'error': error.code, 'message': str(error)[:MAX_TEXT]},)
    except MemoryError:
        return (OUT_OF_MEMORY,)
    except Exception:
        return ({'bug': traceback.format_exc()[-MAX_FACTS // 8 :]},)
    described = {name: getattr(image, name) for name in DESCRIPTION}
    described['notes'] = [note[:MAX_TEXT] for note in image.notes[:MAX_NOTES]]
    described['shapes'] = [array.shape for array in arrays]
    return described, *(memoryview(array.tobytes()) for array in arrays)


def reduce_to(image: np.ndarray, side: int | None) -> np.ndarray:
    """Return `image`, grey uint8 (h, w), with a longer side of at most `side` pixels.

    None leaves it as it is, and 0 gives an image without pixels.
    """
    if side is None:
        return image
    if side == 0:
        return image[:0, :0]
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    return np.asarray(picture)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer than `seconds`, even within a decoder written in C."""
    if not hasattr(signal, 'setitimer'):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if `error` or one of its causes is a `MemoryError`."""
    while error and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == '__main__':
    main()

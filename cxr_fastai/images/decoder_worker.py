"""A running `decoder_process`, as the process that started it sees it: requests, answers, and its end."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.core.errors import CXRError, ImageError
from cxr_fastai.core.schemas import Flag, Integer, ListOf, Number, Text, check_object
from cxr_fastai.images.decoder_process import (
    MAX_NOTES,
    MAX_TEXT,
    MEMORY_EXIT_CODE,
    OUT_OF_MEMORY,
    read_exactly,
    read_facts,
    write_message,
)
from cxr_fastai.images.decoder_start import take_decoder
from cxr_fastai.images.limits import MAX_PIXELS, DecodedImage

ANSWER = {
    'format': Text(16),
    'mode': Text(64),
    'bits': Integer(1, 64),
    'width': Integer(1, MAX_PIXELS),
    'height': Integer(1, MAX_PIXELS),
    'burned_in': Flag(),
    'notes': ListOf(Text(MAX_TEXT), MAX_NOTES),
    'shapes': ListOf(ListOf(Integer(0, MAX_PIXELS), 2), 2),
}
"""The facts in an answer of a process that has decoded an image."""
FAILURE = {'error': Text(40, 'E_[A-Z_]+'), 'message': Text(MAX_TEXT)}
"""The facts in an answer of a process that cannot decode an image."""
MAX_ANSWER = 2 * MAX_PIXELS
"""Maximum number of bytes of all pixels in an answer."""
ANSWER_NAME = 'the answer of a decoder process'
NOT_STARTED = (
    f'the process that decodes images did not start. Check that {sys.executable} can import cxr_fastai, and that there '
    'is enough memory.'
)
DICOM_MODULES = ('pydicom.pixels', 'jpeg_ls')
"""Modules that a process imports before its first DICOM image, if many clients wait."""


class DecoderWorker:
    """A running `decoder_process`. It is usable until it was stopped or ended by itself."""

    def __init__(self, memory: int, priority: int, with_dicom: bool) -> None:
        modules = DICOM_MODULES if with_dicom else ()
        self.process = take_decoder(memory, priority, *modules)
        self.requests: Any = self.process.stdin
        self.answers: Any = self.process.stdout
        self.is_ready = False
        self.waiting_since: float | None = None
        self.cpu_before = 0.0
        self.began: float | None = None
        self.reason: Exception | None = None

    @property
    def is_usable(self) -> bool:
        """True if the process can decode another image."""
        return self.reason is None and self.process.poll() is None

    @property
    def starting_seconds(self) -> float:
        """The seconds since an image waits for the process to become ready; 0 if it is ready."""
        since = self.waiting_since
        return 0 if since is None else time.monotonic() - since

    @property
    def decoding_seconds(self) -> float:
        """The seconds since it began to decode an image; 0 if it does nothing."""
        began = self.began
        return 0 if began is None else time.monotonic() - began

    @property
    def cpu_seconds(self) -> float:
        """The CPU time that it has spent on an image; the elapsed time where that is unknown (not on Linux)."""
        try:
            fields = Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError:
            return self.decoding_seconds
        user, system = fields[11:13]
        return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK') - self.cpu_before

    def decode(self, request: dict[str, Any], data: bytes) -> DecodedImage:
        """Return the image in `data`. Raises `ImageError`, or the reason for which the process was stopped."""
        try:
            if not self.is_ready:
                self.waiting_since = time.monotonic()
                self._read_facts()
                self.waiting_since = None
                self.is_ready = True
            self.began = time.monotonic()
            write_message(self.requests, request, data)
            return self._read_image()
        except ImageError:
            raise
        except (EOFError, OSError, CXRError) as error:  # stopped, crashed, or no valid answer
            self.process.kill()
            self.process.wait()
            raise (self.reason or self._crash()) from error
        finally:
            self.began = None

    def _read_facts(self) -> tuple[dict[str, Any], int]:
        facts, size = read_facts(self.answers)
        self.cpu_before = check_object(facts, {'cpu': Number(0)}, ANSWER_NAME)['cpu']
        return facts, size

    def _read_image(self) -> DecodedImage:
        facts, size = self._read_facts()
        if 'bug' in facts:
            raise RuntimeError(f'a bug in the process that decodes images:\n{facts["bug"]}')
        if 'error' in facts:
            failure = check_object(facts, FAILURE, ANSWER_NAME)
            raise ImageError(failure['message'], failure['error'])
        described = check_object(facts, ANSWER, ANSWER_NAME)
        shapes = described.pop('shapes')
        if size != sum(map(math.prod, shapes)) or size > MAX_ANSWER:
            raise EOFError
        data = read_exactly(self.answers, size)
        first = math.prod(shapes[0])
        pixels = np.frombuffer(data, np.uint8, first).reshape(shapes[0])
        described['notes'] = tuple(described['notes'])
        image = DecodedImage(pixels, **described)
        if len(shapes) == 1:
            return image
        return replace(image, square=np.frombuffer(data, np.uint8, offset=first).reshape(shapes[1]))

    def _crash(self) -> Exception:
        """Return the error of an image whose process has ended by itself."""
        if not self.is_ready:
            return CXRError(NOT_STARTED)
        if -self.process.returncode == signal.SIGALRM:
            return ImageError('its decoding took too long', 'E_TIMEOUT')
        if self.process.returncode in (MEMORY_EXIT_CODE, -signal.SIGKILL):
            return ImageError(OUT_OF_MEMORY['message'], OUT_OF_MEMORY['error'])
        return ImageError('truncated or damaged: its decoder crashed', 'E_TRUNCATED')

    def stop(self, reason: Exception) -> None:
        """Kill the process; `decode` in another thread then raises the `reason`."""
        self.reason = self.reason or reason
        self.process.kill()

    def end(self) -> None:
        """Kill the process and release what belongs to it."""
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()

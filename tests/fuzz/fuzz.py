"""Feed damaged files to the readers of foreign formats for some minutes, and keep each input that breaks one.

    python tests/fuzz/fuzz.py                        # every format for 10 minutes: `make fuzz`
    python tests/fuzz/fuzz.py onnx dicom --minutes 2

A format is a module in `formats/` with `seeds() -> list[bytes]`, `check(data)` and the `DEADLINE` of one input in
seconds; `mutate(data, random)` is optional. `check` returns, or lets an unexpected exception out. A finding is such an
exception, a crash of the process, or an input that takes longer than the deadline. It is kept in `found/FORMAT/`, where
`test_found.py` checks it from then on. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

HERE = Path(__file__).parent
FORMATS = tuple(sorted(path.stem for path in (HERE / 'formats').glob('*.py') if path.stem != '__init__'))
EXAMPLES = 200
"""Inputs of one seed of the random generator."""
START_SECONDS = 120
"""Longest time for importing a format and making its seeds."""


def load_format(name: str) -> ModuleType:
    """Return the module of the format `name`."""
    sys.path[:0] = [path for path in (str(HERE.parent), str(HERE)) if path not in sys.path]
    return importlib.import_module(f'formats.{name}')


def found(name: str) -> list[Path]:
    """Return the kept inputs of the format `name`, which broke a reader once."""
    return sorted(path for path in (HERE / 'found' / name).glob('*') if path.is_file())


def run_examples(form: ModuleType, number: int, examples: int, record: Any = None) -> None:
    """Check `examples` damaged files of the format, made from the random seed `number`. Raises what `check` raises.

    `record` is called with each input before its check, and with None after it.
    """
    from mutations import damaged

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(damaged(form.seeds(), getattr(form, 'mutate', None)))
    def check(data: bytes) -> None:
        if record:
            record(data)
        form.check(data)
        if record:
            record(None)

    check()


def work(name: str, number: int, end: float, path: Path, clock: Any, count: Any) -> None:
    """Check inputs until the time `end`; the current one is at `path`, since the time `clock`. Runs in a process."""
    form = load_format(name)
    for data in form.seeds():
        form.check(data)  # imports whatever a check needs, which does not count as its time

    def record(data: bytes | None) -> None:
        if data is None:
            clock.value = 0.0
            count.value += 1
            if time.time() > end:
                os._exit(0)  # Hypothesis would take an exception for a finding
            return
        path.write_bytes(data)
        clock.value = time.time()

    while time.time() < end:
        try:
            run_examples(form, number, EXAMPLES, record)
        except Exception:
            (path.parent / 'traceback').write_text(traceback.format_exc())
            sys.exit(1)  # the last input is the smallest that fails
        number += 1


def fuzz(name: str, minutes: float, number: int) -> int:
    """Check damaged files of the format `name` for some `minutes`, print a line, and return the number of findings."""
    context = multiprocessing.get_context('spawn')
    form = load_format(name)
    begin = time.time()
    end = begin + 60 * minutes
    clock, count = context.Value('d', 0.0), context.Value('L', 0)
    findings: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'input')
        while time.time() < end - 1:
            clock.value = 0.0
            process = context.Process(target=work, args=(name, number, end, path, clock, count))
            process.start()
            reason = watch(process, clock, end, form.DEADLINE)
            number += 1_000_000
            if reason:
                findings.add(keep(name, path, reason))
    seconds = time.time() - begin
    print(f'{name:<12} {seconds:5.0f} s  {count.value:9,} inputs  {len(findings)} findings', flush=True)
    return len(findings)


def watch(process: Any, clock: Any, end: float, deadline: float) -> str:
    """Wait until `process` ends or an input takes longer than the `deadline`; return what went wrong, or nothing."""
    while process.is_alive():
        process.join(0.05)
        started = clock.value
        if started and time.time() - started > deadline:
            process.kill()
            process.join()
            return f'a check took longer than {deadline:g} s'
        if time.time() > end + START_SECONDS:
            process.kill()
            process.join()
            return 'the process did not end'
    if process.exitcode == 0:
        return ''
    return 'exception' if process.exitcode == 1 else f'the process crashed (exit code {process.exitcode})'


def keep(name: str, path: Path, reason: str) -> str:
    """Keep the input at `path` in the folder of the format, print the `reason`, and return its name."""
    data = path.read_bytes()
    kept = HERE / 'found' / name / hashlib.sha256(data).hexdigest()[:16]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    trace = path.parent / 'traceback'
    details = trace.read_text() if reason == 'exception' and trace.exists() else ''
    print(f'{name}: {reason}: {kept.relative_to(HERE)}\n{details[-3000:]}', flush=True)
    return kept.name


def main() -> int:
    """Fuzz the formats of the command line. Return 1 if there are findings, else 0."""
    parser = argparse.ArgumentParser(description='Feed damaged files to the readers of foreign formats.')
    parser.add_argument('formats', nargs='*', choices=[*FORMATS, []], help='default: all')
    parser.add_argument('--minutes', type=float, default=10, help='minutes for each format (default: 10)')
    parser.add_argument('--jobs', type=int, default=2, help='formats at the same time (default: 2)')
    parser.add_argument('--seed', type=int, default=0, help='first seed of the random generator (default: 0)')
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        names = options.formats or FORMATS
        findings = list(pool.map(lambda name: fuzz(name, options.minutes, options.seed), names))
    return 1 if any(findings) else 0


if __name__ == '__main__':
    sys.exit(main())

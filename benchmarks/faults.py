"""Interrupt trainings in every possible way, resume them, and compare the results with uninterrupted trainings.

    python benchmarks/faults.py --kills 100 --terms 20

The faults are `kill -9` and SIGTERM at random times, a parameter that becomes NaN, and a disk that is full (simulated
by RLIMIT_FSIZE) when one file is written, for every file of `train` and `evaluate`. The images are synthetic and the
network is tiny, but the commands are the real ones. They run in processes of their own, forked from one that has
imported everything. Weights (of the network, the best epoch and the moving average), optimiser state and history must
be equal bit for bit. Needs Linux or macOS. `tests/faults/test_faults.py` tests the same with fewer cases.
"""

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cxr_fastai.cli import main as run_command
from cxr_fastai.core import files, run
from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.run import Run
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import ARCHS, PRETRAINED, Arch, BaselineCNN
from cxr_fastai.training.checkpoint import StopOnSignal, load_state
from cxr_fastai.training.restoring import load_learner

EPOCHS = 4
IMAGES_PER_CLASS = 6
"""Training images of each class."""
BATCH_SIZE = 4
BATCHES = 2 * IMAGES_PER_CLASS // BATCH_SIZE
"""Training batches per epoch."""
RECIPES = {
    'reference': ['--recipe', 'reference', '--set', 'plateau_patience=0', '--set', 'mixup=0.2', '--set', 'erase=0.5'],
    'tuned': ['--recipe', 'tuned', '--set', 'start_size=0.5', '--set', 'clip=1'],
}
"""Two phases with a plateau schedule, and one cycle with averaged weights and growing images."""
TRAINING_FILES = ('journal.jsonl', 'items.csv', 'recipe.json', 'state.pt', 'history.csv', 'learner.pkl', 'failure.json')
EVALUATION_FILES = (
    'predictions.csv',
    'metrics.json',
    'confusion_test.png',
    'roc_test.png',
    'history.png',
    'robustness.csv',
    'robustness_test.png',
)
PRELOADED = [
    'cxr_fastai.training.training',
    'cxr_fastai.evaluation.evaluation',
    'cxr_fastai.interpretation.interpretation',
    'cxr_fastai.evaluation.robustness',
    'sklearn.metrics',
    'filelock',
]


def add_tiny() -> None:
    """Register the architecture `tiny`: the baseline with few channels, in the two phases of a pretrained network."""
    ARCHS['tiny'] = Arch(partial(BaselineCNN, (3, 4, 8)), PRETRAINED)


def train_argv(images: Path, out: Path, recipe: str = 'reference', epochs: int = EPOCHS) -> list[str]:
    """Return the command line of a tiny training."""
    options = {
        'data': images,
        'out': out,
        'arch': 'tiny',
        'epochs': epochs,
        'size': 48,
        'limit': IMAGES_PER_CLASS,
        'batch-size': BATCH_SIZE,
        'workers': 0,
        'seed': 3,
    }
    argv = ['train']
    for name, value in options.items():
        argv += [f'--{name}', str(value)]
    return argv + RECIPES[recipe]


def start(argv: list[str], log: Path, before: Callable[[], None] = add_tiny) -> BaseProcess:
    """Start `cxr-fastai ARGV`, after `before`, in a new process and process group; its output goes to `log`."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_in_process, args=(argv, log, before))
    process.start()
    return process


def _run_in_process(argv: list[str], log: Path, before: Callable[[], None]) -> None:
    os.setpgrp()
    with open(log, 'ab') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore SIGINT
    torch.set_num_threads(1)
    before()
    raise SystemExit(run_command(argv))


def finish(argv: list[str], log: Path) -> int | None:
    """Run `cxr-fastai ARGV` in a new process and return its exit code."""
    process = start(argv, log)
    process.join()
    return process.exitcode


def run_quietly(argv: list[str]) -> tuple[int, str]:
    """Run `cxr-fastai ARGV` in this process and return its exit code and its lines on stderr without warnings."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
        code = run_command(argv)
    lines = [line for line in stderr.getvalue().splitlines() if not line.startswith('warning: ')]
    return code, '\n'.join(lines)


def outcome(folder: Path) -> dict[str, Any]:
    """Return all results of the training in `folder`: final state, exported weights and history."""
    trained = Run.open(folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        weights = load_learner(trained / 'learner.pkl').model.state_dict()
    history = trained.history.to_dict('list')
    return {'learner': weights, 'history': history} | (load_state(trained) or {})


def equal(a: Any, b: Any) -> bool:
    """Return True if two outcomes are equal bit for bit, apart from the seconds that they took."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        names = a.keys() - {'seconds'}
        return names == b.keys() - {'seconds'} and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return a == b


@contextmanager
def nan_before_batch(batch: int) -> Iterator[None]:
    """In the block a weight becomes NaN before the training batch of that number, counted from 1 over all epochs."""
    trained = 0

    def before_batch(self: StopOnSignal) -> None:
        nonlocal trained
        if self.training:
            trained += 1
            if trained == batch:
                self.model[1][-1].bias.data.fill_(math.nan)

    StopOnSignal.before_batch = before_batch
    try:
        yield
    finally:
        del StopOnSignal.before_batch


@contextmanager
def full_disk(name: str, limit: int) -> Iterator[None]:
    """In the block the disk is full when a file called `name` becomes larger than `limit` bytes."""
    original = files.writing
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def limited_writing(path: Path, *options: str) -> Iterator[None]:
        if path.name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            with original(path, *options):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    files.writing = run.writing = limited_writing
    try:
        yield
    finally:
        files.writing = run.writing = original


class Bench:
    """A folder with images and, for each recipe, the outcome and duration of an uninterrupted training."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.images = folder / 'images'
        self.log = folder / 'log'
        self.random = random.Random(seed)
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        make_demo(self.images, images=60, size=96, seed=0)
        finish(train_argv(self.images, folder / 'warm-up'), self.log)
        for recipe in RECIPES:
            start_time = time.perf_counter()
            code = finish(train_argv(self.images, folder / recipe, recipe), self.log)
            if code != 0:
                raise RuntimeError(self.log.read_text())
            self.seconds[recipe] = time.perf_counter() - start_time
            self.outcomes[recipe] = outcome(folder / recipe)

    def interrupt(self, number: int, i: int) -> tuple[Path, str, int | None, float]:
        """Start training i and send it the signal `number` at a random time.

        Returns the run folder, the recipe, the exit code, and the seconds from the signal to the end of the process.
        """
        recipe = list(RECIPES)[i % len(RECIPES)]
        folder = self.folder / f'{signal.Signals(number).name}-{i}'
        process = start(train_argv(self.images, folder, recipe), self.log)
        process.join(self.random.uniform(0, self.seconds[recipe]))
        signal_time = time.perf_counter()
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)
        process.join()
        return folder, recipe, process.exitcode, time.perf_counter() - signal_time

    def resume(self, folder: Path, recipe: str, counts: Counter[str]) -> None:
        """Resume the run in `folder`, or restart it if there is no run yet, and count the results."""
        if (folder / 'recipe.json').exists():
            try:
                load_state(Run.open(folder))
            except CXRError:
                counts['unreadable'] += 1
            else:
                counts['resumed'] += finish(['train', '--resume', str(folder)], self.log) == 0
        else:
            shutil.rmtree(folder, ignore_errors=True)
            counts['restarted'] += finish(train_argv(self.images, folder, recipe), self.log) == 0
        if (folder / 'learner.pkl').is_file():
            counts['equal'] += equal(outcome(folder), self.outcomes[recipe])
        shutil.rmtree(folder)


def kill(bench: Bench, n: int) -> str:
    """Kill trainings with SIGKILL until `n` of them were interrupted after their run was created."""
    counts = Counter(dict.fromkeys(('killed', 'completed before', 'restarted', 'resumed', 'unreadable', 'equal'), 0))
    for i in itertools.count():
        if counts['resumed'] + counts['unreadable'] >= n:
            break
        folder, recipe, code, _ = bench.interrupt(signal.SIGKILL, i)
        if code == 0:
            counts['completed before'] += 1
        else:
            counts['killed'] += 1
            bench.resume(folder, recipe, counts)
    return 'kill -9: ' + ', '.join(f'{name} {count}' for name, count in counts.items())


def terminate(bench: Bench, n: int) -> str:
    """Stop `n` trainings with SIGTERM."""
    counts = Counter(equal=0)
    codes: Counter[int | None] = Counter()
    durations = []
    for i in range(n):
        folder, recipe, code, seconds = bench.interrupt(signal.SIGTERM, i)
        codes[code] += 1
        if code:
            durations.append(seconds)
        bench.resume(folder, recipe, counts)
    return (
        f'SIGTERM: {n} sent; exit codes {dict(codes)}, equal {counts["equal"]}, seconds until exit: '
        f'median {statistics.median(durations):.2f}, longest {max(durations):.2f}'
    )


def diverge(bench: Bench) -> str:
    """Make a weight NaN at the first, a middle and the last batch of a training and of its second epoch."""
    batches = (1, BATCHES + 1, BATCHES + 2, 2 * BATCHES, EPOCHS * BATCHES)
    passed = sum(_diverge_at(bench, batch) for batch in batches)
    return (
        f'NaN: {len(batches)} trainings; exit code 6, correct failure.json and equal results after the resume: {passed}'
    )


def _diverge_at(bench: Bench, batch: int) -> bool:
    folder = bench.folder / f'nan-{batch}'
    with nan_before_batch(batch):
        code, _ = run_quietly(train_argv(bench.images, folder))
    failure = json.loads((folder / 'failure.json').read_text())
    located = (failure['epoch'], failure['batch']) == ((batch - 1) // BATCHES + 1, (batch - 1) % BATCHES + 1)
    resumed_code, _ = run_quietly(['train', '--resume', str(folder)])
    return code == 6 and located and resumed_code == 0 and equal(outcome(folder), bench.outcomes['reference'])


def fill(bench: Bench) -> str:
    """Let the disk be full for each file of a run in turn, when it is empty and after 60 bytes."""
    cases = [(name, limit) for name in (*TRAINING_FILES, *EVALUATION_FILES) for limit in (0, 60)]
    failed = [
        f'{name} at {limit} bytes'
        for name, limit in cases
        if not survives_full_disk(bench.folder, bench.images, name, limit)
    ]
    summary = f'full disk: {len(cases)} cases; exit code 6, one line, previous file intact: {len(cases) - len(failed)}'
    return summary + (f'; failed: {", ".join(failed)}' if failed else '')


def survives_full_disk(folder: Path, images: Path, name: str, limit: int) -> bool:
    """Return True if a command that cannot write the file `name` fails as documented.

    It must exit with code 6 and one line, leave the previous file intact and no part of a file, and succeed afterwards.
    """
    run_folder = folder / f'full-{name}-{limit}'
    argv = _prepare_overwrite(run_folder, images, name)
    path = run_folder / 'figures' / name if name.endswith('.png') else run_folder / name
    before = path.read_bytes() if path.exists() else None
    with full_disk(name, limit), nan_before_batch(1) if name == 'failure.json' else nullcontext():
        code, stderr = run_quietly(argv)
    after = path.read_bytes() if path.exists() else None
    intact = after == before
    if name == 'journal.jsonl' and before and after:  # lines are appended
        intact = after.startswith(before)
    one_line = len(stderr.splitlines()) == 1 and f'{name}: cannot be written' in stderr
    clean = not list(run_folder.rglob('*.tmp'))
    if '--out' in argv:
        shutil.rmtree(run_folder)
    succeeds = run_quietly(argv)[0] == 0
    shutil.rmtree(run_folder)
    return code == 6 and intact and one_line and clean and succeeds


def _prepare_overwrite(folder: Path, images: Path, name: str) -> list[str]:
    """Prepare the run in `folder` and return a command that will write the file `name`, over an old one if possible."""
    argv = train_argv(images, folder, epochs=2)
    resume = ['train', '--resume', str(folder)]
    if name in ('items.csv', 'recipe.json'):
        return argv
    if name == 'learner.pkl':
        run_quietly(argv)
        return [*resume, '--epochs', '3']  # a finished run is written only if it is trained longer
    if name in TRAINING_FILES:
        with nan_before_batch(BATCHES + 2):  # in the second epoch
            run_quietly(argv)
        return resume
    run_quietly(argv)
    evaluate = ['evaluate', str(folder)]
    if name.startswith('robustness'):
        evaluate.append('--robustness')
    run_quietly(evaluate)
    return evaluate


def main() -> None:
    """Run all faults and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100, help='trainings to kill with SIGKILL')
    parser.add_argument('--terms', type=int, default=20, help='trainings to stop with SIGTERM')
    parser.add_argument('--seed', type=int, default=0, help='seed of the random times')
    args = parser.parse_args()
    torch.set_num_threads(1)
    add_tiny()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['CXR_CACHE'] = str(Path(folder, 'cache'))
        bench = Bench(Path(folder), args.seed)
        print(f'a training of {EPOCHS} epochs takes {max(bench.seconds.values()):.1f} s', flush=True)
        start_time = time.perf_counter()
        for fault in (
            partial(kill, bench, args.kills),
            partial(terminate, bench, args.terms),
            partial(diverge, bench),
            partial(fill, bench),
        ):
            print(f'{fault()} (after {time.perf_counter() - start_time:.0f} s)', flush=True)


if __name__ == '__main__':
    main()

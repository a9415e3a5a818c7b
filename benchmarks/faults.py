"""Stop trainings in every way at hand, resume them, and compare with one that nothing stopped.

    python benchmarks/faults.py --kills 100 --terms 20

Kill -9, and SIGTERM, at moments drawn evenly over the life of the process; a parameter that becomes NaN; a disk that is
full (RLIMIT_FSIZE) just when one file is written, for every file that `train` and `evaluate` write. The images are
synthetic and the network tiny, but the commands are the real ones, in processes of their own, forked from one that has
imported everything. All weights (the network's, the best epoch's, the averaged), the optimiser's state and the history
must come out equal to the bit. Needs Linux or macOS. `tests/test_faults.py` has the quick forms.
"""

import argparse
import io
import itertools
import json
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cxr_fastai.cli import main as cxr_fastai
from cxr_fastai.core import files as core
from cxr_fastai.core import run as runs
from cxr_fastai.core.run import Run
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.inference.pickles import load_learner
from cxr_fastai.models.architectures import ARCHS, PRETRAINED, Arch, BaselineCNN
from cxr_fastai.training.checkpoint import StopOnSignal, load_state

EPOCHS = 4
KINDS = {
    'reference': ['--recipe', 'reference', '--set', 'plateau_patience=0', '--set', 'mixup=0.2', '--set', 'erase=0.5'],
    'tuned': ['--recipe', 'tuned', '--set', 'start_size=0.5', '--set', 'clip=1'],
}
"""Two phases with a plateau, and one cycle with averaged weights and growing images."""
TRAINED = ('journal.jsonl', 'items.csv', 'recipe.json', 'state.pt', 'history.csv', 'learner.pkl', 'failure.json')
EVALUATED = (
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
    'cxr_fastai.evaluation.figures',
    'cxr_fastai.evaluation.robustness',
    'sklearn.metrics',
    'filelock',
]


def add_tiny() -> None:
    """Make `--arch tiny` known: the baseline with a few channels, trained in two phases by the reference recipe."""
    ARCHS['tiny'] = Arch(partial(BaselineCNN, (3, 4, 8)), PRETRAINED)


def train_argv(images: Path, out: Path, kind: str = 'reference', epochs: int = EPOCHS) -> list[str]:
    """The command line of a tiny training."""
    return [
        'train',
        '--data',
        str(images),
        '--out',
        str(out),
        '--arch',
        'tiny',
        '--epochs',
        str(epochs),
        '--size',
        '48',
        '--limit',
        '8',
        '--batch-size',
        '4',
        '--workers',
        '0',
        '--seed',
        '3',
        *KINDS[kind],
    ]


def start(argv: list[str], log: Path, before: Callable[[], None] = add_tiny) -> BaseProcess:
    """`cxr-fastai ARGV` in a process, and a process group, of its own, after `before`; what it prints goes to `log`."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=(argv, log, before))
    process.start()
    return process


def _command(argv: list[str], log: Path, before: Callable[[], None]) -> None:
    os.setpgrp()
    with open(log, 'ab') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has not
    torch.set_num_threads(1)
    before()
    raise SystemExit(cxr_fastai(argv))


def finish(argv: list[str], log: Path) -> int:
    """Run `cxr-fastai ARGV` to its end and return its exit code."""
    process = start(argv, log)
    process.join()
    return process.exitcode


def outcome(run: Path) -> dict[str, Any]:
    """All that a training ends with, but for the times that it took."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learner = load_learner(run / 'learner.pkl').model.state_dict()
    history = Run.open(run).history.drop(columns='seconds').to_dict('list')
    return {'learner': learner, 'history': history} | load_state(Run.open(run))


def equal(a: Any, b: Any) -> bool:
    """Whether two outcomes are equal to the bit; times do not count."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - {'seconds'}
        return keys == b.keys() - {'seconds'} and all(equal(a[key], b[key]) for key in keys)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b  # NaN


@contextmanager
def poisoned(batch: int) -> Iterator[None]:
    """Within, a weight becomes NaN before the training batch of that number, counted from 1 over all epochs."""
    count = iter(range(1, 10**9))

    def before_batch(self: StopOnSignal) -> None:
        if self.training and next(count) == batch:
            self.model[1][-1].bias.data.fill_(float('nan'))

    StopOnSignal.before_batch = before_batch
    try:
        yield
    finally:
        del StopOnSignal.before_batch


@contextmanager
def full_disk(name: str, limit: int) -> Iterator[None]:
    """Within, a file called `name` cannot grow over `limit` bytes."""
    plain, unlimited = core.writing, resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def writing(path: Path, by: str = '--out') -> Iterator[None]:
        if path.name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            with plain(path, by):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    core.writing = runs.writing = writing
    try:
        yield
    finally:
        core.writing = runs.writing = plain


def quietly(argv: list[str]) -> tuple[int, str]:
    """The exit code of `cxr-fastai ARGV` in this process, and its lines on stderr but for warnings."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
        code = cxr_fastai(argv)
    return code, '\n'.join(line for line in told.getvalue().splitlines() if not line.startswith('warning: '))


class Bench:
    """Images, the outcome of each kind of training that nothing stopped, and how long it lives."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.images, self.log, self.draw = folder, folder / 'images', folder / 'log', random.Random(seed)
        make_demo(self.images, images=60, size=96, seed=0)
        self.whole, self.seconds = {}, {}
        for kind in ('reference', *KINDS):  # the first warms up
            shutil.rmtree(folder / kind, ignore_errors=True)
            begun = time.perf_counter()
            assert finish(train_argv(self.images, folder / kind, kind), self.log) == 0, self.log.read_text()
            self.seconds[kind] = time.perf_counter() - begun
            self.whole[kind] = outcome(folder / kind)

    def stop(self, number: int, i: int) -> tuple[Path, str, int, float]:
        """Start a training and send it the signal `number` at a random moment: the run, its kind, the exit code, and
        how many seconds it took to end."""
        kind = list(KINDS)[i % len(KINDS)]
        run = self.folder / f'{signal.Signals(number).name}-{i}'
        process = start(train_argv(self.images, run, kind), self.log)
        process.join(self.draw.uniform(0, self.seconds[kind]))
        sent = time.perf_counter()
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        return run, kind, process.exitcode, time.perf_counter() - sent

    def resume(self, run: Path, kind: str, told: Counter) -> None:
        """Go on with `run`, or start anew where it was not yet one, and count what comes out."""
        if (run / 'recipe.json').exists():
            try:
                load_state(Run.open(run))
            except core.CXRError:
                told['unreadable'] += 1
            else:
                told['resumed'] += finish(['train', '--resume', str(run)], self.log) == 0
        else:
            shutil.rmtree(run, ignore_errors=True)
            told['started anew'] += finish(train_argv(self.images, run, kind), self.log) == 0
        told['equal'] += (run / 'learner.pkl').is_file() and equal(outcome(run), self.whole[kind])
        shutil.rmtree(run)


def kill(bench: Bench, n: int) -> str:
    """Kill -9 trainings until `n` of them had begun and not ended."""
    told = Counter(dict.fromkeys(('killed', 'ended before', 'started anew', 'resumed', 'unreadable', 'equal'), 0))
    for i in itertools.count():
        if told['resumed'] + told['unreadable'] >= n:
            break
        run, kind, code, _ = bench.stop(signal.SIGKILL, i)
        if code == 0:
            told['ended before'] += 1
        else:
            told['killed'] += 1
            bench.resume(run, kind, told)
    return 'kill -9: ' + ', '.join(f'{name} {count}' for name, count in told.items())


def terminate(bench: Bench, n: int) -> str:
    """End `n` trainings by SIGTERM."""
    told, codes, seconds = Counter(equal=0), Counter(), []
    for i in range(n):
        run, kind, code, took = bench.stop(signal.SIGTERM, i)
        codes[code] += 1
        if code:
            seconds.append(took)
        bench.resume(run, kind, told)
    return (
        f'SIGTERM: {n} sent; exit codes {dict(sorted(codes.items()))}, equal {told["equal"]}, seconds until exit '
        f'median {statistics.median(seconds):.2f}, longest {max(seconds):.2f}'
    )


def poison(bench: Bench) -> str:
    """Let a weight become NaN at the first, a middle and the last batch of a training and of its second epoch."""
    told, batches = [], 4
    for number in (1, batches + 1, batches + 2, 2 * batches, EPOCHS * batches):
        run = bench.folder / f'nan-{number}'
        with poisoned(number):
            code, _ = quietly(train_argv(bench.images, run))
        failure = json.loads((run / 'failure.json').read_text())
        right = (failure['epoch'], failure['batch']) == ((number - 1) // batches + 1, (number - 1) % batches + 1)
        resumed = quietly(['train', '--resume', str(run)])[0] == 0 and equal(outcome(run), bench.whole['reference'])
        told.append(code == 6 and right and resumed)
    return f'NaN: {len(told)} trainings poisoned; exit code 6, named in failure.json and equal after resume {sum(told)}'


def fill(bench: Bench) -> str:
    """Let the disk be full for each file of a run in turn."""
    cases = [(name, limit) for name in (*TRAINED, *EVALUATED) for limit in (0, 60)]
    whole = [case for case in cases if fill_one(bench.folder, bench.images, *case)]
    failed = [f'{name} at {limit} bytes' for name, limit in cases if (name, limit) not in whole]
    return (
        f'full disk: {len(cases)} times for {len(TRAINED + EVALUATED)} files; exit code 6, one line, old file '
        f'whole and well afterwards {len(whole)}' + (f'; failed: {", ".join(failed)}' if failed else '')
    )


def fill_one(folder: Path, images: Path, name: str, limit: int) -> bool:
    """Whether a command that cannot write `name` ends with one line and exit code 6, leaves no half of a file, and does
    well once there is room."""
    run = folder / f'full-{name}-{limit}'
    argv = _prepare_to_write(run, images, name)
    path = run / ('figures' if name.endswith('.png') else '') / name
    old = path.read_bytes() if path.exists() else None
    failing = poisoned(1) if name == 'failure.json' else redirect_stdout(io.StringIO())
    with full_disk(name, limit), failing:
        code, told = quietly(argv)
    now = path.read_bytes() if path.exists() else None
    kept = now is not None and now.startswith(old or b'') if name == 'journal.jsonl' else now == old
    clean = not list(run.rglob('*.tmp')) and len(told.splitlines()) == 1 and f'{name}: cannot be written' in told
    if '--out' in argv:
        shutil.rmtree(run)
    well = quietly(argv)[0] == 0
    shutil.rmtree(run)
    return code == 6 and kept and clean and well


def _prepare_to_write(run: Path, images: Path, name: str) -> list[str]:
    """Make `run` such that a command will write the file `name` over an old one, if that can be; returns the command."""
    argv = train_argv(images, run, epochs=2)
    if name in ('items.csv', 'recipe.json'):
        return argv
    if name in TRAINED and name != 'learner.pkl':
        with poisoned(6):
            quietly(argv)  # in the second epoch
        return ['train', '--resume', str(run)]
    quietly(argv)
    if name == 'learner.pkl':
        return ['train', '--resume', str(run)]
    argv = ['evaluate', str(run), *['--robustness'] * name.startswith('robustness')]
    quietly(argv)
    return argv


def main() -> None:
    """Run all and print a line for each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--terms', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    add_tiny()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['CXR_CACHE'] = str(Path(folder, 'cache'))
        bench = Bench(Path(folder), args.seed)
        print(f'a training of {EPOCHS} epochs takes {max(bench.seconds.values()):.1f} s', flush=True)
        begun = time.perf_counter()
        for tell in (
            partial(kill, bench, args.kills),
            partial(terminate, bench, args.terms),
            partial(poison, bench),
            partial(fill, bench),
        ):
            print(f'{tell()} ({time.perf_counter() - begun:.0f} s so far)', flush=True)


if __name__ == '__main__':
    main()

"""The command `cxr-fastai`: parse, call one function of the library, print, exit code.

Stages are imported inside the commands, so that `--help` loads neither torch nor pandas.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from cxr_fastai.cli import data as cli_data
from cxr_fastai.cli import options as opt
from cxr_fastai.cli.evaluate import evaluate, report
from cxr_fastai.cli.explain import explain
from cxr_fastai.cli.output import LogLines, complain, free, last_line, out, say, show_warning
from cxr_fastai.cli.predict import export, predict, push_to_hub, trust
from cxr_fastai.cli.serve import serve
from cxr_fastai.cli.train import lr_find, train
from cxr_fastai.core.errors import CXRError, CXRWarning
from cxr_fastai.core.files import check_new

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cli_data.app, name='data')


@app.callback(invoke_without_command=True)
def show_version(show: Annotated[bool, Option('--version', help='Print the version and exit.')] = False) -> None:
    """From a folder of chest X-ray images to a trained, measured and exported classifier.

    Research software, not a medical device.
    """
    from cxr_fastai import __version__

    if show:
        out.print(f'cxr_fastai {__version__}', highlight=False)
        raise typer.Exit


app.command()(train)
app.command('lr-find')(lr_find)
app.command()(evaluate)
app.command()(report)
app.command()(explain)
app.command()(export)
app.command()(predict)
app.command()(trust)
app.command()(serve)
app.command('push-to-hub')(push_to_hub)


@app.command()
def demo(
    folder: opt.NewFolder = None,
    images: opt.Images = 800,
    size: opt.Size = 128,
    epochs: opt.DemoEpochs = 12,
    seed: opt.Seed = 0,
) -> None:
    """The whole way on synthetic images: data, audit, train (baseline), evaluate, explain, export, predict, report.

    Four minutes on two cores.

    Example: cxr-fastai demo --out demo
    """
    folder = folder or free(Path('demo'))
    check_new(folder)
    where, run, bundle, table = folder / 'images', folder / 'run', folder / 'bundle', folder / 'predictions.csv'
    steps = {
        'data demo': lambda: cli_data.data_demo(where, images, max(96, size * 3 // 2), seed),
        'data audit': lambda: cli_data.data_audit(where, report=folder / 'audit'),
        'train': lambda: _train_demo(where, run, epochs, size, seed),
        'evaluate': lambda: evaluate([run]),
        'explain': lambda: explain(run, top_losses=12),
        'export': lambda: export(run, bundle),
        'predict': lambda: _predict_demo(bundle, where / 'test', table),
        'report': lambda: report(run),
    }
    for number, (name, step) in enumerate(steps.items(), 1):
        out.rule(f'{number} of {len(steps)}: {name}', align='left')
        step()
    say(f'images in {where}, run in {run}, bundle in {bundle}, predictions in {table}, report in {run / "report.html"}')


def _train_demo(images: Path, run: Path, epochs: int, size: int, seed: int) -> None:
    from cxr_fastai.models.architectures import make_recipe
    from cxr_fastai.training.training import train

    train(make_recipe('baseline', epochs=epochs, size=size, seed=seed), images, run)


def _predict_demo(bundle: Path, images: Path, table: Path) -> None:
    with suppress(typer.Exit):
        predict(bundle, [images], table)  # the gate may turn an image away


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    with warnings.catch_warnings(), _logging_to_stdout(), _ending_on_sigterm():
        # Other packages' warnings are for their developers; ours are for the user, one line each.
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', CXRWarning)
        warnings.showwarning = show_warning
        try:
            app(argv)
        except KeyboardInterrupt:
            return _tell_signal(signal.SIGINT)
        except SystemExit as end:
            code = int(end.code or 0)
            return _tell_signal(signal.Signals(code - 128)) if code > 128 else code
        except CXRError as error:
            complain(f'error: {last_line(error)}')
            return error.exit_code
        except OSError as error:  # what the system refuses is no bug of ours
            complain(f'error: {error.filename or "system"}: {error.strerror or error}')
            return 1
    return 0


@contextmanager
def _logging_to_stdout() -> Iterator[None]:
    log, lines = logging.getLogger('cxr_fastai'), LogLines()
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: files are closed, temporary ones go."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may listen
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_signal(number: signal.Signals) -> int:
    complain(f'error: stopped by {number.name}')
    return 128 + number


def run() -> None:
    """The console script: `main`, as the process's exit code."""
    sys.stdout.reconfigure(errors='backslashreplace')  # a name may have letters that the terminal's encoding lacks
    sys.exit(main())

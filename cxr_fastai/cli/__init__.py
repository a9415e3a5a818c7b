"""The command line `cxr-fastai`: each command parses its options, calls the library, prints, and sets the exit code.

Commands import the library inside their functions, so that `--help` loads neither torch nor pandas.
"""

from __future__ import annotations

import copy
import errno
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from typer import Option
from typer.models import CommandInfo

from cxr_fastai.cli import cache as cache_commands
from cxr_fastai.cli import checks as check_commands
from cxr_fastai.cli import combine as combine_commands
from cxr_fastai.cli import data as data_commands
from cxr_fastai.cli import evaluate as evaluate_commands
from cxr_fastai.cli import explain as explain_commands
from cxr_fastai.cli import lists as list_commands
from cxr_fastai.cli import options as opt
from cxr_fastai.cli import predict as predict_commands
from cxr_fastai.cli import serve as serve_commands
from cxr_fastai.cli import train as train_commands
from cxr_fastai.cli.console import restored_consoles
from cxr_fastai.cli.output import (
    LogLines,
    err,
    error_message,
    out,
    print_error,
    print_line,
    show_warning,
    unused_path,
)
from cxr_fastai.cli.verbosity import Command, Program, Quiet, Verbose, log
from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.core.files import check_new
from cxr_fastai.core.workers import open_standard_streams

DEMO_STEPS = ('data demo', 'data audit', 'train', 'evaluate', 'explain', 'export', 'predict', 'report')

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the operating system that mean a full disk."""
COLUMNS = range(20, 1000)
"""Widths of a terminal that the variable COLUMNS may state, in characters. Tables need a few; 0 would print nothing."""
DEFAULT_COLUMNS = 80

app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)
app.add_typer(data_commands.app, name='data')
app.add_typer(cache_commands.app, name='cache')


@app.callback(invoke_without_command=True)
def show_version(
    show: Annotated[bool, Option('--version', help='Print the version and exit.')] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train, evaluate, explain, export and serve classifiers of chest X-ray images.

    Research software, not a medical device.
    """
    if show:
        from cxr_fastai import __version__  # a package that is not installed has no version

        out.print(f'cxr_fastai {__version__}', highlight=False)
        raise typer.Exit


# The commands of options alone get other words in `context.args`, and say which option was meant.
app.command(cls=Command, context_settings={'allow_extra_args': True})(train_commands.train)
app.command('lr-find', cls=Command, context_settings={'allow_extra_args': True})(train_commands.lr_find)
app.command(cls=Command)(list_commands.archs)
app.command(cls=Command)(list_commands.recipes)
app.command(cls=Command)(evaluate_commands.evaluate)
app.command(cls=Command)(evaluate_commands.report)
app.command(cls=Command)(combine_commands.combine)
app.command(cls=Command)(explain_commands.explain)
app.command(cls=Command)(predict_commands.export)
app.command(cls=Command)(predict_commands.predict)
app.command(cls=Command)(predict_commands.trust)
app.command(cls=Command)(serve_commands.serve)
app.command(cls=Command)(check_commands.checks)
app.command(cls=Command)(check_commands.benchmark)
app.command('push-to-hub', cls=Command)(predict_commands.push_to_hub)


@app.command(cls=Command)
def demo(
    folder: opt.NewFolder = None,
    images: opt.Images = 800,
    size: opt.Size = 128,
    epochs: opt.DemoEpochs = 12,
    seed: opt.Seed = 0,
) -> None:
    """Run every stage on synthetic images: data, audit, train, evaluate, explain, export, predict, report.

    Takes four minutes on two cores.

    Example: cxr-fastai demo --out demo
    """
    folder = folder or unused_path(Path('demo'))
    check_new(folder)
    image_folder = folder / 'images'
    run = folder / 'run'
    bundle = folder / 'bundle'
    table = folder / 'predictions.csv'

    _print_heading('data demo')
    data_commands.data_demo(image_folder, images, max(96, size * 3 // 2), seed)
    _print_heading('data audit')
    data_commands.data_audit(image_folder, report=folder / 'audit')
    _print_heading('train')
    _train_demo(image_folder, run, epochs, size, seed)
    _print_heading('evaluate')
    evaluate_commands.evaluate([run])
    _print_heading('explain')
    explain_commands.explain(run, top_losses=12)
    _print_heading('export')
    predict_commands.export(run, bundle)
    _print_heading('predict')
    with suppress(typer.Exit):  # exit code 3: the input gate may reject an image
        predict_commands.predict(bundle, [image_folder / 'test'], table)
    _print_heading('report')
    evaluate_commands.report(run)
    print_line(f'images: {image_folder}, run: {run}, bundle: {bundle}, predictions: {table}')
    print_line(f'Open the report in a browser: {run / "report.html"}')


def _print_heading(step: str) -> None:
    out.rule(f'{DEMO_STEPS.index(step) + 1} of {len(DEMO_STEPS)}: {step}', align='left')


def _train_demo(images: Path, run: Path, epochs: int, size: int, seed: int) -> None:
    from cxr_fastai.models.architectures import make_recipe
    from cxr_fastai.training.training import train

    # The folder val of synthetic images is large enough for a validation.
    train(make_recipe('baseline', epochs=epochs, size=size, seed=seed, valid='official'), images, run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the arguments of this process) and return its exit code."""
    with restored_consoles(), _own_warnings(), _logging_to_stdout(), _stop_on_signals() as received:
        try:
            words = sys.argv[1:] if argv is None else argv
            _check_words(words)
            _app_of(words)(argv)
        except KeyboardInterrupt:
            return _report_signal(signal.SIGINT)
        except SystemExit as end:
            code = int(end.code or 0)
            if code > 128:
                return _report_signal(signal.Signals(code - 128))
            return code
        except Exception as error:
            log.debug(traceback.format_exc())
            if received:  # a library turned the exception of the signal into another one
                return _report_signal(received[0])
            return _report_error(error)
    return 0


def _report_error(error: Exception) -> int:
    """Print an expected failure in one line and return its exit code. Raises any other `error`, which is a bug."""
    if isinstance(error, CXRError):
        print_error(f'error: {error_message(error)}')
        return error.exit_code
    if isinstance(error, OSError):  # refused by the operating system
        print_error(f'error: {error.filename or "system"}: {error.strerror or error}')
        return OutputError.exit_code if error.errno in DISK_ERRORS else 1
    raise error


def _check_words(words: Sequence[str]) -> None:
    """Raise `UsageError` for an empty argument, which would mean the current folder."""
    for position, word in enumerate(words):
        if not word.strip():
            before = f' after {words[position - 1]}' if position else ''
            raise UsageError(f'the argument{before} is empty. Is a variable of your shell not set?')


def _app_of(words: Sequence[str]) -> typer.Typer:
    """Return `app` with only the command that the `words` begin with, or the whole app if they begin otherwise.

    Typer builds the options of all commands of an app, which would take 30 ms.
    """
    commands = [command for command in app.registered_commands if words and _name(command) == words[0]]
    if not commands:
        return app
    part = copy.copy(app)
    part.registered_commands = commands
    part.registered_groups = []
    return part


def _name(command: CommandInfo) -> str:
    return command.name or (command.callback.__name__ if command.callback else '')


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Print the warnings of this package, one line each, and ignore those that other packages mean for developers."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', CXRWarning)
        warnings.showwarning = show_warning
        yield


@contextmanager
def _logging_to_stdout() -> Iterator[None]:
    lines = LogLines()
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


@contextmanager
def _stop_on_signals() -> Iterator[list[signal.Signals]]:
    """Stop on SIGTERM as on Ctrl-C, so that files are closed and temporary files are removed; yield what was received.

    A command that a shell script starts in the background ignores SIGINT, and keeps ignoring it.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    try:
        previous = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # only the main thread may handle signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report_signal(number: signal.Signals) -> int:
    print_error(f'error: stopped by {number.name}')
    return 128 + number


def run() -> None:
    """Run the console script: `main` with the arguments and exit code of this process."""
    open_standard_streams()
    _correct_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the terminal's encoding may lack letters of a file name
    sys.exit(main())


def _correct_environment() -> None:
    """Replace values of environment variables that make libraries print nothing, or fail when they are imported."""
    os.environ['MPLBACKEND'] = 'agg'  # commands open no windows
    columns = os.environ.get('COLUMNS', '')
    if columns.isdecimal() and int(columns[:9]) not in COLUMNS:
        os.environ['COLUMNS'] = str(DEFAULT_COLUMNS)
        out.width = err.width = DEFAULT_COLUMNS

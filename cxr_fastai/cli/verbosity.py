"""The options `--quiet` and `--verbose`, which every command accepts before and after its name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option
from typer.core import TyperCommand, TyperGroup

from cxr_fastai.cli.console import out
from cxr_fastai.core.errors import UsageError

if TYPE_CHECKING:
    import typer

SHARED = ('quiet', 'verbose')
"""Names of the options of the whole program that its commands accept as well."""

log = logging.getLogger('cxr_fastai')


def _be_quiet(is_given: bool) -> None:
    if is_given:
        _set_level(logging.WARNING)
        out.quiet = True


def _be_verbose(is_given: bool) -> None:
    if is_given:
        _set_level(logging.DEBUG)


def _set_level(level: int) -> None:
    """Set the level of the log, which `main` sets to INFO before it parses the options."""
    if {log.level, level} == {logging.WARNING, logging.DEBUG}:
        raise UsageError('--quiet and --verbose contradict each other. Give only one of them.')
    log.setLevel(level)


Quiet = Annotated[
    bool,
    Option(
        '--quiet',
        callback=_be_quiet,
        expose_value=False,
        help='Hide tables, results, log lines and progress bars. Errors and warnings are still printed, and so is the '
        'document of --json.',
    ),
]
Verbose = Annotated[
    bool,
    Option(
        '--verbose',
        callback=_be_verbose,
        expose_value=False,
        help='Also print the debug log to standard error, and the traceback of an error.',
    ),
]


def _add_shared_options(params: list[Any], context: typer.Context) -> list[Any]:
    """Return the parameters of a command, of which --help is the last, with the options `SHARED` before --help."""
    shared = [option for option in context.find_root().command.params if option.name in SHARED]
    return _with_plain_flags([*params[:-1], *shared, params[-1]])


def _with_plain_flags(params: list[Any]) -> list[Any]:
    """Return the parameters, of which flags show no type in the help: Typer would print <bool>."""
    for option in params:
        if getattr(option, 'is_flag', False):
            option.metavar = ''
    return params


class Program(TyperGroup):
    """The whole command line, which defines the options `SHARED`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the program and --help."""
        return _with_plain_flags(super().get_params(ctx))


class Command(TyperCommand):
    """A command that also has the options `SHARED`, and whose help fills the lines of the terminal."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.help:  # a docstring, whose line ends Typer would keep
            self.help = '\n\n'.join(' '.join(lines.split()) for lines in self.help.split('\n\n'))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command, the shared options, and --help."""
        return _add_shared_options(super().get_params(ctx), ctx)


class CommandGroup(TyperGroup):
    """A group of commands, such as `data`, that also has the options `SHARED`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the shared options and --help."""
        return _add_shared_options(super().get_params(ctx), ctx)

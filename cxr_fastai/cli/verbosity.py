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
        help='Print only errors, warnings, and the document of --json.',
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


def _shared_options(context: typer.Context) -> list[Any]:
    """Return the options `SHARED` of the whole program."""
    return [option for option in context.find_root().command.params if option.name in SHARED]


class Command(TyperCommand):
    """A command that also has the options `SHARED`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command, the shared options, and --help."""
        *own, help_option = super().get_params(ctx)
        return [*own, *_shared_options(ctx), help_option]


class CommandGroup(TyperGroup):
    """A group of commands, such as `data`, that also has the options `SHARED`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the shared options and --help."""
        *own, help_option = super().get_params(ctx)
        return [*own, *_shared_options(ctx), help_option]

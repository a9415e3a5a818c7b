"""The commands `cxr-fastai cache list` and `cxr-fastai cache clean`, about the caches that `data prepare` wrote."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer import Argument, Option

from cxr_fastai.cli.output import print_columns, print_line
from cxr_fastai.cli.verbosity import Command, CommandGroup
from cxr_fastai.core.errors import UsageError

Names = Annotated[
    list[str] | None,
    Argument(metavar='NAME...', show_default=False, help='Caches to delete, named as in `cxr-fastai cache list`.'),
]
All = Annotated[bool, Option('--all', help='Delete every cache.')]
Yes = Annotated[bool, Option('--yes', help='Delete without asking.')]

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help='List and delete caches of decoded images.')


@app.command('list', cls=Command)
def cache_list() -> None:
    """List the caches of decoded images that `data prepare` wrote: size, number of images, and last change.

    Example: cxr-fastai cache list
    """
    from cxr_fastai.images.cache import cache_root
    from cxr_fastai.images.cache_folders import list_caches

    caches = list_caches()
    if not caches:
        print_line(f'{cache_root()}: no caches')
        return
    rows = [
        (f'{cache.bytes / 1e6:,.1f} MB', f'{cache.images:,}', f'{cache.changed:%Y-%m-%d %H:%M}', cache.name)
        for cache in caches
    ]
    print_columns(('size', 'images', 'last change', 'name'), rows)
    print_line(f'{sum(cache.bytes for cache in caches) / 1e6:,.1f} MB in {cache_root()}')


@app.command('clean', cls=Command)
def cache_clean(names: Names = None, every: All = False, yes: Yes = False) -> None:
    """Delete caches of decoded images, by name or all. The images themselves stay; `data prepare` decodes them again.

    Example: cxr-fastai cache clean --all
    """
    from cxr_fastai.images.cache_folders import delete_cache, list_caches

    if bool(names) == every:
        raise UsageError('give either names of caches or --all. `cxr-fastai cache list` shows the names.')
    caches = {cache.name: cache for cache in list_caches()}
    unknown = [name for name in names or [] if name not in caches]
    if unknown:
        raise UsageError(f'{unknown[0]}: no such cache. `cxr-fastai cache list` shows the names.')
    chosen = [cache for name, cache in caches.items() if every or name in (names or [])]
    noun = 'cache' if len(chosen) == 1 else 'caches'
    size = f'{len(chosen)} {noun}, {sum(cache.bytes for cache in chosen) / 1e6:,.1f} MB'
    if chosen and not yes:
        _ask(f'Delete {size}?')
    for cache in chosen:
        delete_cache(cache)
    print_line(f'deleted: {size}')


def _ask(question: str) -> None:
    """End the command unless the user agrees. Raises `UsageError` where nobody can answer."""
    if not sys.stdin.isatty():
        raise UsageError(f'{question} Nobody can answer here: give --yes.')
    typer.confirm(question, abort=True)

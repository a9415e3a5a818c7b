"""The commands `cxr-fastai cache list` and `cxr-fastai cache clean`.

They are about the caches that `data prepare` wrote, and about the bundles that were downloaded from the Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from cxr_fastai.cli.output import print_columns, print_line
from cxr_fastai.cli.verbosity import Command, CommandGroup
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import counted

if TYPE_CHECKING:
    from cxr_fastai.images.cache_folders import CacheFolder
    from cxr_fastai.inference.hub_bundles import CachedBundle

TIME = '%Y-%m-%d %H:%M'

Names = Annotated[
    list[str] | None,
    Argument(metavar='NAME...', show_default=False, help='Caches to delete, named as in `cxr-fastai cache list`.'),
]
All = Annotated[bool, Option('--all', help='Delete every cache.')]
Yes = Annotated[bool, Option('--yes', help='Delete without asking.')]

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help='List and delete caches of decoded images and bundles of the Hub.'
)


@app.command('list', cls=Command)
def cache_list() -> None:
    """List the caches of decoded images that `data prepare` wrote: size, number of images, and last change. Then the
    bundles of the Hugging Face Hub that were downloaded by the name hf:USER/NAME.

    Example: cxr-fastai cache list
    """
    from cxr_fastai.images.cache import cache_root
    from cxr_fastai.images.cache_folders import list_caches
    from cxr_fastai.inference.hub_bundles import hub_cache, list_hub_bundles

    caches, bundles = list_caches(), list_hub_bundles()
    rows = [(_megabytes([cache]), f'{cache.images:,}', f'{cache.changed:{TIME}}', cache.name) for cache in caches] + [
        (_megabytes([bundle]), '', f'{bundle.changed:{TIME}}', bundle.name) for bundle in bundles
    ]
    if rows:
        print_columns(('size', 'images', 'last change', 'name'), rows)
    print_line(f'{_megabytes(caches)} in {cache_root()}' if caches else f'{cache_root()}: no caches')
    if bundles:
        print_line(f'{_megabytes(bundles)} of bundles in {hub_cache()}')


@app.command('clean', cls=Command)
def cache_clean(names: Names = None, every: All = False, yes: Yes = False) -> None:
    """Delete caches of decoded images and bundles of the Hub, by name or all. The images themselves stay; `data
    prepare` decodes them again, and a bundle is downloaded again.

    Example: cxr-fastai cache clean --all
    """
    from cxr_fastai.images.cache_folders import CacheFolder, delete_cache, list_caches
    from cxr_fastai.inference.hub_bundles import delete_hub_bundle, list_hub_bundles

    if bool(names) == every:
        raise UsageError('give either names of caches or --all. `cxr-fastai cache list` shows the names.')
    caches: dict[str, CacheFolder | CachedBundle] = {cache.name: cache for cache in list_caches()}
    caches |= {bundle.name: bundle for bundle in list_hub_bundles()}
    unknown = [name for name in names or [] if name not in caches]
    if unknown:
        raise UsageError(f'{unknown[0]}: no such cache. `cxr-fastai cache list` shows the names.')
    chosen = [cache for name, cache in caches.items() if every or name in (names or [])]
    size = f'{counted(len(chosen), "cache")}, {_megabytes(chosen)}'
    if chosen and not yes:
        _ask(f'Delete {size}?')
    for cache in chosen:
        if isinstance(cache, CacheFolder):
            delete_cache(cache)
        else:
            delete_hub_bundle(cache)
    print_line(f'deleted: {size}')


def _megabytes(caches: Sequence[CacheFolder | CachedBundle]) -> str:
    return f'{sum(cache.bytes for cache in caches) / 1e6:,.1f} MB'


def _ask(question: str) -> None:
    """End the command unless the user agrees. Raises `UsageError` where nobody can answer."""
    if not sys.stdin.isatty():
        raise UsageError(f'{question} Nobody can answer here: give --yes.')
    typer.confirm(question, abort=True)

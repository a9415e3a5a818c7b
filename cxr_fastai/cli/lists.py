"""The commands `cxr-fastai archs` and `cxr-fastai recipes`, which list what `train` accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import print_columns, print_line
from cxr_fastai.core.environment import is_installed
from cxr_fastai.core.errors import UsageError

if TYPE_CHECKING:
    from cxr_fastai.core.recipe_fields import FieldInfo
    from cxr_fastai.models.catalog import ArchFacts

MAX_ARCHS = 25
"""Networks that `archs` lists at most: each is built to count its parameters."""


def archs(pattern: opt.Pattern = None) -> None:
    """List the networks that --arch accepts, with parameters, image size and initial weights.

    Example: cxr-fastai archs "resnet*"
    """
    from cxr_fastai.models.catalog import describe_arch, list_archs

    names = list_archs(pattern)
    if not names:
        raise UsageError(f'{pattern}: no network has such a name. Patterns: "*resnet*", "torchvision.*".{_timm_hint()}')
    listed = names[:MAX_ARCHS]
    width = max(len('network'), *map(len, listed))
    print_line(f'{"network":{width}}  {"parameters":>11}  {"image size":10}  weights')
    for name in listed:
        print_line(_arch_line(describe_arch(name), width))
    if len(names) > len(listed):
        print_line(f'and {len(names) - len(listed):,} more. Give a narrower pattern to list them.')
    if pattern is None:
        print_line(
            'Also: classifiers of torchvision (archs "torchvision.*"), networks of timm (archs "resnet*") and of '
            'fastai\'s vision_learner (archs "vision_learner.*"), and your own: CXR_ARCHS=NAME=package.module:function.'
            + _timm_hint()
        )


def _timm_hint() -> str:
    if is_installed('timm'):
        return ''
    return ' timm is not installed: pip install "cxr_fastai[timm]".'


def _arch_line(facts: ArchFacts, width: int) -> str:
    parameters = '?' if facts.parameters is None else f'{facts.parameters:,}'
    size = f'{facts.size} only' if facts.fixed_size else f'{facts.size}'
    weights = facts.problem or ', '.join([*facts.weights, 'none'])
    return f'{facts.name:{width}}  {parameters:>11}  {size:10}  {weights}'


def recipes() -> None:
    """List the named recipes: epochs, phases and fields, with defaults, permitted values and meaning.

    Example: cxr-fastai recipes
    """
    from cxr_fastai.core.recipe import RECIPES
    from cxr_fastai.core.recipe_fields import SUMMARIES, list_fields
    from cxr_fastai.models.phases import EPOCHS, FROM_SCRATCH, PRETRAINED, describe_shares

    for name in RECIPES:
        pretrained, scratch = (describe_shares(phases[name]) for phases in (PRETRAINED, FROM_SCRATCH))
        print_line(f'{name}: {SUMMARIES[name]}. {EPOCHS[name]} epochs.')
        print_line(f'    pretrained networks: {pretrained}')
        print_line(f'    networks from scratch: {scratch}')
    rows = [(_setting(info), _tuned(info), f'{info.meaning} ({info.values})') for info in list_fields()]
    print_columns(('reference', 'tuned', 'meaning (values)'), rows)
    print_line('RUN/recipe.json has the recipe of a run: cxr-fastai train --recipe RUN/recipe.json repeats it.')


def _setting(info: FieldInfo) -> str:
    """Return how the command line sets a field to its value in the recipe `reference`."""
    value = info.recipes['reference']
    if info.option.endswith('='):
        return info.option + _show(value)
    if value is False:
        return info.option
    return f'{info.option or info.name} {_show(value)}'


def _tuned(info: FieldInfo) -> str:
    """Return the value of a field in the recipe `tuned` if it is another one."""
    value = info.recipes['tuned']
    return '' if value == info.recipes['reference'] else _show(value)


def _show(value: Any) -> str:
    if value is None:
        return 'none'
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:.3g}' if isinstance(value, float) else str(value)

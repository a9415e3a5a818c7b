"""The fields of a `Recipe`: what each means, which values it may have, and a check of those from a JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import CHOICES, RANGES, RECIPES, SETTABLE, Phase, Recipe

SUMMARIES = {'reference': 'the specification', 'tuned': 'the most robust on corrupted images'}
"""Name of a recipe to what it is."""
MEANINGS = {
    'arch': 'network, a name that `cxr-fastai archs` lists',
    'phases': 'name, epochs, learning rate and patience of each part of the training, and whether the body is frozen',
    'name': 'recipe from which the other fields come',
    'weights': 'initial weights',
    'valid': 'validation images: the val folder, those of some of the patients, or none, so that all are trained on',
    'valid_pct': 'proportion of the patients that valid=patients takes',
    'fold': 'which part of the patients valid=patients takes, of 1 / valid_pct parts; --folds takes each of them',
    'shift_pct': 'proportion of the patients, of the softest normal images, that is held out of training; 0: none',
    'size': 'side of the images in pixels',
    'resize': 'how images become square',
    'low_pass': 'standard deviation of the Gaussian filter on every image, as a fraction of the side',
    'modality': 'DICOM modalities that are accepted besides CR, DX and DR',
    'batch_size': 'images per batch',
    'workers': 'processes that load images; the command uses one per core, and none with a cache',
    'limit': 'images of each class and split that are used; none: all',
    'seed': 'seed of all random numbers',
    'flip': 'probability of a horizontal flip',
    'degrees': 'maximum rotation in degrees',
    'translate': 'maximum shift, as a fraction of the side',
    'brightness': 'b: random factor from 1 - b to 1 + b',
    'contrast': 'c: random factor from 1 - c to 1 + c',
    'gamma': 'g: random exponent from 1 / (1 + g) to 1 + g',
    'interpolation': 'method for rotated, shifted and cropped pixels',
    'crop': 'minimum fraction of the area that a random crop keeps; 1: no crop',
    'crop_aspect': 'maximum aspect ratio of a random crop, in either direction',
    'blur': 'maximum standard deviation of a random Gaussian filter, as a fraction of the side',
    'resolution': 'minimum factor of a random reduction of the resolution; 1: none',
    'jpeg': 'minimum quality of a random JPEG compression; 0: none',
    'erase': 'probability that a rectangle is replaced by noise',
    'match_histogram': 'probability that the histogram of grey levels comes from another image',
    'match_detail': 'probability that an image is blurred to the detail of another one',
    'exchange': 'probability that what is around the lungs comes from another image',
    'hide_lungs': 'probability that the lungs are hidden, with a label that says nothing',
    'mixup': 'alpha of MixUp; 0: none',
    'start_size': 'fraction of the size at which training starts; 1: full size from the start',
    'optimizer': 'adam: weight decay as an L2 penalty; adamw: decoupled',
    'weight_decay': 'weight decay',
    'schedule': 'learning rate: reduced when the loss stops decreasing, or one cycle',
    'plateau_factor': 'factor by which the schedule plateau reduces the learning rate',
    'plateau_patience': 'epochs without improvement before that',
    'patience': 'epochs without a better one after which a phase ends early; 0: never',
    'body_lr': 'learning rate of the body, as a fraction of that of the head',
    'label_smoothing': 'label smoothing of the loss',
    'class_weights': 'weight the classes equally in the loss',
    'clip': 'maximum norm of the gradient; 0: not clipped',
    'ema': 'decay of the moving average of the weights, which is evaluated and saved; 0: none',
    'threshold': 'probability from which an image is classified as PNEUMONIA, until evaluate chooses one',
    'allow_leakage': 'train even if a patient is in two splits',
    'precision': 'number format of the training steps; the command chooses the best of the device',
    'on_bad_image': 'what to do at an unreadable image',
}
"""Field to its meaning and unit."""
VALUES = {
    'weights': 'a name that `cxr-fastai archs` lists, none, or a file',
    'resize': 'squish, pad, crop',
    'low_pass': '0 to 0.1',
    'modality': 'codes separated by commas, such as RG or CT,MR',
    'limit': 'a whole number',
    'workers': 'a whole number',
}
"""Field to its permitted values, as text, where neither `CHOICES` nor `RANGES` has them."""
LIMITS = {
    'size': (1, 4096),
    'batch_size': (1, math.inf),
    'limit': (1, math.inf),
    'workers': (0, math.inf),
    'seed': (0, 2**32),
}
"""Field with a whole number to its minimum and maximum in a file."""
OPTIONS = ('arch', 'weights', 'valid', 'size', 'resize', 'batch_size', 'workers', 'limit', 'seed', 'allow_leakage') + (
    'precision',
    'on_bad_image',
    'modality',
    'patience',
)
"""Fields that `cxr-fastai train` sets by an option of the same name."""


@dataclass(frozen=True)
class FieldInfo:
    """A field of `Recipe`: how the command line sets it, its value in each named recipe, and what it may be."""

    name: str
    option: str
    recipes: dict[str, Any]
    values: str
    meaning: str


def list_fields() -> list[FieldInfo]:
    """Return the fields of `Recipe` that the named recipes set, in the order of the class."""
    infos = []
    for field in fields(Recipe):
        if field.default is MISSING or field.name == 'name':
            continue
        recipes = {name: settings.get(field.name, field.default) for name, settings in RECIPES.items()}
        values = describe_values(field.name, str(field.type))
        infos.append(FieldInfo(field.name, _option(field.name), recipes, values, MEANINGS[field.name]))
    return infos


def _option(name: str) -> str:
    if name in SETTABLE:
        return f'--set {name}='
    if name in OPTIONS:
        return f'--{name.replace("_", "-")}'
    return ''


def describe_values(name: str, kind: str) -> str:
    """Return the permitted values of the field `name` of the type `kind`, as text."""
    if name in CHOICES:
        return ', '.join(CHOICES[name])
    if name in RANGES:
        low, high = RANGES[name]
        return f'{low:g} or more' if high == math.inf else f'{low:g} to {high:g}'
    return VALUES.get(name, TYPES[kind][1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_optional_integer(value: Any) -> bool:
    return value is None or _is_integer(value)


TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    'float': (_is_number, 'a number'),
    'int': (_is_integer, 'a whole number'),
    'int | None': (_is_optional_integer, 'a whole number or null'),
    'str': (lambda value: isinstance(value, str), 'a text'),
    'bool': (lambda value: isinstance(value, bool), 'true or false'),
}
"""Type of a field to its check of a value from JSON, and the words for what it accepts."""


def parse_recipe(values: Any) -> Recipe:
    """Return the recipe with the fields in `values`, the object of a JSON file; missing fields have their default.

    Raises `UsageError`, which names the field, if one is missing, unknown, of another type, or out of range.
    """
    if not isinstance(values, dict):
        raise UsageError(f'an object with the fields of a recipe is needed, not {_show(values)}')
    known = {field.name: field for field in fields(Recipe)}
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise UsageError(f'the field {name} is missing')
    for name, value in values.items():
        if name not in known:
            similar = get_close_matches(name, known, 1)
            advice = f', did you mean {similar[0]}?' if similar else ''
            raise UsageError(f'the field {name} is unknown{advice}')
        if name != 'phases':
            _check_type(name, value, str(known[name].type))
    return Recipe(**values | {'phases': _parse_phases(values['phases'])})


def _parse_phases(values: Any) -> tuple[Phase, ...]:
    if not isinstance(values, list):
        raise UsageError(f'the field phases is {_show(values)}: a list is needed')
    return tuple(_parse_phase(f'phases[{number}]', phase) for number, phase in enumerate(values))


def _parse_phase(where: str, values: Any) -> Phase:
    known = {field.name: field for field in fields(Phase)}
    needed = [name for name in known if name != 'patience']
    if not isinstance(values, dict) or not set(needed) <= values.keys() <= known.keys():
        raise UsageError(f'{where} is {_show(values)}: an object of {", ".join(needed)} is needed')
    for name, value in values.items():
        _check_type(f'{where}.{name}', value, str(known[name].type))
    return Phase(**values)


def _check_type(where: str, value: Any, kind: str) -> None:
    is_valid, words = TYPES[kind]
    if not is_valid(value):
        raise UsageError(f'the field {where} is {_show(value)}: {words} is needed')
    low, high = LIMITS.get(where, (-math.inf, math.inf))
    if where in LIMITS and value is not None and not low <= value <= high:
        raise UsageError(f'the field {where} is {_show(value)}: a whole number from {low:g} to {high:g} is needed')


def _show(value: Any) -> str:
    return f'{value!r:.60}'

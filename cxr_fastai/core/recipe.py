"""Everything that decides a training, as data: the frozen `Recipe`, its phases, and the recipes that have a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import UsageError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `epochs` at the learning rate `lr` (the highest, where it changes), with the body frozen
    or not."""

    name: str
    epochs: int
    lr: float
    frozen: bool = False


@dataclass(frozen=True)
class Recipe:
    """`recipe.json` in the run folder is this, field by field; `models.make_recipe` fills it in for an architecture.

    Angles are degrees. Lengths are shares of the image's side, so that they mean the same at every size. 0 (for a
    share that is kept: 1) leaves a step out. docs/recipe.md tells why each has the value it has.
    """

    arch: str
    phases: tuple[Phase, ...]
    name: str = 'reference'
    weights: str = 'none'
    # Images.
    valid: str = 'official'
    size: int = 224
    resize: str = 'squish'  # a key of `images.RESIZES`
    low_pass: float = 0.0  # standard deviation of the Gaussian that every image goes through
    batch_size: int = 32
    workers: int | None = 0  # None: what suits the images
    limit: int | None = None
    seed: int = 42
    # Augmentation, of training images alone.
    flip: float = 0.5  # probability
    degrees: float = 10.0
    translate: float = 0.1
    brightness: float = 0.2  # factors from 1 - b to 1 + b
    contrast: float = 0.2
    interpolation: str = 'nearest'  # or bilinear
    crop: float = 1.0  # the least share of the area that a random crop keeps
    crop_aspect: float = 1.0  # its greatest aspect ratio, either way
    blur: float = 0.0  # the greatest standard deviation of a random low-pass
    resolution: float = 1.0  # the least factor of going down and up again in size
    jpeg: int = 0  # the lowest quality of a random re-encoding
    erase: float = 0.0  # probability that a rectangle of the batch becomes noise
    mixup: float = 0.0  # alpha
    start_size: float = 1.0  # the share of the side that training starts at; it grows to the whole
    # Optimisation.
    optimizer: str = 'adam'  # weight decay as L2; adamw: decoupled
    weight_decay: float = 1e-4
    schedule: str = 'plateau'  # or one-cycle
    plateau_factor: float = 0.1
    plateau_patience: int = 2
    body_lr: float = 1.0  # the body's learning rate, as a share of the head's
    label_smoothing: float = 0.0
    class_weights: bool = False  # each class counts as much as the other
    clip: float = 0.0  # the greatest norm of the gradient
    ema: float = 0.0  # decay of the moving average of the weights that is measured and kept
    threshold: float = 0.5
    allow_leakage: bool = False
    precision: str = 'fp32'  # or fp16, bf16
    on_bad_image: str = 'fail'  # or skip

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise UsageError(f'{name} {value}: a number from {low:g} to {high:g} is needed.')
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                option = name if name in SETTABLE else f'--{name.replace("_", "-")}'
                raise UsageError(f'{option} {value}: choose {" or ".join(known)}.')

    @property
    def epochs(self) -> int:
        """The total over the phases."""
        return sum(phase.epochs for phase in self.phases)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**fields, 'phases': tuple(Phase(**phase) for phase in fields['phases'])})


def differences(known: Recipe, asked: Recipe) -> list[str]:
    """What sets two recipes apart, as `field: was, now`; `workers` change no batch and do not count."""
    names = [field.name for field in fields(Recipe) if field.name != 'workers']
    return [
        f'{name}: {_show(getattr(known, name))}, now {_show(getattr(asked, name))}'
        for name in names
        if getattr(known, name) != getattr(asked, name)
    ]


def _show(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    return ' and '.join(f'{phase.epochs} epochs of {phase.name} at {phase.lr:g}' for phase in value)


RECIPES: dict[str, dict[str, Any]] = {
    'reference': {},
    'tuned': {
        'low_pass': 1 / 128,
        'translate': 0.0,
        'brightness': 0.3,
        'contrast': 0.3,
        'interpolation': 'bilinear',
        'crop': 0.25,
        'crop_aspect': 4 / 3,
        'resolution': 0.4,
        'blur': 0.012,
        'jpeg': 30,
        'start_size': 0.5,
        'optimizer': 'adamw',
        'weight_decay': 0.01,
        'schedule': 'one-cycle',
        'ema': 0.99,
    },
}
"""What sets a recipe apart from the specification, whatever the architecture."""

RANGES = {
    'flip': (0, 1),
    'degrees': (0, 180),
    'translate': (0, 0.5),
    'brightness': (0, 1),
    'contrast': (0, 1),
    'crop': (0.01, 1),
    'crop_aspect': (1, 4),
    'blur': (0, 0.1),
    'resolution': (0.05, 1),
    'jpeg': (0, 95),
    'erase': (0, 1),
    'mixup': (0, 10),
    'start_size': (0.1, 1),
    'weight_decay': (0, 10),
    'body_lr': (1e-6, 1),
    'plateau_factor': (0, 0.99),
    'plateau_patience': (0, 1000),
    'label_smoothing': (0, 0.99),
    'clip': (0, math.inf),
    'ema': (0, 0.99999),
    'threshold': (0, 1),
}
CHOICES = {
    'interpolation': ('nearest', 'bilinear'),
    'optimizer': ('adam', 'adamw'),
    'valid': ('official', 'patients'),
    'schedule': ('plateau', 'one-cycle'),
    'precision': ('fp32', 'fp16', 'bf16'),
    'on_bad_image': ('fail', 'skip'),
}
SETTABLE = (*(RANGES.keys() - {'threshold'}), 'low_pass', 'interpolation', 'optimizer', 'schedule', 'class_weights')
"""Fields without an option of their own."""


def parse_fields(given: list[str]) -> dict[str, Any]:
    """`FIELD=VALUE` texts as fields of a `Recipe`. Raises `UsageError` for what is none."""
    return dict(_parse_field(text) for text in given)


def _parse_field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition('=')
    kinds = {field.name: field.type for field in fields(Recipe)}
    if name not in SETTABLE:
        near = get_close_matches(name, SETTABLE) or sorted(SETTABLE)
        other = f'use --{name.replace("_", "-")}' if name in kinds else f'choose {" or ".join(near)}'
        raise UsageError(f'--set {text}: no such field: {other}.')
    parse, what = PARSERS[kinds[name]]
    try:
        return name, parse(value.lower())
    except (ValueError, KeyError):
        raise UsageError(f'--set {text}: {name}={what} is needed.') from None


def command_line(recipe: Recipe) -> str:
    """The `cxr-fastai train` that gives this recipe again; a file of weights is called by its name alone."""
    usual = {field.name: field.default for field in fields(Recipe)} | RECIPES[recipe.name]
    other = {name: value for name, value in vars(recipe).items() if value != usual[name] and name not in UNTOLD}
    options = {
        'arch': recipe.arch,
        'recipe': recipe.name,
        'epochs': recipe.epochs,
        'lr': f'{recipe.phases[0].lr:g}',
        'weights': PurePath(recipe.weights).name,
    }
    options |= {name: value for name, value in other.items() if name not in SETTABLE}
    flags = [f'--{name.replace("_", "-")}' + ('' if value is True else f' {value}') for name, value in options.items()]
    return ' '.join(
        [
            'cxr-fastai train --data DIR',
            *flags,
            *(
                f'--set {name}={str(value).lower() if isinstance(value, bool) else value}'
                for name, value in other.items()
                if name in SETTABLE
            ),
        ]
    )


UNTOLD = ('arch', 'name', 'phases', 'weights', 'workers', 'threshold')
"""Fields that `command_line` tells otherwise, or that change nothing in what is trained."""
PARSERS = {
    'float': (float, 'NUMBER'),
    'int': (int, 'WHOLE NUMBER'),
    'str': (str, 'WORD'),
    'bool': ({'true': True, 'false': False}.__getitem__, 'true or false'),
}
VOCAB = ('NORMAL', 'PNEUMONIA')
"""The classes in the order of the network's outputs; the last one is the positive class."""
POSITIVE = VOCAB.index('PNEUMONIA')

"""The `Recipe`: every setting that determines a training, as data, and the named recipes `reference` and `tuned`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from cxr_fastai.core.errors import UsageError, did_you_mean

VOCAB = ('NORMAL', 'PNEUMONIA')
"""The classes in the order of the network's outputs; the last one is the positive class."""
POSITIVE = VOCAB.index('PNEUMONIA')
SHIFT = 'shift'
"""The split of the images that a recipe with `shift_pct` holds out of training; see `data.shift`."""
SPLITS = ('train', 'valid', 'test', SHIFT)
CUSTOM = 'custom'
"""Name of the recipe of a network that was not trained by a named recipe."""
UNKNOWN = 'unknown'
"""Architecture, weights, optimizer or schedule of a custom recipe that were not recorded."""
EXTENSION = 'extension'
"""Name of the phase by which a run was trained longer than its recipe said at first; another one is `extension-2`."""


@dataclass(frozen=True)
class Phase:
    """A part of a training: its number of epochs, its learning rate, and whether the body is frozen.

    `lr` is the maximum learning rate if the schedule varies it. `patience` replaces that of the recipe if it is set.
    """

    name: str
    epochs: int
    lr: float
    frozen: bool = False
    patience: int | None = None


@dataclass(frozen=True)
class Recipe:
    """The settings of a training. `recipe.json` in the run folder contains these fields.

    `models.make_recipe` creates a recipe for an architecture. Angles are in degrees. Lengths are fractions of the side
    of the image, so that they mean the same at every size. 0 turns a step off; for fractions that are kept, 1 does.
    docs/recipe.md explains each default. Raises `UsageError` for values outside `RANGES` and `CHOICES`.
    """

    arch: str
    phases: tuple[Phase, ...]
    name: str = 'reference'
    weights: str = 'none'
    # Images.
    valid: str = 'patients'  # the specification's folder val is official
    valid_pct: float = 0.1  # proportion of the patients that valid='patients' takes for validation
    fold: int = 0  # which part of the patients that is, of 1 / valid_pct parts
    shift_pct: float = 0.0  # proportion of the patients, of the softest normal images, that is held out of training
    size: int = 224
    resize: str = 'squish'  # a key of `images.preprocessing.RESIZES`
    low_pass: float = 0.0  # standard deviation of the Gaussian filter that every image passes
    modality: str = ''  # codes of DICOM modalities that are accepted besides CR, DX and DR: RG or CT,MR
    batch_size: int = 32
    workers: int | None = 0  # None: chosen automatically
    limit: int | None = None
    seed: int = 42
    # Augmentation, of training images only.
    flip: float = 0.5  # probability
    degrees: float = 10.0
    translate: float = 0.1
    brightness: float = 0.2  # b: factors from 1 - b to 1 + b
    contrast: float = 0.2
    gamma: float = 0.0  # g: exponents from 1 / (1 + g) to 1 + g
    interpolation: str = 'nearest'  # or bilinear
    crop: float = 1.0  # minimum fraction of the area that a random crop keeps
    crop_aspect: float = 1.0  # maximum aspect ratio of a random crop, in either direction
    blur: float = 0.0  # maximum standard deviation of a random Gaussian filter
    resolution: float = 1.0  # minimum factor of a random reduction of the resolution
    jpeg: int = 0  # minimum quality of a random JPEG compression
    erase: float = 0.0  # probability that a rectangle of the batch is replaced by noise
    match_histogram: float = 0.0  # probability that the histogram of grey levels comes from another image
    match_detail: float = 0.0  # probability that an image has at most the detail of another one
    exchange: float = 0.0  # probability that what is around the lungs comes from another image
    hide_lungs: float = 0.0  # probability that the lungs are hidden, and the label is random
    mixup: float = 0.0  # alpha
    start_size: float = 1.0  # fraction of the size at which training starts; it grows to the full size
    # Optimisation.
    optimizer: str = 'adam'  # weight decay as L2; adamw: decoupled
    weight_decay: float = 1e-4
    schedule: str = 'plateau'  # or one-cycle
    plateau_factor: float = 0.1
    plateau_patience: int = 2
    patience: int = 0  # epochs without a better one after which a phase ends; 0: never
    body_lr: float = 1.0  # learning rate of the body, as a fraction of that of the head
    label_smoothing: float = 0.0
    class_weights: bool = False  # weight the classes equally
    clip: float = 0.0  # maximum norm of the gradient
    ema: float = 0.0  # decay of the exponential moving average of the weights, which is evaluated and saved
    threshold: float = 0.5
    allow_leakage: bool = False
    precision: str = 'fp32'  # or fp16, bf16
    on_bad_image: str = 'fail'  # or skip

    def __post_init__(self) -> None:
        values = [(name, getattr(self, name)) for name in RANGES]
        values += [('patience', self.patience_of(phase)) for phase in self.phases]
        for name, value in values:
            low, high = RANGES[name]
            if not low <= value <= high:
                raise UsageError(f'{name} {value}: a number from {low:g} to {high:g} is needed.')
        for name in CHOICES:
            value = getattr(self, name)
            if self.name != CUSTOM or value != UNKNOWN:
                check_choice(name, value)
        if self.max_patience and self.valid == 'none':
            raise UsageError(
                f'--patience {self.max_patience} and --valid none: without validation images no epoch is better than '
                'another. Set --patience 0, or choose another --valid.'
            )

    @property
    def epochs(self) -> int:
        """The total number of epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    def patience_of(self, phase: Phase) -> int:
        """Return the number of epochs without a better one after which `phase` ends; 0: it never ends early."""
        return self.patience if phase.patience is None else phase.patience

    @property
    def can_stop_early(self) -> bool:
        """Whether a phase can end before its last epoch."""
        return self.max_patience > 0

    @property
    def max_patience(self) -> int:
        """The largest patience of a phase; of a recipe without phases, its own."""
        return max(map(self.patience_of, self.phases), default=self.patience)

    def shortened_phases(self, trained: Sequence[str]) -> dict[str, int]:
        """Return the phases that ended before their last epoch: name to the number of epochs that were trained.

        `trained` has the phase of each epoch. Phases that were not started are left out.
        """
        epochs = {phase.name: trained.count(phase.name) for phase in self.phases}
        return {phase.name: epochs[phase.name] for phase in self.phases if 0 < epochs[phase.name] < phase.epochs}

    @property
    def extensions(self) -> int:
        """The number of phases by which a run of this recipe was trained longer."""
        return sum(phase.name.startswith(EXTENSION) for phase in self.phases)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Create a recipe from the dictionary that `dataclasses.asdict` returned for it."""
        phases = tuple(Phase(**phase) for phase in values['phases'])
        return cls(**{**values, 'phases': phases})


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
        'match_histogram': 0.25,
        'exchange': 0.5,
        'hide_lungs': 0.4,
        'start_size': 0.5,
        'optimizer': 'adamw',
        'weight_decay': 0.01,
        'schedule': 'one-cycle',
        'ema': 0.99,
    },
}
"""Name to the fields in which a recipe differs from the specification, for every architecture."""


def data_recipe(recipe: str | Recipe, **fields: Any) -> Recipe:
    """Return a recipe for `DataLoaders`: `recipe`, a recipe or the name of one, with other `fields`.

    By a name it has no architecture and no phases. Raises `UsageError` for an unknown name.
    """
    if isinstance(recipe, Recipe):
        return replace(recipe, **fields)
    if recipe not in RECIPES:
        raise UsageError(f'recipe {recipe} is unknown: choose {" or ".join(RECIPES)}.')
    settings: dict[str, Any] = RECIPES[recipe] | fields
    return Recipe(UNKNOWN, (), name=recipe, **settings)


RANGES = {
    'valid_pct': (0.01, 0.5),
    'fold': (0, 99),
    'shift_pct': (0, 0.5),
    'flip': (0, 1),
    'degrees': (0, 180),
    'translate': (0, 0.5),
    'brightness': (0, 1),
    'contrast': (0, 1),
    'gamma': (0, 3),
    'crop': (0.01, 1),
    'crop_aspect': (1, 4),
    'blur': (0, 0.1),
    'resolution': (0.05, 1),
    'jpeg': (0, 95),
    'erase': (0, 1),
    'match_histogram': (0, 1),
    'match_detail': (0, 1),
    'exchange': (0, 1),
    'hide_lungs': (0, 0.9),
    'mixup': (0, 10),
    'start_size': (0.1, 1),
    'weight_decay': (0, 10),
    'body_lr': (1e-6, 1),
    'plateau_factor': (0, 0.99),
    'plateau_patience': (0, 1000),
    'patience': (0, 1000),
    'label_smoothing': (0, 0.99),
    'clip': (0, math.inf),
    'ema': (0, 0.99999),
    'threshold': (0, 1),
}
"""Field to its minimum and maximum."""
CHOICES = {
    'interpolation': ('nearest', 'bilinear'),
    'optimizer': ('adam', 'adamw'),
    'valid': ('official', 'patients', 'none'),
    'schedule': ('plateau', 'one-cycle'),
    'precision': ('fp32', 'fp16', 'bf16'),
    'on_bad_image': ('fail', 'skip'),
}
"""Field to its permitted values."""
OTHER_NAMES = {
    'valid': {'val': 'official', 'valid': 'official', 'validation': 'official', 'patient': 'patients', 'no': 'none'},
    'precision': {'float32': 'fp32', 'float16': 'fp16', 'half': 'fp16', 'bfloat16': 'bf16'},
    'on_bad_image': {'ignore': 'skip', 'error': 'fail'},
}
"""Field to what users write in the place of a permitted value, and the value that is meant."""
SETTABLE = (
    *(name for name in RANGES if name not in ('threshold', 'patience')),
    'low_pass',
    'interpolation',
    'optimizer',
    'schedule',
    'class_weights',
)
"""Fields that have no option of their own and are set by `--set FIELD=VALUE`."""


def check_choice(name: str, value: str, *others: str) -> None:
    """Raise `UsageError` unless `value` is a permitted value of the field `name`, or one of the `others`."""
    choices = (*others, *CHOICES[name])
    if value not in choices:
        meant = OTHER_NAMES.get(name, {}).get(str(value).lower())
        advice = f' (did you mean {meant}?)' if meant else did_you_mean(str(value), choices)
        option = name if name in SETTABLE else option_name(name)
        raise UsageError(f'{option} {value}{advice}: choose {" or ".join(choices)}.')


AUGMENTATION_FIELDS = (
    'low_pass',
    'flip',
    'degrees',
    'translate',
    'brightness',
    'contrast',
    'gamma',
    'interpolation',
    'crop',
    'crop_aspect',
    'blur',
    'resolution',
    'jpeg',
    'erase',
    'match_histogram',
    'match_detail',
    'exchange',
    'hide_lungs',
)
"""Fields in which the named recipes prepare images differently."""
DATA_FIELDS = (
    'valid',
    'valid_pct',
    'fold',
    'shift_pct',
    'size',
    'resize',
    'modality',
    'batch_size',
    'workers',
    'limit',
    'seed',
    'allow_leakage',
    'on_bad_image',
    *AUGMENTATION_FIELDS,
)
"""Fields that `DataLoaders` follow; the others belong to the optimisation."""


FIELD_ADVICE = {
    'phases': 'use --epochs and --lr',
    'freeze_epochs': 'use --freeze-epochs',
    'name': 'use --recipe',
    'threshold': '`cxr-fastai evaluate` chooses it',
    'lr': 'use --lr',
    'learning_rate': 'use --lr',
    'epochs': 'use --epochs',
    'bs': 'use --batch-size',
}
"""What to do about names that neither `--set` nor an option of the same name sets; some are no fields."""


def parse_fields(texts: list[str]) -> dict[str, Any]:
    """Parse texts `FIELD=VALUE` into fields of a `Recipe`. Raises `UsageError` for unknown fields and wrong values."""
    return dict(_parse_field(text) for text in texts)


def _parse_field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition('=')
    types = {field.name: str(field.type) for field in fields(Recipe)}
    if name not in SETTABLE:
        raise UsageError(f'--set {text}: {_advise(name)}.')
    parse, description = PARSERS[types[name]]
    try:
        return name, parse(value.lower())
    except ValueError:
        raise UsageError(f'--set {text}: {name}={description} is needed.') from None


def _advise(name: str) -> str:
    """Say what to do about a field `name` that `--set` does not set."""
    if name in FIELD_ADVICE or name in {field.name for field in fields(Recipe)}:
        return f'not a field for --set: {FIELD_ADVICE.get(name) or "use " + option_name(name)}'
    matches = get_close_matches(name, SETTABLE) or sorted(SETTABLE)
    return f'no such field: choose {" or ".join(matches)}'


def _parse_bool(text: str) -> bool:
    if text not in ('true', 'false'):
        raise ValueError(text)
    return text == 'true'


PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    'float': (float, 'NUMBER'),
    'int': (int, 'WHOLE NUMBER'),
    'str': (str, 'WORD'),
    'bool': (_parse_bool, 'true or false'),
}
"""Type of a field to the function that parses its value and the words that describe it."""


def option_name(field: str) -> str:
    """Return the option of the command line that sets `field`."""
    return f'--{field.replace("_", "-")}'

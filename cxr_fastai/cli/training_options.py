"""The options of the commands `train` and `lr-find` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

Workers = Annotated[
    int | None,
    Option(
        '--workers',
        metavar='N',
        min=0,
        show_default='number of cores; 0 with a cache',
        help='Load images in this number of processes; 0 uses the main process.',
    ),
]
Arch = Annotated[
    str,
    Option(
        '--arch',
        metavar='NAME',
        help='Train this network: baseline, resnet50, efficientnet_lite0, or another that `archs` lists.',
    ),
]
RecipeName = Annotated[
    str,
    Option(
        '--recipe',
        metavar='reference|tuned|FILE',
        help='Train by this recipe: reference (the specification), tuned (the most robust), or a RUN/recipe.json.',
    ),
]
Fields = Annotated[
    list[str] | None,
    Option(
        '--set',
        metavar='FIELD=VALUE',
        show_default=False,
        help='Set a field of the recipe, for example ema=0. Repeat for more.',
    ),
]
Epochs = Annotated[
    int | None,
    Option(
        '--epochs',
        metavar='N',
        show_default='reference 15, tuned 6',
        help='Train for this number of epochs, over all phases. With --resume, add a phase for further epochs.',
    ),
]
FreezeEpochs = Annotated[
    int | None,
    Option(
        '--freeze-epochs',
        metavar='N',
        show_default='a third of the epochs',
        help='Train only the head in this number of the epochs, if the recipe starts with a frozen body.',
    ),
]
Patience = Annotated[
    int,
    Option(
        '--patience',
        metavar='N',
        help='End a phase after this number of epochs without a better one (highest validation AUC); 0: never. '
        'With --resume and --epochs it applies to the new phase only.',
    ),
]
LearningRate = Annotated[
    float | None,
    Option(
        '--lr',
        metavar='RATE',
        show_default='from the recipe',
        help='Set the learning rate of the first phase (later ones keep their ratio), or with --resume, of a new one.',
    ),
]
Weights = Annotated[
    str | None,
    Option(
        '--weights',
        metavar='imagenet|none|FILE',
        show_default='imagenet, if available',
        help='Start from these weights: imagenet, imagenet-v2, none, or the file of a state dict.',
    ),
]
Valid = Annotated[
    str,
    Option(
        '--valid',
        metavar='patients|official|none',
        help='Validate on patients (10% of them, from train and val), official (the folder val), or not at all (none).',
    ),
]
Leakage = Annotated[
    bool, Option('--allow-leakage', help='Train even if a patient is in two splits; the recipe records it.')
]
BadImage = Annotated[
    str, Option('--on-bad-image', metavar='fail|skip', help='At an unreadable image, fail, or skip it with a warning.')
]
Compile = Annotated[
    str, Option('--compile', metavar='on|off', help='Compile training steps with torch.compile: on or off.')
]
Track = Annotated[
    str | None,
    Option(
        '--track',
        metavar='tensorboard|wandb|mlflow',
        show_default=False,
        help='Also log the history to tensorboard, wandb or mlflow.',
    ),
]
NewRun = Annotated[
    Path | None,
    Option(
        '--out', metavar='RUN', show_default='runs/ARCH', help='Create this run folder; it must be empty or not exist.'
    ),
]
Folds = Annotated[
    int | None,
    Option(
        '--folds',
        metavar='K',
        min=2,
        max=100,
        show_default='one training',
        help='Train K networks, each validated on another one of K parts of the patients.',
    ),
]
Seeds = Annotated[
    int | None,
    Option(
        '--seeds',
        metavar='N',
        min=2,
        max=100,
        show_default='one training',
        help='Train N networks with the seeds --seed, --seed + 1, ...',
    ),
]
Resume = Annotated[
    Path | None,
    Option(
        '--resume',
        metavar='RUN',
        show_default='start a new run',
        help='Resume an interrupted run, or the runs of --folds or --seeds, with their own recipe and images. '
        'With --epochs, train a run longer, also a finished one.',
    ),
]
Steps = Annotated[int, Option('--steps', metavar='N', min=20, help='Train for at most this number of batches.')]
NewCurve = Annotated[
    Path, Option('--out', metavar='FILE', help='Write the plot to this PNG file, and the numbers to a CSV next to it.')
]

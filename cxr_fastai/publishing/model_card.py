"""The model card: what a run is, as facts for a page and as `model_card.md` in the format of the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from cxr_fastai.core.recipe import VOCAB, Recipe, command_line
from cxr_fastai.core.run import Run
from cxr_fastai.core.templates import fill
from cxr_fastai.evaluation.intervals import describe
from cxr_fastai.inference.config import sha256

NOT_A_DEVICE = 'Research software, not a medical device. It must not be used to diagnose anybody.'
OUTSIDE = (
    "A network of this kind that scored an AUC of .95 on the test images of the public set of children's images "
    "scored .54 on another hospital's children (Xin, Li, Yi 2021). What is measured on images of the hospital "
    'that a network was trained on does not tell how it does elsewhere.'
)
FIGURES = ('auc', 'average_precision', 'accuracy', 'sensitivity', 'specificity', 'f1')
"""What the card's index of results has."""
HUB = {'auc': 'roc_auc', 'sensitivity': 'recall', 'ppv': 'precision'}
"""Figures that the Hub calls otherwise."""
PACKAGES = ('cxr_fastai', 'fastai', 'torch', 'torchvision', 'python')
UNKNOWN = 'not recorded'


def describe_run(run: Run) -> dict[str, str]:
    """Facts about a run by name, in words; what an older run did not write down is `not recorded`."""
    recipe, begun, history, items = run.recipe, run.noted('start', 'resume'), run.history, run.used_items
    best = (run.noted('end').get('best') or {}).get('epoch', UNKNOWN)
    trained = items[items.split == 'train']
    parameters = begun.get('parameters')
    return {
        'Architecture': recipe.arch + (f', {parameters:,} parameters' if parameters else ''),
        'Classes': f'{VOCAB[0]} and {VOCAB[1]}, of which {VOCAB[1]} is the positive one',
        'First weights': begun.get('origin', recipe.weights if recipe.weights == 'none' else UNKNOWN),
        'What it sees': f'{recipe.size} x {recipe.size} px, resized by {recipe.resize}, grey in three channels, '
        f"normalised by ImageNet's mean and deviation{_low_pass(recipe)}; nothing but the image",
        'Recipe': f'{recipe.name}: {_phases(recipe)}; {recipe.optimizer}, batches of {recipe.batch_size}, schedule '
        f'{recipe.schedule}',
        'Augmentation': _augmentation(recipe),
        'Class imbalance': 'each class weighs the same in the loss'
        if recipe.class_weights
        else 'images are taken as they come, without resampling or weights',
        'Final model': f'one network, of epoch {best} of {recipe.epochs}: that of the best validation AUC'
        + (f'; a moving average of the weights (decay {recipe.ema:g})' if recipe.ema else ''),
        'Seed': str(recipe.seed),
        'Precision': recipe.precision,
        'Trained on': f'{len(trained):,} images of {trained.patient.nunique():,} patients',
        'SHA-256 of items.csv': sha256(run / 'items.csv'),
        'Hardware': f'{begun.get("hardware", UNKNOWN)}, device {begun.get("device", UNKNOWN)}',
        'Time': f'{history.seconds.sum() / 60:,.1f} minutes for {len(history)} epochs',
        'Versions': ', '.join(f'{name} {begun[name]}' for name in PACKAGES if name in begun) or UNKNOWN,
        'Date': str(begun.get('time', UNKNOWN))[:10],
    }


def render_card(run: Run, split: str) -> str:
    """`model_card.md`: the facts of `describe_run` and the metrics of `split`."""
    metrics = run.metrics[split]
    results = {name: metrics[name] for name in FIGURES if metrics[name]['value'] is not None}
    return fill(
        'model_card.md',
        hub=HUB,
        split=split,
        metrics=metrics,
        results=results,
        facts=describe_run(run),
        name=f'{run.recipe.arch}-{run.recipe.name}',
        not_a_device=NOT_A_DEVICE,
        outside=OUTSIDE,
        command=reproduce(run, split),
        say=describe,
        counts=count_kinds(run),
    )


def reproduce(run: Run, split: str) -> str:
    """The commands, a line each, that give the run and its report again."""
    metrics = run.metrics[split]
    columns = {group['column']: None for group in metrics['subgroups'] if group['column'] != 'kind'}
    options = [
        f'--split {split}',
        f'--threshold {metrics["threshold_rule"]}',
        *(f'--by {column}' for column in columns),
        *(f'--prevalence {100 * row["prevalence"]:g}' for row in metrics['prevalences']),
    ]
    return '\n'.join(
        [
            f'{command_line(run.recipe)} --out RUN',
            ' '.join(['cxr-fastai evaluate RUN', *options]),
            'cxr-fastai report RUN',
        ]
    )


def count_kinds(run: Run) -> list[dict[str, Any]]:
    """Images and patients that the run used, by split, label and kind."""
    groups = run.used_items.groupby(['split', 'label', 'kind'], sort=False)
    table = groups.agg(images=('path', 'size'), patients=('patient', 'nunique')).reset_index()
    return table.sort_values(
        ['split', 'label', 'kind'],
        key=lambda column: column.map({'train': 0, 'valid': 1, 'test': 2}) if column.name == 'split' else column,
    ).to_dict('records')


def _low_pass(recipe: Recipe) -> str:
    return f', blurred by {recipe.low_pass * recipe.size:.2g} px (standard deviation)' if recipe.low_pass else ''


def _phases(recipe: Recipe) -> str:
    return ', then '.join(f'{phase.epochs} epochs of {phase.name} at {phase.lr:g}' for phase in recipe.phases)


def _augmentation(recipe: Recipe) -> str:
    steps = {
        'flip': recipe.flip,
        'rotation': recipe.degrees,
        'translation': recipe.translate,
        'brightness': recipe.brightness,
        'contrast': recipe.contrast,
        'crops': 1 - recipe.crop,
        'blur': recipe.blur,
        'resolution': 1 - recipe.resolution,
        'JPEG': recipe.jpeg,
        'erasing': recipe.erase,
        'mixup': recipe.mixup,
    }
    return 'training images alone: ' + (', '.join(name for name, amount in steps.items() if amount) or 'none')

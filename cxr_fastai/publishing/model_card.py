"""The model card of a run, as a table of facts for the report and as `model_card.md` for the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import CUSTOM, SHIFT, SPLITS, VOCAB, Recipe
from cxr_fastai.core.recipe_fields import parse_recipe
from cxr_fastai.core.recipe_texts import command_line, describe_phases
from cxr_fastai.core.run import Run
from cxr_fastai.core.templates import render_template
from cxr_fastai.data.splits import count_patients, describe_patients, unknown_patients, unknown_patients_warning
from cxr_fastai.evaluation.calibration import explain_temperature
from cxr_fastai.evaluation.intervals import describe_suppressed, format_estimate
from cxr_fastai.evaluation.metrics import (
    describe_sample,
    interval_warnings,
    name_metric,
)
from cxr_fastai.evaluation.results import describe_limits, describe_views
from cxr_fastai.evaluation.thresholds import describe_deciding
from cxr_fastai.inference.config import sha256
from cxr_fastai.inference.decision import Decision

if TYPE_CHECKING:
    import pandas as pd

    from cxr_fastai.publishing.half import Parity

BY_IMPORTANCE = ('test', 'valid', SHIFT, 'train')
"""The splits in the order in which a report or a model card prefers them."""
NOT_A_DEVICE = 'Research software, not a medical device. It must not be used to diagnose anyone.'
EXTERNAL_VALIDITY = (
    'Performance on images of the hospital that a network was trained on does not predict its performance elsewhere. '
    'A similar network reached an AUC of 0.95 on the test images of the public pediatric data set, but 0.54 on '
    'children of another hospital (Xin, Li and Yi 2021).'
)
SAME_IMAGES = (
    'The same validation images selected the epoch, so the metrics on them, and the sensitivity that is expected from '
    'them, are somewhat optimistic.'
)
CARD_METRICS = ('auc', 'average_precision', 'accuracy', 'sensitivity', 'specificity', 'f1')
"""The metrics in the metadata of the card."""
HUB_NAMES = {'auc': 'roc_auc', 'sensitivity': 'recall', 'ppv': 'precision'}
"""Metrics that have another name on the Hub."""
SHOWN_PACKAGES = ('cxr_fastai', 'fastai', 'torch', 'torchvision', 'python')
UNKNOWN = 'not recorded'
COMBINATIONS = {
    'single': 'a single network, chosen among those of several runs',
    'soup': 'a single network with the mean weights of {number} networks that started from the same weights',
    'ensemble': 'an ensemble with the mean logits of {number} networks',
}
"""How `combine` made a network, in words."""
SHOWN_DIGITS = 12
"""Number of digits of the SHA-256 of a member that are shown."""


@dataclass(frozen=True)
class CardTexts:
    """The texts of a model card that do not follow from its run. `sections` are titles and texts in Markdown."""

    developers: str = 'to be written by a human'
    license: str = 'to be chosen by a human'
    intended_use: str = (
        'To be written by a human: the patients, the images, and how a radiologist stays responsible for the diagnosis.'
    )
    sections: tuple[tuple[str, str], ...] = ()


PLAIN = CardTexts()
"""The texts of a card that its reader has to complete."""


def main_split(run: Run) -> str:
    """Return the split that the report and the model card of an evaluated run are about."""
    return [split for split in BY_IMPORTANCE if split in run.metrics][0]


def describe_run(run: Run) -> dict[str, str]:
    """Return facts about a run by name, as text; facts that an older run did not record are `not recorded`."""
    recipe = run.recipe
    start = run.last_event('start', 'resume')
    history = run.history
    train_items = run.used_items[lambda items: items.split == 'train']
    versions = [f'{name} {start[name]}' for name in SHOWN_PACKAGES if name in start]
    return {
        'Architecture': _architecture(recipe, start.get('parameters')),
        'Classes': f'{VOCAB[0]} and {VOCAB[1]}; {VOCAB[1]} is the positive class',
        'Initial weights': start.get('origin', recipe.weights if recipe.weights == 'none' else UNKNOWN),
        'Input': _input(recipe),
        **(_custom_training(recipe, start) if recipe.name == CUSTOM else _recipe_training(run, start)),
        **_combination(run),
        'Trained on': f'{counted(len(train_items))} of {_describe_patients(train_items)}',
        'SHA-256 of items.csv': sha256(run / 'items.csv'),
        'Hardware': f'{start.get("hardware", UNKNOWN)}, device {start.get("device", UNKNOWN)}',
        'Training time': _training_time(history.seconds),
        'Versions': ', '.join(versions) or UNKNOWN,
        'Date': str(start.get('time', UNKNOWN))[:10],
    }


def _combination(run: Run) -> dict[str, str]:
    """Return the facts that a run of `combine` has instead of those of a training; none for other runs.

    The networks are named by their hashes, because the name of a run folder can be private.
    """
    combination = run.last_event('combine')
    if not combination:
        return {}
    members = combination['members']
    hashes = ', '.join(member['model'][:SHOWN_DIGITS] for member in members)
    made = COMBINATIONS.get(combination['how'], UNKNOWN).format(number=len(members))
    seeds = dict.fromkeys(str(recipe.seed) for recipe in _member_recipes(combination))
    return {'Final model': f'{made}; SHA-256 {hashes}', 'Seed': ', '.join(seeds)}


def _member_recipes(combination: dict[str, Any]) -> list[Recipe]:
    """Return the recipes of the members of a `combine` event of the journal."""
    return [parse_recipe(member['recipe']) for member in combination['members']]


def _describe_patients(items: pd.DataFrame) -> str:
    return describe_patients(count_patients(items), int(unknown_patients(items).sum()))


def _recipe_training(run: Run, start: dict[str, Any]) -> dict[str, str]:
    recipe = run.recipe
    return {
        'Recipe': (
            f'{recipe.name}: {describe_phases(recipe.phases)}; optimizer {recipe.optimizer}, '
            f'batch size {recipe.batch_size}, schedule {recipe.schedule}'
            + (f', patience {recipe.patience}' if recipe.patience else '')
        ),
        'Augmentation': _augmentation(recipe),
        'Class imbalance': 'weights in the loss, so that both classes count equally'
        if recipe.class_weights
        else 'no resampling and no class weights',
        'Final model': _final_model(recipe, run.kept_epoch or UNKNOWN, run.history.phase.tolist()),
        'Seed': UNKNOWN if start.get('saved_by_hand') else str(recipe.seed),
        'Precision': recipe.precision,
    }


def _custom_training(recipe: Recipe, start: dict[str, Any]) -> dict[str, str]:
    """Return the facts about a training by hand, as far as `save_run` recorded them."""
    optimizer, loss = start.get('optimizer', UNKNOWN), start.get('loss', UNKNOWN)
    transforms = start.get('batch_tfms', [])
    is_known = 'AugmentImages' in transforms
    return {
        'Recipe': (
            f'trained by hand: {describe_phases(recipe.phases) or "phases not recorded"}; optimizer {optimizer}, '
            f'batch size {recipe.batch_size}, loss {loss}, schedule not recorded'
        ),
        'Callbacks': ', '.join(start.get('callbacks', [])) or 'none',
        'Augmentation': _augmentation(recipe) if is_known else f'by {", ".join(transforms) or UNKNOWN}',
        'Final model': 'the network as it was saved',
        'Seed': UNKNOWN,
    }


def _training_time(seconds: pd.Series) -> str:
    if seconds.isna().any():
        return f'{UNKNOWN}; {counted(len(seconds), "epoch")}'
    return f'{seconds.sum() / 60:,.1f} minutes for {counted(len(seconds), "epoch")}'


def _architecture(recipe: Recipe, parameters: int | None) -> str:
    if parameters is None:
        return recipe.arch
    return f'{recipe.arch}, {parameters:,} parameters'


def _input(recipe: Recipe) -> str:
    text = (
        f'a grey image, resized to {recipe.size} x {recipe.size} pixels ({recipe.resize}), repeated in three channels '
        'and normalised with the ImageNet mean and standard deviation'
    )
    if recipe.low_pass:
        text += f', blurred by a Gaussian with a standard deviation of {recipe.low_pass * recipe.size:.2g} pixels'
    if recipe.modality:
        text += f'; DICOM images of the modalities {recipe.modality} are accepted besides CR, DX and DR'
    return text


def _augmentation(recipe: Recipe) -> str:
    amounts = {
        'flip': recipe.flip,
        'rotation': recipe.degrees,
        'translation': recipe.translate,
        'brightness': recipe.brightness,
        'contrast': recipe.contrast,
        'gamma': recipe.gamma,
        'crop': 1 - recipe.crop,
        'blur': recipe.blur,
        'resolution': 1 - recipe.resolution,
        'JPEG compression': recipe.jpeg,
        'erasing': recipe.erase,
        'mixup': recipe.mixup,
        'grey levels of another image': recipe.match_histogram,
        'detail of another image': recipe.match_detail,
        'surroundings of the lungs from another image': recipe.exchange,
        'lungs hidden with a random label': recipe.hide_lungs,
    }
    steps = [name for name, amount in amounts.items() if amount]
    return f'training images only: {", ".join(steps) or "none"}'


def _final_model(recipe: Recipe, epoch: int | str, trained: list[str]) -> str:
    """Describe the network that was kept: that of `epoch`. `trained` has the phase of each epoch."""
    text = f'a single network, from epoch {epoch} of {len(trained)} (highest validation AUC)'
    if recipe.valid == 'none':
        text = f'a single network, from the last of {counted(len(trained), "epoch")}'
    planned = {phase.name: phase.epochs for phase in recipe.phases}
    for name, epochs in recipe.shortened_phases(trained).items():
        text += f'; {name} stopped early, after {epochs} of its {planned[name]} epochs'
    if recipe.ema:
        text += f'; an exponential moving average of the weights with decay {recipe.ema:g}'
    return text


def render_card(run: Run, split: str, texts: CardTexts = PLAIN, parity: Parity | None = None) -> str:
    """Return the text of `model_card.md`: the facts of `describe_run`, the metrics of `split`, and the `texts`.

    `parity` is what storing the weights as float16 changed, if they are.
    """
    metrics = run.metrics[split]
    decision = Decision.from_metrics(run, metrics)
    results = {name: metrics[name] for name in CARD_METRICS if metrics[name]['value'] is not None}
    return render_template(
        'model_card.md',
        name=f'{run.recipe.arch}-{run.recipe.name}',
        split=split,
        metrics=metrics,
        results=results,
        hub_names=HUB_NAMES,
        name_metric=name_metric,
        format_estimate=format_estimate,
        facts=describe_run(run) | ({'Weights': _describe_half(parity)} if parity else {}),
        texts=texts,
        counts=count_kinds(run),
        sample=describe_sample(metrics),
        notes=[*interval_warnings(metrics), *explain_temperature(metrics['calibrated']['temperature'])],
        limits=describe_limits(split, metrics),
        views=describe_views(metrics),
        describe_deciding=describe_deciding,
        patients_warning=unknown_patients_warning(run.items),
        margin=decision.margin if decision else '',
        same_images=note_same_images(run),
        groups=describe_groups(metrics['subgroups']),
        command=reproduce(run, split),
        not_a_device=NOT_A_DEVICE,
        external_validity=EXTERNAL_VALIDITY,
    )


def _describe_half(parity: Parity) -> str:
    return (
        f'stored as float16, computed in float32. On the {counted(parity.images, f"{parity.split} image")}, no '
        f'decision changed, and a probability by at most {parity.largest_change:.1g}'
    )


def note_same_images(run: Run) -> str:
    """Return `SAME_IMAGES` if the validation images of `run` selected its epoch, else nothing."""
    is_selected = run.recipe.name != CUSTOM and not run.has_out_of_fold
    return SAME_IMAGES if is_selected else ''


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Return the number of subgroups by column in words, without their names, which can be those of patients."""
    parts = []
    for column in dict.fromkeys(group['column'] for group in groups):
        rows = [group for group in groups if group['column'] == column]
        counts = [describe_suppressed(group) for group in rows if group['group'] is None]
        n_shown = len(rows) - len(counts)
        if n_shown:
            counts.insert(0, f'{n_shown} {"group" if n_shown == 1 else "groups"}')
        parts.append(f'{column} ({", ".join(counts)})')
    return '; '.join(parts) or 'none'


def reproduce(run: Run, split: str) -> str:
    """Return the commands, one per line, that reproduce the run and its report."""
    metrics = run.metrics[split]
    options = [f'--split {split}', f'--threshold {metrics["threshold_rule"]}']
    if metrics.get('tta'):
        options.append('--tta')
    for column in dict.fromkeys(group['column'] for group in metrics['subgroups']):
        if column != 'kind':
            options.append(f'--by {column}')
    for row in metrics['prevalences']:
        options.append(f'--prevalence {100 * row["prevalence"]:g}%')
    folds = _training_of_folds(run, metrics)
    if folds:
        options.insert(0, '--out-of-fold FOLDS')
    commands = [
        *folds,
        *_trainings(run),
        f'cxr-fastai evaluate RUN {" ".join(options)}',
        'cxr-fastai report RUN',
    ]
    return '\n'.join(commands)


def _training_of_folds(run: Run, metrics: dict[str, Any]) -> list[str]:
    """Return the command that trained the folds whose out-of-fold predictions `run` was given, if it was."""
    if run.recipe.valid != 'none' or run.last_event('combine') or not metrics.get('out_of_fold'):
        return []
    recipe = replace(run.recipe, valid='patients')
    return [f'{command_line(recipe)} --folds {metrics["out_of_fold"]} --out FOLDS']


def _trainings(run: Run) -> list[str]:
    """Return the command that trained the run, or those that trained its members and combined them."""
    combination = run.last_event('combine')
    recipes = _member_recipes(combination) if combination else [run.recipe]
    if len(recipes) == 1:
        return [f'{command_line(recipes[0])} --out RUN']
    folders = [f'RUN-{number}' for number in range(1, len(recipes) + 1)]
    trainings = [f'{command_line(recipe)} --out {folder}' for recipe, folder in zip(recipes, folders, strict=True)]
    return [*trainings, f'cxr-fastai combine {" ".join(folders)} --how {combination["how"]} --out RUN']


def count_kinds(run: Run) -> list[dict[str, Any]]:
    """Return the number of images and patients that the run used, one dict per split, label and kind.

    `patients` is a text, which also gives the number of images of unknown patients.
    """
    groups = run.used_items.groupby(['split', 'label', 'kind'])
    rows = [
        {'split': split, 'label': label, 'kind': kind, 'images': len(items), 'patients': _count_in_words(items)}
        for (split, label, kind), items in groups
    ]
    return sorted(rows, key=lambda row: SPLITS.index(row['split']))


def _count_in_words(items: pd.DataFrame) -> str:
    patients = count_patients(items)
    n_unknown = int(unknown_patients(items).sum())
    if isinstance(patients, str):
        return patients
    return f'{patients:,} and {n_unknown:,} unknown' if n_unknown else f'{patients:,}'

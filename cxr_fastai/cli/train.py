"""The commands `cxr-fastai train` and `cxr-fastai lr-find`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli import training_options as how
from cxr_fastai.cli.output import choose_source, print_line, unused_path
from cxr_fastai.core.errors import CXRError, UsageError, did_you_mean
from cxr_fastai.core.files import check_writable, write_csv
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import RECIPES, Recipe, parse_fields
from cxr_fastai.core.run import Run, read_recipe
from cxr_fastai.core.series import FOLDS, Series, is_series

RECIPE_OPTIONS = (
    'arch',
    'epochs',
    'lr',
    'weights',
    'valid',
    'size',
    'resize',
    'modality',
    'batch_size',
    'workers',
    'limit',
    'seed',
    'allow_leakage',
    'on_bad_image',
    'freeze_epochs',
    'patience',
)
"""Options with the name and the value of an argument of `make_recipe`."""


def train(
    given: typer.Context,
    data: opt.Data = None,
    csv: opt.Csv = None,
    arch: how.Arch = 'baseline',
    recipe: how.RecipeName = 'reference',
    run: how.NewRun = None,
    epochs: how.Epochs = None,
    freeze_epochs: how.FreezeEpochs = None,
    patience: how.Patience = 0,
    lr: how.LearningRate = None,
    weights: how.Weights = None,
    valid: how.Valid = Recipe.valid,
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    modality: opt.Modality = '',
    batch_size: opt.BatchSize = 32,
    workers: how.Workers = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 42,
    allow_leakage: how.Leakage = False,
    on_bad_image: how.BadImage = 'fail',
    fields: how.Fields = None,
    folds: how.Folds = None,
    seeds: how.Seeds = None,
    precision: opt.Precision = 'auto',
    compile: how.Compile = 'off',
    track: how.Track = None,
    device: opt.Device = 'auto',
    resume: how.Resume = None,
) -> None:
    """Train a network and write its run folder: recipe, items, history, journal, state and model.

    With --recipe FILE, other options replace fields of the file. With --folds or --seeds, the folder contains
    several runs.

    Example: cxr-fastai train --arch efficientnet_lite0 --recipe tuned --out runs/lite
    """
    _refuse_arguments(given)
    source = choose_source(data, csv)
    if resume:
        _resume(given, resume, source, run)
        return
    from cxr_fastai.data.items import data_root

    root = data_root(source)
    new_recipe = _choose_recipe(given, recipe)
    is_given = _is_file(recipe) or 'precision' in parse_fields(fields or [])
    options: dict[str, Any] = {
        'compile': compile,
        'track': track,
        'device': _training_device(device),
        'precision': 'auto' if precision == 'auto' and not is_given else None,
    }
    if folds or seeds:
        _train_series(given, new_recipe, root, run, options)
        return
    from cxr_fastai.training.training import train

    folder = run or unused_path(Path('runs', new_recipe.arch))
    _print_next_step(train(new_recipe, root, folder, **options))


def _refuse_arguments(given: typer.Context) -> None:
    """Raise `UsageError` for a word that belongs to no option; it says which option was meant."""
    if not given.args:
        return
    word = given.args[0]
    option = _option_of(word)
    is_possible = option in given.params and option not in _typed_options(given)
    advice = f'Did you mean --{option} {quote(word)}?' if is_possible else 'Omit it, or write its option before it.'
    raise UsageError(f'{word}: `cxr-fastai {given.info_name}` has no arguments, only options. {advice}')


def _option_of(word: str) -> str | None:
    """Return the name of the option that `word` looks like a value of; None if it looks like none."""
    from cxr_fastai.data.find import TABLE_SUFFIXES

    path = Path(word)
    if (path / 'recipe.json').is_file() or is_series(path):
        return 'resume'
    if path.is_dir():
        return 'data'
    if path.suffix.lower() in TABLE_SUFFIXES:
        return 'csv'
    if word in RECIPES or _is_file(word):
        return 'recipe'
    if any(separator in word for separator in '/\\'):
        return 'data'
    if word.isdecimal():
        return 'epochs'
    return 'arch' if _is_like_arch(word) else None


def _is_like_arch(word: str) -> bool:
    from cxr_fastai.models.architectures import ARCHS, find_arch

    try:
        find_arch(word)
    except CXRError:
        return bool(did_you_mean(word, ARCHS))
    return True


def _train_series(given: typer.Context, recipe: Recipe, root: Path, out: Path | None, options: dict[str, Any]) -> None:
    from cxr_fastai.training.series import train_folds, train_seeds

    folds, seeds = given.params['folds'], given.params['seeds']
    if folds and seeds:
        raise UsageError(f'--folds {folds} and --seeds {seeds}: choose one of them.')
    if folds:
        typed = _typed_options(given)
        if typed.get('valid') in ('official', 'none'):
            raise UsageError(
                f'--folds {folds} and --valid {typed["valid"]}: folds are parts of the patients. Omit --valid.'
            )
        for field in parse_fields(typed.get('fields') or []):
            if field in ('fold', 'valid_pct'):
                raise UsageError(f'--folds {folds} and --set {field}: --folds sets it. Omit --set {field}.')
    folder = out or unused_path(Path('runs', f'{recipe.arch}-{"folds" if folds else "seeds"}'))
    if folds:
        _print_next_evaluation(train_folds(recipe, root, folder, folds, **options))
    else:
        _print_next_evaluation(train_seeds(recipe, root, folder, seeds, **options))


def _resume(given: typer.Context, folder: Path, source: Path | None, out: Path | None) -> None:
    """Continue the run in `folder` with its own settings, also beyond its end. Some options replace settings."""
    if out:
        raise UsageError(f'--out {out} and --resume {folder}: a resumed run keeps its folder. Omit --out.')
    recipe_name = given.params['recipe']
    if _is_file(recipe_name):
        raise UsageError(
            f'--recipe {recipe_name} and --resume {folder}: a resumed run keeps its recipe. Omit --recipe.'
        )
    if is_series(folder):
        _resume_series(given, folder, source)
        return
    for option in ('folds', 'seeds'):
        if given.params[option]:
            raise UsageError(f'--{option} and --resume {folder}: it is the folder of one training. Omit --{option}.')
    run = Run.open(folder)
    typed = _typed_options(given)
    recipe = _resumed_recipe(run, typed)
    from cxr_fastai.training.extending import is_finished

    if is_finished(run, recipe):
        _print_finished(run)
        return
    from cxr_fastai.data.items import data_root

    root = data_root(source or run.images)
    start = run.last_event('start', 'resume')
    compile = typed.get('compile', 'on' if start.get('compiled') else 'off')
    track = typed.get('track', start.get('track'))
    from cxr_fastai.training.training import train

    device = _training_device(given.params['device'])
    train(recipe, root, folder, resume=True, compile=compile, track=track, device=device)
    _print_next_step(run)


def _resumed_recipe(run: Run, typed: dict[str, Any]) -> Recipe:
    """Return the recipe of `run` with the options that were `typed`, and a further phase for more --epochs."""
    from cxr_fastai.models.architectures import revise_recipe

    if 'epochs' not in typed:
        patience = typed.pop('patience', None)
        recipe = revise_recipe(run.recipe, **_recipe_arguments(typed))
        if patience not in (None, recipe.patience_of(recipe.phases[-1])):
            raise UsageError(
                f'--patience {patience} and --resume {run.path}: a run keeps the patience that it was started with. '
                'Add --epochs to train further epochs with another one, or omit --patience.'
            )
        return recipe
    from cxr_fastai.training.extending import extend_recipe

    of_phase = {name: typed.pop(name, None) for name in ('epochs', 'lr', 'patience')}
    return revise_recipe(extend_recipe(run, **of_phase), **_recipe_arguments(typed))


def _print_finished(run: Run) -> None:
    from cxr_fastai.inference.file_kinds import STATE

    epochs = run.last_event('end').get('epochs') or run.recipe.epochs
    text = f'{run.path}: trained for {counted(epochs, "epoch")} already, so nothing is left to do.'
    if (run / STATE).is_file():  # a combined run has none
        text += f' Train longer: cxr-fastai train --resume {quote(str(run.path))} --epochs {2 * epochs}'
    print_line(text)


def _resume_series(given: typer.Context, folder: Path, source: Path | None) -> None:
    from cxr_fastai.data.items import data_root
    from cxr_fastai.training.series import resume_series

    _refuse_typed(given, f'--resume {folder}', 'its trainings keep their settings', {'resume', 'data', 'csv', 'device'})
    first = Run(Series.open(folder).folder_of_first)
    started = first.images if (first / 'recipe.json').is_file() else None
    device = _training_device(given.params['device'])
    _print_next_evaluation(resume_series(folder, data_root(source or started), device))


def _refuse_typed(given: typer.Context, where: str, reason: str, allowed: set[str]) -> None:
    """Raise `UsageError` for options on the command line that are not among those `allowed`."""
    refused = _typed_options(given).keys() - allowed
    names = [option.opts[0] for option in given.command.params if option.name in refused]
    if names:
        raise UsageError(f'{", ".join(names)} and {where}: {reason}. Omit {", ".join(names)}.')


def _training_device(name: str) -> str | None:
    """Return the device of a training, or None for `auto`, where each of several processes chooses its own."""
    if name == 'auto':
        return None
    from cxr_fastai.models.devices import choose_device

    return str(choose_device(name))


def _choose_recipe(given: typer.Context, recipe: str) -> Recipe:
    """Return the recipe that `--recipe` names, or that in the file, with the other options of the command line."""
    from cxr_fastai.models.architectures import check_recipe, make_recipe, revise_recipe

    if not _is_file(recipe):
        return make_recipe(**_recipe_arguments(given.params))
    typed = _typed_options(given)
    typed.pop('recipe')
    revised = revise_recipe(read_recipe(Path(recipe)), **_recipe_arguments(typed))
    check_recipe(revised)
    return revised


def _is_file(recipe: str) -> bool:
    """Return True if the value of `--recipe` is a file and not a name."""
    return recipe.endswith('.json')


def _typed_options(given: typer.Context) -> dict[str, Any]:
    """Return the options that are on the command line, without those that have their default value."""
    typed = {}
    for name, value in given.params.items():
        source = given.get_parameter_source(name)
        if source is not None and source.name == 'COMMANDLINE':
            typed[name] = value
    return typed


def _print_next_evaluation(series: Series) -> None:
    split = '' if series.kind == FOLDS else ' --split valid'
    print_line(f'{series.path}: {series.number} runs trained. Next: cxr-fastai evaluate {series.path}{split}')


def _print_next_step(run: Run) -> None:
    print_line(f'{run.path}: trained. Next: {run.first_evaluation()}')


def lr_find(
    given: typer.Context,
    data: opt.Data = None,
    csv: opt.Csv = None,
    arch: how.Arch = 'baseline',
    recipe: how.RecipeName = 'reference',
    weights: how.Weights = None,
    valid: how.Valid = Recipe.valid,
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    modality: opt.Modality = '',
    batch_size: opt.BatchSize = 32,
    workers: how.Workers = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 42,
    fields: how.Fields = None,
    steps: how.Steps = 100,
    curve: how.NewCurve = Path('lr_find.png'),
    device: opt.Device = 'auto',
) -> None:
    """Suggest a learning rate for the first phase of a recipe, and plot the loss against the learning rate.

    Example: cxr-fastai lr-find --arch baseline --recipe tuned --out lr_find.png
    """
    _refuse_arguments(given)
    _check_curve(curve)
    from cxr_fastai.data.items import data_root

    root = data_root(choose_source(data, csv))
    new_recipe = _choose_recipe(given, recipe)
    from cxr_fastai.core.figures import save_figure
    from cxr_fastai.evaluation.plots import plot_rates
    from cxr_fastai.training.lr_finder import find_rates

    rates = find_rates(new_recipe, root, steps, _training_device(device))
    title = f'{new_recipe.arch}, recipe {new_recipe.name}, {new_recipe.size} px'
    save_figure(plot_rates(rates, title), curve)
    write_csv(curve.with_suffix('.csv'), rates.curve)
    print_line(f'Suggested: --lr {rates.suggestion:.1e}. The recipe has {new_recipe.phases[0].lr:.1e}. Curve: {curve}')


def _check_curve(path: Path) -> None:
    """Raise `UsageError` unless the figure `path` and the CSV file next to it can be created."""
    if path.suffix != '.png':
        raise UsageError(f'--out {path}: the file name must end with .png.')
    if not path.parent.is_dir():
        raise UsageError(f'--out {path}: the folder {path.parent} does not exist.')
    for file in (path, path.with_suffix('.csv')):
        if file.exists():
            raise UsageError(f'{file} already exists and was not overwritten. Choose another --out.')
    check_writable(path.parent)


def _recipe_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_recipe` for the `options` of a command."""
    arguments = {name: options[name] for name in RECIPE_OPTIONS if name in options}
    if 'recipe' in options:
        arguments['name'] = options['recipe']
    if options.get('precision', 'auto') != 'auto':  # which `train` replaces by what it measures
        arguments['precision'] = options['precision']
    return arguments | parse_fields(options.get('fields') or [])

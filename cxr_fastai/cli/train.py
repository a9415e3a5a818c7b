"""The commands `cxr-fastai train` and `lr-find`: options become a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, print_line, unused_path
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import write_csv
from cxr_fastai.core.run import Run


def train(
    given: typer.Context,
    data: opt.Data = None,
    csv: opt.Csv = None,
    arch: opt.Arch = 'baseline',
    recipe: opt.RecipeName = 'reference',
    run: opt.NewRun = None,
    epochs: opt.Epochs = None,
    lr: opt.LearningRate = None,
    weights: opt.Weights = None,
    valid: opt.Valid = 'official',
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 42,
    allow_leakage: opt.Leakage = False,
    on_bad_image: opt.BadImage = 'fail',
    fields: opt.Fields = None,
    precision: opt.Precision = 'auto',
    compile: opt.Compile = 'auto',
    track: opt.Track = None,
    resume: opt.Resume = None,
) -> None:
    """Train a network and write its run folder: recipe, items, history, journal, state and learner.pkl.

    Example: cxr-fastai train --arch efficientnet_lite0 --recipe tuned --valid patients --out runs/lite
    """
    if resume:
        return _resume(given, resume, choose_source(data, csv), run)
    from cxr_fastai.data.items import data_root

    root = data_root(choose_source(data, csv))
    from cxr_fastai.models.architectures import make_recipe

    chosen = make_recipe(**_recipe_options(given.params))
    from cxr_fastai.training.training import train

    made = train(chosen, root, run or unused_path(Path('runs', arch)), compile=compile, track=track)
    print_line(f'{made.path}: trained. Next: cxr-fastai evaluate {made.path}')


def lr_find(
    given: typer.Context,
    data: opt.Data = None,
    csv: opt.Csv = None,
    arch: opt.Arch = 'baseline',
    recipe: opt.RecipeName = 'reference',
    weights: opt.Weights = None,
    valid: opt.Valid = 'official',
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 42,
    fields: opt.Fields = None,
    steps: opt.Steps = 100,
    curve: opt.NewCurve = Path('lr_find.png'),
) -> None:
    """Suggest a learning rate for the first phase of a recipe, and draw the loss against it.

    Example: cxr-fastai lr-find --arch baseline --recipe tuned --out lr_find.png
    """
    _check_curve(curve)
    from cxr_fastai.data.items import data_root

    root = data_root(choose_source(data, csv))
    from cxr_fastai.models.architectures import make_recipe

    chosen = make_recipe(**_recipe_options(given.params))
    from cxr_fastai.core.figures import save_figure
    from cxr_fastai.evaluation.plots import plot_rates
    from cxr_fastai.training.lr_finder import find_rates

    rates = find_rates(chosen, root, steps)
    save_figure(plot_rates(rates, f'{arch}, recipe {recipe}, {size} px'), curve)
    write_csv(curve.with_suffix('.csv'), rates.curve)
    print_line(
        f'--lr {rates.suggestion:.1e} is suggested; the recipe has {chosen.phases[0].lr:.1e}. The curve is in {curve}'
    )


def _resume(given: typer.Context, folder: Path, data: Path | None, run: Path | None) -> None:
    if run:
        raise UsageError(f'--out {run} and --resume {folder}: the run goes on in its own folder.')
    known = Run.open(folder)
    from cxr_fastai.data.items import data_root

    root = data_root(data or known.images)
    from cxr_fastai.models.architectures import revise_recipe

    typed = {
        name: value for name, value in given.params.items() if given.get_parameter_source(name).name == 'COMMANDLINE'
    }
    begun = known.last_event('start', 'resume')
    engine = {'compile': 'on' if begun.get('compiled') else 'off', 'track': begun.get('track')}
    engine |= {name: typed[name] for name in engine.keys() & typed.keys()}
    from cxr_fastai.training.training import train

    train(revise_recipe(known.recipe, **_recipe_options(typed)), root, folder, resume=True, **engine)
    print_line(f'{folder}: trained. Next: cxr-fastai evaluate {folder}')


def _check_curve(path: Path) -> None:
    if path.suffix != '.png':
        raise UsageError(f'--out {path}: a name that ends in .png is needed.')
    if not path.parent.is_dir():
        raise UsageError(f'--out {path}: the folder {path.parent} does not exist.')
    for file in (path, path.with_suffix('.csv')):
        if file.exists():
            raise UsageError(f'{file} exists already and was left alone: choose another --out.')


def _recipe_options(params: dict[str, Any]) -> dict[str, Any]:
    """What `make_recipe` takes of the options `params`."""
    from cxr_fastai.core.recipe import parse_fields

    others = ('data', 'csv', 'run', 'resume', 'recipe', 'fields', 'steps', 'curve', 'compile', 'track')
    options = {name: value for name, value in params.items() if name not in others}
    if 'precision' in params:
        from cxr_fastai.training.hardware import choose_precision

        options['precision'] = choose_precision(params['precision'])
    if 'recipe' in params:
        options['name'] = params['recipe']
    return options | parse_fields(params.get('fields') or [])

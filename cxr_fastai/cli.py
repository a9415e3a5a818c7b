"""The command `cxr-fastai`: parse, call one function of the library, print, exit code.

Stages are imported inside the commands, so that `--help` loads neither torch nor pandas.
"""
from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from cxr_fastai.core import CXRError, CXRWarning, UsageError, check_new, write_csv
from cxr_fastai.run import Run

if TYPE_CHECKING:
    import pandas as pd

out, err = Console(), Console(stderr=True)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help='Get and look after films.')
app.add_typer(data_app, name='data')

# One name and one meaning for each option, in every command that has it.
Data = Annotated[Path | None, Option('--data', metavar='DIR', show_default='CXR_DATA, else data/chest_xray', help=(
    'Folder of films (train|val|test / NORMAL|PNEUMONIA), or a CSV of them.'))]
Arch = Annotated[str, Option('--arch', help='Network: baseline or resnet50.')]
RecipeName = Annotated[str, Option('--recipe', help='How to train: reference is the specification.')]
NewRun = Annotated[Path | None, Option('--out', metavar='RUN', show_default='runs/ARCH, or the next free', help=(
    'Run folder to make; it must not hold anything.'))]
NewFolder = Annotated[Path | None, Option('--out', metavar='DIR', show_default='demo, or the next free', help=(
    'Folder to make; it must not hold anything.'))]
NewTable = Annotated[Path | None, Option('--out', metavar='FILE', show_default='print only', help=(
    'CSV to write; it must not exist.'))]
Epochs = Annotated[int, Option('--epochs', metavar='N', help='Epochs in all, over the phases.')]
LearningRate = Annotated[float | None, Option('--lr', show_default='1e-3', help=(
    "The first phase's learning rate; later phases keep their ratio to it."))]
Weights = Annotated[str | None, Option('--weights', show_default='imagenet for resnet50, none for baseline', help=(
    'What to start from: imagenet, imagenet-v2, none, or the file of a state dict.'))]
Valid = Annotated[str, Option('--valid', help='official: the val folder. patients: a tenth of the patients.')]
Split = Annotated[str, Option('--split', help='Split to measure: train, valid or test.')]
Size = Annotated[int, Option('--size', metavar='PX', min=48, max=2048, help=(
    'Side of the film the network sees, in pixels.'))]
FilmSize = Annotated[int, Option('--size', metavar='PX', min=64, max=4096, help='Side of a film, in pixels.')]
Films = Annotated[int, Option('--films', metavar='N', help='Synthetic films in all.')]
BatchSize = Annotated[int, Option('--batch-size', metavar='N', min=1, help='Films in a batch.')]
Workers = Annotated[int, Option('--workers', metavar='N', min=0, help=(
    'Processes that read films; 0 reads them in this one.'))]
Limit = Annotated[int | None, Option('--limit', metavar='N', min=1, show_default='all', help=(
    'Only the first N films of each class and split, for trials.'))]
Seed = Annotated[int, Option('--seed', metavar='N', min=0, help='Seed of everything random.')]
RunFolder = Annotated[Path, Argument(metavar='RUN', help='Folder that `train` made.')]


@app.callback(invoke_without_command=True)
def show_version(show: Annotated[bool, Option('--version', help='Print the version and exit.')] = False) -> None:
    """From a folder of chest X-ray films to a trained, measured and exported classifier.

    Research software, not a medical device.
    """
    from cxr_fastai import __version__
    if show:
        out.print(f'cxr_fastai {__version__}', highlight=False)
        raise typer.Exit


@data_app.command('demo')
def data_demo(folder: Annotated[Path, Argument(metavar='DIR', help='Folder to make; it must not hold anything.')],
              films: Films = 480, size: FilmSize = 256, seed: Seed = 0) -> None:
    """Write synthetic chest films, with masks of their opacities, in the real data set's layout.

    Example: cxr-fastai data demo films --films 200
    """
    from cxr_fastai.demo import make_demo
    counts = make_demo(folder, films, size, seed, out).groupby(['split', 'label'], sort=False).size()
    _say(f'{folder}: {films} films, and masks of the opacities in {folder/"masks"}')
    out.print(counts.unstack().to_string())


@app.command()
def train(data: Data = None, arch: Arch = 'baseline', recipe: RecipeName = 'reference', run: NewRun = None,
          epochs: Epochs = 15, lr: LearningRate = None, weights: Weights = None, valid: Valid = 'official',
          size: Size = 224, batch_size: BatchSize = 32, workers: Workers = 0, limit: Limit = None,
          seed: Seed = 42) -> None:
    """Train a network and write its run folder: recipe, items, history, journal and learner.pkl.

    Example: cxr-fastai train --arch resnet50 --valid patients --out runs/resnet50
    """
    from cxr_fastai.items import data_root
    root = data_root(data)
    from cxr_fastai.models import make_recipe
    chosen = make_recipe(arch, recipe, epochs, lr, weights, valid=valid, size=size, batch_size=batch_size,
                         workers=workers, limit=limit, seed=seed)
    from cxr_fastai.training import train
    made = train(chosen, root, run or _free(Path('runs', arch)), out)
    _say(f'{made.path}: trained. Next: cxr-fastai evaluate {made.path}')


@app.command()
def evaluate(run: RunFolder, data: Data = None, split: Split = 'test', batch_size: BatchSize = 32,
             limit: Limit = None) -> None:
    """Measure a run on a split: predictions.csv, metrics.json and figures in its folder.

    Without --data the films are looked for where the run was trained. Example: cxr-fastai evaluate runs/resnet50
    """
    folder = Run.open(run)
    from cxr_fastai.evaluation import evaluate
    metrics = evaluate(folder, data, split, batch_size, limit, out)
    from cxr_fastai.interpret import save_figures
    figures = save_figures(folder, split)
    out.print(f'{run}, {split} split: {metrics["n"]} films, {metrics["positives"]} of them pneumonia, threshold '
              f'{metrics["threshold"]:g}', soft_wrap=True, markup=False, highlight=False)
    out.print(_metrics_table(metrics))
    _say(f'in {run}: predictions.csv, metrics.json, {", ".join(figures)}')


@app.command()
def predict(model: Annotated[Path, Argument(metavar='MODEL', help='Run folder, or an exported .pkl.')],
            films: Annotated[list[Path], Argument(metavar='FILM|DIR...', help='Films, or folders of films.')],
            table: NewTable = None, batch_size: BatchSize = 32) -> None:
    """Give each film the probability of pneumonia; a film that cannot be read gets a row with its error.

    Example: cxr-fastai predict runs/resnet50 film.jpeg more_films/ --out predictions.csv
    """
    if table and table.exists(): raise UsageError(f'{table} exists already and was left alone: choose another --out.')
    if table and not table.parent.is_dir(): raise UsageError(f'{table}: the folder {table.parent} does not exist.')
    from cxr_fastai.inference import Predictor, list_films, prediction_table
    paths = list_films(films)
    rows = prediction_table(Predictor.load(model).predict(paths, batch_size, out))
    if table: write_csv(table, rows)
    _print_predictions(rows, table)
    if (rows.status != 'ok').any(): raise typer.Exit(3)


@app.command()
def demo(folder: NewFolder = None, films: Films = 800, size: Size = 128, epochs: Epochs = 12,
         seed: Seed = 0) -> None:
    """The whole way on synthetic films: data, train (baseline), evaluate, predict. About two minutes on two cores.

    Example: cxr-fastai demo --out demo
    """
    folder = folder or _free(Path('demo'))
    check_new(folder)
    out.rule('1 of 4: data demo', align='left')
    data_demo(folder/'films', films, max(96, size*3//2), seed)
    out.rule('2 of 4: train', align='left')
    train(folder/'films', run=folder/'run', epochs=epochs, size=size, seed=seed)
    out.rule('3 of 4: evaluate', align='left')
    evaluate(folder/'run')
    out.rule('4 of 4: predict', align='left')
    predict(folder/'run', [folder/'films'/'test'], folder/'predictions.csv')
    _say(f'films in {folder/"films"}, run in {folder/"run"}, predictions in {folder/"predictions.csv"}')


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    with warnings.catch_warnings():
        # Other packages' warnings are for their developers; ours are for the user, one line each.
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', CXRWarning)
        warnings.showwarning = _show_warning
        try: app(argv)
        except SystemExit as end: return int(end.code or 0)
        except CXRError as error:
            _print_line(f'error: {_last_line(error)}')
            return error.exit_code
        except OSError as error:  # what the system refuses is no bug of ours
            _print_line(f'error: {error.filename or "system"}: {error.strerror or error}')
            return 1
    return 0


def run() -> None:
    """The console script: `main`, as the process's exit code."""
    sys.exit(main())


def _say(text: str) -> None: out.print(text, soft_wrap=True, markup=False)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None: _print_line(f'warning: {message}')


def _print_line(text: str) -> None: err.print(text, soft_wrap=True, markup=False, highlight=False)


def _last_line(error: CXRError) -> str:
    """An error's message; a worker process hands it over as the last line of its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f'{type(error).__module__}.{type(error).__name__}: ')


def _free(path: Path) -> Path:
    """`path`, or the first free of path-2, path-3 and so on."""
    tries = (path.with_name(f'{path.name}-{i}') for i in range(2, sys.maxsize))
    return path if not path.exists() else next(p for p in tries if not p.exists())


def _metrics_table(metrics: dict) -> Table:
    from cxr_fastai.evaluation import TARGETS
    table = Table(caption_justify='left')
    for name in ('', 'value', '95 % interval', 'target'): table.add_column(name, justify='right' if name else 'left')
    for name in ('auc', 'sensitivity', 'specificity', 'accuracy', 'ppv', 'npv', 'f1'):
        table.add_row(name.upper() if name in ('auc', 'ppv', 'npv', 'f1') else name,
                      *_cells(metrics[name], TARGETS.get(name)))
    c = metrics['confusion']
    table.caption = (f'{c["tp"]} true positives, {c["fn"]} false negatives\n'
                     f'{c["tn"]} true negatives, {c["fp"]} false positives')
    return table


def _cells(estimate: dict, target: float | None) -> tuple[str, str, str]:
    value, low, high = estimate['value'], estimate['low'], estimate['high']
    if value is None: return 'undefined', '', ''
    met = '' if target is None else f'>= {target:.0%} ' + ('[green]met[/]' if value >= target else '[red]missed[/]')
    return f'{value:.3f}', '' if low is None else f'{low:.3f} to {high:.3f}', met


def _print_predictions(rows: pd.DataFrame, saved: Path | None, most: int = 20) -> None:
    table = Table(caption=f'the first {most} of {len(rows)}' if len(rows) > most else None)
    for name in ('film', 'p(pneumonia)', 'prediction'): table.add_column(name, overflow='fold')
    for row in rows.head(most).itertuples():
        judged = (f'{row.p_pneumonia:.4f}', row.prediction) if row.status == 'ok' else ('', row.code)
        table.add_row(escape(row.path), *judged)
    out.print(table)
    for row in rows[rows.status != 'ok'].itertuples(): _print_line(f'error: {row.message}')
    called, failed = (rows.prediction == 'PNEUMONIA').sum(), (rows.status != 'ok').sum()
    where = f'; rows in {saved}' if saved else ''
    _say(f'{len(rows)} films, {called} called PNEUMONIA, {failed} failed{where}')

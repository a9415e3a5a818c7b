"""The command `cxr-fastai`: parse, call one function of the library, print, exit code.

Stages are imported inside the commands, so that `--help` loads neither torch nor pandas.
"""
from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from cxr_fastai import options as opt
from cxr_fastai.core import CXRError, CXRWarning, UsageError, check_new, leads, write_csv
from cxr_fastai.run import Run

out, err = Console(quiet=not leads()), Console(stderr=True)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help='Get and look after films.')
app.add_typer(data_app, name='data')


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
              films: opt.Films = 480, size: opt.FilmSize = 256, seed: opt.Seed = 0) -> None:
    """Write synthetic chest films, with masks of their opacities, in the real data set's layout.

    Example: cxr-fastai data demo films --films 200
    """
    from cxr_fastai.demo import make_demo
    counts = make_demo(folder, films, size, seed, out).groupby(['split', 'label'], sort=False).size()
    _say(f'{folder}: {films} films, and masks of the opacities in {folder/"masks"}')
    out.print(counts.unstack().to_string())


@data_app.command('download')
def data_download(folder: Annotated[Path, Argument(metavar='DIR', help='Folder to make; it must not hold anything.')],
                  source: opt.Origin = 'mendeley') -> None:
    """Fetch the 5,856 real films in the layout of the Kaggle set; run it again to go on after a cut.

    Example: cxr-fastai data download data/chest_xray --source mendeley
    """
    from cxr_fastai.items import describe_items
    from cxr_fastai.sources import SOURCES, download
    items = download(folder, source, out)
    _say(f'{folder}: {describe_items(items)}. {SOURCES[source].licence}, {SOURCES[source].page}')


@data_app.command('prepare')
def data_prepare(folder: opt.FilmFolder = None, csv: opt.Csv = None, size: opt.Size = 224,
                 resize: opt.Resize = 'squish', workers: opt.Threads = None) -> None:
    """Decode every film once; `train` then takes them from there by itself. Run it again after a stop or a change.

    Example: cxr-fastai data prepare data/chest_xray --size 224
    """
    from cxr_fastai.cache import prepare
    from cxr_fastai.images import Preprocessing
    from cxr_fastai.items import data_root, film_root, read_items
    root = data_root(_one_of(folder, csv))
    items = read_items(root)
    place, added, bad = prepare(items.path, film_root(root), Preprocessing(size, resize), workers, out)
    for error in bad: _print_line(f'error: {error}')
    _say(f'{place}: {len(items) - len(bad):,} films, {added:,} of them added now')
    if bad: raise typer.Exit(3)


@data_app.command('audit')
def data_audit(folder: opt.FilmFolder = None, csv: opt.Csv = None, report: opt.AuditFolder = Path('audit'),
               workers: opt.Threads = None) -> None:
    """Tell what is wrong with a set of films before a network learns it; exit code 1 where a finding is an error.

    Example: cxr-fastai data audit data/chest_xray --out audit
    """
    from cxr_fastai.audit import audit, save_audit
    from cxr_fastai.display import audit_tables
    from cxr_fastai.items import data_root
    found = audit(data_root(_one_of(folder, csv)), workers, out)
    save_audit(found, report)
    out.print(audit_tables(found))
    _say(f'{report}: audit.json and audit.html')
    if any(finding.level == 'error' for finding in found.findings): raise typer.Exit(1)


@app.command()
def train(given: typer.Context, data: opt.Data = None, csv: opt.Csv = None, arch: opt.Arch = 'baseline',
          recipe: opt.RecipeName = 'reference', run: opt.NewRun = None, epochs: opt.Epochs = None,
          lr: opt.LearningRate = None, weights: opt.Weights = None, valid: opt.Valid = 'official',
          size: opt.Size = 224, resize: opt.Resize = 'squish', batch_size: opt.BatchSize = 32,
          workers: opt.Workers = None, limit: opt.Limit = None, seed: opt.Seed = 42,
          allow_leakage: opt.Leakage = False, on_bad_film: opt.BadFilm = 'fail', fields: opt.Fields = None,
          precision: opt.Precision = 'auto', compile: opt.Compile = 'auto', track: opt.Track = None,
          resume: opt.Resume = None) -> None:
    """Train a network and write its run folder: recipe, items, history, journal, state and learner.pkl.

    Example: cxr-fastai train --arch efficientnet_lite0 --recipe tuned --valid patients --out runs/lite
    """
    engine = {'compile': compile, 'track': track}
    if resume: return _resume(given, resume, _one_of(data, csv), run, engine)
    from cxr_fastai.items import data_root
    root = data_root(_one_of(data, csv))
    from cxr_fastai.models import make_recipe
    chosen = make_recipe(**_recipe_options(given.params))
    from cxr_fastai.training import train
    made = train(chosen, root, run or _free(Path('runs', arch)), out, **engine)
    _say(f'{made.path}: trained. Next: cxr-fastai evaluate {made.path}')


@app.command('lr-find')
def lr_find(given: typer.Context, data: opt.Data = None, csv: opt.Csv = None, arch: opt.Arch = 'baseline',
            recipe: opt.RecipeName = 'reference', weights: opt.Weights = None, valid: opt.Valid = 'official',
            size: opt.Size = 224, resize: opt.Resize = 'squish', batch_size: opt.BatchSize = 32,
            workers: opt.Workers = None, limit: opt.Limit = None, seed: opt.Seed = 42, fields: opt.Fields = None,
            steps: opt.Steps = 100, curve: opt.NewCurve = Path('lr_find.png')) -> None:
    """Suggest a learning rate for the first phase of a recipe, and draw the loss against it.

    Example: cxr-fastai lr-find --arch baseline --recipe tuned --out lr_find.png
    """
    from cxr_fastai.items import data_root
    root = data_root(_one_of(data, csv))
    from cxr_fastai.models import make_recipe
    chosen = make_recipe(**_recipe_options(given.params))
    from cxr_fastai.interpret import plot_rates, save_figure
    from cxr_fastai.rates import find_rates
    rates = find_rates(chosen, root, steps)
    save_figure(plot_rates(rates, f'{arch}, recipe {recipe}, {size} px'), curve)
    write_csv(curve.with_suffix('.csv'), rates.curve)
    _say(f'--lr {rates.suggestion:.1e} is suggested; the recipe has {chosen.phases[0].lr:.1e}. The curve is in {curve}')


def _resume(given: typer.Context, folder: Path, data: Path | None, run: Path | None,
            engine: dict[str, Any]) -> None:
    if run: raise UsageError(f'--out {run} and --resume {folder}: the run goes on in its own folder.')
    known = Run.open(folder)
    from cxr_fastai.items import data_root
    trained_on = known.noted('start').get('data')
    root = data_root(data or (Path(trained_on) if trained_on else None))
    from cxr_fastai.models import revise_recipe
    typed = {name: value for name, value in given.params.items()
             if given.get_parameter_source(name).name == 'COMMANDLINE'}
    from cxr_fastai.training import train
    train(revise_recipe(known.recipe, **_recipe_options(typed)), root, folder, out, resume=True, **engine)
    _say(f'{folder}: trained. Next: cxr-fastai evaluate {folder}')


def _recipe_options(params: dict[str, Any]) -> dict[str, Any]:
    """What `make_recipe` takes of the options `params`."""
    from cxr_fastai.recipe import parse_fields
    others = ('data', 'csv', 'run', 'resume', 'recipe', 'fields', 'steps', 'curve', 'compile', 'track')
    options = {name: value for name, value in params.items() if name not in others}
    if 'precision' in params:
        from cxr_fastai.devices import choose_precision
        options['precision'] = choose_precision(params['precision'])
    if 'recipe' in params: options['name'] = params['recipe']
    return options | parse_fields(params.get('fields') or [])


@app.command()
def evaluate(run: opt.RunFolder, data: opt.Data = None, csv: opt.Csv = None, split: opt.Split = 'test',
             batch_size: opt.BatchSize = 32, limit: opt.Limit = None, robustness: opt.Robustness = False) -> None:
    """Measure a run on a split: predictions.csv, metrics.json and figures in its folder.

    Without --data the films are looked for where the run was trained. Example: cxr-fastai evaluate runs/resnet50
    """
    folder = Run.open(run)
    from cxr_fastai.evaluation import evaluate
    metrics = evaluate(folder, _one_of(data, csv), split, batch_size, limit, out)
    from cxr_fastai.display import metrics_table
    from cxr_fastai.interpret import save_figures
    figures = save_figures(folder, split)
    _say(f'{run}, {split} split: {metrics["n"]} films, {metrics["positives"]} of them pneumonia, threshold '
         f'{metrics["threshold"]:g}')
    out.print(metrics_table(metrics))
    _say(f'in {run}: predictions.csv, metrics.json, {", ".join(figures)}')
    if robustness: _evaluate_robustness(folder, _one_of(data, csv), split, batch_size, limit)


@app.command()
def predict(model: Annotated[Path, Argument(metavar='MODEL', help='Run folder, or an exported .pkl.')],
            films: Annotated[list[Path], Argument(metavar='FILM|DIR|CSV...', help=(
                'Films, folders of films, or CSVs with a column path.'))],
            table: opt.NewTable = None, batch_size: opt.BatchSize = 32) -> None:
    """Give each film the probability of pneumonia; a film that cannot be read gets a row with its error.

    Example: cxr-fastai predict runs/resnet50 film.jpeg more_films/ --out predictions.csv
    """
    if table and table.exists(): raise UsageError(f'{table} exists already and was left alone: choose another --out.')
    if table and not table.parent.is_dir(): raise UsageError(f'{table}: the folder {table.parent} does not exist.')
    from cxr_fastai.display import predictions_table
    from cxr_fastai.inference import Predictor, list_films, prediction_table
    paths = list_films(films)
    rows = prediction_table(Predictor.load(model).predict(paths, batch_size, out))
    if table: write_csv(table, rows)
    bad = rows[rows.status != 'ok']
    out.print(predictions_table(rows))
    for row in bad.itertuples(): _print_line(f'error: {row.path}: {row.message}')
    _say(f'{len(rows)} films, {(rows.prediction == "PNEUMONIA").sum()} called PNEUMONIA, {len(bad)} failed'
         + (f'; rows in {table}' if table else ''))
    if len(bad): raise typer.Exit(3)


@app.command()
def demo(folder: opt.NewFolder = None, films: opt.Films = 800, size: opt.Size = 128, epochs: opt.DemoEpochs = 12,
         seed: opt.Seed = 0) -> None:
    """The whole way on synthetic films: data, audit, train (baseline), evaluate, predict. Two minutes on two cores.

    Example: cxr-fastai demo --out demo
    """
    folder = folder or _free(Path('demo'))
    check_new(folder)
    out.rule('1 of 5: data demo', align='left')
    data_demo(folder/'films', films, max(96, size*3//2), seed)
    out.rule('2 of 5: data audit', align='left')
    data_audit(folder/'films', report=folder/'audit')
    out.rule('3 of 5: train', align='left')
    from cxr_fastai.models import make_recipe
    from cxr_fastai.training import train
    train(make_recipe('baseline', epochs=epochs, size=size, seed=seed), folder/'films', folder/'run', out)
    out.rule('4 of 5: evaluate', align='left')
    evaluate(folder/'run')
    out.rule('5 of 5: predict', align='left')
    predict(folder/'run', [folder/'films'/'test'], folder/'predictions.csv')
    _say(f'films in {folder/"films"}, run in {folder/"run"}, predictions in {folder/"predictions.csv"}')


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    with warnings.catch_warnings(), _ending_on_sigterm():
        # Other packages' warnings are for their developers; ours are for the user, one line each.
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', CXRWarning)
        warnings.showwarning = _show_warning
        try: app(argv)
        except KeyboardInterrupt: return _tell_signal(signal.SIGINT)
        except SystemExit as end:
            code = int(end.code or 0)
            return _tell_signal(signal.Signals(code - 128)) if code > 128 else code
        except CXRError as error:
            _print_line(f'error: {_last_line(error)}')
            return error.exit_code
        except OSError as error:  # what the system refuses is no bug of ours
            _print_line(f'error: {error.filename or "system"}: {error.strerror or error}')
            return 1
    return 0


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: files are closed, temporary ones go."""
    def end(number: int, _: object) -> None: sys.exit(128 + number)
    try: before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may listen
        yield
        return
    try: yield
    finally: signal.signal(signal.SIGTERM, before)


def _tell_signal(number: signal.Signals) -> int:
    _print_line(f'error: stopped by {number.name}')
    return 128 + number


def run() -> None:
    """The console script: `main`, as the process's exit code."""
    sys.exit(main())


def _one_of(folder: Path | None, csv: Path | None) -> Path | None:
    if folder and csv: raise UsageError(f'{folder} and --csv {csv}: name one of them.')
    return folder or csv


def _evaluate_robustness(folder: Run, films: Path | None, split: str, batch_size: int, limit: int | None) -> None:
    from cxr_fastai.display import robustness_table
    from cxr_fastai.interpret import save_robustness
    from cxr_fastai.robustness import evaluate_robustness
    out.print(robustness_table(evaluate_robustness(folder, films, split, batch_size, limit, out)))
    _say(f'in {folder.path}: robustness.csv, {save_robustness(folder, split)}')


def _say(text: str) -> None: out.print(text, soft_wrap=True, markup=False)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if leads(): _print_line(f'warning: {message}')


def _print_line(text: str) -> None: err.print(text, soft_wrap=True, markup=False, highlight=False)


def _last_line(error: CXRError) -> str:
    """An error's message; a worker process hands it over as the last line of its traceback, a callback indented."""
    last = str(error).strip().splitlines()[-1].strip()
    return last.removeprefix(f'{type(error).__module__}.{type(error).__name__}: ')


def _free(path: Path) -> Path:
    """`path`, or the first free of path-2, path-3 and so on."""
    tries = (path.with_name(f'{path.name}-{i}') for i in range(2, sys.maxsize))
    return path if not path.exists() else next(p for p in tries if not p.exists())

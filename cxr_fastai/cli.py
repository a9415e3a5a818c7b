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
from typing import Annotated

import typer
from typer import Argument, Option

from cxr_fastai import cli_data
from cxr_fastai import options as opt
from cxr_fastai.cli_train import lr_find, train
from cxr_fastai.core import CXRError, CXRWarning, UsageError, check_new, write_csv
from cxr_fastai.run import Run
from cxr_fastai.terminal import complain, free, last_line, one_of, out, say, show_warning

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cli_data.app, name='data')


@app.callback(invoke_without_command=True)
def show_version(show: Annotated[bool, Option('--version', help='Print the version and exit.')] = False) -> None:
    """From a folder of chest X-ray films to a trained, measured and exported classifier.

    Research software, not a medical device.
    """
    from cxr_fastai import __version__
    if show:
        out.print(f'cxr_fastai {__version__}', highlight=False)
        raise typer.Exit


app.command()(train)
app.command('lr-find')(lr_find)


@app.command()
def evaluate(run: opt.RunFolder, data: opt.Data = None, csv: opt.Csv = None, split: opt.Split = 'test',
             batch_size: opt.BatchSize = 32, limit: opt.Limit = None, robustness: opt.Robustness = False) -> None:
    """Measure a run on a split: predictions.csv, metrics.json and figures in its folder.

    Without --data the films are looked for where the run was trained. Example: cxr-fastai evaluate runs/resnet50
    """
    folder = Run.open(run)
    from cxr_fastai.evaluation import evaluate
    metrics = evaluate(folder, one_of(data, csv), split, batch_size, limit, out)
    from cxr_fastai.display import metrics_table
    from cxr_fastai.interpret import save_figures
    figures = save_figures(folder, split)
    say(f'{run}, {split} split: {metrics["n"]} films, {metrics["positives"]} of them pneumonia, threshold '
        f'{metrics["threshold"]:g}')
    out.print(metrics_table(metrics))
    say(f'in {run}: predictions.csv, metrics.json, {", ".join(figures)}')
    if robustness: _evaluate_robustness(folder, one_of(data, csv), split, batch_size, limit)


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
    for row in bad.itertuples(): complain(f'error: {row.path}: {row.message}')
    say(f'{len(rows)} films, {(rows.prediction == "PNEUMONIA").sum()} called PNEUMONIA, {len(bad)} failed'
        + (f'; rows in {table}' if table else ''))
    if len(bad): raise typer.Exit(3)


@app.command()
def demo(folder: opt.NewFolder = None, films: opt.Films = 800, size: opt.Size = 128, epochs: opt.DemoEpochs = 12,
         seed: opt.Seed = 0) -> None:
    """The whole way on synthetic films: data, audit, train (baseline), evaluate, predict. Two minutes on two cores.

    Example: cxr-fastai demo --out demo
    """
    folder = folder or free(Path('demo'))
    check_new(folder)
    out.rule('1 of 5: data demo', align='left')
    cli_data.data_demo(folder/'films', films, max(96, size*3//2), seed)
    out.rule('2 of 5: data audit', align='left')
    cli_data.data_audit(folder/'films', report=folder/'audit')
    out.rule('3 of 5: train', align='left')
    from cxr_fastai.models import make_recipe
    from cxr_fastai.training import train
    train(make_recipe('baseline', epochs=epochs, size=size, seed=seed), folder/'films', folder/'run', out)
    out.rule('4 of 5: evaluate', align='left')
    evaluate(folder/'run')
    out.rule('5 of 5: predict', align='left')
    predict(folder/'run', [folder/'films'/'test'], folder/'predictions.csv')
    say(f'films in {folder/"films"}, run in {folder/"run"}, predictions in {folder/"predictions.csv"}')


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    with warnings.catch_warnings(), _ending_on_sigterm():
        # Other packages' warnings are for their developers; ours are for the user, one line each.
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', CXRWarning)
        warnings.showwarning = show_warning
        try: app(argv)
        except KeyboardInterrupt: return _tell_signal(signal.SIGINT)
        except SystemExit as end:
            code = int(end.code or 0)
            return _tell_signal(signal.Signals(code - 128)) if code > 128 else code
        except CXRError as error:
            complain(f'error: {last_line(error)}')
            return error.exit_code
        except OSError as error:  # what the system refuses is no bug of ours
            complain(f'error: {error.filename or "system"}: {error.strerror or error}')
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
    complain(f'error: stopped by {number.name}')
    return 128 + number


def run() -> None:
    """The console script: `main`, as the process's exit code."""
    sys.exit(main())


def _evaluate_robustness(folder: Run, films: Path | None, split: str, batch_size: int, limit: int | None) -> None:
    from cxr_fastai.display import robustness_table
    from cxr_fastai.interpret import save_robustness
    from cxr_fastai.robustness import evaluate_robustness
    out.print(robustness_table(evaluate_robustness(folder, films, split, batch_size, limit, out)))
    say(f'in {folder.path}: robustness.csv, {save_robustness(folder, split)}')

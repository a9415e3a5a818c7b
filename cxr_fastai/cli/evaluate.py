"""The commands `cxr-fastai evaluate` and `cxr-fastai report`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.console import move_messages_to_stderr
from cxr_fastai.cli.documents import evaluated_run, evaluation_document, print_json
from cxr_fastai.cli.output import choose_source, out, print_error, print_line, unused_path
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series, is_folds

if TYPE_CHECKING:
    import pandas as pd

    from cxr_fastai.evaluation.comparison import Comparison
    from cxr_fastai.evaluation.evaluation import Evaluation


def evaluate(
    runs: opt.RunFolders,
    data: opt.Data = None,
    csv: opt.Csv = None,
    split: opt.EvaluatedSplit = None,
    threshold: opt.Rule = None,
    prevalence: opt.Prevalences = None,
    by: opt.By = None,
    batch_size: opt.BatchSize = 32,
    limit: opt.Limit = None,
    robustness: opt.Robustness = False,
    shift: opt.Shift = False,
    choose_on: opt.ChooseOn = None,
    out_of_fold: opt.OutOfFold = None,
    folder: opt.NewComparison = None,
    each: opt.Each = False,
    device: opt.Device = 'auto',
    tta: opt.Views = None,
    as_json: opt.AsJson = False,
) -> None:
    """Evaluate a run on a split, and write predictions, metrics with 95% intervals, and figures into its folder.
    Several runs, or a folder of runs, are compared on the same images, and the comparison is printed. The folder of
    `train --folds` is evaluated on its out-of-fold predictions, unless --split is test.

    Without --data the images are those that the run was trained on. The fields of --json: split, runs (each with run,
    metrics, figures, robustness, shift), comparison (folder, pairs, seeds; null for one run); for folds: metrics,
    decision, folds, spread.

    Example: cxr-fastai evaluate runs/resnet50
    """
    if as_json:
        move_messages_to_stderr()
    images = choose_source(data, csv)
    rule = _compose_rule(threshold, choose_on)
    prevalences = _parse_shares(prevalence)
    groups = ['kind', *by] if by else None
    from cxr_fastai.evaluation.comparison import find_runs
    from cxr_fastai.evaluation.evaluation import Evaluation

    how = Evaluation(images, split or 'test', batch_size, limit, rule, prevalences, groups, device=device, tta=tta)
    if split in (None, 'valid') and len(runs) == 1 and is_folds(runs[0]):
        unused = {'limit': limit, 'by': by, 'robustness': robustness, 'out': folder, 'each': each}
        _refuse(unused | {'shift': shift, 'choose-on': choose_on, 'out-of-fold': out_of_fold}, runs[0])
        _evaluate_folds(runs[0], how, as_json)
        return
    run_list = find_runs(runs)
    is_comparison = len(run_list) > 1
    split = _choose_split(split, shift, limit, out_of_fold, is_comparison)
    how = replace(how, split=split, again=not is_comparison)
    if folder and not is_comparison:
        raise UsageError(f'--out {folder}: only the comparison of several runs has a folder of its own. Omit --out.')
    if each and not is_comparison:
        raise UsageError('--each: the tables of a single run are always printed. Omit --each, or name several runs.')
    if out_of_fold:
        _adopt_out_of_fold(run_list[0], out_of_fold, how)
    request = _Request(how, robustness, shift)
    if is_comparison:
        _compare(run_list, request, folder, each, as_json)
        return
    results = _evaluate_run(run_list[0], request, is_shown=not as_json)
    if as_json:
        print_json(evaluation_document(split, [results.document()], None, None))


@dataclass(frozen=True)
class _Request:
    """What is measured of each run: `how` it is evaluated, and whether also for --robustness and --shift."""

    how: Evaluation
    robustness: bool
    shift: bool


@dataclass(frozen=True)
class _Results:
    """The results of one run: its metrics, the figures that were drawn, and those of --robustness and --shift."""

    run: Run
    metrics: dict[str, Any]
    figures: list[str]
    robustness: pd.DataFrame | None
    shift: dict[str, Any] | None

    def document(self) -> dict[str, Any]:
        """Return the part of the document of --json about this run."""
        return evaluated_run(self.run, self.metrics, self.figures, self.robustness, self.shift)


def _compare(runs: list[Run], request: _Request, folder: Path | None, each: bool, as_json: bool) -> None:
    """Evaluate and compare several runs, and print the comparison, then what was asked for of each run."""
    from cxr_fastai.evaluation.comparison import check_comparison_folder, compare_runs

    split = request.how.split
    folder = folder or _choose_folder(runs, split)
    check_comparison_folder(folder, runs, split)  # before the runs are evaluated, which takes long
    print_line(f'comparing {len(runs)} runs on the {split} split, in the folder {folder}')
    results = [_evaluate_run(run, request, is_shown=False) for run in runs]
    if len({result.metrics['tta'] for result in results}) > 1:
        print_error(
            'warning: some of the runs are evaluated with test-time views and others without, so the differences are '
            'not those of the networks alone. Evaluate all of them with --tta, or with --no-tta.'
        )
    comparison = compare_runs(runs, split, folder)
    if as_json:
        print_json(evaluation_document(split, [result.document() for result in results], comparison, folder))
        return
    _print_comparison(comparison, folder)
    for result in results:
        if each:
            _print_evaluation(result.run, split, result.metrics, result.figures)
        else:
            _print_files(result.run, result.figures)
        if result.robustness is not None:
            _print_robustness(result.run, split, result.robustness)
        if result.shift is not None:
            _print_shift(result.shift)
    if not each:
        print_line('--each prints the tables of each run, too')


def _choose_folder(runs: list[Run], split: str) -> Path:
    """Return the folder of the comparison where none was given, and print why if it is not a new `comparison`."""
    from cxr_fastai.evaluation.comparison import is_comparison_of

    default = Path('comparison')
    folder = unused_path(default, lambda path: is_comparison_of(path, runs, split))
    if folder.exists():
        print_line(f'{folder}: replaces the earlier comparison of these runs')
    elif folder != default:
        print_line(f'{default}: exists, and is not a comparison of these runs on the {split} split, so it stays')
    return folder


def _evaluate_run(run: Run, request: _Request, is_shown: bool) -> _Results:
    """Evaluate one run, and print its tables one by one if `is_shown`."""
    from cxr_fastai.evaluation.figures import evaluate_and_draw
    from cxr_fastai.evaluation.robustness import evaluate_robustness, warn_of_stale_robustness
    from cxr_fastai.evaluation.shift import evaluate_shift

    how = request.how
    metrics, figures = evaluate_and_draw(run, how)
    if is_shown:
        _print_evaluation(run, how.split, metrics, figures)
    corrupted = shifted = None
    if request.robustness:
        corrupted = evaluate_robustness(run, how.data, how.split, how.batch_size, how.limit, how.device)
        if is_shown:
            _print_robustness(run, how.split, corrupted)
    if request.shift:
        shifted = evaluate_shift(run, how.data, how.batch_size, again=False, device=how.device)
        if is_shown:
            _print_shift(shifted)
    warn_of_stale_robustness(run)
    return _Results(run, metrics, figures, corrupted, shifted)


def _adopt_out_of_fold(run: Run, folds: Path, how: Evaluation) -> None:
    """Give `run` the out-of-fold predictions of the series in the folder `folds`."""
    from cxr_fastai.evaluation.out_of_fold import adopt_out_of_fold
    from cxr_fastai.evaluation.thresholds import parse_rule
    from cxr_fastai.inference.decision import DEFAULT_RULE

    parse_rule(how.rule or DEFAULT_RULE)  # before the predictions of the run are replaced
    adopt_out_of_fold(run, Series.open(folds), how.data, how.batch_size, how.device, how.tta)


def _choose_split(
    split: str | None, shift: bool, limit: int | None, out_of_fold: Path | None, is_comparison: bool
) -> str:
    """Return the split to evaluate. Raises `UsageError` for options that do not go together."""
    if out_of_fold and is_comparison:
        raise UsageError(f'--out-of-fold {out_of_fold}: the predictions are for one run. Name a single run.')
    if shift and split not in (None, SHIFT):
        raise UsageError(f'--shift and --split {split}: --shift evaluates the split {SHIFT}. Omit one of them.')
    if shift and limit:
        raise UsageError(f'--shift and --limit {limit}: both splits are measured whole. Omit --limit.')
    if shift:
        return SHIFT
    return split or ('valid' if out_of_fold else 'test')


def _compose_rule(rule: str | None, choose_on: str | None) -> str | None:
    """Return `rule` with the split that `--choose-on` names; None to choose as before."""
    from cxr_fastai.evaluation.thresholds import ON_SHIFT
    from cxr_fastai.inference.decision import DEFAULT_RULE

    if choose_on is None:
        return rule
    if choose_on not in ('valid', SHIFT):
        raise UsageError(f'--choose-on {choose_on}: choose valid or {SHIFT}.')
    if rule is None:
        print_line(f'--choose-on {choose_on} without --threshold: the rule is {DEFAULT_RULE}.')
    base = (rule or DEFAULT_RULE).removesuffix(ON_SHIFT)
    if choose_on == 'valid':
        return base
    if base.startswith('fixed:'):
        raise UsageError(f'--threshold {base} and --choose-on {SHIFT}: a fixed threshold is not chosen. Omit one.')
    return base + ON_SHIFT


def _refuse(options: dict[str, object], folder: Path) -> None:
    """Raise `UsageError` for those of the `options` that have a value: out-of-fold predictions do not have them."""
    names = [f'--{name}' for name, value in options.items() if value]
    if names:
        raise UsageError(
            f'{", ".join(names)}: not available for the out-of-fold predictions of {folder}. Name one of its runs, '
            'or add --split test.'
        )


def _evaluate_folds(folder: Path, how: Evaluation, as_json: bool) -> None:
    from cxr_fastai.evaluation.cross_validation import evaluate_folds
    from cxr_fastai.evaluation.robustness import warn_of_stale_robustness

    series = Series.open(folder)
    results = evaluate_folds(series, how.data, how.batch_size, how.rule, how.prevalences, how.device, tta=how.tta)
    for run in series.open_runs():
        warn_of_stale_robustness(run)
    if as_json:
        print_json(results)
    else:
        _print_folds(folder, results)


def _print_folds(folder: Path, results: dict[str, Any]) -> None:
    from cxr_fastai.cli.comparison_tables import folds_table
    from cxr_fastai.cli.output import metrics_tables
    from cxr_fastai.core.run_files import OUT_OF_FOLD
    from cxr_fastai.evaluation.cross_validation import METRICS

    metrics, decision = results['metrics'], results['decision']
    summary = (
        f'{folder}, out-of-fold: {counted(metrics["n"])}, {metrics["positives"]:,} of them pneumonia; threshold '
        f'{decision["threshold"]:g} ({_describe_rule(decision["rule"], decision["tta"])}).'
    )
    print_line(f'{summary} {decision["margin"]}'.rstrip())
    out.print(metrics_tables(metrics))
    out.print(folds_table(results['folds'], results['spread']))
    print_line(f'in {folder}: {OUT_OF_FOLD}, {METRICS}, figures/')


def _describe_rule(rule: str, tta: bool) -> str:
    """Return by which rule the threshold was chosen, and whether on probabilities with test-time views."""
    return f'rule {rule}, with test-time views' if tta else f'rule {rule}'


def _parse_shares(texts: list[str] | None) -> list[float] | None:
    return [parse_share(text) for text in texts] if texts else None


def parse_share(text: str) -> float:
    """Return the value of `--prevalence`: a share such as 0.05, or a percentage such as 5%. Raises `UsageError`."""
    number = text.strip()
    try:
        share = float(number.removesuffix('%')) / (100 if number.endswith('%') else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f'--prevalence {text}: not a share of images. Write it as 5% or as 0.05.')
    return share


def _print_evaluation(run: Run, split: str, metrics: dict[str, Any], figures: list[str]) -> None:
    from cxr_fastai.cli.output import metrics_tables
    from cxr_fastai.evaluation.results import describe_limits
    from cxr_fastai.inference.decision import Decision

    decision = Decision.from_metrics(run, metrics)
    summary = (
        f'{run.path}, {split} split: {counted(metrics["n"])}, {metrics["positives"]:,} of them pneumonia; '
        f'threshold {metrics["threshold"]:g} ({_describe_rule(metrics["threshold_rule"], metrics["tta"])}).'
    )
    print_line(f'{summary} {decision.margin}'.rstrip() if decision else summary)
    out.print(metrics_tables(metrics))
    limits = describe_limits(split, metrics)
    if limits:
        print_line(limits)
    _print_files(run, figures)


def _print_files(run: Run, figures: list[str]) -> None:
    files = ['predictions.csv', 'metrics.json', 'decision.json', *figures]
    print_line(f'in {run.path}: {", ".join(files)}')


def _print_robustness(run: Run, split: str, robustness: pd.DataFrame) -> None:
    from cxr_fastai.cli.robustness_tables import anatomy_table, robustness_table

    out.print(robustness_table(robustness))
    out.print(anatomy_table(robustness))
    print_line(f'in {run.path}: robustness.csv, figures/robustness_{split}.png')


def _print_shift(results: dict[str, Any]) -> None:
    from cxr_fastai.cli.robustness_tables import shift_tables

    out.print(shift_tables(results))


def _print_comparison(comparison: Comparison, folder: Path) -> None:
    from cxr_fastai.cli.comparison_tables import comparison_tables

    out.print(comparison_tables(comparison.runs, comparison.pairs, comparison.seeds))
    if not comparison.pairs:
        print_line('The runs have too few images in common for paired tests.')
    print_line(f'in {folder}: comparison.json, comparison.png')


def report(
    run: opt.RunFolder, audit: opt.Audit = None, pdf: opt.Pdf = False, hide_names: opt.HideNames = False
) -> None:
    """Write the report of an evaluated run: report.html, a single self-contained page, and model_card.md.

    Example: cxr-fastai report runs/resnet50 --pdf
    """
    folder = Run.open(run)
    from cxr_fastai.publishing.reporting import report

    report(folder, audit, hide_names, pdf)
    files = ['report.html', *(['report.pdf'] if pdf else []), 'model_card.md']
    print_line(f'in {run}: {", ".join(files)}')

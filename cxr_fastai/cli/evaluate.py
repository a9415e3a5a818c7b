"""The commands `evaluate` and `report`: a run, or several, measured and told."""

from __future__ import annotations

from pathlib import Path

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, out, print_line, unused_path
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import check_new, write_json, writing
from cxr_fastai.core.run import Run


def evaluate(
    runs: opt.RunFolders,
    data: opt.Data = None,
    csv: opt.Csv = None,
    split: opt.Split = 'test',
    threshold: opt.Rule = None,
    prevalence: opt.Prevalences = None,
    by: opt.By = None,
    batch_size: opt.BatchSize = 32,
    limit: opt.Limit = None,
    robustness: opt.Robustness = False,
    folder: opt.NewComparison = None,
) -> None:
    """Measure a run on a split: predictions, metrics with intervals and figures in its folder. Several runs, or a
    folder of runs, are compared on the same images.

    Without --data the images are looked for where the run was trained. Example: cxr-fastai evaluate runs/resnet50
    """
    from cxr_fastai.evaluation.comparison import find_runs

    found = find_runs(runs)
    if folder and len(found) == 1:
        raise UsageError(f'--out {folder} is for several runs: what is found of one goes into its own folder.')
    if folder:
        check_new(folder)
    from cxr_fastai.evaluation.evaluation import evaluate, find_split
    from cxr_fastai.evaluation.figures import save_figures, save_images

    images = choose_source(data, csv)
    given = {'rule': threshold, 'by': ('kind', *(by or ())), 'again': len(found) == 1}
    if prevalence:
        given['prevalences'] = [share / 100 for share in prevalence]
    for run in found:
        before = run.metrics
        metrics = evaluate(run, images, split, batch_size, limit, **given)
        for other in before.keys() & run.metrics.keys() - {split}:  # their figures tell what was before
            if run.metrics[other] != before[other]:
                save_figures(run, other)
        save_images(run, split, find_split(run, images, split, limit)[0])
        _tell(run, split, metrics, save_figures(run, split))
        if robustness:
            _evaluate_robustness(run, images, split, batch_size, limit)
    if len(found) > 1:
        _compare(found, split, folder or unused_path(Path('comparison')))


def report(
    run: opt.RunFolder, audit: opt.Audit = None, pdf: opt.Pdf = False, hide_names: opt.HideNames = False
) -> None:
    """Write a run's report.html, one page that needs nothing else, and model_card.md, from what was evaluated.

    Example: cxr-fastai report runs/resnet50 --pdf
    """
    folder = Run.open(run)
    from cxr_fastai.publishing.reporting import report

    page = report(folder, audit, hide_names)
    if pdf:
        from cxr_fastai.publishing.reporting import print_pdf

        print_pdf(page, folder / 'report.pdf')
    else:
        (folder / 'report.pdf').unlink(missing_ok=True)  # it was of another page
    print_line(f'in {run}: report.html, {"report.pdf, " if pdf else ""}model_card.md')


def _tell(run: Run, split: str, metrics: dict, figures: list[str]) -> None:
    from cxr_fastai.cli.output import metrics_tables
    from cxr_fastai.inference.decision import Decision

    decided = Decision.behind(run, metrics)
    margin = decided.margin if decided else ''
    print_line(
        f'{run.path}, {split} split: {metrics["n"]} images, {metrics["positives"]} of them pneumonia, threshold '
        f'{metrics["threshold"]:g} by the rule {metrics["threshold_rule"]}. {margin}'.rstrip()
    )
    out.print(metrics_tables(metrics))
    print_line(
        f'in {run.path}: predictions.csv, metrics.json, {"decision.json, " if decided else ""}{", ".join(figures)}'
    )


def _compare(runs: list[Run], split: str, folder: Path) -> None:
    from cxr_fastai.cli.output import comparison_tables
    from cxr_fastai.core.figures import save_figure
    from cxr_fastai.evaluation.comparison import compare, name_runs, same_images, summarise_seeds
    from cxr_fastai.evaluation.curves import plot_comparison

    named = name_runs(runs)
    metrics = {name: run.metrics[split] for name, run in named.items()}
    tables = {name: run.predicted(split) for name, run in named.items()}
    shared = same_images(tables)
    pairs = compare(shared, {name: metrics[name]['threshold'] for name in named}) if shared else []
    seeds = summarise_seeds(named, split)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'comparison.json', {'split': split, 'runs': metrics, 'pairs': pairs, 'seeds': seeds})
    save_figure(plot_comparison(shared or tables, metrics, f'{split} split'), folder / 'comparison.png')
    out.print(comparison_tables(metrics, pairs, seeds))
    if not pairs:
        print_line('The runs have too few images in common for paired tests.')
    print_line(f'in {folder}: comparison.json, comparison.png')


def _evaluate_robustness(run: Run, images: Path | None, split: str, batch_size: int, limit: int | None) -> None:
    from cxr_fastai.cli.output import robustness_table
    from cxr_fastai.evaluation.robustness import evaluate_robustness
    from cxr_fastai.evaluation.figures import save_robustness_figure

    out.print(robustness_table(evaluate_robustness(run, images, split, batch_size, limit)))
    print_line(f'in {run.path}: robustness.csv, {save_robustness_figure(run, split)}')

"""`report` writes the report of an evaluated run as one self-contained HTML page, and `print_pdf` prints it.

The report is made from the JSON, CSV and PNG files of the run. Nothing is predicted, so torch is not loaded.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.figures import to_svg
from cxr_fastai.core.files import StrPath, write_text
from cxr_fastai.core.recipe import UNKNOWN
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.core.run_files import read_json
from cxr_fastai.core.templates import data_uri, render_template
from cxr_fastai.data.auditing import NOT_TRAINABLE, SMALL_VALIDATION
from cxr_fastai.data.find import shown_path
from cxr_fastai.data.items import identify_images
from cxr_fastai.data.splits import (
    count_patients,
    describe_patients,
    leaking_patients,
    unknown_patients,
    unknown_patients_warning,
    validation_warning,
)
from cxr_fastai.evaluation.figures import CURVES, cam_picture, image_picture, typical_correct, worst_errors
from cxr_fastai.evaluation.intervals import MIN_GROUP_SIZE, Estimate, describe_suppressed, format_estimate, too_few
from cxr_fastai.evaluation.metrics import (
    RANKING_METRICS,
    TARGETS,
    THRESHOLD_METRICS,
    describe_sample,
    interval_warnings,
    name_metric,
)
from cxr_fastai.evaluation.plots import (
    CAM_CHECK_PANELS,
    history_panels,
    plot_cam_check_panel,
    plot_history_panel,
    plot_robustness,
)
from cxr_fastai.evaluation.results import check_results, describe_limits, describe_views, is_of_network
from cxr_fastai.evaluation.robustness import anatomy_aucs, read_robustness, summarise
from cxr_fastai.evaluation.shift import SHIFT_NAMES, has_shift, measure_shift
from cxr_fastai.evaluation.split_images import own_images
from cxr_fastai.evaluation.thresholds import describe_deciding, threshold_table
from cxr_fastai.images.anatomy import FILLS
from cxr_fastai.inference.decision import Decision
from cxr_fastai.interpretation.check_targets import check_rows
from cxr_fastai.publishing.checklist import TOPICS
from cxr_fastai.publishing.model_card import (
    EXTERNAL_VALIDITY,
    NOT_A_DEVICE,
    count_kinds,
    describe_run,
    main_split,
    note_same_images,
    render_card,
    reproduce,
)
from cxr_fastai.publishing.printing import print_pdf

SECTIONS = {
    'summary': 'Summary',
    'data': 'Data',
    'training': 'Training',
    'performance': 'Performance',
    'calibration': 'Calibration',
    'thresholds': 'Thresholds',
    'groups': 'Subgroups',
    'robustness': 'Robustness',
    'shift': 'Soft images',
    'images': 'Images',
    'maps': 'Reliability of the maps',
    'card': 'Model card',
    'checklist': 'Reporting checklist',
    'reproduce': 'How to reproduce',
}
"""The sections of the report with their titles; those without content are left out."""
VALIDATION_SPLITS = {
    'official': 'The validation images are those of the folder val.',
    'patients': 'The validation images are those of {share:.0%} of the {units} of train and val, drawn at random with '
    'the same class balance.',
    'none': 'The network was trained on all images, so it has no validation images. Validation metrics, if there '
    'are any, are those of other networks.',
    UNKNOWN: 'The validation images were chosen before the run was saved; how is not recorded.',
}
"""How validation images are chosen, by the field `valid` of the recipe; see `_describe_validation`."""
CONSTANTS = {
    'topics': TOPICS,
    'ranking_metrics': RANKING_METRICS,
    'threshold_metrics': THRESHOLD_METRICS,
    'min_group_size': MIN_GROUP_SIZE,
    'not_a_device': NOT_A_DEVICE,
    'external_validity': EXTERNAL_VALIDITY,
    'format_estimate': format_estimate,
    'too_few': too_few,
    'describe_suppressed': describe_suppressed,
    'name_metric': name_metric,
    'shift_names': SHIFT_NAMES,
    'describe_deciding': describe_deciding,
    'fills': tuple(FILLS),
}
"""The values and functions that the template uses for every run."""


def report(run: Run | StrPath, audit: StrPath | None = None, hide_names: bool = False, pdf: bool = False) -> Path:
    """Write `report.html` and `model_card.md` into `run` and return the path of the page.

    `audit` is the folder of a `data audit` of the images of the run (default: see `find_audit`). With `hide_names`,
    images are named by numbers. With `pdf`, the page is also printed to `report.pdf`; without it, a warning names the
    `report.pdf` of an earlier report.

    Raises `UsageError` if the run has not been evaluated since its network changed, or if the audit is of other images;
    `CXRError` if no browser can print the page.
    """
    run = as_run(run)
    audit = Path(audit) if audit is not None else None
    if not run.metrics:
        raise UsageError(f'{run.path}: not evaluated yet. Run `{run.evaluation()}` first.')
    split = main_split(run)
    check_results(run, split)
    findings = read_audit(audit, run) if audit else find_audit(run)
    page = run / 'report.html'
    write_text(page, render(run, split, findings, hide_names))
    write_text(run / 'model_card.md', render_card(run, split))
    if pdf:
        print_pdf(page, run / 'report.pdf')
    elif (run / 'report.pdf').exists():
        warnings.warn(
            f'{run / "report.pdf"} is of an earlier report and was not changed. --pdf replaces it.',
            CXRWarning,
            stacklevel=2,
        )
    return page


def render(run: Run, split: str, audit: dict[str, Any] | None = None, hide_names: bool = False) -> str:
    """Return the report about `split` as HTML, with all figures and images embedded."""
    metrics = run.metrics[split]
    predictions = run.predicted(split)
    map_check = _read_map_check(run)
    robustness = read_robustness(run, split)
    values = {
        'run': run,
        'split': split,
        'metrics': metrics,
        'targets': compare_with_targets(metrics),
        'decision': Decision.from_metrics(run, metrics),
        'valid_metrics': run.metrics.get('valid') if split != 'valid' else None,
        'flow': describe_flow(run),
        'counts': count_kinds(run),
        'sample': describe_sample(metrics),
        'interval_warnings': interval_warnings(metrics),
        'calibration_notes': dict.fromkeys([*metrics['calibration']['notes'], *metrics['calibrated']['notes']]),
        'leaking_patients': len(leaking_patients(run.items)),
        'patients_warning': unknown_patients_warning(run.items),
        'limits': describe_limits(split, metrics),
        'views': describe_views(metrics),
        'same_images': note_same_images(run),
        'validation_warning': validation_warning(run.items) if run.recipe.valid != 'none' else None,
        'has_other_images': not set(predictions.path) <= set(own_images(run, split).path),
        'audit': audit,
        'plots': draw(run, predictions, metrics, split, robustness, map_check),
        'thresholds': threshold_table(predictions, [metrics['threshold']]).to_dict('records'),
        'robustness': _summarise_robustness(robustness),
        'shift': measure_shift(run) if has_shift(run) else None,
        'images': select_images(run, predictions, metrics['model'], hide_names),
        'maps': map_check,
        'check_rows': check_rows(map_check) if map_check else [],
        'facts': describe_run(run),
        'command': reproduce(run, split),
    }
    sections = {name: title for name, title in SECTIONS.items() if values.get(name, True) is not None}
    contents = {*sections, *_extra_contents(run, split, values)}
    return render_template('report.html', **CONSTANTS, **values, sections=sections, contents=contents)


def _extra_contents(run: Run, split: str, values: dict[str, Any]) -> list[str]:
    """The facts that topics of the checklist require, in addition to sections."""
    contents = []
    if values['patients_warning'] is None:
        contents.append('patients')
    if split == 'test' and not values['has_other_images']:
        contents.append('internal')
    if 'origin' in run.last_event('start', 'resume'):
        contents.append('origin')
    if any(image['cam'] for images in values['images'].values() for image in images):
        contents.append('cams')
    return contents


def compare_with_targets(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target of the specification with the estimate and a verdict: a CSS class and a text."""
    return [
        {'name': name, 'target': target, 'estimate': metrics[name], 'verdict': _verdict(metrics[name], target)}
        for name, target in TARGETS.items()
    ]


def _verdict(estimate: Estimate, target: float) -> tuple[str, str]:
    value, low, high = estimate['value'], estimate['low'], estimate['high']
    if value is None or low is None or high is None:
        return 'warning', 'cannot be determined'
    if value >= target:
        return 'good', 'met' if low >= target else 'met, but the interval includes lower values'
    return 'error', 'not met' if high < target else 'not met, but the interval includes the target'


def describe_flow(run: Run) -> dict[str, Any]:
    """Return the number of images that the run found, could not read, and used in each split."""
    used_items = run.used_items
    return {
        'found': len(run.items),
        'patients': describe_patients(count_patients(run.items), int(unknown_patients(run.items).sum())),
        'limit': run.recipe.limit,
        'unreadable': len(run.items) - len(used_items),
        'valid': _describe_validation(run.recipe.valid, used_items),
        'splits': {
            split: rows.label.value_counts().sort_index().to_dict() for split, rows in used_items.groupby('split')
        },
    }


def _describe_validation(kind: str, items: pd.DataFrame) -> str:
    """Return how the validation images of `items` were chosen, with the share of the patients that they really have."""
    chosen_from = items[items.split != 'test']
    patients_known = not unknown_patients(chosen_from).all()
    n_valid, n_both = [
        rows.patient.nunique() if patients_known else len(rows)
        for rows in (chosen_from[chosen_from.split == 'valid'], chosen_from)
    ]
    units = 'patients' if patients_known else 'images'
    return VALIDATION_SPLITS[kind].format(share=n_valid / max(n_both, 1), units=units)


def read_audit(folder: Path, run: Run) -> dict[str, Any]:
    """Return the results of `data audit` in `folder`. Raises `UsageError` unless they are of the images of `run`.

    Findings about the splits are left out, because the run has chosen its splits.
    """
    path = folder / 'audit.json'
    if not path.is_file():
        raise UsageError(f'{path}: no such file. `cxr-fastai data audit --out {folder}` writes it.')
    audit = read_json(path)
    if audit.get('identity') != identify_images(run.items):
        raise UsageError(f'{path}: an audit of other images than those of the run. Audit the images of the run.')
    findings = [finding for finding in audit['findings'] if finding['name'] not in (NOT_TRAINABLE, SMALL_VALIDATION)]
    return audit | {'findings': findings}


def find_audit(run: Run) -> dict[str, Any] | None:
    """Return the audit of the images of `run` in `audit/`, here or next to the run; None if there is none."""
    for folder in (Path('audit'), run.path.parent / 'audit'):
        with suppress(UsageError):
            return read_audit(folder, run)
    return None


def select_images(
    run: Run, predictions: pd.DataFrame, network: str, hide_names: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Return the worst `errors` and typical `correct` predictions of the network with the SHA-256 `network`.

    Each has the keys `name`, `label`, `p`, and `picture` and `cam`, which are data URIs of thumbnails of the image and
    of its map (None if there is none).
    """
    numbers = {path: number for number, path in enumerate(predictions.path, 1)}
    groups = {'errors': worst_errors(predictions), 'correct': typical_correct(predictions)}
    return {
        group: [
            {
                'name': shown_path(row.path, numbers[row.path], hide_names),
                'label': row.label,
                'p': row.p_pneumonia,
                'picture': _embed(image_picture(run, row.path)),
                'cam': _embed(cam_picture(run, row.path, network)),
            }
            for row in rows.itertuples()
        ]
        for group, rows in groups.items()
    }


def _embed(path: Path) -> str | None:
    return data_uri(path.read_bytes(), 'image/png') if path.is_file() else None


def draw(
    run: Run,
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
    split: str,
    robustness: pd.DataFrame | None = None,
    map_check: dict[str, Any] | None = None,
) -> dict[str, Markup]:
    """Return the figures of the report as SVG, by name.

    `robustness` are the rows of the split in the table of that name, and `map_check` is the content of
    `cam_check.json`, if there are any.
    """
    history = run.history
    figures = {panel: plot_history_panel(history, panel, run.kept_epoch) for panel in history_panels(history)}
    if metrics['auc']['value'] is not None:
        figures |= {name: plot(predictions, metrics, f'{split} split') for name, plot in CURVES.items()}
    if robustness is not None:
        figures['robustness'] = plot_robustness(robustness, f'{split} split')
    if map_check and 'stages' in map_check:
        figures |= {panel: plot_cam_check_panel(map_check, panel) for panel in CAM_CHECK_PANELS}
    return {name: Markup(to_svg(figure, describe_plot(name, metrics))) for name, figure in figures.items()}


def describe_plot(name: str, metrics: dict[str, Any]) -> str:
    """Return the text alternative of the figure `name`, for readers who cannot see it."""
    auc = format_estimate(metrics['auc'])
    average_precision = format_estimate(metrics['average_precision'])
    slope = format_estimate(metrics['calibration']['slope'])
    descriptions = {
        'losses': 'training and validation loss by epoch',
        'validation': 'validation metrics by epoch',
        'roc': f'ROC curve, AUC {auc}',
        'precision_recall': f'precision-recall curve, average precision {average_precision}',
        'calibration': f'reliability diagram, slope {slope}',
        'scores': 'histograms of the probability of pneumonia for normal images and for images of pneumonia',
        'net_benefit': 'decision curves with and without temperature scaling, compared with treating all and none',
        'risk_coverage': 'accuracy by the share of images that are kept',
        'robustness': 'AUC by the strength of each corruption',
        'deletion': 'probability of pneumonia while pixels are deleted and inserted',
        'randomisation': 'similarity of maps while layers are randomised, compared with the maps of two images',
        'location': 'mean map and the box around the thorax',
    }
    return f'Figure: {descriptions[name]}'


def _summarise_robustness(rows: pd.DataFrame | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    return summarise(rows) | {'n': int(rows.n.iloc[0]), 'anatomy': anatomy_aucs(rows)}


def _read_map_check(run: Run) -> dict[str, Any] | None:
    """The results of `explain --check`; None if there are none, or if they are of another network."""
    path = run / 'figures' / 'cam_check.json'
    if not path.is_file():
        return None
    check = read_json(path)
    return check if is_of_network(run, check) else None

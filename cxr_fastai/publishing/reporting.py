"""A run becomes one page that needs nothing else: it reads the run's JSON, CSV and PNG files, and predicts nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from markupsafe import Markup

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.figures import to_svg
from cxr_fastai.core.files import atomic, write_text
from cxr_fastai.core.run import Run, read_json
from cxr_fastai.core.templates import data_uri, fill
from cxr_fastai.data.auditing import NOT_TRAINABLE, TOO_SMALL
from cxr_fastai.data.find import safe_path, short_path
from cxr_fastai.data.items import identify_images
from cxr_fastai.data.splits import doubt_validation, leaking_patients
from cxr_fastai.evaluation.intervals import Estimate, describe
from cxr_fastai.evaluation.metrics import AT_A_THRESHOLD, FEW, OVERALL, TARGETS, is_complete, name_figure
from cxr_fastai.evaluation.plots import CHECKED, EPOCHS, plot_checked, plot_epochs, plot_robustness
from cxr_fastai.evaluation.thresholds import threshold_table
from cxr_fastai.images.corruptions import summarise
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.decision import Decision
from cxr_fastai.interpretation.checks import CHECKS, tell
from cxr_fastai.interpretation.interpretation import CURVES, image_picture, typical_hits, worst_errors
from cxr_fastai.publishing.checklist import TOPICS
from cxr_fastai.publishing.model_card import NOT_A_DEVICE, OUTSIDE, count_kinds, describe_run, render_card, reproduce

SPLITS = ('test', 'valid', 'train')
"""What the report is about, in order of preference."""
SECTIONS = {
    'summary': 'Summary',
    'data': 'Data',
    'training': 'Training',
    'performance': 'Performance',
    'calibration': 'Calibration',
    'thresholds': 'Thresholds',
    'groups': 'Groups',
    'robustness': 'Robustness',
    'images': 'Images',
    'maps': 'Whether maps can be believed',
    'card': 'Model card',
    'checklist': 'Checklist',
    'reproduce': 'How to reproduce it',
}


def report(run: Run, audit: Path | None = None, hide_names: bool = False) -> Path:
    """Write `report.html` and `model_card.md` into `run` and return the page's path.

    `audit` is the folder of a `data audit` of its images (default: that of `find_audit`). With `hide_names`, images
    whose names may be a person's are called by numbers. Raises `UsageError` where nothing was evaluated yet, or for
    another set's audit.
    """
    if not run.metrics:
        raise UsageError(f'{run.path}: nothing was evaluated yet: `cxr-fastai evaluate {run.path}`.')
    split = next(split for split in SPLITS if split in run.metrics)
    check_fresh(run, split)
    findings = read_audit(audit, run) if audit else find_audit(run)
    write_text(run / 'report.html', render(run, split, findings, hide_names))
    write_text(run / 'model_card.md', render_card(run, split))
    return run / 'report.html'


def check_fresh(run: Run, split: str) -> None:
    """Raise `UsageError` where the metrics of `split` are of an older version, other predictions or another network."""
    metrics, n = run.metrics[split], len(run.predicted(split))
    why = (
        'are of an older version'
        if not is_complete(metrics)
        else f'are of {metrics["n"]} images, predictions.csv of {n}'
        if metrics['n'] != n
        else 'are of another network'
        if not _is_of(run, metrics)
        else None
    )
    if why:
        raise UsageError(f'{run.path}: the metrics of {split} {why}: `cxr-fastai evaluate {run.path} --split {split}`.')


def render(run: Run, split: str, audit: dict[str, Any] | None = None, hide_names: bool = False) -> str:
    """The report about `split` as HTML, with everything that it shows inside."""
    metrics, predictions = run.metrics[split], run.predicted(split)
    own, check = run.items[run.items.split == split], _checked_maps(run)
    facts = {
        'metrics': metrics,
        'split': split,
        'run': run,
        'targets': judge_targets(metrics),
        'audit': audit,
        'facts': describe_run(run),
        'counts': count_kinds(run),
        'flow': describe_flow(run),
        'command': reproduce(run, split),
        'doubt': doubt_validation(run.items),
        'leaks': len(leaking_patients(run.items)),
        'valid': run.metrics.get('valid') if split != 'valid' else None,
        'decision': Decision.behind(run, metrics),
        'elsewhere': not set(predictions.path) <= set(own.path),
        'begun': run.noted('start', 'resume'),
        'pictures': draw(run, predictions, metrics, split, check),
        'thresholds': _thresholds(predictions, metrics),
        'robustness': _robustness(run, split),
        'maps': check,
        'images': show_images(run, predictions, hide_names),
    }
    sections = {name: title for name, title in SECTIONS.items() if facts.get(name, True) is not None}
    told = {
        *sections,
        *(['internal'] if split == 'test' and not facts['elsewhere'] else []),
        *(['origin'] if 'origin' in facts['begun'] else []),
        *(['cams'] if any(image['cam'] for images in facts['images'].values() for image in images) else []),
    }
    return fill(
        'report.html',
        **facts,
        sections=sections,
        topics=TOPICS,
        told=told,
        say=describe,
        name_figure=name_figure,
        overall=OVERALL,
        at_a_threshold=AT_A_THRESHOLD,
        few=FEW,
        checks=CHECKS,
        tell=tell,
        not_a_device=NOT_A_DEVICE,
        outside=OUTSIDE,
    )


def judge_targets(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target of the specification: whether the figure meets it, and whether its interval is sure of that."""
    return [
        {'name': name, 'target': target, 'estimate': metrics[name], 'verdict': _verdict(metrics[name], target)}
        for name, target in TARGETS.items()
    ]


def describe_flow(run: Run) -> dict[str, Any]:
    """How many images the run found and could not read, what went into each split, and how valid was chosen."""
    used, valid = (
        run.used_items,
        {
            'official': 'the images of the folder val',
            'patients': (
                'a tenth of the patients of train and val, drawn by the seed, with the shares of the classes kept'
            ),
        },
    )
    return {
        'found': len(run.items),
        'patients': run.items.patient.nunique(),
        'limit': run.recipe.limit,
        'unreadable': len(run.items) - len(used),
        'valid': valid[run.recipe.valid],
        'splits': {split: rows.label.value_counts().sort_index().to_dict() for split, rows in used.groupby('split')},
    }


def read_audit(folder: Path, run: Run) -> dict[str, Any]:
    """What `data audit` found of the images of `run`. Raises `UsageError` where there is no audit, or another one's."""
    path = folder / 'audit.json'
    if not path.is_file():
        raise UsageError(f'{path}: no such file: `cxr-fastai data audit --out {folder}` writes it.')
    audit = read_json(path)
    if not isinstance(audit, dict) or audit.get('identity') != identify_images(run.items):
        raise UsageError(f'{path} is about other images than those of the run: audit these.')
    return audit | {
        'findings': [finding for finding in audit['findings'] if finding['name'] not in (NOT_TRAINABLE, TOO_SMALL)]
    }  # the run chose its splits


def find_audit(run: Run) -> dict[str, Any] | None:
    """The audit in `audit/`, here or beside the run, where `data audit` leaves it, if it is of the images of `run`."""
    for folder in (Path('audit'), run.path.parent / 'audit'):
        with suppress(UsageError):
            return read_audit(folder, run)
    return None


def show_images(run: Run, predictions: pd.DataFrame, hide_names: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The worst errors and typical hits, each with its name, truth, probability, and small pictures of image and map
    (None where there is none)."""
    numbers = {path: number for number, path in enumerate(predictions.path, 1)}
    chosen = {'errors': worst_errors(predictions), 'hits': typical_hits(predictions)}
    name = lambda path: safe_path(path, numbers[path]) if hide_names else short_path(path)
    return {
        kind: [
            {
                'name': name(row.path),
                'label': row.label,
                'p': row.p_pneumonia,
                'picture': _picture(image_picture(run, row.path)),
                'cam': _picture(image_picture(run, row.path, 'cams')),
            }
            for row in rows.itertuples()
        ]
        for kind, rows in chosen.items()
    }


def draw(
    run: Run, predictions: pd.DataFrame, metrics: dict[str, Any], split: str, check: dict[str, Any] | None = None
) -> dict[str, Markup]:
    """Every figure of the page as an SVG, by name; `check` is what was found of its maps."""
    figures = {part: plot_epochs(run.history, part) for part in EPOCHS}
    if metrics['auc']['value'] is not None:
        figures |= {name: plot(predictions, metrics, f'{split} split') for name, plot in CURVES.items()}
    rows = _robust_rows(run, split)
    if rows is not None:
        figures['robustness'] = plot_robustness(rows, f'{split} split', columns=2)
    if check and 'stages' in check:
        figures |= {name: plot_checked(check, name) for name in CHECKED}
    return {name: Markup(to_svg(figure, describe_plot(name, metrics))) for name, figure in figures.items()}


def describe_plot(name: str, metrics: dict[str, Any]) -> str:
    """What the figure `name` shows, for those who cannot see it."""
    words = {
        'losses': 'training and validation loss by epoch',
        'validation': 'validation figures by epoch',
        'roc': f'ROC curve, AUC {describe(metrics["auc"])}',
        'precision_recall': f'precision-recall curve, average precision {describe(metrics["average_precision"])}',
        'calibration': f'reliability diagram, slope {describe(metrics["calibration"]["slope"])}',
        'scores': 'histograms of the probability of pneumonia for normal images and for pneumonia',
        'net_benefit': 'decision curve beside treating everybody and nobody',
        'risk_coverage': 'accuracy against the share of images that are kept',
        'robustness': 'AUC against the strength of each corruption',
        'deletion': 'probability while pixels become those of a normal image, and while they come back',
        'forgetting': 'similarity of maps while layers are drawn anew, beside that of two images',
        'place': 'the mean map, and the box of the thorax',
    }
    return f'Figure: {words[name]}'


def _verdict(estimate: Estimate, target: float) -> tuple[str, str]:
    """A word that the page colours, and the verdict."""
    if estimate['value'] is None:
        return 'warning', 'cannot be told'
    if estimate['value'] >= target:
        return ('good', 'met') if estimate['low'] >= target else ('good', 'met, though the interval reaches below it')
    return ('error', 'missed') if estimate['high'] < target else ('error', 'missed, though the interval reaches it')


def _thresholds(predictions: pd.DataFrame, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return threshold_table(predictions, [metrics['threshold']]).to_dict('records')


def _robust_rows(run: Run, split: str) -> pd.DataFrame | None:
    if not (run / 'robustness.csv').exists():
        return None
    rows = run.robustness[lambda table: table.split == split]
    return rows if len(rows) else None


def _robustness(run: Run, split: str) -> dict[str, Any] | None:
    rows = _robust_rows(run, split)
    if rows is None:
        return None
    kinds = rows[rows.strength > 0].groupby('corruption', sort=False)
    worst = [{'kind': kind, 'mean': found.auc.mean(), 'worst': found.auc.min()} for kind, found in kinds]
    return summarise(rows) | {'kinds': worst}


def _checked_maps(run: Run) -> dict[str, Any] | None:
    """What `explain --check` found of the run's network; None where it found nothing, or of another network."""
    path = run / 'figures' / 'cam_check.json'
    check = read_json(path) if path.is_file() else None
    return check if check and _is_of(run, check) else None


def _is_of(run: Run, found: dict[str, Any]) -> bool:
    """Whether `found` is about the network of `run`, as far as that is there."""
    try:
        return identify_network(run.path) == found['model']
    except UsageError:
        return True


def _picture(path: Path) -> str | None:
    return data_uri(path.read_bytes(), 'image/png') if path.is_file() else None


BROWSERS = (
    'chromium',
    'chromium-browser',
    'google-chrome',
    'google-chrome-stable',
    'chrome',
    'msedge',
    '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
)
QUIET = (
    '--headless',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-pdf-header-footer',
)
PATIENCE = 120
"""Seconds that printing may take."""


def find_browser() -> str | None:
    """The Chromium, Chrome or Edge on this machine, if there is one."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def print_pdf(page: Path, pdf: Path) -> None:
    """Print the HTML file `page` to `pdf`, atomically. Raises `CXRError` where no browser is found or it fails."""
    if not (browser := find_browser()):
        raise CXRError(f'--pdf: neither Chromium nor Chrome was found: install one, or print {page} from a browser.')
    sandbox = ['--no-sandbox'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else []  # root has none
    with TemporaryDirectory() as profile, atomic(pdf) as temporary:
        made = Path(profile) / 'page.pdf'
        command = [
            browser,
            *QUIET,
            *sandbox,
            f'--user-data-dir={profile}/user',
            f'--print-to-pdf={made}',
            page.resolve().as_uri(),
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise CXRError(f'--pdf: {browser} failed ({error}): print {page} from a browser.') from error
        if not made.is_file():
            raise CXRError(f'--pdf: {browser} wrote nothing: print {page} from a browser.')
        temporary.write_bytes(made.read_bytes())

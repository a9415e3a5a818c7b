"""The JSON documents that commands print with `--json`, one for each command, which programs can rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.cli.console import document
from cxr_fastai.cli.failures import Failure

if TYPE_CHECKING:
    import pandas as pd

    from cxr_fastai.core.errors import ImageError
    from cxr_fastai.core.run import Run
    from cxr_fastai.evaluation.comparison import Comparison
    from cxr_fastai.inference.tables import Predictions


def print_json(value: Any) -> None:
    """Print `value` to stdout as one JSON document, in ASCII. NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    # Without colors: 10,000 rows take 0.7 s to print, with colors 5.5 s.
    document.print(text, soft_wrap=True, markup=False, emoji=False, highlight=False)


def _finite(value: Any) -> Any:
    """Return `value` with None in place of numbers that JSON cannot express."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def prediction_document(
    predictions: Predictions,
    model: Path,
    files: Mapping[str, Path | None],
    unreported: Sequence[tuple[str, ImageError]] | None,
    failed_maps: Sequence[tuple[str, ImageError]] | None,
) -> dict[str, Any]:
    """Return the document of `predict`: the model and its threshold, the counts, and the rows of all images.

    `files` are what was written, by field. `unreported` and `failed_maps` have the path and the reason of each image
    without a DICOM report or a map; None if nobody asked for them.
    """
    from cxr_fastai.inference.pretrained import name_model
    from cxr_fastai.inference.tables import with_numbers

    predictor = predictions.predictor
    return {
        'model': name_model(model),
        'threshold': predictor.threshold,
        'threshold_rule': predictor.config.threshold_rule,
        'calibrated': predictor.calibrated,
        'tta': predictor.tta,
        'images': len(predictions.rows),
        'positives': predictions.positives,
        'failures': len(predictions.failures),
        **{field: _text(path) for field, path in files.items()},
        'unreported': _reasons(unreported),
        'failed_maps': _reasons(failed_maps),
        'rows': [with_numbers(row) for row in predictions.rows],
    }


def _reasons(errors: Sequence[tuple[str, ImageError]] | None) -> list[dict[str, str]] | None:
    """Return the path, the code and the message of each image, in the form of rows."""
    if errors is None:
        return None
    failures = [(path, Failure.from_error(error)) for path, error in errors]
    return [{'path': path, 'code': failure.code, 'message': failure.reason} for path, failure in failures]


def evaluated_run(
    run: Run,
    metrics: dict[str, Any],
    figures: list[str],
    robustness: pd.DataFrame | None,
    shift: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the part of the document of `evaluate` about one run."""
    return {
        'run': str(run.path),
        'metrics': metrics,
        'figures': figures,
        'robustness': None if robustness is None else robustness.to_dict('records'),
        'shift': shift,
    }


def evaluation_document(
    split: str, runs: list[dict[str, Any]], comparison: Comparison | None, folder: Path | None
) -> dict[str, Any]:
    """Return the document of `evaluate`: the metrics of each run, and the comparison of several."""
    compared = None
    if comparison is not None:
        contents = asdict(comparison)
        compared = {'folder': _text(folder), 'pairs': contents['pairs'], 'seeds': contents['seeds']}
    return {'split': split, 'runs': runs, 'comparison': compared}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

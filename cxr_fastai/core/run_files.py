"""Reading of the files in a run folder, which may come from somebody else, and the hashes that bind results together.

`evaluate` writes three files that belong together: `predictions.csv`, `decision.json`, and last `metrics.json`, which
contains the hashes of what is in the other two and of the metrics themselves. Every reader therefore notices a crash
between the writes, and an edit of one of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.files import unescape_formula
from cxr_fastai.core.foreign import MAX_JSON, read_bytes, read_text
from cxr_fastai.core.foreign import parse_json as parse_foreign_json
from cxr_fastai.core.recipe import SPLITS, VOCAB
from cxr_fastai.core.schemas import Anything, Fields, Flag, Integer, Number, Rule, Table, Text, check_object

if TYPE_CHECKING:
    import pandas as pd

MAX_TABLE = 2**29
"""Largest CSV file of a run, in bytes."""
OUT_OF_FOLD = 'out_of_fold.csv'
"""Predictions for the training images of a run by networks that were not trained on them; see `Run.out_of_fold`."""
WRITERS = {
    'items.csv': 'train',
    'history.csv': 'train',
    'predictions.csv': 'evaluate',
    'robustness.csv': 'evaluate --robustness',
    OUT_OF_FOLD: 'evaluate',
}
"""Table to the command that writes it."""
TEXT_COLUMNS = ('path', 'label', 'split', 'patient', 'kind', 'prediction', 'phase', 'model', 'sha256', 'fold')
"""Columns that are read as text: the patient `007` is not the number 7, and the patient `NA` is not missing."""
EXACT_COLUMNS = ('p_pneumonia', 'loss', 'threshold')
"""Columns that are read to the last digit: a probability may lie next to the threshold."""
NUMBERS = {
    'items.csv': (),
    'history.csv': ('epoch', 'lr', 'train_loss', 'valid_loss', 'accuracy', 'roc_auc', 'sensitivity', 'specificity')
    + ('seconds',),
    'predictions.csv': ('p_pneumonia', 'loss'),
    OUT_OF_FOLD: ('p_pneumonia', 'loss'),
    'robustness.csv': ('strength', 'n', 'auc', 'auc_low', 'auc_high', 'sensitivity', 'specificity'),
}
"""Table to the columns of numbers that it must have. Cells may be empty."""
TEXTS = {
    'items.csv': ('path', 'label', 'split', 'patient', 'kind'),
    'history.csv': ('phase',),
    'predictions.csv': ('path', 'label', 'split', 'patient', 'prediction'),
    OUT_OF_FOLD: ('path', 'label', 'split', 'patient', 'prediction', 'fold'),
    'robustness.csv': ('corruption', 'split', 'model', 'sha256'),
}
"""Table to the columns of texts that it must have."""
CHOICES = {'label': VOCAB, 'prediction': VOCAB, 'split': SPLITS, 'tta': (True, False)}
"""Column to the values that it may have."""
UNIQUE_COLUMNS = {'items.csv': ['path', 'split'], 'predictions.csv': ['path', 'split'], OUT_OF_FOLD: ['path']}
"""Table to the columns that identify a row."""
ROBUSTNESS_FACTS = ('threshold', 'tta')
"""Columns of the robustness table that say how the images were predicted. A table of an earlier version lacks them."""
TRAINING_FACTS = ('recipe.json', 'items.csv', 'history.csv')
"""The files of a training that predictions and reports depend on, beside the network itself."""
MISMATCHES = {
    'predictions': 'are of other predictions than those in predictions.csv',
    'decision': 'were computed with another decision than that in decision.json',
    'training': 'are of another training than that in recipe.json, items.csv and history.csv',
    'metrics': 'were changed after they had been computed',
}
"""What the hashes of the metrics of a split cover, and what is wrong with the metrics if that does not fit."""

MAX_THRESHOLD = math.nextafter(1, 2)
"""Largest threshold: no image is classified as pneumonia."""
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 1e3
SHA256 = '[0-9a-f]{64}'
ESTIMATE = Fields({name: Number(-1e6, 1e6, optional=True) for name in ('value', 'low', 'high')}, required=False)
"""A metric with its interval, as `evaluation.intervals.make_estimate` returns it."""
RATES = ('sensitivity', 'specificity')
DECISION: dict[str, Rule] = {
    'threshold': Number(0, MAX_THRESHOLD),
    'rule': Text(200),
    'temperature': Number(MIN_TEMPERATURE, MAX_TEMPERATURE, optional=True, required=False),
    'model': Text(64, f'({SHA256})?', required=False),
    'margin': Text(2000, required=False),
    'is_default': Flag(required=False),
    'tta': Flag(required=False),
    'valid': Fields({'n': Integer(0, required=False)} | dict.fromkeys(RATES, ESTIMATE), required=False),
}
"""The fields of `decision.json`."""
METRICS: dict[str, Rule] = {
    'n': Integer(1, required=False),
    'threshold': Number(0, MAX_THRESHOLD, required=False),
    'threshold_rule': Text(200, required=False),
    'model': Text(64, f'({SHA256})?', required=False),
    'tta': Flag(required=False),
    'hashes': Fields(dict.fromkeys(MISMATCHES, Text(64, SHA256, required=False)), required=False),
}
"""The fields of a split in `metrics.json` that say what the metrics are of. Other fields are the metrics."""
EVALUATE_AGAIN = 'Evaluate the run again.'
AGAIN = 'Write it again with the command that created it.'


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in the JSON file `path`. Raises `UsageError` if the file is damaged."""
    values = parse_foreign_json(_read(path, MAX_JSON), path, AGAIN, UsageError)
    return check_object(values, {}, path, AGAIN, UsageError) | values


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        return read_bytes(path, max_bytes)
    except UsageError:
        raise
    except CXRError as error:  # too large
        raise UsageError(str(error)) from None


def read_decision(path: Path) -> dict[str, Any]:
    """Return the fields of the file `decision.json` at `path`; none if there is no such file.

    Raises `UsageError` if the threshold, the temperature or the rule has another type, or is out of range.
    """
    if not path.exists():
        return {}
    decision = read_json(path)
    check_object(decision, DECISION, path, f'Delete it. {EVALUATE_AGAIN}', UsageError)
    return decision


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics by split in the file `metrics.json` at `path`; none if there is no such file.

    Raises `UsageError` if it is damaged.
    """
    if not path.exists():
        return {}
    metrics = read_json(path)
    rule = Table(Anything(), '|'.join(SPLITS))
    check_object({'metrics': metrics}, {'metrics': rule}, path, EVALUATE_AGAIN, UsageError)
    for split, values in metrics.items():
        check_object(values, METRICS, f'{path}: {split}', EVALUATE_AGAIN, UsageError)
    return metrics


def read_table(path: Path) -> pd.DataFrame:
    """Return the table in the CSV file `path` of a run.

    Raises `UsageError` if it is missing or damaged: a column is missing, a probability is not in [0, 1], a label or
    split is unknown, or a row occurs twice.
    """
    if not path.exists():
        raise UsageError(f'{path} is missing: `cxr-fastai {WRITERS[path.name]}` writes it.')
    try:
        table = _parse_table(read_text(path, MAX_TABLE))
        _check_table(table, path.name)
    except UsageError:
        raise
    except (CXRError, ValueError, RecursionError, OverflowError) as error:
        problem = first_line(error).removeprefix(f'{path}: ')
        raise UsageError(f'{path}: damaged ({problem}). {AGAIN}') from None
    return table


def _parse_table(text: str) -> pd.DataFrame:
    import pandas as pd

    columns = pd.read_csv(StringIO(text), nrows=0).columns
    text_columns = [name for name in columns if name in TEXT_COLUMNS]
    exact_columns = [name for name in columns if name in EXACT_COLUMNS]
    numbers = columns.difference([*text_columns, *exact_columns])
    table = pd.read_csv(
        StringIO(text),
        dtype=dict.fromkeys(text_columns, str),
        keep_default_na=False,
        na_values={name: [''] for name in numbers},
        converters=dict.fromkeys(exact_columns, float),
        index_col=False,
    )
    for name in text_columns:
        table[name] = table[name].map(unescape_formula)
    return table


def _check_table(table: pd.DataFrame, name: str) -> None:
    missing = [column for column in (*TEXTS[name], *NUMBERS[name]) if column not in table]
    if missing:
        raise ValueError(f'no column {" or ".join(missing)}')
    for column in NUMBERS[name]:
        if len(table) and table[column].dtype.kind not in 'iuf':
            raise ValueError(f'the column {column} contains other values than numbers')
    for column, values in CHOICES.items():
        unknown = ~table[column].isin(values) if column in table and len(table) else []
        if any(unknown):
            raise ValueError(
                f'{column} {table[column][unknown].iloc[0]!r:.80} is not one of {", ".join(map(str, values))}'
            )
    if 'p_pneumonia' in table and not table.p_pneumonia.between(0, 1).all():
        p = table.p_pneumonia[~table.p_pneumonia.between(0, 1)].iloc[0]
        raise ValueError(f'the probability {p:g} is not between 0 and 1')
    repeated = table.duplicated(UNIQUE_COLUMNS[name]) if name in UNIQUE_COLUMNS else []
    if any(repeated):
        raise ValueError(f'the image {table.path[repeated].iloc[0]!r:.80} occurs twice')


def hash_results(
    predictions: pd.DataFrame | None,
    decision: Mapping[str, Any],
    metrics: Mapping[str, Any],
    folder: Path,
    parts: Iterable[str] = tuple(MISMATCHES),
) -> dict[str, str]:
    """Return the SHA-256 of each of the `parts` of `MISMATCHES`.

    They cover the `predictions` of a split, which other parts do not need, the `decision`, the files of the training in
    `folder`, and the `metrics`.
    """
    hashes = {
        'predictions': lambda: _hash_table(predictions, 'predictions.csv', 'split', lambda number: float(number).hex()),
        'decision': lambda: _hash(_list_decision(decision)),
        'training': lambda: _hash([_hash_file(folder / name) for name in TRAINING_FACTS]),
        'metrics': lambda: _hash({name: value for name, value in metrics.items() if name != 'hashes'}),
    }
    return {part: hashes[part]() for part in parts}


def _list_decision(decision: Mapping[str, Any]) -> list[Any]:
    """Return the values of a decision that its hash covers.

    `tta` is covered where it is true, so that decisions from before this field existed keep their hash.
    """
    return [decision.get(name) for name in DECISION if name != 'tta' or decision.get(name)]


def _hash_table(rows: Any, table: str, left_out: str, write: Callable[[float], str]) -> str:
    """Return the SHA-256 of the texts but one, and of the numbers, of `rows` of a `table`, in order."""
    texts = [rows[name].astype(str) for name in TEXTS[table] if name != left_out]
    numbers = [rows[name].map(write) for name in NUMBERS[table]]
    return _hash([*map(list, zip(*texts, *numbers, strict=True))])


def _hash_file(path: Path) -> str:
    return hashlib.sha256(_read(path, MAX_TABLE)).hexdigest() if path.exists() else ''


def hash_rows(rows: pd.DataFrame) -> str:
    """Return the SHA-256 of the texts, numbers and `ROBUSTNESS_FACTS` of `rows` of the robustness table, in order."""
    table = _hash_table(rows, 'robustness.csv', 'sha256', lambda number: f'{number:.9g}')
    return _hash([table, *(rows[name].astype(str).tolist() for name in ROBUSTNESS_FACTS)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

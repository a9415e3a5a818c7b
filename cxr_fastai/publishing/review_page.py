"""`save_review` writes a label review as a table and as one self-contained HTML page with pictures and maps."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, check_writable, csv_text, write_text, writing
from cxr_fastai.core.foreign import read_bytes
from cxr_fastai.core.templates import data_uri, render_template
from cxr_fastai.data.find import shown_path
from cxr_fastai.data.splits import UNKNOWN_PATIENT
from cxr_fastai.evaluation.label_review import CONTRADICTS, DUPLICATE, WEAK, LabelReview
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.interpretation.explainer import Explainer, Subject, read_subjects
from cxr_fastai.interpretation.overlays import Explanation, blend
from cxr_fastai.publishing.model_card import NOT_A_DEVICE
from cxr_fastai.publishing.thumbnails import compress

TABLE = 'review.csv'
PAGE = 'review.html'
MARK = re.compile(r'<meta name="review" content="([0-9a-f]{64})">')
"""The line of the page that contains the SHA-256 of its table."""
MAX_BYTES = 2**28
"""Largest table or page that is read, in bytes."""
MAX_PICTURES = 400
"""Number of images that the page shows; the table lists all."""
SECTIONS = {
    DUPLICATE: 'Duplicates with another label',
    CONTRADICTS: 'Predictions that contradict the label',
    WEAK: 'Predictions that agree weakly with the label',
}
"""Reason to the title of its images on the page."""


@dataclass(frozen=True)
class Pictures:
    """Small JPEG files of an image, and of it with its map.

    `overlay` is None if the map contains no evidence, or if the network has no maps (`has_map`).
    """

    image: bytes
    overlay: bytes | None
    has_map: bool = True


def save_review(
    review: LabelReview, folder: StrPath, hide_names: bool = False, device: str = 'auto', batch_size: int = 32
) -> Path:
    """Write `review.csv` and the self-contained page `review.html` into `folder`; return the path of the page.

    The maps are those of the network that scored the image, which was not trained on it; `device` and `batch_size` are
    those of the networks. With `hide_names` the page has numbers instead of the names of images and patients; the
    table keeps the paths. Files of an earlier review are replaced. Raises `UsageError` for other files, see
    `check_replaceable`, and `OutputError`.
    """
    folder = Path(folder)
    check_replaceable(folder)
    pictures = draw_pictures(review, device, batch_size)
    table = csv_text(review.table)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TABLE, table)
    write_text(folder / PAGE, render(review, pictures, _hash(table.encode(errors='backslashreplace')), hide_names))
    return folder / PAGE


def check_replaceable(folder: StrPath) -> None:
    """Raise `UsageError` if `folder` contains a `review.csv` or `review.html` that `save_review` would not replace.

    These are files of other programs, and a table that somebody has edited: it may contain hours of work.
    """
    folder = Path(folder)
    check_writable(folder)
    table, page = folder / TABLE, folder / PAGE
    match = MARK.search(read_bytes(page, MAX_BYTES).decode(errors='replace')) if page.exists() else None
    if page.exists() and match is None:
        raise UsageError(f'{page}: not a page of `data review`, so it was not replaced. Choose another --out.')
    if table.exists() and (match is None or _hash(read_bytes(table, MAX_BYTES)) != match[1]):
        raise UsageError(
            f'{table}: was edited since `data review` wrote it, or is of another program, so it was not replaced. '
            'Rename it, or choose another --out.'
        )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def draw_pictures(review: LabelReview, device: str = 'auto', batch_size: int = 32) -> dict[str, Pictures]:
    """Return the pictures of the images that the page shows, by path; none of an image that may show a name."""
    shown = review.table.head(MAX_PICTURES)
    pictures = {}
    for fold, rows in shown.groupby('fold', sort=True):
        subjects = [Subject(review.root / row.path, row.path, row.label, row.p_pneumonia) for row in rows.itertuples()]
        explainer = _load_explainer(review.series.folder(str(fold)), device)
        if explainer:
            explanations = explainer.explain(subjects, batch_size)
        else:
            explanations = read_subjects(subjects, 0.5, Preprocessing.of(review.series.recipe))
        for path, explanation in zip(rows.path, explanations, strict=True):
            if isinstance(explanation, Explanation):
                pictures[path] = _draw(explanation, explainer is not None)
    return pictures


def _load_explainer(run: Path, device: str) -> Explainer | None:
    """Return the explainer of the network of a `run`; None, with a warning, if its architecture has no maps."""
    try:
        return Explainer.load(run, device=device)
    except UsageError as error:
        warnings.warn(f'{run.name}: the page has no maps of this network ({error})', CXRWarning, stacklevel=3)
        return None


def _draw(explanation: Explanation, has_map: bool) -> Pictures:
    overlay = None if explanation.is_empty else compress(blend(explanation))
    return Pictures(compress(explanation.image), overlay, has_map)


def render(review: LabelReview, pictures: dict[str, Pictures], table_hash: str, hide_names: bool = False) -> str:
    """Return the page as HTML without scripts and external files, with the `pictures` of its images by path.

    `table_hash` is the SHA-256 of `review.csv`. `hide_names` is that of `save_review`.
    """
    shown = review.table.head(MAX_PICTURES)
    numbers = {path: number for number, path in enumerate(review.predictions.path, 1)}
    names = {path: shown_path(path, number, hide_names) for path, number in numbers.items()}
    entries = [_describe(row, names, pictures.get(str(row.path)), hide_names) for row in shown.itertuples()]
    return render_template(
        'review.html',
        review=review,
        folder='folds' if hide_names else review.series.path.resolve().name,
        table_hash=table_hash,
        sections={
            title: [entry for entry in entries if entry['reason'] == reason] for reason, title in SECTIONS.items()
        },
        counts={title: review.count(reason) for reason, title in SECTIONS.items()},
        not_shown=len(review.table) - len(shown),
        not_a_device=NOT_A_DEVICE,
    )


def _describe(row: Any, names: dict[str, str], pictures: Pictures | None, hide_names: bool) -> dict[str, Any]:
    """Return what the page shows of a `row` of the table."""
    overlay = pictures.overlay if pictures else None
    return {
        'rank': row.rank,
        'name': names[row.path],
        'label': row.label,
        'p': row.p_pneumonia,
        'fold': row.fold,
        'patient': '' if hide_names else _patient(row.patient),
        'reason': row.reason,
        'duplicate_of': names[row.duplicate_of] if row.duplicate_of else '',
        'image': data_uri(pictures.image, 'image/jpeg') if pictures else None,
        'has_map': pictures.has_map if pictures else False,
        'overlay': data_uri(overlay, 'image/jpeg') if overlay else None,
    }


def _patient(patient: Any) -> str:
    """Return the patient of an image; empty if it is unknown."""
    return '' if pd.isna(patient) or str(patient).startswith(UNKNOWN_PATIENT) else str(patient)

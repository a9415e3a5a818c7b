"""`save_prediction_page` writes predictions as one self-contained HTML page with pictures, maps and reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_fastai.core.errors import UsageError, visible
from cxr_fastai.core.files import StrPath, check_writable, write_text
from cxr_fastai.core.paths import HUB_PREFIX
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.templates import data_uri, render_template
from cxr_fastai.data.find import short_path
from cxr_fastai.images.decode import ImageLike
from cxr_fastai.inference.gate import OUT_OF_DISTRIBUTION
from cxr_fastai.inference.predictor import Row
from cxr_fastai.inference.tables import Predictions
from cxr_fastai.publishing.model_card import NOT_A_DEVICE
from cxr_fastai.publishing.thumbnails import Thumbnail, draw_maps, read_thumbnails

SUFFIXES = ('.html', '.htm')
MAX_SHOWN = 1000
"""Number of predictions that the page shows."""
MAX_LISTED = 100
"""Number of images without a prediction for one reason that the page lists."""


def save_prediction_page(
    predictions: Predictions,
    images: Sequence[ImageLike],
    page: StrPath,
    model: StrPath,
    maps: bool = False,
    drawn: Mapping[int, bytes | None] | None = None,
) -> Path:
    """Write the predictions of `images` to the new file `page`, and return its path.

    The page has a small picture of each image with its probability, its decision and, with `maps`, a map of what
    influenced the score; the images without a probability are grouped by the reason. Of more than `MAX_SHOWN`
    predictions, it shows those with the highest probabilities. `model` is the path or the name (see
    `pretrained.name_model`) that it shows. `drawn` has the maps of the `shown_positions` by position, if the caller has
    drawn them already (see `thumbnails.draw_map`).

    Raises `UsageError` if `page` exists (see `check_page`), or with `maps` if the network has none; `OutputError`.
    """
    page = Path(page)
    check_page(page)
    shown = shown_positions(predictions)
    rejected = [index for index, row in enumerate(predictions.rows) if row['code'] == OUT_OF_DISTRIBUTION]
    visible_images = [*shown, *rejected[:MAX_LISTED]]
    predictor = predictions.predictor
    pictures = read_thumbnails([images[index] for index in visible_images], predictor.config.modality)
    thumbnails = dict(zip(visible_images, pictures, strict=True))
    if maps and drawn is None:
        drawn = dict(zip(shown, draw_maps(predictor, [images[index] for index in shown]), strict=True))
    write_text(page, render(predictions, thumbnails, drawn or {}, model), '--html')
    return page


def shown_positions(predictions: Predictions) -> list[int]:
    """Return the positions of the predictions that the page shows with a picture, the highest probability first."""
    return _by_probability(predictions)[:MAX_SHOWN]


def check_page(page: StrPath) -> None:
    """Raise `UsageError` if `page` is no name of a new HTML file, and `OutputError` if it cannot be written."""
    page = Path(page)
    if page.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--html {page}: the name must end in .html, so that browsers show it.')
    if not page.parent.is_dir():
        raise UsageError(f'{page}: the folder {page.parent} does not exist. Create it, or choose another --html.')
    if page.exists():
        raise UsageError(f'{page} exists already and was not changed. Choose another --html, or delete it.')
    check_writable(page.parent, '--html')


def _by_probability(predictions: Predictions) -> list[int]:
    """Return the positions of the rows with a probability, the highest first."""
    return sorted(predictions.scored, key=lambda index: -float(predictions.rows[index]['p_pneumonia']))


def render(
    predictions: Predictions, thumbnails: dict[int, Thumbnail], maps: Mapping[int, bytes | None], model: StrPath
) -> str:
    """Return the page as HTML without scripts and external files.

    `thumbnails` are the pictures by the position of the row; the page shows the predictions that have one. `maps` are
    PNG files by position, see `thumbnails.draw_maps`; without any, the page says nothing about maps.
    """
    rows, predictor = predictions.rows, predictions.predictor
    shown = [index for index in _by_probability(predictions) if index in thumbnails]
    distances = {index: abs(float(rows[index]['p_pneumonia']) - predictor.threshold) for index in shown}
    ranks = {index: rank for rank, index in enumerate(sorted(shown, key=distances.__getitem__))}
    entries = [
        _describe(rows[index], thumbnails[index], maps.get(index)) | {'file': index, 'near': ranks[index]}
        for index in shown
    ]
    scored = len(rows) - len(predictions.failures)
    return render_template(
        'predictions.html',
        model=visible(_short_model(str(model))),
        predictor=predictor,
        images=len(rows),
        counts={VOCAB[POSITIVE]: predictions.positives, VOCAB[1 - POSITIVE]: scored - predictions.positives},
        entries=entries,
        not_shown=scored - len(shown),
        has_maps=bool(maps),
        failure_groups=_group_failures(predictions, thumbnails),
        failures=len(predictions.failures),
        max_listed=MAX_LISTED,
        not_a_device=NOT_A_DEVICE,
    )


def _short_model(model: str) -> str:
    """Return the last part of the path of a model; the name of one of the Hub as it is."""
    return model if model.startswith(HUB_PREFIX) else Path(model).name


def _describe(row: Row, thumbnail: Thumbnail, drawn: bytes | None = None) -> dict[str, Any]:
    """Return what the page shows of a row: its texts, and its picture and map as data URIs."""
    return {
        'name': _shown_name(row),
        'p': float(row['p_pneumonia']) if row['status'] == 'ok' else None,
        'prediction': row['prediction'],
        'message': _reason(row),
        'image': data_uri(thumbnail.image, 'image/jpeg') if thumbnail.image else None,
        'note': thumbnail.note,
        'map': data_uri(drawn, 'image/png') if drawn else None,
        'is_empty': drawn == b'',
    }


def _shown_name(row: Row) -> str:
    return visible(short_path(row['path']))


def _reason(row: Row) -> str:
    """Return the message of a row, without the code in front of it."""
    return visible((row['message'] or '').removeprefix(f'{row["code"]}: '))


def _group_failures(predictions: Predictions, thumbnails: dict[int, Thumbnail]) -> list[dict[str, Any]]:
    """Return images without a prediction by reason, the most frequent first; of each reason the first `MAX_LISTED`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(predictions.rows):
        if row['status'] != 'ok':
            groups.setdefault((row['status'], row['code']), []).append(index)
    return [
        {
            'status': status,
            'code': code,
            'count': len(members),
            'reasons': sorted({_reason(predictions.rows[index]) for index in members}),
            'entries': [
                _describe(predictions.rows[index], thumbnails.get(index, Thumbnail(None)))
                for index in members[:MAX_LISTED]
            ],
        }
        for (status, code), members in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]

"""Audit a set of images: leakage, duplicates, unreadable images, small validation splits, shortcuts to the label."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.files import StrPath, write_json, write_text, writing
from cxr_fastai.core.templates import data_uri, render_template
from cxr_fastai.data.find import describe_ignored, short_path, shown_path
from cxr_fastai.data.image_stats import MAX_PAIRS, MIN_CORRELATION, find_duplicates, measure_images
from cxr_fastai.data.items import identify_images, image_root, read_items
from cxr_fastai.data.probes import ANATOMY, LABEL, SHORTCUT_AUC, probe_label, probe_shift
from cxr_fastai.data.splits import (
    check_trainable,
    count_patients,
    describe_patients,
    leaking_patients,
    unknown_patients,
    unknown_patients_warning,
    validation_warning,
)
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.formats import FIGURES, MASKS

EXPECTED_REASONS = ('listed twice', '__MACOSX', '._*', '.DS_Store', 'nested chest_xray', MASKS, FIGURES)
"""Reasons for leaving files out that are no finding, or have a finding of their own."""
NOT_TRAINABLE = 'not trainable with these splits'
SMALL_VALIDATION = 'validation too small to select an epoch'
"""Names of the findings that depend on how a training chooses its splits."""
MAX_SHOWN = 40
"""Pairs of images, or lines, that the page shows for a finding."""
PICTURE_SIZE = 160


@dataclass(frozen=True)
class Finding:
    """An `error` or a `warning` about a set of images.

    Attributes
    ----------
    level : `error` or `warning`.
    name : what is wrong.
    count : how often; None if there is nothing to count.
    advice : details, and what to do.
    images : groups of names: images or patients that belong together, followed by their splits or error code.
    """

    level: str
    name: str
    count: int | None
    advice: str
    images: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    Attributes
    ----------
    data : name of the folder or CSV file.
    images : number of images.
    identity : hash of the images by `identify_images`.
    counts : columns `split label kind images`.
    facts : how the image files are stored.
    probes : columns `probe trait auc`: the AUC of single properties for the label or for a split.
    findings : errors first.
    pictures : small JPEG pictures of the duplicates, by image name.
    """

    data: str
    images: int
    identity: str
    counts: pd.DataFrame
    facts: dict[str, Any]
    probes: pd.DataFrame
    findings: tuple[Finding, ...]
    pictures: dict[str, bytes]

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of `audit.json`: everything but the pictures."""
        return {
            'data': self.data,
            'images': self.images,
            'identity': self.identity,
            'counts': self.counts.to_dict('records'),
            'probes': self.probes.to_dict('records'),
            'facts': self.facts,
            'findings': [asdict(finding) for finding in self.findings],
        }


def audit(
    data: StrPath, workers: int | None = None, hide_names: bool = False, modality: str = '', anatomy: bool = False
) -> Audit:
    """Examine every image of the folder or CSV file `data` with `workers` threads (default: the number of cores).

    With `hide_names` the result contains numbers instead of the names of images, patients and the folder, because names
    can identify a patient. `modality` has the codes of DICOM modalities, such as `RG,CT`, that are accepted besides
    those of radiographs. With `anatomy`, a small network is trained on images without their lungs, which takes minutes:
    see `probe_anatomy`. Raises `CXRError` if there are no images, and `UsageError` for a wrong `modality`.
    """
    parse_modalities(modality)
    data = Path(data)
    items = read_items(data)
    root = image_root(data)
    measurements, thumbnails = measure_images(list(items.path), root, workers, modality)
    images = pd.concat([items, measurements], axis=1)
    images.attrs['ignored'] = items.attrs['ignored']
    images['name'] = [shown_path(path, number, hide_names) for number, path in enumerate(items.path, 1)]
    usable = images[images.code.isna()]
    probes = [probe_label(usable), probe_shift(usable)]
    if anatomy:
        from cxr_fastai.data.anatomy_probe import probe_anatomy

        probes.insert(1, probe_anatomy(usable, root, workers, modality))
    table = pd.concat(probes, ignore_index=True)
    duplicates = find_duplicates(thumbnails, max_pairs=MAX_PAIRS)
    pairs = _describe_pairs(images, duplicates)
    findings = [
        *_find_unreadable(images),
        *_find_burned_in_text(images),
        *_find_leakage(items, hide_names),
        *_find_unknown_patients(items),
        *_find_duplicates(pairs),
        *_find_unfinished_search(duplicates),
        *_find_repeated_rows(images),
        *_find_left_out(images),
        *_find_small_splits(items),
        *_find_shortcuts(table),
    ]
    return Audit(
        data='images' if hide_names else data.resolve().name,
        images=len(items),
        identity=identify_images(items),
        counts=_count_kinds(items),
        facts=_summarise_files(images, usable),
        probes=table,
        findings=tuple(sorted(findings, key=lambda finding: finding.level != 'error')),
        pictures=_draw_pictures(images, pairs, root, modality),
    )


def _count_kinds(items: pd.DataFrame) -> pd.DataFrame:
    counts = items.groupby(['split', 'label', 'kind']).size().rename('images')
    return counts.reindex(['train', 'valid', 'test'], level='split').reset_index()


def save_audit(audit: Audit, folder: StrPath) -> None:
    """Write `audit.json` and the self-contained page `audit.html` into `folder`. Raises `OutputError`."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'audit.json', audit.as_dict())
    write_text(folder / 'audit.html', render(audit))


def render(audit: Audit) -> str:
    """Return the audit as one HTML page without scripts and external files."""
    pictures = {name: data_uri(jpeg, 'image/jpeg') for name, jpeg in audit.pictures.items()}
    return render_template(
        'audit.html',
        audit=audit,
        patients=describe_patients(audit.facts['patients'], audit.facts['unknown_patients']),
        pictures=pictures,
        shortcut_auc=SHORTCUT_AUC,
        min_correlation=MIN_CORRELATION,
        max_shown=MAX_SHOWN,
    )


def _find_unreadable(images: pd.DataFrame) -> list[Finding]:
    unreadable = images[images.code.notna()]
    if unreadable.empty:
        return []
    codes = ', '.join(f'{code} ({n})' for code, n in Counter(unreadable.code).items())
    names = tuple(zip(unreadable['name'], unreadable.code, strict=True))
    return [
        Finding('error', 'unusable images', len(unreadable), f'Error codes: {codes}. Replace or remove them.', names)
    ]


def _find_burned_in_text(images: pd.DataFrame) -> list[Finding]:
    burned_in = images[images.burned_in.eq(True)]  # it is missing for an unreadable image
    if burned_in.empty:
        return []
    advice = (
        'According to the files, the pixels can contain the name of the patient. These images are not shown here. '
        'Do not share them.'
    )
    names = tuple((name,) for name in burned_in['name'])
    return [Finding('warning', 'images with burned-in text', len(burned_in), advice, names)]


def _find_leakage(items: pd.DataFrame, hide_names: bool) -> list[Finding]:
    splits_by_patient = leaking_patients(items)
    if splits_by_patient.empty:
        return []
    groups = []
    for number, (patient, splits) in enumerate(splits_by_patient.items(), 1):
        name = f'patient-{number}' if hide_names else short_path(str(patient))
        groups.append((name, *splits))
    advice = (
        'Metrics on one of the splits are too optimistic. Put each patient into one split; --valid patients does so '
        'for train and valid.'
    )
    return [Finding('error', 'patients in two splits', len(splits_by_patient), advice, tuple(groups))]


def _find_unknown_patients(items: pd.DataFrame) -> list[Finding]:
    warning = unknown_patients_warning(items)
    if warning is None:
        return []
    n = int(unknown_patients(items).sum())
    return [Finding('warning', 'images of unknown patients', n, warning[0].upper() + warning[1:])]


def _describe_pairs(images: pd.DataFrame, duplicates: list[tuple[int, int, float]]) -> pd.DataFrame:
    """Return the duplicate pairs with the columns `first second name other relation identical`."""
    rows = []
    for i, j, _ in duplicates:
        first, second = images.iloc[i], images.iloc[j]
        if first.path == second.path:
            continue  # the same file listed twice is a separate finding
        if first.label != second.label:
            relation = 'across classes'
        elif first.split != second.split:
            relation = 'across splits'
        else:
            relation = f'inside {first.split}'
        rows.append((i, j, first['name'], second['name'], relation, first.digest == second.digest))
    return pd.DataFrame(rows, columns=['first', 'second', 'name', 'other', 'relation', 'identical'])


def _find_duplicates(pairs: pd.DataFrame) -> list[Finding]:
    serious = {
        'across classes': 'One of the two labels is wrong. Find out which, and correct it.',
        'across splits': 'A network is tested on an image that it was trained on. Remove one image of each pair.',
    }
    minor = 'These images have twice the weight of others. Remove one image of each pair, unless this is intended.'
    findings = []
    for relation, group in pairs.groupby('relation'):
        level = 'error' if relation in serious else 'warning'
        advice = f'Pairs with identical pixels: {group.identical.sum()}. {serious.get(str(relation), minor)}'
        names = tuple(zip(group['name'], group.other, strict=True))
        findings.append(Finding(level, f'duplicate pairs {relation}', len(group), advice, names))
    return findings


def _find_unfinished_search(duplicates: list[tuple[int, int, float]]) -> list[Finding]:
    if len(duplicates) < MAX_PAIRS:
        return []
    advice = f'The search stopped after {MAX_PAIRS:,} pairs. Remove these duplicates and repeat the audit.'
    return [Finding('error', 'too many duplicate pairs', None, advice)]


def _find_repeated_rows(images: pd.DataFrame) -> list[Finding]:
    findings = []
    repeated = images.attrs['ignored'].get('listed twice', 0)
    if repeated:
        advice = 'Only the first row of each image is used.'
        findings.append(Finding('warning', 'images listed twice', repeated, advice))
    several_splits = images[images.duplicated('path', keep=False)]
    groups = [(group['name'].iloc[0], *group.split.unique()) for _, group in several_splits.groupby('path')]
    if groups:
        advice = 'Keep each image in one split.'
        findings.append(Finding('error', 'images listed in two splits', len(groups), advice, tuple(groups)))
    return findings


def _find_left_out(images: pd.DataFrame) -> list[Finding]:
    left_out = {reason: n for reason, n in images.attrs['ignored'].items() if reason not in EXPECTED_REASONS}
    if not left_out:
        return []
    advice = f'Not used: {describe_ignored(left_out)}.'
    return [Finding('warning', 'files left out', sum(left_out.values()), advice)]


def _find_small_splits(items: pd.DataFrame) -> list[Finding]:
    try:
        check_trainable(items, 'none')  # `train` takes validation images from train if there are no others
    except UsageError as error:
        return [Finding('warning', NOT_TRAINABLE, None, str(error))]
    has_validation = (items.split == 'valid').any()
    warning = validation_warning(items) if has_validation else None
    if warning is None:
        return []
    return [Finding('warning', SMALL_VALIDATION, None, f'{warning} Only for --valid official.')]


def _find_shortcuts(probes: pd.DataFrame) -> list[Finding]:
    findings = []
    for probe, group in probes[probes.auc > SHORTCUT_AUC].groupby('probe', sort=False):
        aucs = ', '.join(f'{trait} {auc:.3f}' for trait, auc in zip(group.trait, group.auc, strict=True))
        name, measured, effect = _describe_probe(str(probe))
        findings.append(Finding('warning', name, len(group), f'{measured}: {aucs}. {effect}'))
    return findings


def _describe_probe(probe: str) -> tuple[str, str, str]:
    """Return the name of the finding of a probe, what was measured, and what it means."""
    if probe == LABEL:
        effect = 'A network can learn these properties instead of the disease.'
        return 'shortcuts to the label', 'AUC of each property alone', effect
    if probe == ANATOMY:
        effect = (
            'What is around the lungs tells the label, and a network can learn that instead of the disease. Train with '
            '--set exchange=0.5 --set hide_lungs=0.4, and look at evaluate --robustness.'
        )
        return 'the label without the lungs', 'AUC of a small network', effect
    return f'shift between {probe}', 'AUC of each property alone', 'Results on one split may not hold on the other.'


def _summarise_files(images: pd.DataFrame, usable: pd.DataFrame) -> dict[str, Any]:
    """Return how the image files are stored: counts by format, mode and bits, and the range of their sizes."""
    usable = usable.astype({'bits': int})
    return {
        'ignored': images.attrs['ignored'],
        'patients': count_patients(images),
        'unknown_patients': int(unknown_patients(images).sum()),
        'formats': _count_values(usable['format']),
        'modes': _count_values(usable['mode']),
        'bits': _count_values(usable['bits']),
        'width': _range(usable['width']),
        'height': _range(usable['height']),
        'bytes': _range(usable['bytes']),
    }


def _count_values(column: pd.Series) -> dict[str, int]:
    return {str(value): int(n) for value, n in column.value_counts().items()}


def _range(column: pd.Series) -> dict[str, int]:
    if column.empty:
        return {}
    least, median, most = column.quantile([0, 0.5, 1])
    return {'least': int(least), 'median': int(median), 'most': int(most)}


def _draw_pictures(images: pd.DataFrame, pairs: pd.DataFrame, root: Path, modality: str) -> dict[str, bytes]:
    """Return small pictures of the duplicates that the page shows, by name; none of an image with burned-in text."""
    shown = pairs.groupby('relation').head(MAX_SHOWN)
    pictures = {}
    for i in sorted({*shown['first'], *shown['second']}):
        if images.burned_in[i]:
            continue
        try:
            picture = Image.fromarray(open_image(root / images.path[i], modality=modality).pixels)
        except ImageError:
            continue
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        file = BytesIO()
        picture.save(file, 'JPEG', quality=80)
        pictures[images['name'][i]] = file.getvalue()
    return pictures

"""Items become findings: leakage, duplicates, unreadable images, too little validation, shortcuts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.files import write_json, write_text, writing
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.templates import data_uri, fill
from cxr_fastai.data.find import safe_name, safe_path, short_path
from cxr_fastai.data.image_stats import MOST_PAIRS, TRAITS, find_alike, measure_images
from cxr_fastai.data.items import identify_images, image_root, read_items
from cxr_fastai.data.splits import check_trainable, doubt_validation, leaking_patients
from cxr_fastai.images.decode import open_image

HARM = {
    True: 'A network can use what it sees of it in place of the disease.',
    False: 'What holds on the images of one split may not hold on those of the other.',
}
"""What a telling number does, where it tells the label and where it tells a split."""
NOT_TRAINABLE, TOO_SMALL = 'not trainable as it is', 'validation too small to select on'
"""Findings about splits, which a training may choose otherwise."""
SHOWN = 40
"""Pairs of a finding that the page shows."""
THUMB = 160


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (`error`) or doubtful (`warning`) about a set of images: how often (None where there is
    nothing to count), which images or patients (in groups that belong together), and what to do. No name in it is one
    that a patient might have."""

    level: str
    name: str
    count: int | None
    advice: str
    images: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Audit:
    """What an audit found: `counts` by split, class and kind; `facts` about the files; `probes` (columns probe, trait,
    auc); `findings`, errors first; and small pictures of duplicates, JPEG by name. `identity` is that of the images, by
    `identify_images`."""

    data: str
    images: int
    identity: str
    counts: pd.DataFrame
    facts: dict[str, Any]
    probes: pd.DataFrame
    findings: tuple[Finding, ...]
    pictures: dict[str, bytes]


def audit(data: Path, workers: int | None = None) -> Audit:
    """Look at every image of the folder or CSV `data`. Raises `CXRError` where there is no set of images to look at."""
    items, root = read_items(data), image_root(data)
    measured, thumbnails = measure_images(list(items.path), root, workers)
    images = pd.concat([items, measured], axis=1)
    images.attrs['ignored'] = items.attrs['ignored']
    images['name'] = [safe_path(short_path(path), number) for number, path in enumerate(items.path, 1)]
    whole = images[images.code.isna()]
    probes = pd.concat([probe_label(whole), probe_shift(whole)], ignore_index=True)
    alike = find_alike(thumbnails)
    pairs = _pair_up(images, alike)
    findings = [
        *_unreadable(images),
        *_burned_in(images),
        *_leakage(items),
        *_duplicates(pairs),
        *_too_many(alike),
        *_listed_twice(images),
        *_too_few(items),
        *_telling(probes),
        *_names(images),
    ]
    counts = items.groupby(['split', 'label', 'kind']).size().rename('images').reset_index()
    return Audit(
        safe_name(data.resolve().name, 'images'),
        len(items),
        identify_images(items),
        counts,
        _facts(images, whole),
        probes,
        tuple(sorted(findings, key=lambda finding: finding.level != 'error')),
        _draw(images, pairs, root),
    )


def save_audit(audit: Audit, folder: Path) -> None:
    """Write `audit.json` and `audit.html`, one page that needs nothing else, into `folder`. Raises `OutputError`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tables = {'counts': audit.counts.to_dict('records'), 'probes': audit.probes.to_dict('records')}
    write_json(
        folder / 'audit.json',
        {
            'data': audit.data,
            'images': audit.images,
            'identity': audit.identity,
            **tables,
            'facts': audit.facts,
            'findings': [asdict(finding) for finding in audit.findings],
        },
    )
    write_text(folder / 'audit.html', render(audit))


def render(audit: Audit) -> str:
    """The audit as one HTML page, without scripts and without anything from elsewhere."""
    pictures = {name: data_uri(jpeg, 'image/jpeg') for name, jpeg in audit.pictures.items()}
    return fill('audit.html', audit=audit, pictures=pictures, telling=TELLING, shown=SHOWN)


def _unreadable(images: pd.DataFrame) -> list[Finding]:
    bad = images[images.code.notna()]
    if bad.empty:
        return []
    codes = ', '.join(f'{n} {code}' for code, n in Counter(bad.code).items())
    return [
        Finding(
            'error',
            'images that cannot be used',
            len(bad),
            f'{codes}: mend or remove them.',
            tuple(zip(bad['name'], bad.code, strict=True)),
        )
    ]


def _burned_in(images: pd.DataFrame) -> list[Finding]:
    burned = images[images.burned_in.eq(True)]  # missing for an image that cannot be read
    if burned.empty:
        return []
    return [
        Finding(
            'warning',
            'images with burned-in text',
            len(burned),
            'Their files say that the picture may name the patient: they are not shown here; do not share them.',
            tuple((name,) for name in burned['name']),
        )
    ]


def _leakage(items: pd.DataFrame) -> list[Finding]:
    shared = leaking_patients(items)
    if shared.empty:
        return []
    return [
        Finding(
            'error',
            'patients in two splits',
            len(shared),
            'Figures on one split flatter: put each patient into one; --valid patients does so for train and valid.',
            tuple(
                (safe_name(patient, f'patient-{number}'), *splits)
                for number, (patient, splits) in enumerate(shared.items(), 1)
            ),
        )
    ]


def _pair_up(images: pd.DataFrame, alike: list[tuple[int, int, float]]) -> pd.DataFrame:
    """The pairs of images that show the same, with the columns `first second name other relation exact`."""
    rows = []
    for i, j, _ in alike:
        a, b = images.iloc[i], images.iloc[j]
        if a.path == b.path:
            continue  # listed twice, which is another finding
        relation = (
            'across classes' if a.label != b.label else 'across splits' if a.split != b.split else f'inside {a.split}'
        )
        rows.append((i, j, a['name'], b['name'], relation, a.digest == b.digest))
    return pd.DataFrame(rows, columns=['first', 'second', 'name', 'other', 'relation', 'exact'])


def _duplicates(pairs: pd.DataFrame) -> list[Finding]:
    advice = {
        'across classes': 'One of the labels is wrong: find out which.',
        'across splits': 'A split tests what another has taught: remove one of each.',
    }
    return [
        Finding(
            'error' if relation in advice else 'warning',
            f'duplicate pairs {relation}',
            len(found),
            f'{found.exact.sum()} of the pairs are the same to the pixel. '
            + advice.get(relation, 'They weigh double: remove one of each, or know it.'),
            tuple(zip(found['name'], found.other, strict=True)),
        )
        for relation, found in pairs.groupby('relation')
    ]


def _too_many(alike: list[tuple[int, int, float]]) -> list[Finding]:
    if len(alike) < MOST_PAIRS:
        return []
    return [
        Finding(
            'error',
            'too many duplicate pairs to list',
            None,
            f'The search stopped after {MOST_PAIRS:,}: remove these copies and audit again.',
        )
    ]


def _listed_twice(images: pd.DataFrame) -> list[Finding]:
    again = images.attrs['ignored'].get('listed twice', 0)
    splits = images[images.duplicated('path', keep=False)].groupby('path').agg({'name': 'first', 'split': 'unique'})
    findings = [Finding('warning', 'images listed twice', again, 'Only the first row of each counts.')] if again else []
    if len(splits):
        findings.append(
            Finding(
                'error',
                'images listed in two splits',
                len(splits),
                'Leave each in one.',
                tuple((name, *found) for name, found in splits.itertuples(index=False)),
            )
        )
    return findings


def _too_few(items: pd.DataFrame) -> list[Finding]:
    try:
        check_trainable(items)
    except UsageError as error:
        return [Finding('warning', NOT_TRAINABLE, None, str(error))]
    if not (doubt := doubt_validation(items)):
        return []
    return [Finding('warning', TOO_SMALL, None, f'{doubt} --valid patients is sounder.')]


def _telling(probes: pd.DataFrame) -> list[Finding]:
    telling = probes[probes.auc > TELLING]
    return [
        Finding(
            'warning',
            'shortcuts to the label' if probe == LABEL else f'shift between {probe}',
            len(found),
            ', '.join(f'{trait} {auc:.3f}' for trait, auc in zip(found.trait, found.auc, strict=True))
            + f': the AUC of each number alone. {HARM[probe == LABEL]}',
        )
        for probe, found in telling.groupby('probe', sort=False)
    ]


def _names(images: pd.DataFrame) -> list[Finding]:
    hidden = images['name'] != images.path.map(short_path)
    if not hidden.any():
        return []
    return [
        Finding(
            'warning',
            'file names that may name patients',
            int(hidden.sum()),
            'They are shown by their '
            'number in the order of paths: rename them before you share the set or a run trained on it.',
        )
    ]


def _facts(images: pd.DataFrame, whole: pd.DataFrame) -> dict[str, Any]:
    """What the files of the images are; of those that can be used, the `whole` ones, how they are stored."""
    whole = whole.astype({'bits': int})
    tally = lambda column: {str(value): int(n) for value, n in whole[column].value_counts().items()}
    span = lambda column: (
        dict(zip(('least', 'median', 'most'), map(int, whole[column].quantile([0, 0.5, 1])), strict=True))
        if len(whole)
        else {}
    )
    return {
        'ignored': images.attrs['ignored'],
        'patients': int(images.patient.nunique()),
        'formats': tally('format'),
        'modes': tally('mode'),
        'bits': tally('bits'),
        'width': span('width'),
        'height': span('height'),
        'bytes': span('bytes'),
    }


def _draw(images: pd.DataFrame, pairs: pd.DataFrame, root: Path) -> dict[str, bytes]:
    """Small pictures of the pairs that are shown, by name; none of an image with text that may name the patient."""
    shown = pairs.groupby('relation').head(SHOWN)
    pictures = {}
    for i in sorted({*shown['first'], *shown['second']}):
        if images.burned_in[i]:
            continue
        try:
            image = Image.fromarray(open_image(root / images.path[i]).pixels)
        except ImageError:
            continue
        image.thumbnail((THUMB, THUMB))
        image.save(buffer := BytesIO(), 'JPEG', quality=80)
        pictures[images['name'][i]] = buffer.getvalue()
    return pictures


TELLING = 0.70
"""Cross-validated AUC above which a number gives something away."""
ENOUGH = 20
"""Images, and patients, on either side below which nothing is probed: chance alone would look telling."""
FOLDS = 5
LABEL = 'label'
"""The probe of the label, beside those of the splits."""


def probe_label(images: pd.DataFrame) -> pd.DataFrame:
    """The AUC of each of `TRAITS` for the label: columns `probe trait auc`, the highest first.

    `images` has the columns `split label patient` and the traits. Measured on train images where there are enough of both
    classes, else on all; empty where there are too few.
    """
    train = images[images.split == 'train']
    for chosen in (train, images):
        probed = _probe(LABEL, chosen, (chosen.label == VOCAB[POSITIVE]).to_numpy())
        if len(probed):
            break
    return probed


def probe_shift(images: pd.DataFrame) -> pd.DataFrame:
    """The AUC of each of `TRAITS` for telling images of train from those of valid and of test, within a class: columns
    `probe trait auc`. What differs there makes validation a poor guide to the test."""
    found = []
    for label in VOCAB:
        for other in ('valid', 'test'):
            chosen = images[(images.label == label) & images.split.isin(['train', other])]
            found.append(_probe(f'train and {other}, {label}', chosen, (chosen.split == other).to_numpy()))
    return pd.concat(found, ignore_index=True)


def _probe(name: str, images: pd.DataFrame, targs: np.ndarray) -> pd.DataFrame:
    """Columns `probe trait auc` for the boolean `targs` (n,) of the images."""
    from sklearn.model_selection import StratifiedGroupKFold

    patients, rows = images.patient.to_numpy(), []
    if min(min(side.sum(), len(set(patients[side]))) for side in (targs, ~targs)) >= ENOUGH:
        splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(images, targs, patients)
        folds = np.empty(len(images), int)
        for i, (_, held_out) in enumerate(splits):
            folds[held_out] = i
        rows = [
            (name, trait, _auc(images[trait].to_numpy(float), targs, folds))
            for trait in TRAITS
            if images[trait].nunique() > 1
        ]
    table = pd.DataFrame(rows, columns=['probe', 'trait', 'auc'])
    return table.sort_values('auc', ascending=False, kind='stable', ignore_index=True)


def _auc(x: np.ndarray, targs: np.ndarray, folds: np.ndarray) -> float:
    """AUC of the number `x` (n,), read upwards or downwards as the other `folds` (n,) say."""
    from sklearn.metrics import roc_auc_score

    score = np.empty(len(x))
    for i in range(FOLDS):
        held_out = folds == i
        upwards = roc_auc_score(targs[~held_out], x[~held_out]) >= 0.5
        score[held_out] = x[held_out] if upwards else -x[held_out]
    return float(roc_auc_score(targs, score))

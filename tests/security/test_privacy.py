"""Bundles and predictions contain no names of images, folders, patients or users.

Unique marker words are written to every place that can contain a name, and then searched for in all files that the
commands write.
"""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from imagefiles import GREY, dicom, encoded, with_text
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin
from pydicom import dcmread

from cxr_fastai.cli import main
from cxr_fastai.inference.bundle import FILES, MANIFEST
from cxr_fastai.models.architectures import build_model
from cxr_fastai.publishing import exporting

IN_IMAGES = (
    'exif_artist',
    'exif_description',
    'exif_copyright',
    'exif_xpauthor',
    'exif_comment',
    'jpeg_comment',
    'xmp',
    'icc',
    'png_text',
    'png_itxt',
    'png_ztxt',
    'png_exif',
    'tiff_host',
    'dicom_name',
    'dicom_id',
    'dicom_institution',
    'dicom_comments',
    'dicom_private',
    'dicom_others',
    'dicom_study',
)
OUTSIDE = ('file', 'folder', 'list', 'patient', 'hospital', 'run', 'user', 'home', 'weights', 'table')
ODD = ('modality', 'photometric', 'syntax', 'frames', 'slope', 'window')
"""DICOM attributes with a wrong value, because of which the image is refused or gets a note."""
MARKERS = {place: f'Zq{place.replace("_", "").title()}Xv' for place in (*IN_IMAGES, *OUTSIDE, *ODD)}
"""Place -> the marker word that is written there."""
ENCODINGS = ('utf-8', 'utf-16-le', 'utf-16-be', 'utf-32-le')


def exif_image(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = MARKERS['exif_artist']
    exif[ExifTags.Base.ImageDescription] = MARKERS['exif_description']
    exif[ExifTags.Base.Copyright] = MARKERS['exif_copyright']
    exif[ExifTags.Base.XPAuthor] = MARKERS['exif_xpauthor'].encode('utf-16-le')
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b'ASCII\0\0\0' + MARKERS['exif_comment'].encode()
    return encoded(image, 'JPEG', quality=95, exif=exif)


def jpeg_image(image: Image.Image) -> bytes:
    description = 'sRGB built-in'
    marker = MARKERS['icc'].ljust(13)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><dc:creator>{MARKERS["xmp"]}</dc:creator></x:xmpmeta>'
    return encoded(
        image.convert('RGB'),
        'JPEG',
        quality=95,
        comment=MARKERS['jpeg_comment'].encode(),
        xmp=xmp.encode(),
        icc_profile=profile.replace(description.encode('utf-16-be'), marker.encode('utf-16-be')),
    )


def png_image(image: Image.Image) -> bytes:
    words, exif = PngImagePlugin.PngInfo(), Image.Exif()
    words.add_text('Author', MARKERS['png_text'])
    words.add_text('Patient', MARKERS['png_ztxt'], zip=True)
    words.add_itxt('Title', MARKERS['png_itxt'], 'en', 'Titel', zip=True)
    exif[ExifTags.Base.Artist] = MARKERS['png_exif']
    return encoded(image, 'PNG', pnginfo=words, exif=exif)


def tiff_image(image: Image.Image) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ExifTags.Base.HostComputer] = MARKERS['tiff_host']
    return encoded(image, 'TIFF', tiffinfo=tags)


def dicom_image(image: Image.Image) -> bytes:
    data = dicom(
        np.asarray(image),
        PatientName=MARKERS['dicom_name'],
        PatientID=MARKERS['dicom_id'],
        InstitutionName=MARKERS['dicom_institution'],
        PatientComments=MARKERS['dicom_comments'],
        OtherPatientNames=MARKERS['dicom_others'],
        StudyDescription=MARKERS['dicom_study'],
    )
    dataset = dcmread(io.BytesIO(data))
    dataset.private_block(0x0099, 'HOSPITAL', create=True).add_new(1, 'LO', MARKERS['dicom_private'])
    dataset.save_as(buffer := io.BytesIO(), enforce_file_format=True)
    return buffer.getvalue()


PLANTERS = {'.jpg': exif_image, '.jpeg': jpeg_image, '.png': png_image, '.tif': tiff_image, '.dcm': dicom_image}


def odd_images() -> dict[str, bytes]:
    """DICOM images with a wrong value, which an error message or a note could quote."""
    frames, syntax = (MARKERS[name].encode() for name in ('frames', 'syntax'))
    return {
        'modality': dicom(Modality=MARKERS['modality']),
        'photometric': dicom(GREY, PhotometricInterpretation=MARKERS['photometric']),
        'frames': dicom(NumberOfFrames='9' * len(frames)).replace(b'9' * len(frames), frames),
        'slope': with_text('RescaleSlope', MARKERS['slope']),
        'window': with_text('WindowCenter', MARKERS['window']),
        'syntax': dicom().replace(b'1.2.840.10008.1.2.1\0', syntax.ljust(20, b'1')),
    }


def texts(path: Path) -> str:
    """The texts that Pillow or pydicom reads from an image file, in addition to the pixels."""
    if path.suffix == '.dcm':
        return ' '.join(str(element.value) for element in dcmread(path))
    with Image.open(path) as image:
        exif = image.getexif()
        values = [
            *image.info.values(),
            *getattr(image, 'text', {}).values(),
            *exif.values(),
            *exif.get_ifd(ExifTags.IFD.Exif).values(),
        ]
    return ' '.join(
        word.replace(b'\0', b'').decode('latin-1') if isinstance(word, bytes) else str(word) for word in values
    )


@pytest.fixture(scope='module')
def planted(images, tmp_path_factory) -> Path:
    """A CSV of forty images, with markers in the metadata of the files, in their names and in its own name."""
    root = tmp_path_factory.mktemp('planted') / MARKERS['home'] / 'data'
    (root / MARKERS['folder']).mkdir(parents=True)
    paths = [
        path
        for split in ('train', 'val', 'test')
        for label in ('NORMAL', 'PNEUMONIA')
        for path in sorted((images / split / label).iterdir())[: 10 if split == 'train' else 5]
    ]
    rows, kinds = [], list(PLANTERS.items())
    for number, path in enumerate(paths):
        suffix, plant = kinds[number % len(kinds)]
        image = f'{MARKERS["folder"]}/{MARKERS["file"]}-{number}{suffix}'
        with Image.open(path) as picture:
            (root / image).write_bytes(plant(picture.convert('L')))
        rows.append(
            {
                'path': image,
                'label': path.parent.name,
                'split': path.parts[-3],
                'patient': f'{MARKERS["patient"]} {number}',
                'hospital': MARKERS['hospital'] + 'AB'[number % 2],
            }
        )
    listing = root / f'{MARKERS["list"]}.csv'
    pd.DataFrame(rows).to_csv(listing, index=False)
    return listing


@pytest.fixture(scope='module')
def named_user(planted) -> Iterator[pytest.MonkeyPatch]:
    """Within these tests the user and the home folder have a marker as name."""
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise matplotlib would build a font cache in the other home folder.
        patch.setenv('MPLCONFIGDIR', matplotlib.get_cachedir())
        for name in ('USER', 'LOGNAME', 'USERNAME'):
            patch.setenv(name, MARKERS['user'])
        for name in ('HOME', 'USERPROFILE'):
            patch.setenv(name, str(planted.parents[1]))
        patch.setattr(exporting, 'verify_in_new_process', lambda _: None)  # it only reads, and takes long
        yield patch


def run_command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope='module')
def outputs(planted, named_user, tmp_path_factory) -> dict[str, Path]:
    """The run that this user trains on these images, and its bundle."""
    weights = planted.parents[1] / MARKERS['weights'] / 'weights.pth'
    weights.parent.mkdir()
    torch.save(build_model('baseline').state_dict(), weights)
    folder = tmp_path_factory.mktemp('runs') / MARKERS['run']
    run, bundle = folder / 'run', folder / 'bundle'
    options = ['--epochs', 1, '--size', 48, '--batch-size', 8, '--workers', 0, '--valid', 'official']
    run_command('train', '--csv', planted, '--out', run, '--weights', weights, *options)
    run_command('evaluate', run, '--by', 'hospital')
    run_command('export', run, '--out', bundle)
    return {'run': run, 'bundle': bundle}


def entries(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in a folder, or of the file `path`; zip files are unpacked."""
    for file in sorted(path.rglob('*')) if path.is_dir() else [path]:
        yield from unpacked(file.name, file.read_bytes())


def unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data + name.encode()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            yield from unpacked(f'{name}/{entry.filename}', archive.read(entry))


def leaks(data: bytes) -> set[str]:
    """The places of the markers that `data` contains, in any encoding and case."""
    small = data.lower()
    return {place for place, word in MARKERS.items() for code in ENCODINGS if word.lower().encode(code) in small}


def test_every_marker_was_written_and_would_be_found(planted, outputs):
    images = ' '.join(texts(planted.parent / path) for path in pd.read_csv(planted).path[: len(PLANTERS)])
    assert not [place for place in IN_IMAGES if MARKERS[place] not in images]
    assert leaks(planted.read_bytes() + bytes(planted)) >= {'file', 'folder', 'list', 'patient', 'hospital', 'home'}
    items, journal = ((outputs['run'] / name).read_bytes() for name in ('items.csv', 'journal.jsonl'))
    assert leaks(items) == {'file', 'folder', 'patient'} and leaks(journal) >= {'home', 'list'}
    for code in ENCODINGS:
        assert leaks(b'\1' + MARKERS['user'].upper().encode(code)) == {'user'}
    assert {place for place, data in odd_images().items() if place in leaks(data)} == set(ODD)


def check_bundle(files: dict[str, bytes], prefix: str = '') -> None:
    """Check that all files of a bundle were read, the pickle in the learner too, and that none contains a marker."""
    assert files.keys() >= {prefix + name for name in (*FILES, MANIFEST)}
    assert [name for name in files if name.startswith(f'{prefix}learner.pkl/') and name.endswith('.pkl')]
    assert [(name, leaks(data)) for name, data in files.items() if leaks(data)] == []


def test_no_file_of_a_bundle_contains_a_name(outputs):
    check_bundle(dict(entries(outputs['bundle'])))


@pytest.mark.slow  # exports once more
def test_no_file_of_a_zip_bundle_contains_a_name(outputs, tmp_path):
    run_command('export', outputs['run'], '--zip', '--out', tmp_path / 'bundle.zip')
    check_bundle(dict(entries(tmp_path / 'bundle.zip')), prefix='bundle.zip/')


@pytest.mark.parametrize('name', ['learner.pkl', 'model.safetensors'])
def test_no_model_file_of_a_run_contains_a_name(outputs, name):
    assert [(inner, leaks(data)) for inner, data in entries(outputs['run'] / name) if leaks(data)] == []


def test_the_model_card_contains_no_name(outputs):
    assert main(['report', str(outputs['run'])]) == 0
    assert not leaks((outputs['run'] / 'model_card.md').read_bytes())
    assert (
        '--by hospital' in (outputs['run'] / 'model_card.md').read_text()
    )  # the name of the column, but none of its values


@pytest.mark.parametrize('suffix', ['.csv', '.json'])
def test_predictions_contain_no_name_except_the_path_of_the_image(planted, outputs, tmp_path, suffix):
    folder = tmp_path / MARKERS['folder']
    folder.mkdir()
    for place, data in odd_images().items():
        (folder / f'{place}.dcm').write_bytes(data)
    table = tmp_path / f'{MARKERS["table"]}{suffix}'
    assert main(['predict', str(outputs['bundle']), str(planted), str(folder), '--no-gate', '--out', str(table)]) == 3
    text = table.read_text(encoding='utf-8')
    rows = json.loads(text) if suffix == '.json' else list(csv.DictReader(io.StringIO(text)))
    paths = [row.pop('path') for row in rows]
    assert [row['status'] for row in rows] == ['ok'] * 40 + ['ok', 'rejected', 'rejected', 'ok', 'error', 'ok']
    assert not leaks(json.dumps(rows).encode()) and leaks('\n'.join(paths).encode()) == {'home', 'folder', 'file'}
    for path in paths:
        text = text.replace(path, '')
    assert not leaks(text.encode())

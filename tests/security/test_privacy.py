"""What images, folders, patients and the user are called stays with them: a bundle, and what it predicts, tell nothing.

Words that stand nowhere else, the canaries, are planted wherever a name may stand, and looked for in all that is made.
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
from imagefiles import GREY, dicom, encoded
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin
from pydicom import dcmread

from cxr_fastai.cli import main
from cxr_fastai.inference.bundle import CARD, CONFIG, MANIFEST, ONNX
from cxr_fastai.models.architectures import build_model

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
REFUSED = ('modality', 'photometric', 'syntax', 'frames')
"""What a DICOM image says that is looked at, so that the image is refused."""
CANARIES = {place: f'Zq{place.replace("_", "").title()}Xv' for place in (*IN_IMAGES, *OUTSIDE, *REFUSED)}
"""Place -> the word that is planted there."""
ENCODINGS = ('utf-8', 'utf-16-le', 'utf-16-be', 'utf-32-le')


def exif_image(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = CANARIES['exif_artist']
    exif[ExifTags.Base.ImageDescription] = CANARIES['exif_description']
    exif[ExifTags.Base.Copyright] = CANARIES['exif_copyright']
    exif[ExifTags.Base.XPAuthor] = CANARIES['exif_xpauthor'].encode('utf-16-le')
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b'ASCII\0\0\0' + CANARIES['exif_comment'].encode()
    return encoded(image, 'JPEG', quality=95, exif=exif)


def jpeg_image(image: Image.Image) -> bytes:
    plain, told = 'sRGB built-in', CANARIES['icc'].ljust(13)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><dc:creator>{CANARIES["xmp"]}</dc:creator></x:xmpmeta>'
    return encoded(
        image.convert('RGB'),
        'JPEG',
        quality=95,
        comment=CANARIES['jpeg_comment'].encode(),
        xmp=xmp.encode(),
        icc_profile=profile.replace(plain.encode('utf-16-be'), told.encode('utf-16-be')),
    )


def png_image(image: Image.Image) -> bytes:
    words, exif = PngImagePlugin.PngInfo(), Image.Exif()
    words.add_text('Author', CANARIES['png_text'])
    words.add_text('Patient', CANARIES['png_ztxt'], zip=True)
    words.add_itxt('Title', CANARIES['png_itxt'], 'en', 'Titel', zip=True)
    exif[ExifTags.Base.Artist] = CANARIES['png_exif']
    return encoded(image, 'PNG', pnginfo=words, exif=exif)


def tiff_image(image: Image.Image) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ExifTags.Base.HostComputer] = CANARIES['tiff_host']
    return encoded(image, 'TIFF', tiffinfo=tags)


def dicom_image(image: Image.Image) -> bytes:
    data = dicom(
        np.asarray(image),
        PatientName=CANARIES['dicom_name'],
        PatientID=CANARIES['dicom_id'],
        InstitutionName=CANARIES['dicom_institution'],
        PatientComments=CANARIES['dicom_comments'],
        OtherPatientNames=CANARIES['dicom_others'],
        StudyDescription=CANARIES['dicom_study'],
    )
    found = dcmread(io.BytesIO(data))
    found.private_block(0x0099, 'HOSPITAL', create=True).add_new(1, 'LO', CANARIES['dicom_private'])
    found.save_as(buffer := io.BytesIO(), enforce_file_format=True)
    return buffer.getvalue()


PLANTERS = {'.jpg': exif_image, '.jpeg': jpeg_image, '.png': png_image, '.tif': tiff_image, '.dcm': dicom_image}


def refused_images() -> dict[str, bytes]:
    """DICOM images whose very refusal might quote them."""
    frames, syntax = (CANARIES[name].encode() for name in ('frames', 'syntax'))
    return {
        'modality': dicom(Modality=CANARIES['modality']),
        'photometric': dicom(GREY, PhotometricInterpretation=CANARIES['photometric']),
        'frames': dicom(NumberOfFrames='9' * len(frames)).replace(b'9' * len(frames), frames),
        'syntax': dicom().replace(b'1.2.840.10008.1.2.1\0', syntax.ljust(20, b'1')),
    }


def texts(path: Path) -> str:
    """What Pillow or pydicom reads beside the pixels of an image."""
    if path.suffix == '.dcm':
        return ' '.join(str(element.value) for element in dcmread(path))
    with Image.open(path) as image:
        exif = image.getexif()
        found = [
            *image.info.values(),
            *getattr(image, 'text', {}).values(),
            *exif.values(),
            *exif.get_ifd(ExifTags.IFD.Exif).values(),
        ]
    return ' '.join(
        word.replace(b'\0', b'').decode('latin-1') if isinstance(word, bytes) else str(word) for word in found
    )


@pytest.fixture(scope='module')
def planted(images, tmp_path_factory) -> Path:
    """A CSV of forty images, with canaries in what their files say, in their names and in its own."""
    root = tmp_path_factory.mktemp('planted') / CANARIES['home'] / 'data'
    (root / CANARIES['folder']).mkdir(parents=True)
    found = [
        path
        for split in ('train', 'val', 'test')
        for label in ('NORMAL', 'PNEUMONIA')
        for path in sorted((images / split / label).iterdir())[: 10 if split == 'train' else 5]
    ]
    rows, kinds = [], list(PLANTERS.items())
    for number, path in enumerate(found):
        suffix, plant = kinds[number % len(kinds)]
        image = f'{CANARIES["folder"]}/{CANARIES["file"]}-{number}{suffix}'
        with Image.open(path) as picture:
            (root / image).write_bytes(plant(picture.convert('L')))
        rows.append(
            {
                'path': image,
                'label': path.parent.name,
                'split': path.parts[-3],
                'patient': f'{CANARIES["patient"]} {number}',
                'hospital': CANARIES['hospital'] + 'AB'[number % 2],
            }
        )
    listing = root / f'{CANARIES["list"]}.csv'
    pd.DataFrame(rows).to_csv(listing, index=False)
    return listing


@pytest.fixture(scope='module')
def made(planted, tmp_path_factory) -> dict[str, Path]:
    """What a user with a name makes of these images: a run, and its bundle as a folder and as a zip."""
    home, folder = planted.parents[1], tmp_path_factory.mktemp('runs') / CANARIES['run']
    weights = home / CANARIES['weights'] / 'weights.pth'
    weights.parent.mkdir()
    torch.save(build_model('baseline').state_dict(), weights)
    made = {'run': folder / 'run', 'bundle': folder / 'bundle', 'zip': folder / 'bundle.zip'}
    commands = [
        [
            'train',
            '--csv',
            planted,
            '--out',
            made['run'],
            '--epochs',
            '1',
            '--size',
            '48',
            '--batch-size',
            '8',
            '--workers',
            '0',
            '--weights',
            weights,
        ],
        ['evaluate', made['run'], '--by', 'hospital'],
        ['export', made['run'], '--out', made['bundle']],
        ['export', made['run'], '--zip', '--out', made['zip']],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MPLCONFIGDIR', matplotlib.get_cachedir())  # which it would make anew in another home
        for name in ('USER', 'LOGNAME', 'USERNAME'):
            patch.setenv(name, CANARIES['user'])
        for name in ('HOME', 'USERPROFILE'):
            patch.setenv(name, str(home))
        patch.setattr(
            'cxr_fastai.publishing.exporting.verify_in_new_process', lambda _: None
        )  # it reads alone, and takes long twice
        for words in commands:
            assert main([str(word) for word in words]) == 0
    return made


def entries(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each file of a folder, or the file `path`, and all that is in zips among them, decompressed; and their names."""
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
    """The places whose canaries are in `data`, in any encoding, in small letters or capitals."""
    small = data.lower()
    return {place for place, word in CANARIES.items() for code in ENCODINGS if word.lower().encode(code) in small}


def test_every_canary_was_planted_and_would_be_found(planted, made):
    images = ' '.join(texts(planted.parent / path) for path in pd.read_csv(planted).path[: len(PLANTERS)])
    assert not [place for place in IN_IMAGES if CANARIES[place] not in images]
    assert leaks(planted.read_bytes() + bytes(planted)) >= {'file', 'folder', 'list', 'patient', 'hospital', 'home'}
    items, journal = ((made['run'] / name).read_bytes() for name in ('items.csv', 'journal.jsonl'))
    assert leaks(items) == {'file', 'folder', 'patient'} and leaks(journal) >= {'home', 'list'}
    for code in ENCODINGS:
        assert leaks(b'\1' + CANARIES['user'].upper().encode(code)) == {'user'}
    assert {place for place, data in refused_images().items() if place in leaks(data)} == set(REFUSED)


@pytest.mark.parametrize('kind', ['bundle', 'zip'])
def test_no_file_of_a_bundle_tells_a_name(made, kind):
    found = dict(entries(made[kind]))
    names = {'learner.pkl', 'model.safetensors', ONNX, CARD, CONFIG, MANIFEST, 'canary.safetensors', 'gate.safetensors'}
    prefix = 'bundle.zip/' if kind == 'zip' else ''
    assert found.keys() >= {prefix + name for name in names}
    assert [name for name in found if name.startswith(f'{prefix}learner.pkl/') and name.endswith('.pkl')]
    assert {name: told for name, data in found.items() if (told := leaks(data))} == {}


@pytest.mark.parametrize('name', ['learner.pkl', 'model.safetensors'])
def test_no_model_file_of_a_run_tells_a_name(made, name):
    assert {inner: told for inner, data in entries(made['run'] / name) if (told := leaks(data))} == {}


def test_the_card_for_sharing_tells_no_name(made):
    assert main(['report', str(made['run'])]) == 0
    assert not leaks((made['run'] / 'model_card.md').read_bytes())
    assert '--by hospital' in (made['run'] / 'model_card.md').read_text()  # the column, none of its words


@pytest.mark.parametrize('suffix', ['.csv', '.json'])
def test_rows_of_predictions_tell_no_more_than_where_the_image_is(planted, made, tmp_path, suffix):
    folder = tmp_path / CANARIES['folder']
    folder.mkdir()
    for place, data in refused_images().items():
        (folder / f'{place}.dcm').write_bytes(data)
    table = tmp_path / f'{CANARIES["table"]}{suffix}'
    assert main(['predict', str(made['bundle']), str(planted), str(folder), '--no-gate', '--out', str(table)]) == 3
    text = table.read_text(encoding='utf-8')
    rows = json.loads(text) if suffix == '.json' else list(csv.DictReader(io.StringIO(text)))
    paths = [row.pop('path') for row in rows]
    assert [row['status'] for row in rows] == ['ok'] * 40 + ['error', 'rejected', 'rejected', 'error']
    assert not leaks(json.dumps(rows).encode()) and leaks('\n'.join(paths).encode()) == {'home', 'folder', 'file'}
    for path in paths:
        text = text.replace(path, '')
    assert not leaks(text.encode())

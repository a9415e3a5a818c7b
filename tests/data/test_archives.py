"""Archives are checked before anything is written, whatever their headers say."""

import io
import stat
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.core.errors import CXRError, OutputError, UsageError
from cxr_fastai.data import archives
from cxr_fastai.data.archives import choose_images, unpack_arrays, new_folder, unpack_images
from cxr_fastai.data.find import find_images
from cxr_fastai.data.items import read_items

NAMES = (
    'chest_xray/train/NORMAL/IM-0001-0001.jpeg',
    'chest_xray/train/PNEUMONIA/person1_virus_6.jpeg',
    'chest_xray/test/NORMAL/IM-0002-0001.jpeg',
    'chest_xray/test/PNEUMONIA/person2_bacteria_7.jpeg',
)


def image(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)).save(buffer, 'JPEG')
    return buffer.getvalue()


def pack(path, entries, change=None, method=zipfile.ZIP_DEFLATED):
    """Write `entries`, pairs of name and bytes; `change` may spoil what the central directory says."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w', method) as file:
        warnings.simplefilter('ignore')  # names that occur twice are meant
        for name, data in entries:
            info = zipfile.ZipInfo('placeholder')
            info.filename, info.compress_type = name, method  # the constructor would clean the name
            file.writestr(info, data)
        if change:
            change(file.filelist[-1])
    return path


def images_zip(path, *more, **options):
    return pack(path, [*((name, image(i)) for i, name in enumerate(NAMES)), *more], **options)


def refused(tmp_path, archive, match):
    with pytest.raises(CXRError, match=match) as caught:
        unpack_images(archive, tmp_path / 'images')
    assert '\n' not in str(caught.value)
    return caught.value


def test_images_come_out_as_they_went_in(tmp_path):
    skipped = unpack_images(images_zip(tmp_path / 'a.zip'), tmp_path / 'images')
    assert not skipped
    assert len(find_images(tmp_path / 'images')[0]) == 4
    assert (tmp_path / 'images/train/PNEUMONIA/person1_virus_6.jpeg').read_bytes() == image(1)


def test_second_copies_and_junk_are_counted():
    junk = [
        '__MACOSX/chest_xray/train/NORMAL/._IM-0001-0001.jpeg',
        'chest_xray/._train',
        'chest_xray/.DS_Store',
        'chest_xray/more.zip',
        'chest_xray/train/IM-0009-0001.jpeg',
        'chest_xray/chest_xray/.DS_Store',
    ]
    images, skipped = choose_images([*NAMES, *(f'chest_xray/{name}' for name in NAMES), *junk])
    assert list(images) == list(NAMES)
    assert set(images.values()) == {name.removeprefix('chest_xray/') for name in NAMES}
    assert skipped == {
        '__MACOSX': 1,
        '._*': 1,
        '.DS_Store': 2,
        'not an image': 1,
        'outside the class folders': 1,
        'nested chest_xray': 4,
    }


@pytest.mark.parametrize('above', ['', 'chest_xray/', 'chest_xray/chest_xray/'])
def test_the_folders_above_the_splits_do_not_matter(above):
    assert choose_images([f'{above}val/NORMAL/a.JPEG'])[0] == {f'{above}val/NORMAL/a.JPEG': 'val/NORMAL/a.JPEG'}


@pytest.mark.parametrize(
    'name',
    [
        '../evil.jpeg',
        'chest_xray/train/NORMAL/../../../../evil.jpeg',
        '/etc/evil.jpeg',
        'C:/evil.jpeg',
        'C:evil.jpeg',
        r'chest_xray\train\NORMAL\evil.jpeg',
        '..',
        'a/..',
        '../',
        r'\\host\share\evil.jpeg',
        'chest_xray/train/NORMAL/a.jpeg\0b',
    ],
)
def test_a_name_that_leaves_the_folder_refuses_the_whole_archive(tmp_path, name):
    error = refused(tmp_path, images_zip(tmp_path / 'a.zip', (name, b'')), 'can lead out of the folder')
    assert repr(name) in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ['a.zip']


def test_a_name_with_dots_is_harmless(tmp_path):
    unpack_images(images_zip(tmp_path / 'a.zip', ('chest_xray/train/NORMAL/a..b.jpeg', image())), tmp_path / 'images')
    assert (tmp_path / 'images/train/NORMAL/a..b.jpeg').is_file()


def link(entry):
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def device(entry):
    entry.external_attr = (stat.S_IFCHR | 0o666) << 16


def encrypt(entry):
    entry.flag_bits |= 1


def pack_oddly(entry):
    entry.compress_type = zipfile.ZIP_LZMA


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (link, 'link or a device'),
        (device, 'link or a device'),
        (encrypt, 'is encrypted'),
        (pack_oddly, 'method 14 is not supported'),
    ],
)
def test_an_entry_that_is_no_plain_file_is_refused(tmp_path, change, match):
    refused(tmp_path, images_zip(tmp_path / 'a.zip', change=change), match)


@pytest.mark.parametrize('name', [NAMES[0], NAMES[0].replace('IM', 'im')])
def test_a_name_that_occurs_twice_is_refused(tmp_path, name):
    refused(tmp_path, images_zip(tmp_path / 'a.zip', (name, image())), 'occurs twice')


def test_a_bomb_is_refused_by_the_size_of_the_archive(tmp_path):
    bomb = ('chest_xray/readme.txt', bytes(5_000_000))
    refused(tmp_path, pack(tmp_path / 'a.zip', [bomb]), 'would unpack to 5,000,000; at most')


def test_an_image_that_is_a_bomb_is_refused_among_honest_ones(tmp_path):
    bomb = ('chest_xray/train/NORMAL/bomb.png', bytes(100_000))
    refused(tmp_path, images_zip(tmp_path / 'a.zip', bomb), "bomb.png' is refused: .* more than 200 times")
    assert not (tmp_path / 'images').exists()


def test_headers_that_lie_do_not_help_a_bomb(tmp_path, monkeypatch):
    archive = images_zip(tmp_path / 'a.zip')
    monkeypatch.setattr(zipfile.ZipFile, 'open', lambda *_: io.BytesIO(bytes(2_000_000)))
    refused(tmp_path, archive, 'more than 200 times')


def test_a_size_that_lies_is_damage(tmp_path):
    def shrink(entry):
        entry.file_size = 10

    refused(tmp_path, images_zip(tmp_path / 'a.zip', change=shrink), 'not a complete zip file')


@pytest.mark.parametrize(
    ('limit', 'value', 'match'),
    [('MAX_ENTRIES', 3, '4 entries; at most 3 are allowed'), ('MAX_BYTES', 1000, 'at most 1,000')],
)
def test_limits_hold(tmp_path, monkeypatch, limit, value, match):
    monkeypatch.setattr(archives, limit, value)
    refused(tmp_path, images_zip(tmp_path / 'a.zip'), match)


def test_a_damaged_zip_is_one_line(tmp_path):
    whole = images_zip(tmp_path / 'a.zip', method=zipfile.ZIP_STORED).read_bytes()
    at = whole.index(image(2)) + 500
    damaged = {
        'cut': whole[:-200],
        'flipped': whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :],
        'page': b'<!doctype html>',
        'empty': b'',
        'tail': whole[-22:],
        'middle': whole[3000:],
    }
    match = 'not a complete zip file|cannot be read|its data are missing'
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / f'images of {name}', tmp_path / name, f'{name}: .*({match})')
    refused(tmp_path, tmp_path / 'absent.zip', 'absent.zip: cannot be read .No such file')


def test_a_folder_is_copied_without_following_links(tmp_path):
    unpack_images(images_zip(tmp_path / 'a.zip'), tmp_path / 'cache/chest_xray')
    unpack_images(tmp_path / 'a.zip', tmp_path / 'cache/chest_xray/chest_xray')
    (tmp_path / 'cache/chest_xray/train/NORMAL/link.jpeg').symlink_to('/etc/hostname')
    assert unpack_images(tmp_path / 'cache', tmp_path / 'images') == {'nested chest_xray': 4, 'link': 1}
    assert len(find_images(tmp_path / 'images')[0]) == 4


def arrays(path, **other):
    rng = np.random.default_rng(0)
    content = {}
    for split, n in (('train', 4), ('val', 2), ('test', 2)):
        content[f'{split}_images'] = rng.integers(0, 256, (n, 224, 224), np.uint8)
        content[f'{split}_labels'] = (np.arange(n) % 2).astype(np.uint8)[:, None]
    content |= other
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path, content


def test_arrays_become_grey_png_images(tmp_path):
    path, content = arrays(tmp_path / 'a.npz')
    assert not unpack_arrays(path, tmp_path / 'images')
    items = read_items(tmp_path / 'images')
    assert items.groupby(['split', 'label']).size().tolist() == [1, 1, 2, 2, 1, 1]
    assert items.path[0] == 'test/NORMAL/medmnist-test-00001.png'
    with Image.open(tmp_path / 'images/train/PNEUMONIA/medmnist-train-00002.png') as image:
        assert image.mode == 'L' and (np.asarray(image) == content['train_images'][1]).all()


@pytest.mark.parametrize(
    ('wrong', 'match'),
    [
        ({'val_images': np.array([{}], dtype=object)}, 'not the arrays of MedMNIST .*allow_pickle'),
        ({'val_images': np.zeros((2, 28, 28), np.uint8)}, r'images \(2, 28, 28\)'),
        ({'val_images': np.zeros((2, 224, 224))}, 'float64 images'),
        ({'val_images': np.array(1, np.uint8)}, r'images \(\)'),
        ({'val_labels': np.zeros((3, 1), np.uint8)}, r'labels \(3, 1\)'),
        ({'val_labels': np.array([[0], [2]])}, 'labels other than 0 for NORMAL and 1 for PNEUMONIA'),
        ({'val_labels': np.zeros((2, 1))}, 'labels other than'),
        ({'val_images': None}, 'not the arrays of MedMNIST'),
    ],
)
def test_other_arrays_are_refused(tmp_path, wrong, match):
    with pytest.raises(CXRError, match=match):
        unpack_arrays(arrays(tmp_path / 'a.npz', **wrong)[0], tmp_path / 'images')


def test_damaged_arrays_are_refused(tmp_path):
    path, _ = arrays(tmp_path / 'a.npz')
    for data in (path.read_bytes()[:-100], b'<!doctype html>', b''):
        (tmp_path / 'b.npz').write_bytes(data)
        with pytest.raises(CXRError, match='not the arrays of MedMNIST'):
            unpack_arrays(tmp_path / 'b.npz', tmp_path / 'images')


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match='stop'), new_folder(tmp_path / 'new') as temporary:
        (temporary / 'half').touch()
        raise ValueError('stop')
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / 'new') as temporary:
        (temporary / 'whole').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'whole']


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(UsageError, match='exists already'), new_folder(tmp_path / 'new'):
        (tmp_path / 'new').mkdir()
        (tmp_path / 'new/mine').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'mine']


def test_a_full_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match='No space left'), new_folder(tmp_path / 'new'):
        raise OSError(28, 'No space left on device')

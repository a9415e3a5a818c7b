"""Archives are checked before anything is written, whatever their headers say."""

import io
import stat
import zipfile

import numpy as np
import pytest
from archivefiles import NAMES, jpeg_bytes, write_arrays, write_images_zip, write_zip
from PIL import Image

from cxr_fastai.core.errors import CXRError, OutputError, UsageError
from cxr_fastai.data import archives
from cxr_fastai.data.archives import choose_images, new_folder, unpack_arrays, unpack_images
from cxr_fastai.data.find import find_images
from cxr_fastai.data.items import read_items


def assert_refused(tmp_path, archive, match):
    with pytest.raises(CXRError, match=match) as caught:
        unpack_images(archive, tmp_path / 'images')
    assert '\n' not in str(caught.value)
    return caught.value


def test_the_images_of_a_zip_file_are_unpacked_unchanged(tmp_path):
    ignored = unpack_images(write_images_zip(tmp_path / 'a.zip'), tmp_path / 'images')
    assert not ignored
    assert len(find_images(tmp_path / 'images')[0]) == 4
    assert (tmp_path / 'images/train/PNEUMONIA/person1_virus_6.jpeg').read_bytes() == jpeg_bytes(1)


def test_second_copies_and_other_files_are_counted():
    other_files = [
        '__MACOSX/chest_xray/train/NORMAL/._IM-0001-0001.jpeg',
        'chest_xray/._train',
        'chest_xray/.DS_Store',
        'chest_xray/more.zip',
        'chest_xray/train/IM-0009-0001.jpeg',
        'chest_xray/chest_xray/.DS_Store',
    ]
    images, ignored = choose_images([*NAMES, *(f'chest_xray/{name}' for name in NAMES), *other_files])
    assert list(images) == list(NAMES)
    assert set(images.values()) == {name.removeprefix('chest_xray/') for name in NAMES}
    assert ignored == {
        '__MACOSX': 1,
        '._*': 1,
        '.DS_Store': 2,
        'not an image': 1,
        'outside the class folders': 1,
        'nested chest_xray': 4,
    }


@pytest.mark.parametrize('above', ['', 'chest_xray/', 'chest_xray/chest_xray/'])
def test_the_images_may_be_below_one_or_two_folders(above):
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
def test_an_archive_with_an_entry_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    error = assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip', (name, b'')), 'can lead out of the folder')
    assert repr(name) in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ['a.zip']


def test_a_file_name_may_contain_two_dots(tmp_path):
    archive = write_images_zip(tmp_path / 'a.zip', ('chest_xray/train/NORMAL/a..b.jpeg', jpeg_bytes()))
    unpack_images(archive, tmp_path / 'images')
    assert (tmp_path / 'images/train/NORMAL/a..b.jpeg').is_file()


def make_link(entry):
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def make_device(entry):
    entry.external_attr = (stat.S_IFCHR | 0o666) << 16


def encrypt(entry):
    entry.flag_bits |= 1


def use_lzma(entry):
    entry.compress_type = zipfile.ZIP_LZMA


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (make_link, 'link or a device'),
        (make_device, 'link or a device'),
        (encrypt, 'is encrypted'),
        (use_lzma, 'method 14 is not supported'),
    ],
)
def test_an_entry_that_is_not_a_plain_file_is_refused(tmp_path, change, match):
    assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip', change=change), match)


@pytest.mark.parametrize('name', [NAMES[0], NAMES[0].replace('IM', 'im')])
def test_a_name_that_occurs_twice_is_refused(tmp_path, name):
    assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip', (name, jpeg_bytes())), 'occurs twice')


def test_an_archive_that_expands_too_much_is_refused(tmp_path):
    bomb = ('chest_xray/readme.txt', bytes(5_000_000))
    assert_refused(tmp_path, write_zip(tmp_path / 'a.zip', [bomb]), 'would unpack to 5,000,000; at most')


def test_an_image_that_expands_too_much_is_refused(tmp_path):
    bomb = ('chest_xray/train/NORMAL/bomb.png', bytes(100_000))
    match = "bomb.png' is refused: .* more than 200 times"
    assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip', bomb), match)
    assert not (tmp_path / 'images').exists()


def test_an_image_that_expands_more_than_its_header_says_is_refused(tmp_path, monkeypatch):
    archive = write_images_zip(tmp_path / 'a.zip')
    monkeypatch.setattr(zipfile.ZipFile, 'open', lambda *_: io.BytesIO(bytes(2_000_000)))
    assert_refused(tmp_path, archive, 'more than 200 times')


def test_a_wrong_size_in_a_header_is_damage(tmp_path):
    def shrink(entry):
        entry.file_size = 10

    assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip', change=shrink), 'not a complete zip file')


@pytest.mark.parametrize(
    ('limit', 'value', 'match'),
    [('MAX_ENTRIES', 3, 'more than 3 entries'), ('MAX_BYTES', 1000, 'at most 1,000 bytes')],
)
def test_an_archive_over_a_limit_is_refused(tmp_path, monkeypatch, limit, value, match):
    monkeypatch.setattr(archives, limit, value)
    assert_refused(tmp_path, write_images_zip(tmp_path / 'a.zip'), match)


def test_a_damaged_zip_file_gives_a_message_of_one_line(tmp_path):
    complete = write_images_zip(tmp_path / 'a.zip', method=zipfile.ZIP_STORED).read_bytes()
    at = complete.index(jpeg_bytes(2)) + 500
    damaged_files = {
        'cut': complete[:-200],
        'flipped': complete[:at] + bytes([complete[at] ^ 255]) + complete[at + 1 :],
        'page': b'<!doctype html>',
        'empty': b'',
        'tail': complete[-22:],
        'middle': complete[3000:],
    }
    match = 'not a complete zip file|cannot be read|its data are missing'
    for name, content in damaged_files.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / f'images of {name}', tmp_path / name, f'{name}: .*({match})')
    assert_refused(tmp_path, tmp_path / 'absent.zip', 'absent.zip: cannot be read .No such file')


def test_a_folder_is_copied_without_following_links(tmp_path):
    unpack_images(write_images_zip(tmp_path / 'a.zip'), tmp_path / 'cache/chest_xray')
    unpack_images(tmp_path / 'a.zip', tmp_path / 'cache/chest_xray/chest_xray')
    (tmp_path / 'cache/chest_xray/train/NORMAL/link.jpeg').symlink_to('/etc/hostname')
    assert unpack_images(tmp_path / 'cache', tmp_path / 'images') == {'nested chest_xray': 4, 'link': 1}
    assert len(find_images(tmp_path / 'images')[0]) == 4


def test_medmnist_arrays_become_grey_png_files(tmp_path):
    arrays = write_arrays(tmp_path / 'a.npz')
    assert not unpack_arrays(tmp_path / 'a.npz', tmp_path / 'images')
    items = read_items(tmp_path / 'images')
    assert items.groupby(['split', 'label']).size().tolist() == [1, 1, 2, 2, 1, 1]
    assert items.path[0] == 'test/NORMAL/medmnist-test-00001.png'
    with Image.open(tmp_path / 'images/train/PNEUMONIA/medmnist-train-00002.png') as image:
        assert image.mode == 'L'
        assert (np.asarray(image) == arrays['train_images'][1]).all()


@pytest.mark.parametrize(
    ('changes', 'match'),
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
def test_other_arrays_are_refused(tmp_path, changes, match):
    write_arrays(tmp_path / 'a.npz', **changes)
    with pytest.raises(CXRError, match=match):
        unpack_arrays(tmp_path / 'a.npz', tmp_path / 'images')


def test_damaged_array_files_are_refused(tmp_path):
    write_arrays(tmp_path / 'a.npz')
    for content in ((tmp_path / 'a.npz').read_bytes()[:-100], b'<!doctype html>', b''):
        (tmp_path / 'b.npz').write_bytes(content)
        with pytest.raises(CXRError, match='not the arrays of MedMNIST'):
            unpack_arrays(tmp_path / 'b.npz', tmp_path / 'images')


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match='stop'), new_folder(tmp_path / 'new') as temporary:
        (temporary / 'half').touch()
        raise ValueError('stop')
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / 'new') as temporary:
        (temporary / 'whole').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'whole']


def test_a_folder_that_another_process_filled_is_left_unchanged(tmp_path):
    with pytest.raises(UsageError, match='exists'), new_folder(tmp_path / 'new'):
        (tmp_path / 'new').mkdir()
        (tmp_path / 'new/mine').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'mine']


def test_a_full_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match='No space left'), new_folder(tmp_path / 'new'):
        raise OSError(28, 'No space left on device')

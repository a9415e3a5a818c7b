"""The example images and the held-out split keep patients apart and leave the official test images unused."""

from cxr_fastai.data.items import read_items
from cxr_fastai.data.splits import leaking_patients
from cxr_fastai.examples import example_images, hold_out, list_held_out


def test_the_held_out_split_contains_no_official_test_image_and_no_leak(images):
    items = read_items(images)
    held_out = hold_out(items)
    assert set(held_out.path) == set(items[items.split != 'test'].path)
    assert set(held_out.split) == {'train', 'valid', 'test'}
    assert leaking_patients(held_out).empty


def test_the_csv_file_of_the_held_out_split_can_replace_a_folder(images, tmp_path):
    listing = list_held_out(images, tmp_path / 'lists/held_out.csv')
    items, expected = read_items(listing), hold_out(read_items(images))
    assert len(items) == len(expected)
    assert items.split.value_counts().to_dict() == expected.split.value_counts().to_dict()


def test_example_images_are_copied_from_the_real_data_set_without_its_test_images(images, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(images))
    folder = example_images(tmp_path)
    assert folder == tmp_path / 'real/images'
    official_test = {path.name for path in (images / 'test').rglob('*.jpeg')}
    assert not official_test & {path.name for path in folder.rglob('*.jpeg')}
    assert leaking_patients(read_items(folder)).empty
    assert example_images(tmp_path) == folder, 'the second call reuses the images'

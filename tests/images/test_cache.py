"""The cache of decoded images always gives the same pixels as decoding."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, OutputError, UsageError
from cxr_fastai.core.hardware import available_cores
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders, cxr_block, locate
from cxr_fastai.images import cache
from cxr_fastai.images.cache import ImageCache, cache_folder, find_cache, prepare
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.training import train

SMALL = Preprocessing(64)


@pytest.fixture
def root(images, tmp_path, monkeypatch) -> Path:
    """A copy of the images that a test may change, with an empty cache."""
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))
    return Path(shutil.copytree(images, tmp_path / 'images'))


@pytest.fixture
def paths(root) -> list[str]:
    return list(read_items(root).path)


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """The contents of all files that were decoded so far."""
    contents = []

    def decode_and_record(data: bytes, *arguments: object) -> DecodedImage:
        contents.append(data)
        return decode_image(data, *arguments)

    monkeypatch.setattr(cache, 'decode_image', decode_and_record)
    return contents


def same_pixels(cached: ImageCache, root: Path, paths: list[str]) -> bool:
    """Return True if the cache gives the same pixels as decoding."""
    return all(np.array_equal(cached.load(root / path), cached.preprocessing.load(root / path)) for path in paths)


@pytest.mark.parametrize('preprocessing', [SMALL, Preprocessing(48, 'pad'), Preprocessing(80, 'crop')])
def test_cached_images_equal_the_decoded_ones(root, paths, preprocessing):
    folder, n, bad = prepare(paths, root, preprocessing)
    cached = find_cache(root, preprocessing)
    assert (n, bad, cached.folder) == (len(paths), [], folder) and all(root / path in cached for path in paths)
    assert isinstance(cached.images, np.memmap) and cached.images.shape == (n, preprocessing.size, preprocessing.size)
    assert same_pixels(cached, root, paths)


def test_another_size_or_resize_is_another_cache(root, paths):
    prepare(paths[:3], root, SMALL)
    assert find_cache(root, Preprocessing(48)) is None and find_cache(root, Preprocessing(64, 'pad')) is None
    assert find_cache(root / 'train', SMALL) is None


def test_no_image_is_decoded_twice(root, paths, decoded):
    prepare(paths[:20], root, SMALL)
    prepare(paths, root, SMALL)
    assert len(decoded) == len(paths)
    assert prepare(paths + paths, root, SMALL)[1] == 0 and len(decoded) == len(paths)


def test_only_changed_and_new_images_are_decoded_again(root, paths, decoded):
    prepare(paths, root, SMALL)
    Image.fromarray(255 - np.asarray(Image.open(root / paths[4]))).save(root / paths[4])
    Image.open(root / paths[5]).rotate(90).save(root / 'train/NORMAL/IM-7777-0001.jpeg')
    cached = find_cache(root, SMALL)
    assert root / paths[4] not in cached and len(cached.rows) == len(paths) - 1
    decoded.clear()
    paths = list(read_items(root).path)
    assert prepare(paths, root, SMALL)[1] == 2 == len(decoded)
    assert same_pixels(find_cache(root, SMALL), root, paths)


def test_a_touched_or_moved_image_is_recognised_by_its_content(root, paths, decoded):
    prepare(paths, root, SMALL)
    os.utime(root / paths[0], (1, 1))
    (root / paths[1]).rename(root / 'train/NORMAL/IM-8888-0001.jpeg')
    decoded.clear()
    paths = list(read_items(root).path)
    prepare(paths, root, SMALL)
    assert not decoded and same_pixels(find_cache(root, SMALL), root, paths)


def test_a_deleted_image_is_not_in_the_cache(root, paths):
    prepare(paths, root, SMALL)
    (root / paths[0]).unlink()
    cached = find_cache(root, SMALL)
    assert root / paths[0] not in cached and root / paths[1] in cached


def test_unreadable_images_are_reported_and_left_out(root, paths):
    (root / paths[2]).write_bytes(b'')
    _, n, bad = prepare(paths, root, SMALL)
    assert n == len(paths) - 1 and [error.code for error in bad] == ['E_EMPTY'] and str(root / paths[2]) in str(bad[0])
    assert root / paths[2] not in find_cache(root, SMALL)


def test_damaged_lines_of_the_index_are_skipped(root, paths):
    folder, _, _ = prepare(paths[:20], root, SMALL)
    damage = b'\0\0\n[1, 2]\n[1, "x", 2, "", "y"]\n["0", "x", 1, 1, "y"]\n' + b'9' * 5000 + b'\n' + b'[' * 200_000
    with open(folder / 'index.jsonl', 'ab') as index:
        index.write(damage)
    assert len(find_cache(root, SMALL).rows) == 20
    prepare(paths, root, SMALL)
    assert same_pixels(find_cache(root, SMALL), root, paths) and len(find_cache(root, SMALL).rows) == len(paths)


def test_an_old_line_of_the_index_never_refers_to_a_new_image(root, paths):
    folder, _, _ = prepare(paths[:10], root, SMALL)
    os.truncate(folder / 'images.u8', 7 * 64 * 64)
    Image.open(root / paths[20]).rotate(90).save(root / 'train/NORMAL/IM-7777-0001.jpeg')
    prepare(['train/NORMAL/IM-7777-0001.jpeg'], root, SMALL)
    cached = find_cache(root, SMALL)
    assert len(cached.rows) == 8 and same_pixels(cached, root, [*paths[:10], 'train/NORMAL/IM-7777-0001.jpeg'])


@pytest.mark.parametrize('lost', ['images.u8', 'index.jsonl', 'decoder.json'])
def test_a_cache_without_one_of_its_files_is_rebuilt(root, paths, lost):
    folder, _, _ = prepare(paths[:10], root, SMALL)
    (folder / lost).unlink()
    assert find_cache(root, SMALL) is None
    assert prepare(paths[:10], root, SMALL)[1] == 10 and len(find_cache(root, SMALL).rows) == 10


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / 'file').touch()


def _endless(path: Path) -> None:
    path.symlink_to('/dev/zero')


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def _nested(path: Path) -> None:
    path.write_text('[' * 100_000)


@pytest.mark.parametrize('damage', [_pipe, _folder, _endless, _huge, _nested])
@pytest.mark.parametrize('name', ['index.jsonl', 'decoder.json'])
def test_a_cache_whose_files_are_something_else_is_rebuilt(root, paths, name, damage):
    folder, _, _ = prepare(paths[:5], root, SMALL)
    (folder / name).unlink()
    damage(folder / name)
    assert find_cache(root, SMALL) is None
    assert prepare(paths[:5], root, SMALL)[1] == 5
    assert len(find_cache(root, SMALL).rows) == 5


def test_a_pipe_or_a_folder_instead_of_the_pixels_is_replaced(root, paths):
    for damage in (_pipe, _folder):
        folder, _, _ = prepare(paths[:5], root, SMALL)
        (folder / 'images.u8').unlink()
        damage(folder / 'images.u8')
        assert find_cache(root, SMALL) is None
        assert prepare(paths[:5], root, SMALL)[1] == 5


def test_a_lock_that_cannot_be_opened_is_an_output_error(root, paths):
    folder, _, _ = prepare(paths[:5], root, SMALL)
    (folder / 'lock').unlink(missing_ok=True)
    (folder / 'lock').mkdir()
    with pytest.raises(OutputError, match='lock: cannot be opened'):
        prepare(paths[:10], root, SMALL)


@pytest.mark.parametrize(
    'entry',
    [
        [True, 'x', 1, 1, 'a' * 64],
        [0, 'x', 1.5, 1, 'a' * 64],
        [0, 'x', 1, -1, 'a' * 64],
        [0, 'x', 1, 1, 'z'],
        [-1, 'x', 1, 1, 'a' * 64],
        {'row': 0},
        5,
    ],
)
def test_an_entry_with_a_value_of_another_type_is_skipped(root, paths, entry):
    folder, _, _ = prepare(paths[:5], root, SMALL)
    with open(folder / 'index.jsonl', 'a') as index:
        index.write(json.dumps(entry) + '\n')
    assert len(find_cache(root, SMALL).rows) == 5


def test_without_a_home_folder_prepare_asks_for_a_folder(root, paths, monkeypatch):
    monkeypatch.setenv('CXR_CACHE', '~nobody-of-that-name/cache')
    assert find_cache(root, SMALL) is None
    with pytest.raises(UsageError, match='no such home folder. Name a folder for the cache by CXR_CACHE'):
        prepare(paths, root, SMALL)


def test_unusual_file_names_are_cached(root, paths, decoded):
    odd = [os.fsdecode(name) for name in (b'a\rb.png', b'a\nb.png', b'"x", [1].png', b'\xff\xfe.png', 'é.png'.encode())]
    for i, name in enumerate(odd):
        (root / name).write_bytes((root / paths[i]).read_bytes())
    prepare(odd, root, SMALL)
    decoded.clear()
    prepare(odd, root, SMALL)
    assert not decoded and same_pixels(find_cache(root, SMALL), root, odd) and len(find_cache(root, SMALL).rows) == 5


@pytest.mark.parametrize('cut', ['index', 'images', 'both'])
def test_half_written_images_are_never_read(root, paths, cut):
    folder, _, _ = prepare(paths, root, SMALL)
    for name, lost in (('index.jsonl', 30), ('images.u8', 5 * 64 * 64 + 100)):
        if cut in (name.split('.')[0], 'both'):
            os.truncate(folder / name, (folder / name).stat().st_size - lost)
    cached = find_cache(root, SMALL)
    assert len(cached.rows) < len(paths) and same_pixels(cached, root, paths)
    prepare(paths, root, SMALL)
    cached = find_cache(root, SMALL)
    assert len(cached.rows) == len(paths) and same_pixels(cached, root, paths)


def test_a_killed_prepare_continues_where_it_stopped(root, paths, decoded, monkeypatch):
    for i in range(400):
        data = (root / paths[i % len(paths)]).read_bytes() + i.to_bytes(4, 'big')
        (root / f'train/NORMAL/IM-{i:05d}-0001.jpeg').write_bytes(data)
    paths = list(read_items(root).path)
    code = (
        'import sys; from pathlib import Path\n'
        'from cxr_fastai.images.cache import Preprocessing, prepare\n'
        'root = Path(sys.argv[1])\n'
        'paths = [path.relative_to(root).as_posix() for path in sorted(root.glob("t*/*/*.jpeg"))]\n'
        'prepare(paths, root, Preprocessing(64), 1)'
    )
    process = subprocess.Popen([sys.executable, '-c', code, root])
    index = cache_folder(root, SMALL) / 'index.jsonl'
    while process.poll() is None and (not index.exists() or index.stat().st_size == 0):
        time.sleep(0.001)
    process.kill()
    process.wait()
    cached = find_cache(root, SMALL)
    kept = len(cached.rows)
    assert kept > 0 and same_pixels(cached, root, paths[::20])
    prepare(paths, root, SMALL)
    assert len(decoded) <= len(paths) - kept
    assert len(find_cache(root, SMALL).rows) == len(paths)


def test_a_cache_of_another_decoder_is_rebuilt(root, paths, decoded, monkeypatch):
    prepare(paths, root, SMALL)
    monkeypatch.setattr(cache, 'DECODER', 99)
    assert find_cache(root, SMALL) is None
    decoded.clear()
    prepare(paths, root, SMALL)
    assert len(decoded) == len(paths) and same_pixels(find_cache(root, SMALL), root, paths)


def test_an_open_cache_keeps_its_pixels_when_it_is_rebuilt(root, paths, monkeypatch):
    prepare(paths, root, SMALL)
    cached = find_cache(root, SMALL)
    before = cached.load(root / paths[0]).copy()
    monkeypatch.setattr(cache, 'DECODER', 99)
    prepare(paths[::-1], root, SMALL)
    assert np.array_equal(cached.load(root / paths[0]), before)


def test_two_processes_cannot_prepare_the_same_images(root, paths):
    folder, _, _ = prepare(paths[:1], root, SMALL)
    with FileLock(folder / 'lock'), pytest.raises(CXRError, match='another `data prepare` is at work'):
        prepare(paths, root, SMALL)


def test_an_unwritable_cache_folder_is_an_output_error(root, paths, monkeypatch):
    monkeypatch.setenv('CXR_CACHE', '/sys/cxr')
    with pytest.raises(OutputError, match='cannot be written'):
        prepare(paths, root, SMALL)


def test_a_cache_is_found_by_relative_and_absolute_path(root, paths, monkeypatch):
    prepare(paths, root, SMALL)
    monkeypatch.chdir(root.parent)
    cached = find_cache(Path('images'), SMALL)
    assert same_pixels(cached, Path('images'), paths) and Path('images') / paths[0] in cached


def batches(recipe, root: Path, cached: ImageCache | None, epochs: int) -> list[torch.Tensor]:
    """Return all images and targets of the training and validation batches of some epochs."""
    torch.manual_seed(0)
    dls = CXRDataLoaders.from_items(read_items(root), root, recipe, cached)
    dls.train.rng.seed(0)
    return [
        part.as_subclass(torch.Tensor) for dl in dls.loaders for _ in range(epochs) for batch in dl for part in batch
    ]


@pytest.mark.parametrize(
    ('resize', 'workers', 'epochs'),
    [
        ('squish', 0, 2),
        ('squish', 2, 1),
        pytest.param('pad', 0, 2, marks=pytest.mark.slow),
        pytest.param('crop', 0, 2, marks=pytest.mark.slow),
    ],
)
def test_batches_are_bit_identical_with_and_without_a_cache(root, paths, resize, workers, epochs):
    recipe = make_recipe('baseline', size=64, resize=resize, batch_size=7, workers=workers)
    prepare(paths[::2], root, Preprocessing(64, resize))  # half of them: the others are decoded
    plain = batches(recipe, root, None, epochs)
    from_cache = batches(recipe, root, find_cache(root, Preprocessing(64, resize)), epochs)
    assert len(plain) == len(from_cache) > 10
    assert all(map(torch.equal, plain, from_cache))


def test_by_default_there_is_a_worker_per_core_unless_every_image_is_cached(root, paths):
    recipe = make_recipe('baseline', size=64, workers=None)

    def processes() -> int:
        dls = CXRDataLoaders.from_items(read_items(root), root, recipe, find_cache(root, SMALL))
        return dls.train.fake_l.num_workers

    assert processes() == available_cores()
    prepare(paths[:-30], root, SMALL)
    assert processes() == available_cores()
    prepare(paths, root, SMALL)
    assert processes() == 0


def test_model_files_contain_no_trace_of_the_cache(root, paths):
    import pickle

    prepare(paths, root, SMALL)
    cached = find_cache(root, SMALL)
    block = cxr_block(make_recipe('baseline', size=64), cached)
    dls = block.dataloaders(locate(read_items(root), root), bs=4, num_workers=0)
    packed = pickle.dumps(dls.new_empty().valid.after_item)
    assert pickle.loads(pickle.dumps(cached)) == SMALL and b'cache' not in packed and str(root).encode() not in packed


def test_training_uses_the_cache_and_gives_the_same_history(root, tmp_path, capsys, caplog):
    caplog.set_level('INFO', 'cxr_fastai')
    recipe = make_recipe('baseline', epochs=1, size=64, batch_size=8, seed=3)
    first = train(recipe, root, tmp_path / 'first')
    assert 'decoded from' not in caplog.text
    assert main(['data', 'prepare', str(root), '--size', '64']) == 0
    assert '60 images, 60 of them' in capsys.readouterr().out
    second = train(recipe, root, tmp_path / 'second')
    assert re.search('48 of 48 images .*from', caplog.text)
    columns = ['train_loss', 'valid_loss', 'roc_auc']
    assert first.history[columns].equals(second.history[columns])
    assert b'index.jsonl' not in (second / 'learner.pkl').read_bytes()


def test_prepare_reports_unreadable_images_and_exits_with_3(root, paths, capsys):
    (root / paths[0]).write_bytes(b'x')
    assert main(['data', 'prepare', str(root), '--size', '64', '--resize', 'pad', '--workers', '1']) == 3
    shown = capsys.readouterr()
    assert f'error: {root / paths[0]}: E_FORMAT' in shown.err and '59 images, 59 of them' in shown.out
    assert main(['data', 'prepare', str(root), '--resize', 'stretch']) == 2


def test_a_csv_file_and_its_folder_share_a_cache(root, paths):
    table = pd.DataFrame({'path': paths, 'label': [Path(path).parent.name for path in paths]})
    table.to_csv(root / 'images.csv', index=False)
    assert main(['data', 'prepare', '--csv', str(root / 'images.csv'), '--size', '64']) == 0
    assert len(find_cache(root, SMALL).rows) == len(paths)


def test_progress_is_logged_without_a_terminal(root, paths, monkeypatch, caplog):
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    caplog.set_level('INFO', 'cxr_fastai')
    prepare(paths, root, SMALL, 1)
    assert caplog.messages and all('of 60 images, ' in line for line in caplog.messages)
    assert len(caplog.messages) <= 20


def test_a_learner_that_was_trained_from_the_cache_can_be_loaded(root, paths, tmp_path):
    prepare(paths, root, SMALL)
    run = train(make_recipe('baseline', epochs=1, size=64, batch_size=8, limit=8), root, tmp_path / 'run')
    assert load_learner(run / 'learner.pkl').config['size'] == 64

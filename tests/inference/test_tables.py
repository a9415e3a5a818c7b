"""Tables of predictions: complete at any time, for images of any name, and never overwritten."""

import csv
import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oddnames import FORMULAS, NAMES, copy_with_odd_names
from PIL import Image

from cxr_fastai.core import environment
from cxr_fastai.core.errors import CXRWarning, OutputError, UsageError
from cxr_fastai.core.files import FORMULA_STARTS
from cxr_fastai.data.find import find_images
from cxr_fastai.images.decode import ImageLike, read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference import tables
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.config import temper
from cxr_fastai.inference.gate import REJECTION
from cxr_fastai.inference.predictor import COLUMNS, Predictor
from cxr_fastai.inference.tables import JsonTable, ParquetTable, open_table, predict_to_table

SUFFIXES = ['.csv', '.json', '.parquet']
BATCH = 4


def row(path: str, **fields: object) -> dict:
    return {**dict.fromkeys(COLUMNS), 'path': path, 'status': 'ok', **fields}


def parsed(path: Path) -> list[dict]:
    """The rows of a table as other programs read them; a missing value is an empty text."""
    if path.suffix == '.json':
        return [{name: value or '' for name, value in row.items()} for row in json.loads(path.read_bytes())]
    if path.suffix == '.parquet':
        return pd.read_parquet(path).astype(object).fillna('').to_dict('records')
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file, strict=True))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Within the block no file can grow beyond `limit` bytes."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


# The files.


@pytest.mark.parametrize('name', FORMULAS)
def test_a_name_that_a_spreadsheet_would_evaluate_is_text_in_a_csv(tmp_path, name):
    for suffix in SUFFIXES:
        table = open_table(tmp_path / f'p{suffix}', COLUMNS)
        table.create()
        table.append([row(name, message=name)])
        table.close()
        (other_program,) = parsed(table.path)
        expected = f"'{name}" if suffix == '.csv' else name
        assert (other_program['path'], other_program['message']) == (expected, expected)
        assert table.read() == [row(name, message=name)]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_every_name_is_read_as_it_was_written(tmp_path, suffix):
    table = open_table(tmp_path / f'p{suffix}', COLUMNS)
    table.create()
    table.append([row(name) for name in NAMES])
    table.close()
    assert [line['path'] for line in table.read()] == NAMES
    other_program = [line['path'] for line in parsed(table.path)]
    if suffix == '.csv':
        assert not [name for name in other_program if name.startswith(FORMULA_STARTS)]
    else:
        assert other_program == NAMES


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_is_complete_after_every_batch(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(ParquetTable, 'ROWS_PER_WRITE', 1)
    table = open_table(tmp_path / f'p{suffix}', COLUMNS)
    table.create()
    assert parsed(table.path) == table.read() == []
    count = 0
    for batch_size in (3, 0, 1, 2):
        table.append([row(name, p_pneumonia=0.25, threshold=0.5) for name in NAMES[count : count + batch_size]])
        count += batch_size
        assert len(parsed(table.path)) == count
        lines = open_table(table.path, COLUMNS).read()
        assert [line['path'] for line in lines] == NAMES[:count]
        assert {float(line['p_pneumonia']) for line in lines} <= {0.25}
    assert [path.name for path in tmp_path.iterdir()] == [table.path.name]


def test_a_parquet_file_is_not_rewritten_for_every_batch(tmp_path):
    table = open_table(tmp_path / 'p.parquet', COLUMNS)
    table.create()
    table.append([row('a.png')])
    assert parsed(table.path) == []
    table.append([row('b.png')] * (ParquetTable.ROWS_PER_WRITE - 1))
    assert len(parsed(table.path)) == ParquetTable.ROWS_PER_WRITE


@pytest.mark.parametrize('suffix', ['.csv', '.json'])
def test_a_disk_that_becomes_full_in_a_batch_leaves_the_rows_before_it(tmp_path, suffix):
    table = open_table(tmp_path / f'p{suffix}', COLUMNS)
    table.create()
    for batch in ([], [row('a.png')]):
        table.append(batch)
        before = table.path.read_bytes()
        with full_disk(len(before) + 10), pytest.raises(OutputError, match='File too large'):
            table.append([row(name) for name in NAMES])
        assert table.path.read_bytes() == before
    table.append([row('b.png')])
    assert [line['path'] for line in table.read()] == ['a.png', 'b.png']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_that_cannot_be_created_leaves_no_file(tmp_path, suffix):
    table = open_table(tmp_path / f'p{suffix}', COLUMNS)
    with full_disk(2), pytest.raises(OutputError, match='File too large'):
        table.create()
    assert not list(tmp_path.iterdir())


def test_the_suffix_chooses_the_kind_of_table(tmp_path, monkeypatch):
    assert isinstance(open_table(tmp_path / 'P.JSON', ()), JsonTable)
    with pytest.raises(UsageError, match='The name must end in .csv, .json, .parquet'):
        open_table(tmp_path / 'p', ())
    monkeypatch.setattr(environment, 'find_spec', lambda _: None)
    with pytest.raises(UsageError, match=r'pip install "cxr_fastai\[parquet\]"'):
        open_table(tmp_path / 'p.parquet', ())


# Predicting to a table.


@pytest.fixture(scope='module')
def image(images) -> Path:
    return sorted((images / 'test').rglob('*.jpeg'))[0]


@pytest.fixture(scope='module')
def paths(images, tmp_path_factory) -> list[Path]:
    """Eleven images in three batches; the second batch contains an empty file."""
    empty = tmp_path_factory.mktemp('bad') / '=bad.jpeg'
    empty.write_bytes(b'')
    good = sorted((images / 'test').rglob('*.jpeg'))[:10]
    return [*good[:5], empty, *good[5:]]


@dataclass(frozen=True)
class Call:
    """`predict_to_table` with the same model, images and batch size."""

    model: Path
    paths: list[ImageLike]

    def __call__(self, table: Path, **options: object) -> tables.Predictions:
        return predict_to_table(self.model, self.paths, table, batch_size=BATCH, use_gate=False, **options)


@pytest.fixture(scope='module')
def predict(bundle, paths) -> Call:
    return Call(bundle, paths)


@pytest.fixture(scope='module')
def complete(predict, tmp_path_factory) -> dict[str, Path]:
    """Tables by suffix, as they are without an interruption."""
    paths = {suffix: tmp_path_factory.mktemp('complete') / f'p{suffix}' for suffix in SUFFIXES}
    for path in paths.values():
        predict(path)
    return paths


def is_same(table: Path, complete: dict[str, Path]) -> bool:
    if table.suffix == '.parquet':
        return pd.read_parquet(table).equals(pd.read_parquet(complete['.parquet']))
    return table.read_bytes() == complete[table.suffix].read_bytes()


def test_the_result_has_rows_positives_and_failures(predict, complete, tmp_path):
    predictions = predict(tmp_path / 'p.json')
    assert predictions.rows == json.loads(complete['.json'].read_text())
    assert predictions.positives == sum(row['prediction'] == 'PNEUMONIA' for row in predictions.rows)
    (failure,) = predictions.failures
    assert failure['code'] == 'E_EMPTY' and failure['path'].endswith('=bad.jpeg')
    assert predictions.predictor.gate is None


def test_without_a_table_nothing_is_written(bundle, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(predict_to_table(bundle, [image]).rows) == 1
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_gate_is_a_warning(evaluated, image):
    with pytest.warns(CXRWarning, match='has no input gate'):
        predict_to_table(evaluated.path, [image])


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_images_of_every_name_get_their_row(bundle, image, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(copy_with_odd_names(image, tmp_path / 'images'))
    paths, _ = find_images(Path('.'))
    table = tmp_path / f'p{suffix}'
    predict_to_table(bundle, paths, table, use_gate=False)
    expected = [str(path).encode('utf-8', 'backslashreplace').decode() for path in paths]
    lines = open_table(table, COLUMNS).read()
    assert [line['path'] for line in lines] == expected
    assert {line['status'] for line in lines} == {'ok'}
    other_program = [line['path'] for line in parsed(table)]
    if suffix == '.csv':
        assert not [path for path in other_program if path.startswith(FORMULA_STARTS)]
    else:
        assert other_program == expected


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_an_existing_table_is_not_changed(predict, tmp_path, suffix):
    table = tmp_path / f'p{suffix}'
    table.write_text('precious')
    with pytest.raises(UsageError, match='exists already and was not changed'):
        predict(table)
    with pytest.raises(UsageError, match='is not a table of predictions'):
        predict(table, resume=True)
    table.chmod(0o400)
    with pytest.raises(UsageError, match='exists already'):
        predict(table)
    assert table.read_text() == 'precious'


@pytest.mark.parametrize('content', ['', '{}', 'null', '5', '[1]', '[["path"]]', '[{"path": "a.png"}]', '[' * 100_000])
def test_other_json_is_not_resumed(predict, tmp_path, content):
    table = tmp_path / 'p.json'
    table.write_text(content)
    with pytest.raises(UsageError, match='is not a table of predictions'):
        predict(table, resume=True)
    assert table.read_text() == content


@pytest.mark.parametrize(
    'content', ['', 'a,b\n', f'{",".join(COLUMNS)}\nx.png,ok\n', f'"{"x" * 200_000}"', '\0', '\xff']
)
def test_another_csv_file_is_not_resumed(predict, tmp_path, content):
    table = tmp_path / 'p.csv'
    table.write_text(content, encoding='latin-1')
    with pytest.raises(UsageError, match='is not a table of predictions'):
        predict(table, resume=True)
    assert table.read_text(encoding='latin-1') == content


def test_another_parquet_file_is_not_resumed(predict, tmp_path):
    table = tmp_path / 'p.parquet'
    pd.DataFrame({'a': []}).to_parquet(table)
    before = table.read_bytes()
    with pytest.raises(UsageError, match='is not a table of predictions'):
        predict(table, resume=True)
    assert table.read_bytes() == before


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_folder_or_an_image_is_not_a_table(predict, image, tmp_path, suffix, resume):
    (tmp_path / f'folder{suffix}').mkdir()
    with pytest.raises(UsageError, match='exists already|not a table'):
        predict(tmp_path / f'folder{suffix}', resume=resume)
    copy = Path(shutil.copy(image, tmp_path / f'image{suffix}'))
    before = copy.read_bytes()
    with pytest.raises(UsageError, match='exists already|not a table'):
        predict(copy, resume=resume)
    assert copy.read_bytes() == before


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs /sys, where nobody can create files; run it on Linux')
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_folder_that_cannot_be_written_is_an_output_error(predict, suffix):
    with pytest.raises(OutputError, match='cannot be written'):
        predict(Path(f'/sys/cxr{suffix}'))


def interrupt_batch(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Let the prediction of a batch, counted from 1, be interrupted."""
    infer = Predictor.infer
    calls = 0

    def interrupted(self: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal calls
        if len(images) > 1:  # opening a bundle predicts one image
            calls += 1
        if calls == batch:
            raise KeyboardInterrupt
        return infer(self, images)

    monkeypatch.setattr(Predictor, 'infer', interrupted)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_an_interrupted_table_is_resumed_to_the_same_table(predict, complete, tmp_path, monkeypatch, suffix, batch):
    table = tmp_path / f'p{suffix}'
    with monkeypatch.context() as patch:
        interrupt_batch(patch, batch)
        with pytest.raises(KeyboardInterrupt):
            predict(table)
    assert parsed(table) == parsed(complete[suffix])[: (batch - 1) * BATCH]
    for _ in range(2):  # the second time nothing is left to do
        assert len(predict(table, resume=True).rows) == 11
        assert is_same(table, complete)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_full_disk_loses_no_row_that_was_written(predict, complete, tmp_path, suffix):
    empty = open_table(tmp_path / f'empty{suffix}', COLUMNS)
    empty.create()
    table = tmp_path / f'p{suffix}'
    limit = complete[suffix].stat().st_size - 40
    rows_left = 2 * BATCH
    if suffix == '.parquet':  # written once, at the end
        limit = empty.path.stat().st_size + 40
        rows_left = 0
    with full_disk(limit), pytest.raises(OutputError, match=f'p{suffix}: cannot be written .*File too large'):
        predict(table)
    assert parsed(table) == parsed(complete[suffix])[:rows_left]
    predict(table, resume=True)
    assert is_same(table, complete)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_resume_starts_a_table_that_does_not_exist(predict, complete, tmp_path, suffix):
    predict(tmp_path / f'p{suffix}', resume=True)
    assert is_same(tmp_path / f'p{suffix}', complete)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_of_other_images_or_another_threshold_is_not_resumed(predict, paths, complete, tmp_path, suffix):
    table = Path(shutil.copy(complete[suffix], tmp_path / f'p{suffix}'))
    for other_paths in (paths[::-1], paths[:3]):
        with pytest.raises(UsageError, match='contains other images'):
            Call(predict.model, other_paths)(table, resume=True)
    with pytest.raises(UsageError, match=r'has the threshold .*, but now it is 0.125'):
        predict(table, resume=True, threshold=0.125)
    assert table.read_bytes() == complete[suffix].read_bytes()


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_of_another_network_is_not_resumed(predict, complete, tmp_path, suffix, monkeypatch):
    table = Path(shutil.copy(complete[suffix], tmp_path / f'p{suffix}'))
    infer = Predictor.infer

    def other_network(predictor: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, distances = infer(predictor, images)
        return p / 2, distances

    monkeypatch.setattr(Predictor, 'infer', other_network)
    with pytest.raises(UsageError, match=r'for .*, but now it is .* Use the same model, options and images'):
        predict(table, resume=True)
    assert table.read_bytes() == complete[suffix].read_bytes()


def test_rows_that_a_gate_rejected_are_not_continued_without_it(bundle, paths, tmp_path, monkeypatch):
    table = tmp_path / 'p.csv'
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, 'decide', lambda *_: REJECTION)
        predict_to_table(bundle, paths[:2], table, use_gate=False)
    with pytest.raises(UsageError, match='rejects .*, which is accepted now'):
        predict_to_table(bundle, paths[:2], table, use_gate=False, resume=True)


def test_a_table_with_a_damaged_number_is_not_resumed(predict, complete, tmp_path):
    table = tmp_path / 'p.csv'
    lines = complete['.csv'].read_text().splitlines(keepends=True)
    threshold = lines[1].split(',')[4]
    table.write_text(''.join([lines[0], lines[1].replace(f',{threshold},', ',high,'), *lines[2:]]))
    with pytest.raises(UsageError, match="'high' as threshold, which is not a number"):
        predict(table, resume=True)


# Options.


@pytest.fixture(scope='module')
def good_paths(paths) -> list[Path]:
    return [path for path in paths if not re.search('bad', path.name)]


def test_the_threshold_option_replaces_that_of_the_model(bundle, good_paths):
    plain = predict_to_table(bundle, good_paths, use_gate=False).rows
    median = float(np.median([row['p_pneumonia'] for row in plain]))
    for threshold, positives in ((0, 10), (median, 5), (1, 0)):
        predictions = predict_to_table(bundle, good_paths, use_gate=False, threshold=threshold)
        rows = predictions.rows
        assert {row['threshold'] for row in rows} == {threshold}
        assert [row['p_pneumonia'] for row in rows] == [row['p_pneumonia'] for row in plain]
        assert [row['prediction'] == 'PNEUMONIA' for row in rows] == [row['p_pneumonia'] >= threshold for row in rows]
        assert predictions.positives == positives


def test_calibration_scales_probabilities_and_threshold_and_changes_no_class(bundle, good_paths):
    temperature = Bundle.open(bundle).config.temperature
    plain = predict_to_table(bundle, good_paths, use_gate=False).rows
    calibrated = predict_to_table(bundle, good_paths, use_gate=False, calibrated=True).rows
    assert temperature != 1
    for before, after in zip(plain, calibrated, strict=True):
        assert after['p_pneumonia'] == pytest.approx(temper(before['p_pneumonia'], temperature))
        assert after['p_pneumonia'] != before['p_pneumonia']
        assert after['threshold'] == pytest.approx(temper(before['threshold'], temperature))
        assert after['prediction'] == before['prediction']


def test_a_threshold_is_on_the_scale_of_calibrated_probabilities(bundle, image):
    (row,) = predict_to_table(bundle, [image], use_gate=False, calibrated=True, threshold=0.3).rows
    assert row['threshold'] == pytest.approx(0.3)


def test_tta_is_the_mean_of_an_image_and_its_mirror_image(bundle, good_paths, tmp_path):
    preprocessing = Preprocessing.of(Bundle.open(bundle).config)
    for number, path in enumerate(good_paths[:3]):
        square = preprocessing.square(read_image(path))
        Image.fromarray(square).save(tmp_path / f'{number}.png')
        Image.fromarray(square[:, ::-1]).save(tmp_path / f'{number}-mirrored.png')
    paths = sorted(tmp_path.iterdir())
    plain, averaged = {}, {}
    for probabilities, tta in ((plain, False), (averaged, True)):
        for row in predict_to_table(bundle, paths, use_gate=False, tta=tta, threshold=0.5).rows:
            probabilities[Path(row['path']).stem] = row['p_pneumonia']
    for number in range(3):
        p, mirrored = plain[f'{number}'], plain[f'{number}-mirrored']
        assert abs(p - mirrored) > 1e-5
        assert averaged[f'{number}'] == pytest.approx((p + mirrored) / 2, abs=1e-6)
        assert averaged[f'{number}'] == averaged[f'{number}-mirrored']


def test_unusable_paths_get_a_row(bundle, image):
    rows = predict_to_table(bundle, [Path('x' * 300 + '.png'), Path('nul\0.png'), image], use_gate=False).rows
    assert [row['status'] for row in rows] == ['error', 'error', 'ok']
    assert [row['message'] for row in rows[:2]] == ['E_IO: File name too long', 'E_IO: not a valid file name']


def test_images_in_memory_are_named_by_their_number_also_after_an_interruption(bundle, image, tmp_path, monkeypatch):
    array = read_image(image)
    images = [array, image, image.read_bytes(), Image.open(image), array / 255, *[array] * 4]
    names = ['image-1', str(image), *[f'image-{n}' for n in range(3, 10)]]
    call = Call(bundle, images)
    with monkeypatch.context() as patch:
        interrupt_batch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / 'p.csv')
    rows = call(tmp_path / 'p.csv', resume=True).rows
    assert [row['path'] for row in rows] == [row['path'] for row in parsed(tmp_path / 'p.csv')] == names
    assert [row['status'] for row in rows] == [*['ok'] * 4, 'error', *['ok'] * 4]
    assert rows[4]['code'] == 'E_ARRAY'
    probabilities = [float(row['p_pneumonia']) for row in rows if row['status'] == 'ok']
    assert np.ptp(probabilities) < 1e-6, 'they are the same image'


def test_a_single_image_is_not_a_list(bundle, image, tmp_path):
    with pytest.raises(UsageError, match=r'Pass \[image\]'):
        predict_to_table(bundle, image, tmp_path / 'p.csv')
    assert not (tmp_path / 'p.csv').exists()

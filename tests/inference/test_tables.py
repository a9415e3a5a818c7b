"""Tables of predictions: whole at any time, whatever images are called, and never written over.

The numbers are those of the list of bad inputs that the project keeps: 73 to 82 are names and places to write to.
"""

import csv
import io
import json
import os
import re
import resource
import shutil
import sys
import unicodedata
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from imagefiles import encoded
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.cli import run as console_script
from cxr_fastai.core import files as core
from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference import tables as writers
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.config import temper
from cxr_fastai.inference.predictor import COLUMNS, Predictor
from cxr_fastai.inference.tables import FORMULA, JsonRows, ParquetRows, open_rows

SUFFIXES = ['.csv', '.json', '.parquet']
FORMULAS = ['=cmd|"/c calc"!A0.png', '+1.png', '-1.png', '@SUM(A1).png', '\t=1.png', '\r=1.png', '\0.png']
NAMES = [
    *FORMULAS,
    "'=1.png",
    "''=1.png",
    "'",
    "'plain.png",
    'a\rb.png',
    'a\nb.png',
    'a\r\nb.png',
    'a,"b".png',
    ' x ',
    '<script>alert(1)</script>.png',
    r'$\bad$.png',
    '[/x].png',
    '\x1b[31mred.png',
    'fdp.\u202egnp',
    'a\u2028b',
    '胸',
    unicodedata.normalize('NFC', 'é.png'),
    unicodedata.normalize('NFD', 'é.png'),
    'x' * 5000,
]
FILES = [
    b'=cmd.jpeg',
    b'+1.jpeg',
    b'-1.jpeg',
    b'@SUM.jpeg',
    b'\t1.jpeg',
    b'\r1.jpeg',
    b"'=1.jpeg",
    b'<script>alert(1)<.jpeg',
    rb'$\bad$.jpeg',
    b'[/x].jpeg',
    b'bad\xff\xfe.jpeg',
    b'\x1b[31mred.jpeg',
    b'new\nline.jpeg',
    'rtl\u202egpj.jpeg'.encode(),
    b'back\\.jpeg',
    *(unicodedata.normalize(form, 'é.jpeg').encode() for form in ('NFC', 'NFD')),
    b'a/same.jpeg',
    b'b/same.jpeg',
]
"""What Linux allows an image to be called; a slash makes a folder."""
BATCH = 4


def row(path: str, **facts) -> dict:
    return dict.fromkeys(COLUMNS) | {'path': path, 'status': 'ok'} | facts


def parsed(path: Path) -> list[dict]:
    """The rows of a table as programs other than ours read them; what is missing is an empty text."""
    if path.suffix == '.json':
        return [{k: v or '' for k, v in row.items()} for row in json.loads(path.read_bytes())]
    if path.suffix == '.parquet':
        return pd.read_parquet(path).astype(object).fillna('').to_dict('records')
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file, strict=True))


def command(*words) -> tuple[int, str, str]:
    """The exit code of `cxr-fastai WORDS`, and what it prints and complains."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as told:
        code = main([str(word) for word in words])
    return code, said.getvalue(), told.getvalue()


def refused(code: int, says: str, *words) -> None:
    got, _, told = command(*words)
    (complaint,) = (line for line in told.splitlines() if not line.startswith('warning: '))
    assert got == code and re.search(says, complaint), complaint


def rows_of(bundle: Path, *words) -> list[dict]:
    """The rows that `predict` writes as JSON."""
    with TemporaryDirectory() as folder:
        code, _, told = command('predict', bundle, *words, '--out', f'{folder}/rows.json')
        assert code in (0, 3), told
        return json.loads(Path(folder, 'rows.json').read_text())


@contextmanager
def full_disk(monkeypatch, path: Path, limit: int):
    """Within, the file `path`, and its temporary neighbours, cannot grow over `limit` bytes."""
    plain, unlimited = core.writing, resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def writing(where, by='--out'):
        if where == path:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            with plain(where, by):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    with monkeypatch.context() as patch:
        for module in (core, writers):
            patch.setattr(module, 'writing', writing)
        yield


# Rows.


@pytest.mark.parametrize('name', FORMULAS)
def test_a_name_that_a_spreadsheet_would_reckon_with_is_text_in_a_csv(tmp_path, name):
    for suffix in SUFFIXES:
        table = open_rows(tmp_path / f'p{suffix}', COLUMNS)
        table.start()
        table.add([row(name, message=name)])
        table.close()
        (found,) = parsed(table.path)
        wanted = f"'{name}" if suffix == '.csv' else name
        assert (found['path'], found['message']) == (wanted, wanted)
        assert table.read() == [row(name, message=name)]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_every_name_comes_back_as_it_was(tmp_path, suffix):
    table = open_rows(tmp_path / f'p{suffix}', COLUMNS)
    table.start()
    table.add([row(name) for name in NAMES])
    table.close()
    assert [found['path'] for found in table.read()] == NAMES
    raw = [found['path'] for found in parsed(table.path)]
    if suffix == '.csv':
        assert not [name for name in raw if name.startswith(FORMULA)]
    else:
        assert raw == NAMES


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_is_whole_after_every_batch(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(ParquetRows, 'EVERY', 1)
    table = open_rows(tmp_path / f'p{suffix}', COLUMNS)
    table.start()
    assert parsed(table.path) == table.read() == []
    added = []
    for n in (3, 0, 1, 2):
        batch = [row(name, p_pneumonia=0.25, threshold=0.5) for name in NAMES[len(added) : len(added) + n]]
        table.add(batch)
        added += batch
        assert len(parsed(table.path)) == len(added)
        again = open_rows(table.path, COLUMNS).read()
        assert [(found['path'], float(found['p_pneumonia'])) for found in again] == [(a['path'], 0.25) for a in added]
    assert [path.name for path in tmp_path.iterdir()] == [table.path.name]


def test_a_parquet_table_is_not_written_anew_for_every_batch(tmp_path):
    table = open_rows(tmp_path / 'p.parquet', COLUMNS)
    table.start()
    table.add([row('a.png')])
    assert parsed(table.path) == []
    table.add([row('b.png')] * (ParquetRows.EVERY - 1))
    assert len(parsed(table.path)) == ParquetRows.EVERY


@pytest.mark.parametrize('suffix', ['.csv', '.json'])
def test_a_disk_that_is_full_in_the_midst_of_a_batch_leaves_the_rows_before_it(tmp_path, monkeypatch, suffix):
    table = open_rows(tmp_path / f'p{suffix}', COLUMNS)
    table.start()
    for kept in ([], [row('a.png')]):
        table.add(kept)
        before = table.path.read_bytes()
        with full_disk(monkeypatch, table.path, len(before) + 10), pytest.raises(OutputError, match='File too large'):
            table.add([row(name) for name in NAMES])
        assert table.path.read_bytes() == before
    table.add([row('b.png')])
    assert [found['path'] for found in table.read()] == ['a.png', 'b.png']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_that_cannot_even_begin_leaves_nothing(tmp_path, monkeypatch, suffix):
    table = open_rows(tmp_path / f'p{suffix}', COLUMNS)
    with full_disk(monkeypatch, table.path, 2), pytest.raises(OutputError, match='File too large'):
        table.start()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_tables_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r'its name has to end in .csv, .json, .parquet'):
        open_rows(tmp_path / 'p', ())
    assert isinstance(open_rows(tmp_path / 'P.JSON', ()), JsonRows)
    monkeypatch.setattr('importlib.util.find_spec', lambda _: None)
    with pytest.raises(UsageError, match=r'pip install "cxr_fastai\[parquet\]"'):
        open_rows(tmp_path / 'p.parquet', ())


# Names.


@pytest.fixture(scope='module')
def image(images) -> Path:
    return sorted((images / 'test').rglob('*.jpeg'))[0]


@pytest.fixture(scope='module')
def odd(image, tmp_path_factory) -> Path:
    if sys.platform != 'linux':
        pytest.skip('other systems refuse some of these names')
    folder = tmp_path_factory.mktemp('odd')
    for name in FILES:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(os.fsencode(image), path)
    return folder


def names_of(odd: Path) -> list[str]:
    """The names below a folder as tables have them, in the order of `predict`."""
    from cxr_fastai.data.find import find_images

    found = [str(path.relative_to(odd)) for path in find_images(odd)[0]]
    return [name.encode('utf-8', 'backslashreplace').decode() for name in found]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_images_of_every_name_get_their_row_and_no_name_commands_the_terminal(
    bundle, odd, tmp_path, monkeypatch, suffix
):
    monkeypatch.chdir(odd)
    (tmp_path / 'bad\x1b[2J\u202e\n\x9b.jpeg').write_bytes(b'')
    table = tmp_path / f'p{suffix}'
    code, said, told = command('predict', bundle, '.', tmp_path, '--no-gate', '--out', table)
    wanted = [*names_of(odd), f'{tmp_path}/bad\x1b[2J\u202e\n\x9b.jpeg']
    assert code == 3 and len(wanted) == len(FILES) + 1 and 'bad\\udcff\\udcfe.jpeg' in wanted
    found = open_rows(table, COLUMNS).read()
    assert [row['path'] for row in found] == wanted
    assert {row['status'] for row in found[:-1]} == {'ok'} and found[-1]['message'] == 'E_EMPTY: the file is empty'
    assert not [c for c in said + told if c != '\n' and not c.isprintable()]
    cells = {line.split('│')[1].strip() for line in said.splitlines() if line.startswith('│')}
    assert cells >= {
        '[/x].jpeg',
        'back\\.jpeg',
        r'new\nline.jpeg',
        r'\x1b[31mred.jpeg',
        r'rtl\u202egpj.jpeg',
        r'$\bad$.jpeg',
    }
    assert told.rstrip().endswith(r'bad\x1b[2J\u202e\n\x9b.jpeg: E_EMPTY: the file is empty')
    if suffix != '.csv':
        assert [row['path'] for row in parsed(table)] == wanted
    else:
        assert not [row for row in parsed(table) if row['path'].startswith(FORMULA)]


def test_an_image_that_no_system_can_have_is_a_row(bundle, image, tmp_path):
    listing = tmp_path / 'list.csv'
    listing.write_text(f'path\n{"y" * 300}.png\nnul\0.png\n{image}\n')
    rows = rows_of(bundle, 'x' * 300 + '.png', listing, image, '--no-gate')
    assert [row['status'] for row in rows] == ['error', 'error', 'error', 'ok', 'ok']
    assert [row['message'] for row in rows[:3]] == ['E_IO: File name too long'] * 2 + [
        'E_IO: no file can have this name'
    ]


def test_letters_that_the_terminal_lacks_are_escaped(bundle, image, tmp_path, monkeypatch):
    shutil.copy(image, tmp_path / 'é胸.jpeg')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['cxr-fastai', 'predict', str(bundle), 'é胸.jpeg', '--no-gate'])
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'ascii'))
    with pytest.raises(SystemExit) as ended:
        console_script()
    sys.stdout.flush()
    assert ended.value.code == 0 and rb'\xe9\u80f8.jpeg' in sys.stdout.buffer.getvalue()


def test_pictures_are_called_by_the_number_of_their_row(bundle, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    images = [
        'a/same.jpeg',
        tmp_path / 'bad.jpeg',
        'b/same.jpeg',
        r'$\bad$.jpeg',
        os.fsdecode(b'bad\xff\xfe.jpeg'),
        '\x1b[31mred.jpeg',
        'new\nline.jpeg',
    ]
    argv = ['predict', bundle, *images, '--no-gate', '--explain', '--out', tmp_path / 'p.csv']
    code, said, told = command(*argv)
    assert code == 3 and '\x1b' not in said and r'bad\udcff\udcfe.jpeg: p(pneumonia)' in said
    assert len(told.splitlines()) == 1  # the bad image is told of once
    drawn = sorted(path.name for path in (tmp_path / 'p_maps').iterdir())
    assert drawn == [f'{number:04d}.png' for number in (1, 3, 4, 5, 6, 7)]
    before = {path: path.read_bytes() for path in (tmp_path / 'p_maps').iterdir()}
    argv[-1] = tmp_path / 'p.json'
    refused(2, 'p_maps exists already and nothing in it was overwritten', *argv)
    assert before == {path: path.read_bytes() for path in (tmp_path / 'p_maps').iterdir()}
    assert not (tmp_path / 'p.json').exists()


# Places.


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_that_is_there_is_left_alone(bundle, image, tmp_path, suffix):
    (table := tmp_path / f'p{suffix}').write_text('precious')
    refused(2, 'exists already and was left alone', 'predict', bundle, image, '--out', table)
    refused(2, 'is no table of predictions', 'predict', bundle, image, '--out', table, '--resume')
    table.chmod(0o400)
    refused(2, 'exists already', 'predict', bundle, image, '--out', table)
    assert table.read_text() == 'precious'


@pytest.mark.parametrize('content', ['', '{}', 'null', '5', '[1]', '[["path"]]', '[{"path": "a.png"}]', '[' * 100_000])
def test_json_that_is_no_table_is_not_gone_on_with(bundle, image, tmp_path, content):
    (tmp_path / 'p.json').write_text(content)
    refused(2, 'is no table of predictions', 'predict', bundle, image, '--out', tmp_path / 'p.json', '--resume')
    assert (tmp_path / 'p.json').read_text() == content


@pytest.mark.parametrize(
    'content', ['', 'a,b\n', f'{",".join(COLUMNS)}\nx.png,ok\n', f'"{"x" * 200_000}"', '\0', '\xff']
)
def test_a_csv_that_is_no_table_is_not_gone_on_with(bundle, image, tmp_path, content):
    (tmp_path / 'p.csv').write_text(content, encoding='latin-1')
    refused(2, 'is no table of predictions', 'predict', bundle, image, '--out', tmp_path / 'p.csv', '--resume')
    assert (tmp_path / 'p.csv').read_text(encoding='latin-1') == content


def test_a_parquet_table_of_something_else_is_not_gone_on_with(bundle, image, tmp_path):
    pd.DataFrame({'a': []}).to_parquet(tmp_path / 'p.parquet')
    before = (tmp_path / 'p.parquet').read_bytes()
    refused(2, 'is no table of predictions', 'predict', bundle, image, '--out', tmp_path / 'p.parquet', '--resume')
    assert (tmp_path / 'p.parquet').read_bytes() == before


@pytest.mark.parametrize('resume', [[], ['--resume']])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_place_that_is_a_folder_or_an_image_is_refused(bundle, image, tmp_path, suffix, resume):
    (tmp_path / f'folder{suffix}').mkdir()
    refused(2, 'exists already|no table', 'predict', bundle, image, '--out', tmp_path / f'folder{suffix}', *resume)
    shutil.copy(image, again := tmp_path / f'image{suffix}')
    if suffix == '.csv':
        again.write_text(f'path\n{image}\n')  # which lists images
    before = again.read_bytes()
    refused(2, 'exists already|no table', 'predict', bundle, again, '--out', again, *resume)
    assert again.read_bytes() == before


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--out', 'image.jpeg'], 'has to end in'),
        (['--out', 'nowhere/p.csv'], 'the folder nowhere does not exist'),
        (['--resume'], '--resume needs --out'),
        (['--explain'], '--explain needs --out'),
    ],
)
def test_options_that_do_not_fit_together_are_refused(bundle, image, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    refused(2, says, 'predict', bundle, image, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs a file system that refuses new files, also to root')
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_folder_that_takes_no_file_ends_with_six(bundle, image, suffix):
    refused(6, 'cannot be written', 'predict', bundle, image, '--out', f'/sys/cxr{suffix}')


# Stops.


@pytest.fixture(scope='module')
def some(images, tmp_path_factory) -> list[Path]:
    """Eleven images in three batches; a bad one in the second."""
    bad = tmp_path_factory.mktemp('bad') / '=bad.jpeg'
    bad.write_bytes(b'')
    found = sorted((images / 'test').rglob('*.jpeg'))[:10]
    return [*found[:5], bad, *found[5:]]


@pytest.fixture(scope='module')
def argv(bundle, some) -> list:
    return ['predict', bundle, *some, '--batch-size', BATCH, '--no-gate', '--out']


@pytest.fixture(scope='module')
def whole(argv, tmp_path_factory) -> dict[str, Path]:
    """The tables of a command that nothing stopped."""
    tables = {suffix: tmp_path_factory.mktemp('whole') / f'p{suffix}' for suffix in SUFFIXES}
    for table in tables.values():
        assert command(*argv, table)[0] == 3
    return tables


def same(table: Path, whole: dict[str, Path]) -> bool:
    if table.suffix != '.parquet':
        return table.read_bytes() == whole[table.suffix].read_bytes()
    return pd.read_parquet(table).equals(pd.read_parquet(whole['.parquet']))


def stop(monkeypatch, batch: int, error: BaseException) -> None:
    """Let prediction end at that batch, counted from 1."""
    rows, count = Predictor._rows, iter(range(1, 99))

    def stopped(self, images):
        if next(count) == batch:
            raise error
        return rows(self, images)

    monkeypatch.setattr(Predictor, '_rows', stopped)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_command_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    argv, whole, tmp_path, monkeypatch, suffix, batch
):
    table = tmp_path / f'p{suffix}'
    with monkeypatch.context() as patch:
        stop(patch, batch, KeyboardInterrupt())
        assert command(*argv, table)[0] == 130
    assert parsed(table) == parsed(whole[suffix])[: (batch - 1) * BATCH]
    for _ in range(2):  # again changes nothing
        assert command(*argv, table, '--resume')[0] == 3 and same(table, whole)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_disk_that_was_full_costs_no_row_that_was_written(argv, whole, tmp_path, monkeypatch, suffix):
    table = tmp_path / f'p{suffix}'
    open_rows(table, COLUMNS).start()
    room = table.stat().st_size + 40 if suffix == '.parquet' else whole[suffix].stat().st_size - 40
    table.unlink()
    with full_disk(monkeypatch, table, room):
        refused(6, f'p{suffix}: cannot be written .*File too large', *argv, table)
    assert parsed(table) == parsed(whole[suffix])[: 0 if suffix == '.parquet' else 2 * BATCH]
    assert command(*argv, table, '--resume')[0] == 3 and same(table, whole)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_what_was_not_begun_is_begun_by_resume(argv, whole, tmp_path, suffix):
    assert command(*argv, tmp_path / f'p{suffix}', '--resume')[0] == 3 and same(tmp_path / f'p{suffix}', whole)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_table_of_other_images_or_another_threshold_is_not_gone_on_with(bundle, some, argv, whole, tmp_path, suffix):
    table = Path(shutil.copy(whole[suffix], tmp_path / f'p{suffix}'))
    refused(2, 'is about other images', 'predict', bundle, *some[::-1], '--out', table, '--resume')
    refused(2, 'is about other images', 'predict', bundle, *some[:3], '--out', table, '--resume')
    refused(2, 'has the threshold .*, now it would be 0.125', *argv, table, '--resume', '--threshold', '0.125')
    assert table.read_bytes() == whole[suffix].read_bytes()


# Sources and options.


def test_standard_input_names_images_a_line_each(bundle, odd, image, monkeypatch):
    monkeypatch.chdir(odd)
    names = [b'bad\xff\xfe.jpeg', b' ', b'', b'=cmd.jpeg\r', b'gone.jpeg', b'-1.jpeg']
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n'.join(names)), 'utf-8'))
    rows = rows_of(bundle, image, '-', '--no-gate')
    assert [row['path'] for row in rows] == [str(image), r'bad\udcff\udcfe.jpeg', '=cmd.jpeg', 'gone.jpeg', '-1.jpeg']
    assert [row['status'] for row in rows] == ['ok', 'ok', 'ok', 'error', 'ok']


def test_standard_input_without_an_image_is_wrong_usage(bundle, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n \n')))
    refused(2, 'no images found', 'predict', bundle, '-')


def test_a_threshold_that_is_given_decides(bundle, some):
    images = [*some[:5], *some[6:]]
    plain = rows_of(bundle, *images, '--no-gate')
    cut = float(np.median([row['p_pneumonia'] for row in plain]))
    for threshold, called in ((0, 10), (cut, 5), (1, 0)):
        rows = rows_of(bundle, *images, '--no-gate', '--threshold', threshold)
        assert {row['threshold'] for row in rows} == {threshold}
        assert [row['p_pneumonia'] for row in rows] == [row['p_pneumonia'] for row in plain]
        assert [row['prediction'] == 'PNEUMONIA' for row in rows] == [row['p_pneumonia'] >= threshold for row in rows]
        assert sum(row['prediction'] == 'PNEUMONIA' for row in rows) == called
    assert command('predict', bundle, images[0], '--threshold', '1.5')[0] == 2


def test_calibrated_probabilities_are_at_the_temperature_and_change_no_decision(bundle, some):
    images, temperature = [*some[:5], *some[6:]], Bundle.open(bundle).config.temperature
    plain, warm = rows_of(bundle, *images, '--no-gate'), rows_of(bundle, *images, '--no-gate', '--calibrated')
    assert temperature != 1
    for a, b in zip(plain, warm, strict=True):
        assert b['p_pneumonia'] == pytest.approx(temper(a['p_pneumonia'], temperature)) != a['p_pneumonia']
        assert b['threshold'] == pytest.approx(temper(a['threshold'], temperature))
        assert a['prediction'] == b['prediction']
    (told,) = rows_of(bundle, images[0], '--no-gate', '--calibrated', '--threshold', '0.3')
    assert told['threshold'] == pytest.approx(0.3)


def test_a_map_tells_the_probability_of_the_table(bundle, image, tmp_path):
    argv = ['predict', bundle, image, '--no-gate', '--calibrated', '--threshold', '0.3', '--explain', '--tta']
    code, said, _ = command(*argv, '--out', tmp_path / 'p.json')
    (found,) = parsed(tmp_path / 'p.json')
    assert code == 0 and f'p(pneumonia) {found["p_pneumonia"]:.3f}, threshold 0.3: {found["prediction"]}' in said


def test_tta_is_the_mean_of_an_image_and_its_mirror_image(bundle, some, tmp_path):
    seen = Preprocessing.of(Bundle.open(bundle).config)
    for number, path in enumerate(some[:3]):
        square = seen.square(read_image(path))
        Image.fromarray(square).save(tmp_path / f'{number}.png')
        Image.fromarray(square[:, ::-1]).save(tmp_path / f'{number}-mirrored.png')
    plain = {Path(row['path']).stem: row['p_pneumonia'] for row in rows_of(bundle, tmp_path, '--no-gate')}
    both = {Path(row['path']).stem: row['p_pneumonia'] for row in rows_of(bundle, tmp_path, '--no-gate', '--tta')}
    for number in range(3):
        pair = plain[f'{number}'], plain[f'{number}-mirrored']
        assert abs(pair[0] - pair[1]) > 1e-5
        assert both[f'{number}'] == pytest.approx(sum(pair) / 2, abs=1e-6) == both[f'{number}-mirrored']


def test_a_picture_that_the_gate_turns_away_has_neither_probability_nor_map(bundle, image, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    (tmp_path / 'noise.png').write_bytes(encoded(noise))
    argv = ['predict', bundle, tmp_path / 'noise.png', image, '--explain', '--out']
    code, said, told = command(*argv, tmp_path / 'p.json')
    away, inside = parsed(tmp_path / 'p.json')
    assert code == 3 and (away['status'], away['code']) == ('rejected', 'E_OUT_OF_DISTRIBUTION')
    assert away['p_pneumonia'] == away['prediction'] == '' and inside['status'] == 'ok'
    assert [path.name for path in (tmp_path / 'p_maps').iterdir()] == ['0002.png'] and 'noise.png: p(' not in said
    assert 'rejected: ' in told and '--no-gate tells the probability' in told
    told, _ = rows_of(bundle, tmp_path / 'noise.png', image, '--no-gate')
    assert told['status'] == 'ok' and 0 <= told['p_pneumonia'] <= 1

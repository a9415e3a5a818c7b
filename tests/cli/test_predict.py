"""The command `predict`: its options, what it prints, and its exit codes."""

import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from imagefiles import encoded
from oddnames import FILES, copy_with_odd_names

from cxr_fastai.cli import main
from cxr_fastai.cli import run as console_script
from cxr_fastai.core.run import Run


def run_command(*words: object) -> tuple[int, str, str]:
    """The exit code of a command, its standard output and its standard error."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        code = main([str(word) for word in words])
    return code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope='module')
def image(images) -> Path:
    return sorted((images / 'test').rglob('*.jpeg'))[0]


@pytest.fixture(scope='module')
def odd(image, tmp_path_factory) -> Path:
    return copy_with_odd_names(image, tmp_path_factory.mktemp('odd'))


@pytest.mark.parametrize(
    ('options', 'pattern'),
    [
        (['--out', 'image.jpeg'], 'The name must end in'),
        (['--out', 'nowhere/p.csv'], 'the folder nowhere does not exist'),
        (['--resume'], '--resume needs --out'),
        (['--explain'], '--explain needs --out, --html or --dicom-out'),
        (['--html', 'page.csv'], 'the name must end in .html'),
        (['--html', 'nowhere/p.html'], 'the folder nowhere does not exist'),
        (['--threshold', '1.5'], ''),
    ],
)
def test_options_that_do_not_fit_together_are_usage_errors(bundle, image, tmp_path, monkeypatch, options, pattern):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_command('predict', bundle, image, *options)
    assert code == 2 and re.search(pattern, errors)
    assert not list(tmp_path.iterdir())


def test_the_table_of_images_is_not_overwritten_by_the_predictions(bundle, image, tmp_path):
    listing = tmp_path / 'list.csv'
    listing.write_text(f'path\n{image}\n')
    for options in ([], ['--resume']):
        code, _, errors = run_command('predict', bundle, listing, '--out', listing, *options)
        assert code == 2 and re.search('exists already|not a table', errors)
    assert listing.read_text() == f'path\n{image}\n'


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs /sys, where nobody can create files; run it on Linux')
def test_a_table_that_cannot_be_written_ends_with_six(bundle, image):
    code, _, errors = run_command('predict', bundle, image, '--out', '/sys/cxr.csv')
    assert code == 6 and 'cannot be written' in errors


def test_a_page_shows_the_predictions_and_needs_no_table(bundle, image, tmp_path):
    page = tmp_path / 'p.html'
    code, output, _ = run_command('predict', bundle, image, '--no-gate', '--html', page, '--explain')
    assert code == 0 and f'{page}: page with pictures' in output and [*tmp_path.iterdir()] == [page]
    text = page.read_text()
    assert 'show all maps' in text and image.name in text.replace('<wbr>', '')
    code, _, errors = run_command('predict', bundle, image, '--no-gate', '--html', page)
    assert code == 2 and 'exists already and was not changed' in errors and page.read_text() == text


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs /sys, where nobody can create files; run it on Linux')
def test_a_page_that_cannot_be_written_is_refused_before_the_predictions(bundle, image, tmp_path):
    table = tmp_path / 'p.csv'
    code, _, errors = run_command('predict', bundle, image, '--out', table, '--html', '/sys/cxr.html')
    assert code == 6 and 'choose another place with --html' in errors and not table.exists()


def test_file_names_cannot_control_the_terminal(bundle, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    bad = tmp_path / 'bad\x1b[2J\u202e\n\x9b.jpeg'
    bad.write_bytes(b'')
    table = tmp_path / 'p.json'
    code, output, errors = run_command('predict', bundle, '.', tmp_path, '--no-gate', '--out', table)
    rows = json.loads(table.read_text())
    assert code == 3 and len(rows) == len(FILES) + 1
    assert 'bad\\udcff\\udcfe.jpeg' in [row['path'] for row in rows]
    assert (rows[-1]['path'], rows[-1]['message']) == (str(bad), 'E_EMPTY: the file is empty')
    assert not [char for char in output + errors if char != '\n' and not char.isprintable()]
    cells = {line.split('│')[1].strip() for line in output.splitlines() if line.startswith('│')}
    assert cells >= {
        '[/x].jpeg',
        'back\\.jpeg',
        r'new\nline.jpeg',
        r'\x1b[31mred.jpeg',
        r'rtl\u202egpj.jpeg',
        r'$\bad$.jpeg',
    }
    assert errors.rstrip().endswith(r'bad\x1b[2J\u202e\n\x9b.jpeg: E_EMPTY: the file is empty')


def test_names_that_no_file_can_have_get_a_row(bundle, image, tmp_path):
    listing = tmp_path / 'list.csv'
    listing.write_text(f'path\n{"y" * 300}.png\nnul\0.png\n{image}\n')
    table = tmp_path / 'p.json'
    assert run_command('predict', bundle, 'x' * 300 + '.png', listing, '--no-gate', '--out', table)[0] == 3
    rows = json.loads(table.read_text())
    assert [row['status'] for row in rows] == ['error', 'error', 'error', 'ok']
    too_long = 'E_IO: File name too long'
    assert [row['message'] for row in rows[:3]] == [too_long, too_long, 'E_IO: not a valid file name']


def test_letters_that_the_terminal_cannot_show_are_escaped(bundle, image, tmp_path, monkeypatch):
    (tmp_path / 'é胸.jpeg').write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['cxr-fastai', 'predict', str(bundle), 'é胸.jpeg', '--no-gate'])
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'ascii'))
    with pytest.raises(SystemExit) as ended:
        console_script()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert rb'\xe9\u80f8.jpeg' in sys.stdout.buffer.getvalue()


def test_an_interrupt_ends_with_130_and_leaves_a_table_to_resume(bundle, images, tmp_path, monkeypatch):
    from cxr_fastai.inference.predictor import Predictor

    infer = Predictor.infer

    def interrupted(self: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(images) == 2:  # the last batch of twelve images
            raise KeyboardInterrupt
        return infer(self, images)

    argv = ['predict', bundle, images / 'test', '--batch-size', 5, '--no-gate', '--out', tmp_path / 'p.csv']
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, 'infer', interrupted)
        assert run_command(*argv)[0] == 130
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 11
    code, output, _ = run_command(*argv, '--resume')
    assert code == 0
    assert re.search(r'12 images, \d+ classified as PNEUMONIA, 0 rejected, 0 failed; rows in', output)


def test_the_threshold_and_its_origin_are_printed(evaluated, bundle, image, tmp_path):
    (tmp_path / 'lone.pkl').write_bytes((evaluated / 'learner.pkl').read_bytes())
    by_rule = f'chosen on validation images by the rule {evaluated.decision["rule"]}.'
    for model in (evaluated.path, evaluated / 'learner.pkl', bundle):
        assert by_rule in run_command('predict', model, image, '--no-gate')[1]
    for options, value in (((), '0.5'), (('--threshold', 0.3), '0.3')):
        output = run_command('predict', tmp_path / 'lone.pkl', image, '--no-gate', *options)[1]
        assert f'at a probability of {value} or more: a fixed threshold, not chosen on validation images' in output


def test_a_fixed_threshold_is_shown_with_the_commands_that_choose_one(evaluated, bundle, image, tmp_path):
    run = Path(shutil.copytree(evaluated.path, tmp_path / 'run', ignore=shutil.ignore_patterns('bundle')))
    assert run_command('evaluate', run, '--threshold', 'fixed:0.9')[0] == 0
    shutil.copytree(bundle, run / 'bundle')
    evaluate = f'To choose one on them, evaluate the run: `cxr-fastai evaluate {run} --threshold sensitivity:0.95`'
    for model, advice in ((run, f'{evaluate}.'), (run / 'bundle', f'{evaluate}, then `cxr-fastai export {run}`.')):
        assert advice in run_command('predict', model, image, '--no-gate', '--threshold', 0.9)[1]
    assert run_command('evaluate', run, '--threshold', 'sensitivity:0.95')[0] == 0
    assert 'by the rule sensitivity:0.95.' in run_command('predict', run, image, '--no-gate')[1]
    assert 'To choose one' not in run_command('predict', 'pretrained', image, '--no-gate', '--threshold', 0.9)[1]


def test_the_threshold_of_a_run_with_validation_images_of_one_class_has_no_advice(run, image, tmp_path):
    copy = Run(shutil.copytree(run.path, tmp_path / 'run'))
    items = copy.items
    items[(items.split != 'valid') | (items.label == 'NORMAL')].to_csv(copy / 'items.csv', index=False)
    output = run_command('predict', copy.path, image, '--no-gate')[1]
    assert 'a fixed threshold, not chosen on validation images.' in output and 'To choose one' not in output


def test_standard_input_names_one_image_per_line(bundle, odd, image, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    lines = [b'bad\xff\xfe.jpeg', b' ', b'', b'=cmd.jpeg\r', b'gone.jpeg', b'-1.jpeg']
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n'.join(lines)), 'utf-8'))
    table = tmp_path / 'p.json'
    assert run_command('predict', bundle, image, '-', '--no-gate', '--out', table)[0] == 3
    rows = json.loads(table.read_text())
    assert [row['path'] for row in rows] == [str(image), r'bad\udcff\udcfe.jpeg', '=cmd.jpeg', 'gone.jpeg', '-1.jpeg']
    assert [row['status'] for row in rows] == ['ok', 'ok', 'ok', 'error', 'ok']


def test_standard_input_without_an_image_is_a_usage_error(bundle, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n \n')))
    code, _, errors = run_command('predict', bundle, '-')
    assert code == 2 and 'standard input: the list of images is empty' in errors


def test_maps_are_named_by_the_number_of_the_row(bundle, odd, tmp_path, monkeypatch):
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
    code, output, errors = run_command(*argv)
    assert code == 3 and '\x1b' not in output
    assert r'bad\udcff\udcfe.jpeg: p(pneumonia)' in output
    assert len(errors.splitlines()) == 1  # the unreadable image is reported once
    maps = {path: path.read_bytes() for path in sorted((tmp_path / 'p_maps').iterdir())}
    assert [path.name for path in maps] == [f'{number:04d}.png' for number in (1, 3, 4, 5, 6, 7)]
    code, _, errors = run_command(*argv[:-1], tmp_path / 'p.json')
    assert code == 2 and 'p_maps exists already and nothing in it was overwritten' in errors
    assert maps == {path: path.read_bytes() for path in (tmp_path / 'p_maps').iterdir()}
    assert not (tmp_path / 'p.json').exists()


def test_the_line_of_a_map_has_the_probability_of_the_table(bundle, image, tmp_path):
    argv = ['predict', bundle, image, '--no-gate', '--threshold', '0.3', '--explain', '--tta']
    code, output, _ = run_command(*argv, '--out', tmp_path / 'p.json')
    (row,) = json.loads((tmp_path / 'p.json').read_text())
    assert code == 0
    line = f'p(pneumonia) {row["p_pneumonia"]:.3f}, threshold 0.3: {row["prediction"]}'
    assert line in ' '.join(output.split())


def test_an_image_that_the_gate_rejects_has_neither_probability_nor_map(bundle, image, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    (tmp_path / 'noise.png').write_bytes(encoded(noise))
    argv = ['predict', bundle, tmp_path / 'noise.png', image, '--explain', '--out', tmp_path / 'p.json']
    code, output, errors = run_command(*argv)
    rejected, accepted = json.loads((tmp_path / 'p.json').read_text())
    assert code == 3
    assert (rejected['status'], rejected['code']) == ('rejected', 'E_OUT_OF_DISTRIBUTION')
    assert rejected['p_pneumonia'] is None and rejected['prediction'] is None
    assert accepted['status'] == 'ok'
    assert [path.name for path in (tmp_path / 'p_maps').iterdir()] == ['0002.png']
    assert 'noise.png: p(' not in output
    assert 'rejected: ' in errors and 'With --no-gate' in errors


def test_without_the_gate_a_rejected_image_gets_a_probability(bundle, image, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    (tmp_path / 'noise.png').write_bytes(encoded(noise))
    table = tmp_path / 'p.json'
    assert run_command('predict', bundle, tmp_path / 'noise.png', '--no-gate', '--out', table)[0] == 0
    (row,) = json.loads(table.read_text())
    assert row['status'] == 'ok' and 0 <= row['p_pneumonia'] <= 1


def test_many_failures_of_one_kind_are_one_line_with_three_examples(bundle, tmp_path, capsys):
    folder = tmp_path / 'damaged'
    folder.mkdir()
    for number in range(25):
        (folder / f'{number:02}.png').write_bytes(b'')
    (folder / 'other.png').write_bytes(b'text')
    assert main(['predict', str(bundle), str(folder)]) == 3
    printed = capsys.readouterr()
    names = ', '.join(str(folder / f'0{number}.png') for number in range(3))
    many, one = [line for line in printed.err.splitlines() if line.startswith('error: ')]
    assert many == f'error: 25 images with E_EMPTY, such as {names}. The first: E_EMPTY: the file is empty'
    assert one.startswith(f'error: {folder / "other.png"}: E_FORMAT: ')
    assert '0 classified as PNEUMONIA, 0 rejected, 26 failed; --out writes all reasons to a table' in printed.out


def test_prepare_and_audit_name_three_of_many_unusable_images(images, tmp_path, capsys):
    copy = shutil.copytree(images, tmp_path / 'images')
    for path in sorted((copy / 'train/NORMAL').iterdir())[:5]:
        path.write_bytes(b'')
    assert main(['data', 'prepare', str(copy), '--size', '48']) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert line.startswith('error: 5 images with E_EMPTY, such as ') and line.count('.jpeg') == 3
    assert main(['data', 'audit', str(copy), '--out', str(tmp_path / 'audit'), '--hide-names']) == 1
    words = re.findall(r'[\w:]+', capsys.readouterr().out)  # the column of the table wraps
    assert 'Such as:' in ' '.join(words)

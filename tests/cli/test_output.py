"""Terminal output: tables of 80 columns, plain numbers, and one line for each error and warning."""

import io
import re
from copy import deepcopy
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from cxr_fastai.cli import main, output
from cxr_fastai.cli.comparison_tables import comparison_tables, format_p
from cxr_fastai.cli.output import (
    choose_source,
    error_message,
    metrics_tables,
    predictions_table,
    print_columns,
    unused_path,
)
from cxr_fastai.core.errors import UsageError

NUMBER = re.compile(r'(?<![\w.])\.\d')


def render(table: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


HEADER = ('field', 'meaning')
ROWS = [('--size', 'side of the [images] in pixels: ' + 'word ' * 20), ('--seed', 'seed')]


def test_columns_are_one_line_for_each_row_where_they_are_piped(capsys):
    print_columns(HEADER, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['field', '--size', '--seed']
    assert len({line.index(text) for line, text in zip(lines, ('meaning', 'side', 'seed'), strict=True)} - {2}) == 1


def test_columns_are_wrapped_in_a_terminal(monkeypatch):
    console = Console(width=60, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(output, 'out', console)
    print_columns(HEADER, ROWS)
    lines = console.file.getvalue().splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 60
    assert 'side of the [images]' in lines[1] and lines[2].startswith('        ')


@pytest.fixture(scope='module')
def metrics(evaluated) -> dict:
    return evaluated.metrics['test']


def test_metrics_fit_in_80_columns_with_their_targets(metrics):
    text = render(metrics_tables(metrics))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search('sensitivity ≥95% (met|missed), specificity ≥90% (met|missed)', text)
    assert re.search(r'sensitivity +│ \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) +│', text)


def test_subgroups_that_are_too_small_are_not_called_undefined(metrics):
    none = {'value': None, 'low': None, 'high': None}
    group = {'column': 'site', 'group': 'A', 'n': 12, 'positives': 7, 'sensitivity': none, 'specificity': none}
    only_normal = group | {'group': 'B', 'positives': 0, 'specificity': metrics['specificity']}
    rows = [row | {'auc': metrics['auc']} for row in (group, only_normal)]
    suppressed = {'column': 'site', 'group': None, 'suppressed': 2}
    text = render(metrics_tables(metrics | {'subgroups': [*rows, suppressed]}))
    words = ' '.join(text.replace('│', ' ').split())
    assert 'site A 12 too few (7) too few (5)' in words and 'site B 12 undefined' in words
    assert 'site: 2 groups with too few' in words


def test_numbers_have_a_leading_zero(metrics):
    assert not NUMBER.search(render(metrics_tables(metrics)))
    assert format_p(0.0421) == '0.042'
    assert format_p(0.0001) == '< 0.001'
    assert format_p(None) == ''


def test_a_comparison_breaks_no_number_in_80_columns(metrics):
    other = deepcopy(metrics)
    pair = {
        'run': 'runs/efficientnet_lite0-43',
        'against': 'runs/efficientnet_lite0',
        'n': 624,
        'auc': {'value': 0.0123, 'low': -0.0012, 'high': 0.0258, 'p': 0.0421, 'p_holm': 0.0842},
        'grouped_by_patient': True,
        'unknown_patients': 0,
        'mcnemar': {'only_first': 12, 'only_second': 20, 'p': 0.2153, 'p_holm': 0.4306},
    }
    runs = {'runs/efficientnet_lite0': metrics, 'runs/efficientnet_lite0-43': other}
    text = render(comparison_tables(runs, [pair], []))
    assert max(map(len, text.splitlines())) <= 80
    for number in ('+0.012', '-0.001', '+0.026', '0.042', '(0.084)', '20 : 12', '0.215'):
        assert number in text, number


def test_predictions_show_a_probability_or_an_error_code():
    rows = [
        {'path': 'a.png', 'status': 'ok', 'p_pneumonia': '0.91', 'prediction': 'PNEUMONIA', 'code': ''},
        {'path': 'b.png', 'status': 'error', 'p_pneumonia': '', 'prediction': '', 'code': 'E_EMPTY'},
    ]
    text = render(predictions_table(rows))
    assert re.search('a.png +│ 0.9100 +│ PNEUMONIA', text)
    assert re.search('b.png +│ +│ E_EMPTY', text)
    assert 'the first 1 of 2' in render(predictions_table(rows, limit=1))


def test_square_brackets_in_a_file_name_are_not_markup(capsys, run, images, tmp_path):
    image = tmp_path / '[red]image[-red].jpeg'
    image.write_bytes(next((images / 'test').rglob('*.jpeg')).read_bytes())
    assert main(['predict', str(run.path), str(image)]) == 0
    assert '[red]image[-red].jpeg' in capsys.readouterr().out.replace('\n', '')


def test_a_default_folder_that_exists_gets_a_number(tmp_path):
    path = tmp_path / 'baseline'
    assert unused_path(path) == path
    path.mkdir()
    assert unused_path(path) == tmp_path / 'baseline-2'
    (tmp_path / 'baseline-2').mkdir()
    assert unused_path(path) == tmp_path / 'baseline-3'


def test_images_come_from_a_folder_or_a_csv_but_not_both():
    folder, csv = Path('images'), Path('images.csv')
    assert choose_source(folder, None) == folder
    assert choose_source(None, csv) == csv
    assert choose_source(None, None) is None
    with pytest.raises(UsageError, match='images.csv'):
        choose_source(folder, csv)


def test_the_error_of_a_worker_process_is_its_last_line():
    error = UsageError('Traceback (most recent call last):\n  ...\ncxr_fastai.core.errors.UsageError: too small')
    assert error_message(error) == 'too small'
    assert error_message(UsageError('too small')) == 'too small'

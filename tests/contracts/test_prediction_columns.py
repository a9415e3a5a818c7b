"""The columns of a table of predictions, and the values of `status`."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from cxr_fastai.inference.predictor import COLUMNS, Predictor, prediction_table
from cxr_fastai.inference.tables import predict_to_table

EXPECTED = ['path', 'status', 'p_pneumonia', 'prediction', 'threshold', 'code', 'message']


@pytest.fixture(scope='module')
def paths(images, tmp_path_factory) -> list[Path]:
    """An image and an empty file."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'empty.jpeg').write_bytes(b'')
    return [next((images / 'test').rglob('*.jpeg')), folder / 'empty.jpeg']


def test_the_columns_are_those_of_the_documentation():
    assert list(COLUMNS) == EXPECTED


@pytest.mark.parametrize('suffix', ['.csv', '.json', '.parquet'])
def test_every_kind_of_table_has_these_columns(bundle, paths, tmp_path, suffix):
    table = tmp_path / f'p{suffix}'
    predict_to_table(bundle, paths, table, use_gate=False)
    if suffix == '.csv':
        with open(table, encoding='utf-8', newline='') as file:
            columns = next(csv.reader(file))
    elif suffix == '.json':
        columns = list(json.loads(table.read_text())[0])
    else:
        columns = list(pd.read_parquet(table))
    assert columns == EXPECTED


def test_a_row_has_a_probability_or_a_code(bundle, paths):
    table = prediction_table(Predictor.load(bundle, gate=False).predict(paths))
    assert list(table) == EXPECTED
    assert table.status.to_list() == ['ok', 'error']
    assert table.p_pneumonia.notna().to_list() == table.prediction.notna().to_list() == [True, False]
    assert table.code.notna().to_list() == [False, True]

"""`benchmark` times every setting of this machine alike, and compares its probabilities."""

import json

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import ImageError
from cxr_fastai.inference.benchmarking import COLUMNS, REFERENCE, benchmark, find_settings


def test_a_bundle_has_both_engines_and_a_run_has_torch(bundle, evaluated):
    assert {setting.engine for setting in find_settings(bundle)} == {'torch', 'onnx'}
    assert {setting.engine for setting in find_settings(evaluated.path)} == {'torch'}
    assert find_settings(bundle)[0] == REFERENCE


def test_rows_have_rates_and_the_change_of_probabilities(bundle, images):
    paths = sorted(images.rglob('*.jpeg'))[:3]
    rows = benchmark(bundle, [*paths, images / 'missing.png'], batch_sizes=(1, 4), rounds=1)
    assert len(rows) == 2 * len(find_settings(bundle)) and all(tuple(row) == COLUMNS for row in rows)
    for row in rows:
        assert row['images_per_second'] == pytest.approx(1000 * row['batch_size'] / row['milliseconds'])
        limit = {('torch', 'fp32'): 0, ('onnx', 'fp32'): 1e-4}.get((row['engine'], row['precision']), 0.05)
        assert row['largest_change'] <= limit


def test_images_that_cannot_be_used_are_an_error(bundle, tmp_path):
    (tmp_path / 'empty.png').touch()
    with pytest.raises(ImageError, match='empty.png'):
        benchmark(bundle, [tmp_path / 'empty.png'], rounds=1)


def test_the_command_prints_a_table_or_json(bundle, capsys):
    assert main(['benchmark', str(bundle)]) == 0
    assert 'largest change of p' in capsys.readouterr().out
    assert main(['benchmark', str(bundle), '--json']) == 0
    assert tuple(json.loads(capsys.readouterr().out)[0]) == COLUMNS

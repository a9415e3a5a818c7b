"""Files are written completely or not at all."""

import pytest

from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.core.files import atomic, check_new, write_json, write_text


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text('half of the new')
        raise RuntimeError
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_path_raises_an_output_error_with_advice(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='cannot be written.*choose another place with --out'):
        write_text(tmp_path / 'file' / 'x', '')


def test_json_files_never_contain_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / 'x.json', {'auc': float('nan')})
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes(tmp_path, second_process):
    write_text(tmp_path / 'x', 'text')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    check_new(tmp_path)
    check_new(tmp_path / 'new')
    (tmp_path / 'file').write_text('')
    for path in (tmp_path, tmp_path / 'file'):
        with pytest.raises(UsageError, match='exists already and nothing in it was overwritten'):
            check_new(path)

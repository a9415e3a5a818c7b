"""Errors, atomic writing and the run folder."""

import json
import pickle
from dataclasses import asdict

import pytest

from cxr_fastai.core.errors import ImageError, OutputError, UsageError
from cxr_fastai.core.files import atomic, write_json, write_text
from cxr_fastai.core.progress import progress
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.models.architectures import make_recipe


def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text('half of the new')
        raise RuntimeError
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_writing_where_no_file_can_be_is_an_output_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='cannot be written.*choose another place'):
        write_text(tmp_path / 'file' / 'x', '')


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / 'x.json', {'auc': float('nan')})
    assert not list(tmp_path.iterdir())


def test_an_image_error_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(ImageError('a.png: E_EMPTY: the file is empty', 'E_EMPTY')))
    assert (str(error), error.code) == ('a.png: E_EMPTY: the file is empty', 'E_EMPTY')


def test_a_recipe_survives_json():
    recipe = make_recipe('resnet50', weights='none', epochs=3)
    assert Recipe.from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_a_run_folder_is_made_once(tmp_path):
    Run.create(tmp_path / 'run')
    with pytest.raises(UsageError, match='exists already and nothing in it was overwritten'):
        Run.create(tmp_path / 'run')


def test_an_empty_folder_may_become_a_run(tmp_path):
    assert (Run.create(tmp_path) / 'figures').is_dir()


def test_a_folder_without_recipe_is_no_run(tmp_path):
    with pytest.raises(UsageError, match='is not a run folder.*cxr-fastai train'):
        Run.open(tmp_path)


def test_the_journal_tells_the_newest_of_an_event(tmp_path):
    run = Run.create(tmp_path)
    assert run.noted('start') == {}
    for seed in (1, 2):
        run.note('start', seed=seed)
    run.note('end')
    assert run.noted('start')['seed'] == 2


def test_progress_is_a_bar_with_its_rate_on_a_terminal_and_silent_elsewhere(terminal):
    with terminal.used():
        assert list(progress(iter('abc'), total=3)) == list('abc')
    assert '/3 [' in terminal.getvalue() and 'image/s' in terminal.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal(capfd):
    assert list(progress('abc')) == list('abc')
    assert capfd.readouterr() == ('', '')

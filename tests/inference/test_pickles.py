"""Exported learners and the trusted hashes."""

import json
import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import fastai.learner
import numpy as np
import pytest
import torch
from bundlefiles import make_learner_pickle, old_learner_pickle

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.folders import temporary_folder
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.inference.config import ModelConfig, sha256
from cxr_fastai.inference.pickles import UntrustedError, distrust, save_learner, trust, trusted
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.restoring import load_learner

RECIPE = make_recipe('baseline', size=48, batch_size=8)
CONFIG = ModelConfig.from_recipe(RECIPE)
STOCK_FASTAI = """
import json, sys, warnings
warnings.simplefilter('ignore')
from fastai.learner import load_learner
learn = load_learner('learner.pkl')
with learn.no_bar():
    probabilities = learn.get_preds(dl=learn.dls.test_dl(sys.argv[1:]))[0][:, 1].tolist()
    name, _, scores = learn.predict(sys.argv[1])
print(json.dumps({'probabilities': probabilities, 'name': name, 'first': float(scores[1])}))
"""


@pytest.fixture(scope='module')
def learn(images):
    torch.manual_seed(3)
    return recipe_learner(CXRDataLoaders.from_items(read_items(images), images, RECIPE), RECIPE)


@pytest.fixture(scope='module')
def saved(learn, tmp_path_factory) -> Path:
    """That learner as a file."""
    path = tmp_path_factory.mktemp('saved') / 'learner.pkl'
    save_learner(learn, path, CONFIG)
    return path


def test_stock_fastai_in_a_new_process_predicts_what_this_package_does(run, images, tmp_path):
    paths = [str(images / path) for path in run.items[run.items.split == 'valid'].path]
    (tmp_path / 'learner.pkl').write_bytes((run / 'learner.pkl').read_bytes())
    process = subprocess.run(
        [sys.executable, '-c', STOCK_FASTAI, *paths],
        cwd=tmp_path,
        text=True,
        check=True,
        capture_output=True,
        env=os.environ | {'PYTHONPATH': ''},
    )
    stock = json.loads(process.stdout)
    rows = list(Predictor.load(run.path).predict(paths, batch_size=3))
    learn = load_learner(run / 'learner.pkl')
    with learn.no_bar():
        reloaded = learn.get_preds(dl=learn.dls.test_dl(paths))[0][:, 1].tolist()
    assert np.allclose(stock['probabilities'], reloaded, rtol=0, atol=1e-6)
    assert np.allclose(stock['probabilities'], [row['p_pneumonia'] for row in rows], rtol=0, atol=1e-6)
    assert stock['first'] == pytest.approx(rows[0]['p_pneumonia'], abs=1e-6)
    assert stock['name'] in ('NORMAL', 'PNEUMONIA')


def test_a_saved_learner_predicts_what_it_did_before(learn, saved, images):
    items = read_items(images)
    with learn.no_bar():
        before = learn.get_preds()[0][:, 1].numpy()
    rows = Predictor.load(saved).predict([images / path for path in items[items.split == 'valid'].path])
    assert np.allclose([row['p_pneumonia'] for row in rows], before, rtol=0, atol=1e-6)


def test_the_file_contains_no_folder_no_image_name_and_no_bytecode(run, images):
    with zipfile.ZipFile(run / 'learner.pkl') as archive:
        content = b''.join(archive.read(name) for name in archive.namelist() if name.endswith('.pkl'))
    secrets = [str(images), str(run.path), sys.prefix, os.path.expanduser('~'), *run.items.path.map(os.path.basename)]
    assert not [secret for secret in secrets if secret.encode() in content]
    assert b'cloudpickle' not in content


@pytest.mark.filterwarnings('ignore:load_learner')  # fastai warns that pickles can run code
def test_the_file_contains_no_results_of_validation_images(learn, tmp_path):
    learn.validate()
    assert len(learn.metrics[1].preds)
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    reloaded = fastai.learner.load_learner(tmp_path / 'learner.pkl')
    assert not reloaded.metrics[1].preds
    assert not any(map(len, reloaded.dls.valid_ds.splits))
    assert not hasattr(reloaded, 'xb') and not hasattr(reloaded, 'dl')
    assert len(learn.xb)


def test_the_trusted_file_has_the_name_of_the_finished_folder(learn, tmp_path):
    with temporary_folder(tmp_path / 'bundle') as folder:
        digest = save_learner(learn, folder / 'learner.pkl', CONFIG)
    assert trusted()[digest]['why'] == 'exported here: bundle/learner.pkl'


def test_saving_leaves_the_learner_unchanged(learn, tmp_path):
    dls, path = learn.dls, learn.path
    learn.create_opt()
    opt = learn.opt
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert (learn.dls, learn.path, learn.opt) == (dls, path, opt)
    assert learn.dls.path == path


def test_a_failed_save_leaves_the_learner_and_the_old_file_unchanged(learn, tmp_path, monkeypatch):
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    digest, dls = sha256(tmp_path / 'learner.pkl'), learn.dls
    monkeypatch.setattr(learn, 'model', lambda: None)  # plain pickle cannot save a local function
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert learn.dls is dls and sha256(tmp_path / 'learner.pkl') == digest
    assert [path.name for path in tmp_path.iterdir()] == ['learner.pkl']


def test_the_refusal_says_how_to_trust_a_file_that_one_has_just_made(tmp_path, capsys):
    file = tmp_path / 'my model.pkl'
    file.write_bytes(pickle.dumps({'made': 'here'}))
    with pytest.raises(UntrustedError, match='or this one if you have just made the file yourself') as caught:
        load_learner(file)
    words = shlex.split(str(caught.value).split('`')[1].replace('HEX', sha256(file)))
    assert main(words[1:]) == 0
    assert sha256(file) in trusted()


@pytest.mark.parametrize('content', [b'', b'not a model', pickle.dumps({'a': 1})])
def test_a_trusted_file_that_is_not_a_learner_is_refused_in_one_line(tmp_path, content):
    (tmp_path / 'model.pkl').write_bytes(content)
    with pytest.raises(UntrustedError):
        load_learner(tmp_path / 'model.pkl')
    trust(sha256(tmp_path / 'model.pkl'), 'test')
    with pytest.raises(CXRError, match='not an exported learner') as caught:
        load_learner(tmp_path / 'model.pkl')
    assert '\n' not in str(caught.value)


def test_a_trusted_pickle_of_another_package_is_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / 'model.pkl')
    trust(sha256(tmp_path / 'model.pkl'), 'test')
    with pytest.raises(CXRError, match='not an exported learner|cxr-fastai did not make it'):
        load_learner(tmp_path / 'model.pkl')


def test_a_learner_of_schema_1_must_be_exported_again(saved, tmp_path):
    (tmp_path / 'modules.pkl').write_bytes(old_learner_pickle(saved.read_bytes()))
    learn = load_learner(saved)
    learn.config['schema'] = 1
    (tmp_path / 'schema.pkl').write_bytes(make_learner_pickle(learn))
    for name in ('modules.pkl', 'schema.pkl'):
        trust(sha256(tmp_path / name), 'test')
        with pytest.raises(CXRError, match='made before version 0.1.0.* [Ee]xport it again') as caught:
            load_learner(tmp_path / name)
        assert '\n' not in str(caught.value)


def test_a_trust_store_that_cannot_be_written_does_not_lose_the_learner(learn, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', '/dev/null/trust.json')
    with pytest.warns(CXRWarning, match='could not be added to the trusted hashes'):
        save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert (tmp_path / 'learner.pkl').is_file()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A trust store of its own, which does not exist yet."""
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'new' / 'trust.json'))
    return tmp_path / 'new' / 'trust.json'


def test_a_hash_is_trusted_until_it_is_removed(store, tmp_path, capsys):
    assert trusted() == {}
    (tmp_path / 'm.pkl').write_bytes(b'abc')
    digest = sha256(tmp_path / 'm.pkl')
    assert main(['trust', str(tmp_path / 'm.pkl'), '--sha256', digest.upper()]) == 0
    assert list(trusted()) == [digest]
    assert oct(store.stat().st_mode)[-3:] == '600'
    capsys.readouterr()
    assert main(['trust', 'list']) == 0
    assert capsys.readouterr().out == f'{digest}  {date.today().isoformat()}  hash confirmed: m.pkl\n'
    assert main(['trust', 'remove', digest]) == 0 and trusted() == {}
    assert main(['trust', 'list']) == 0 and capsys.readouterr().out == f'{store}: no trusted hashes\n'
    with pytest.raises(UsageError, match='not a trusted hash'):
        distrust(digest)


def test_a_file_with_another_hash_is_not_trusted(store, tmp_path, capsys):
    (tmp_path / 'm.pkl').write_bytes(b'abc')
    assert main(['trust', str(tmp_path / 'm.pkl'), '--sha256', 'f' * 64]) == 2
    assert 'not the file that you expect' in capsys.readouterr().err
    assert trusted() == {}


@pytest.mark.parametrize('words', [['x'], ['list', '--sha256', 'f' * 64], ['remove', 'zz'], ['gone', '--sha256', 'zz']])
def test_incomplete_arguments_of_trust_are_usage_errors(store, words):
    assert main(['trust', *words]) == 2


def test_a_damaged_trust_store_is_an_error(store):
    store.parent.mkdir()
    store.write_text('[]')
    with pytest.raises(CXRError, match='not a store of trusted hashes'):
        trusted()


def test_hashes_that_several_threads_trust_at_once_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    hashes = [f'{number:064x}' for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda digest: trust(digest, 'test'), hashes))
    assert set(trusted()) == set(hashes)

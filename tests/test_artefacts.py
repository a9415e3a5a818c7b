"""The exported learner: plain, without names, loadable anywhere, and equal to the one that was trained."""
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from cxr_fastai.artefacts import find_learner, load_learner, save_learner, sha256
from cxr_fastai.core import CXRError, UsageError
from cxr_fastai.data import make_dls
from cxr_fastai.inference import Predictor
from cxr_fastai.items import read_items
from cxr_fastai.learner import make_learner
from cxr_fastai.models import make_recipe

RECIPE = make_recipe('baseline', size=48, batch_size=8)
IN_A_FRESH_PROCESS = """
import json, sys, warnings
warnings.simplefilter('ignore')
from fastai.learner import load_learner
learn = load_learner('learner.pkl')
with learn.no_bar():
    probabilities = learn.get_preds(dl=learn.dls.test_dl(sys.argv[1:]))[0][:, 1].tolist()
    name, _, scores = learn.predict(sys.argv[1])
print(json.dumps({'probabilities': probabilities, 'name': name, 'first': float(scores[1])}))
"""


@pytest.fixture
def learn(films):
    torch.manual_seed(3)
    return make_learner(make_dls(read_items(films), films, RECIPE), RECIPE)


@pytest.mark.slow
def test_stock_fastai_the_reloaded_file_and_predict_agree(run, films, tmp_path):
    paths = [str(films/path) for path in run.items[run.items.split == 'valid'].path]
    (tmp_path/'learner.pkl').write_bytes((run/'learner.pkl').read_bytes())
    done = subprocess.run([sys.executable, '-c', IN_A_FRESH_PROCESS, *paths], cwd=tmp_path, text=True, check=True,
                          capture_output=True, env=os.environ | {'PYTHONPATH': ''})
    fresh = json.loads(done.stdout)
    with pytest.warns(UserWarning, match='is a pickle'): predictor = Predictor.load(run.path)
    ours = [row['p_pneumonia'] for row in predictor.predict(paths, batch_size=3)]
    with pytest.warns(UserWarning, match='is a pickle'): learn = load_learner(run/'learner.pkl')
    with learn.no_bar(): direct = learn.get_preds(dl=learn.dls.test_dl(paths))[0][:, 1].tolist()
    assert np.allclose(fresh['probabilities'], direct, rtol=0, atol=1e-6)
    assert np.allclose(fresh['probabilities'], ours, rtol=0, atol=1e-6)
    assert fresh['first'] == pytest.approx(ours[0], abs=1e-6) and fresh['name'] in ('NORMAL', 'PNEUMONIA')


def test_the_saved_learner_predicts_what_the_live_one_did(learn, films, tmp_path):
    items = read_items(films)
    with learn.no_bar(): live = learn.get_preds()[0][:, 1].numpy()
    save_learner(learn, tmp_path/'learner.pkl', RECIPE)
    with pytest.warns(UserWarning): predictor = Predictor.load(tmp_path/'learner.pkl')
    rows = predictor.predict([films/path for path in items[items.split == 'valid'].path])
    assert np.allclose([row['p_pneumonia'] for row in rows], live, rtol=0, atol=1e-6)


def test_no_folder_film_or_code_is_in_the_file(run, films):
    with zipfile.ZipFile(run/'learner.pkl') as archive:
        content = b''.join(archive.read(name) for name in archive.namelist() if name.endswith('.pkl'))
    secrets = [str(films), str(run.path), sys.prefix, os.path.expanduser('~'), *run.items.path.map(os.path.basename)]
    assert not [secret for secret in secrets if secret.encode() in content]
    assert b'cloudpickle' not in content


def test_no_result_of_the_validation_films_is_in_the_file(learn, tmp_path):
    learn.validate()
    assert len(learn.metrics[1].preds)
    save_learner(learn, tmp_path/'learner.pkl', RECIPE)
    with pytest.warns(UserWarning): again = load_learner(tmp_path/'learner.pkl')
    assert not again.metrics[1].preds and not any(map(len, again.dls.valid_ds.splits))


def test_saving_leaves_the_learner_whole(learn, tmp_path):
    dls, path = learn.dls, learn.path
    learn.create_opt()
    opt = learn.opt
    save_learner(learn, tmp_path/'learner.pkl', RECIPE)
    assert (learn.dls, learn.path, learn.opt) == (dls, path, opt) and learn.dls.path == path


def test_a_failed_export_leaves_the_learner_and_the_old_file_whole(learn, tmp_path, monkeypatch):
    save_learner(learn, tmp_path/'learner.pkl', RECIPE)
    old, dls = sha256(tmp_path/'learner.pkl'), learn.dls
    monkeypatch.setattr(learn, 'model', lambda: None)  # a function of a function: plain pickle refuses it
    with pytest.raises((AttributeError, pickle.PicklingError)): save_learner(learn, tmp_path/'learner.pkl', RECIPE)
    assert learn.dls is dls and sha256(tmp_path/'learner.pkl') == old
    assert [path.name for path in tmp_path.iterdir()] == ['learner.pkl']


@pytest.mark.parametrize('content', [b'', b'not a model', pickle.dumps({'a': 1})])
def test_a_file_that_is_no_learner_is_refused_in_one_line(tmp_path, content):
    (tmp_path/'model.pkl').write_bytes(content)
    with pytest.warns(UserWarning, match='SHA-256'), pytest.raises(CXRError, match='not an exported learner') as caught:
        load_learner(tmp_path/'model.pkl')
    assert '\n' not in str(caught.value)


def test_a_pickle_of_another_package_is_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path/'model.pkl')
    with pytest.raises(CXRError, match='not an exported learner|not made by'), pytest.warns(UserWarning):
        load_learner(tmp_path/'model.pkl')


def test_a_run_without_model_says_so(tmp_path):
    with pytest.raises(UsageError, match='no model there'): find_learner(tmp_path)

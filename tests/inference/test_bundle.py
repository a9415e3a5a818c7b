"""Learner and bundle: plain, without names, loadable anywhere, and equal to what was trained."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.inference.bundle import FILES, Bundle, manifest_text
from cxr_fastai.inference.config import ModelConfig, find_network, sha256, tensor_bytes
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine
from cxr_fastai.inference.pickles import UntrustedError, distrust, load_learner, save_learner, trust, trusted
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.selftest import Canary, ParityError, draw_images
from cxr_fastai.models.architectures import build_model, make_recipe
from cxr_fastai.publishing.exporting import export, verify, verify_afresh
from cxr_fastai.publishing.onnx import fold, to_onnx
from cxr_fastai.training.learner import make_learner

RECIPE = make_recipe('baseline', size=48, batch_size=8)
CONFIG = ModelConfig.of(RECIPE)
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
def learn(images):
    torch.manual_seed(3)
    return make_learner(make_dls(read_items(images), images, RECIPE), RECIPE)


def test_stock_fastai_the_reloaded_file_and_predict_agree(run, images, tmp_path):
    paths = [str(images / path) for path in run.items[run.items.split == 'valid'].path]
    (tmp_path / 'learner.pkl').write_bytes((run / 'learner.pkl').read_bytes())
    done = subprocess.run(
        [sys.executable, '-c', IN_A_FRESH_PROCESS, *paths],
        cwd=tmp_path,
        text=True,
        check=True,
        capture_output=True,
        env=os.environ | {'PYTHONPATH': ''},
    )
    fresh = json.loads(done.stdout)
    predictor = Predictor.load(run.path)
    ours = [row['p_pneumonia'] for row in predictor.predict(paths, batch_size=3)]
    learn = load_learner(run / 'learner.pkl')
    with learn.no_bar():
        direct = learn.get_preds(dl=learn.dls.test_dl(paths))[0][:, 1].tolist()
    assert np.allclose(fresh['probabilities'], direct, rtol=0, atol=1e-6)
    assert np.allclose(fresh['probabilities'], ours, rtol=0, atol=1e-6)
    assert fresh['first'] == pytest.approx(ours[0], abs=1e-6) and fresh['name'] in ('NORMAL', 'PNEUMONIA')


def test_the_saved_learner_predicts_what_the_live_one_did(learn, images, tmp_path):
    items = read_items(images)
    with learn.no_bar():
        live = learn.get_preds()[0][:, 1].numpy()
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    predictor = Predictor.load(tmp_path / 'learner.pkl')
    rows = predictor.predict([images / path for path in items[items.split == 'valid'].path])
    assert np.allclose([row['p_pneumonia'] for row in rows], live, rtol=0, atol=1e-6)


def test_no_folder_image_or_code_is_in_the_file(run, images):
    with zipfile.ZipFile(run / 'learner.pkl') as archive:
        content = b''.join(archive.read(name) for name in archive.namelist() if name.endswith('.pkl'))
    secrets = [str(images), str(run.path), sys.prefix, os.path.expanduser('~'), *run.items.path.map(os.path.basename)]
    assert not [secret for secret in secrets if secret.encode() in content]
    assert b'cloudpickle' not in content


def test_no_result_of_the_validation_images_is_in_the_file(learn, tmp_path):
    learn.validate()
    assert len(learn.metrics[1].preds)
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    again = load_learner(tmp_path / 'learner.pkl')
    assert not again.metrics[1].preds and not any(map(len, again.dls.valid_ds.splits))
    assert not hasattr(again, 'xb') and not hasattr(again, 'dl') and len(learn.xb)


def test_saving_leaves_the_learner_whole(learn, tmp_path):
    dls, path = learn.dls, learn.path
    learn.create_opt()
    opt = learn.opt
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert (learn.dls, learn.path, learn.opt) == (dls, path, opt) and learn.dls.path == path


def test_a_failed_export_leaves_the_learner_and_the_old_file_whole(learn, tmp_path, monkeypatch):
    save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    old, dls = sha256(tmp_path / 'learner.pkl'), learn.dls
    monkeypatch.setattr(learn, 'model', lambda: None)  # a function of a function: plain pickle refuses it
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert learn.dls is dls and sha256(tmp_path / 'learner.pkl') == old
    assert [path.name for path in tmp_path.iterdir()] == ['learner.pkl']


@pytest.mark.parametrize('content', [b'', b'not a model', pickle.dumps({'a': 1})])
def test_a_trusted_file_that_is_no_learner_is_refused_in_one_line(tmp_path, content):
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
    with pytest.raises(CXRError, match='not an exported learner|not made by'):
        load_learner(tmp_path / 'model.pkl')


def test_a_run_without_model_says_so(tmp_path):
    with pytest.raises(UsageError, match='no model there'):
        find_network(tmp_path)


@pytest.fixture(scope='module')
def images_100(images) -> np.ndarray:
    """120 images of 64 px: all synthetic ones, and all of them turned upside down."""
    from cxr_fastai.images.preprocessing import Preprocessing

    seen = Preprocessing(64)
    found = np.stack([seen.load(path) for path in sorted((images).rglob('*.jpeg'))])
    return np.concatenate([found, found[:, ::-1]])


def test_every_form_of_a_model_predicts_the_same(bundle, evaluated, images_100):
    opened = Bundle.open(bundle)
    forms = {
        'run': Predictor.load(evaluated.path).engine,
        'torch': opened.engine('torch'),
        'onnx': opened.engine('onnx'),
        'learner': TorchEngine(load_learner(bundle / 'learner.pkl').model),
    }
    found = {name: engine(images_100) for name, engine in forms.items()}
    threshold = opened.config.threshold
    assert len(images_100) >= 100 and found['run'][0].std() > 0.01
    for name in ('torch', 'onnx', 'learner'):
        assert np.abs(found[name][0] - found['run'][0]).max() <= 1e-4
        assert ((found[name][0] >= threshold) == (found['run'][0] >= threshold)).all()
        assert np.allclose(found[name][1], found['run'][1], atol=1e-4)


@pytest.mark.parametrize('arch', ['baseline', 'resnet50', 'efficientnet_lite0'])
def test_an_onnx_file_takes_images_as_they_are(arch):
    import onnxruntime

    torch.manual_seed(0)
    model = build_model(arch).train()
    with torch.no_grad():
        model[0](torch.randn(8, 3, 64, 64))
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    wanted = TorchEngine(model)(images)
    data = to_onnx(model, 64, temperature=2.0)
    found = OnnxEngine(data, Path('m.onnx'))(images)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    (cold,) = session.run(['p_calibrated'], {'images': images[:1, None]})
    logit = np.log(wanted[0][0] / (1 - wanted[0][0]))
    assert cold[0] == pytest.approx(1 / (1 + np.exp(-logit / 2)), abs=1e-5)
    assert session.get_inputs()[0].type == 'tensor(uint8)'


def test_the_fold_is_exact_also_at_the_border():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1))
    grey = torch.rand(2, 1, 8, 8)
    from cxr_fastai.models.inputs import normalize

    wanted = model(normalize(grey.clone()))
    assert fold(model) and torch.allclose(model(torch.cat([grey, torch.ones_like(grey)], 1)), wanted, atol=1e-5)
    assert not fold(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)))


def test_a_bundle_has_what_it_says_and_names_nothing(bundle, evaluated, images):
    manifest = json.loads((bundle / 'manifest.json').read_text())
    assert set(manifest['files']) == {*FILES} - {'model.int8.onnx'} == set(os.listdir(bundle)) - {'manifest.json'}
    content = b''.join((bundle / name).read_bytes() for name in os.listdir(bundle))
    with zipfile.ZipFile(bundle / 'learner.pkl') as archive:
        content += b''.join(archive.read(name) for name in archive.namelist())
    secrets = [
        str(images),
        str(evaluated.path),
        sys.prefix,
        os.path.expanduser('~'),
        os.uname().nodename,
        *evaluated.items.path.map(os.path.basename),
        *evaluated.items.patient,
    ]
    assert not [secret for secret in secrets if len(secret) > 4 and secret.encode() in content]
    config = json.loads((bundle / 'config.json').read_text())
    assert config['vocab'] == ['NORMAL', 'PNEUMONIA'] and config['threshold'] == evaluated.decision['threshold']
    assert config['items_sha256'] == sha256(evaluated / 'items.csv') and config['normalisation']['mean'][0] == 0.485


def test_arrays_are_saved_as_they_are_seen():
    table = np.arange(8.0).reshape(4, 2)
    assert (load(tensor_bytes({'a': table[:, 1]}))['a'] == [1, 3, 5, 7]).all()


def test_a_zip_is_the_same_bundle(bundle, tmp_path, images):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        for path in bundle.iterdir():
            archive.write(path, path.name)
    image = next((images / 'test').rglob('*.jpeg'))
    a, b = (next(Predictor.load(path).predict([image])) for path in (bundle, tmp_path / 'b.zip'))
    assert a == b


def test_a_failed_export_leaves_the_old_bundle_whole(evaluated, bundle, tmp_path, monkeypatch):
    shutil.copytree(bundle, tmp_path / 'b')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'b').iterdir()}

    def fail(*_: object) -> None:
        raise ParityError('no')

    for name in ('verify_afresh', 'fill_bundle'):
        monkeypatch.setattr(f'cxr_fastai.publishing.exporting.{name}', fail)
        monkeypatch.setattr(
            'cxr_fastai.publishing.exporting.fill_bundle', lambda *_: None
        ) if name == 'verify_afresh' else None
        with pytest.raises(ParityError):
            export(evaluated, tmp_path / 'b')
        assert {path.name: path.read_bytes() for path in (tmp_path / 'b').iterdir()} == before
    assert os.listdir(tmp_path) == ['b']


def test_an_export_overwrites_bundles_alone(evaluated, tmp_path):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/precious').write_text('x')
    with pytest.raises(UsageError, match='is no bundle'):
        export(evaluated, tmp_path / 'b')
    (tmp_path / 'b/manifest.json').write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match='is no bundle'):
        export(evaluated, tmp_path / 'b')
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
        archive.writestr('image.jpeg', b'x')
    with pytest.raises(UsageError, match='is no bundle'):
        export(evaluated, tmp_path / 'images.zip', as_zip=True)
    assert (tmp_path / 'b/precious').read_text() == 'x'
    with pytest.raises(UsageError, match='go together'):
        export(evaluated, tmp_path / 'c', as_zip=True)
    with pytest.raises(UsageError, match='go together'):
        export(evaluated, tmp_path / 'c.zip')


def test_a_bundle_with_images_beside_it_is_left_alone(evaluated, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / 'b')
    (tmp_path / 'b/image.jpeg').write_text('x')
    with pytest.raises(UsageError, match='is no bundle'):
        export(evaluated, tmp_path / 'b')


def seal(folder: Path, name: str) -> None:
    """Give the manifest the hash of the file `name` as it is now."""
    files = json.loads((folder / 'manifest.json').read_text())['files']
    files[name] = {'sha256': sha256(folder / name), 'size': (folder / name).stat().st_size}
    (folder / 'manifest.json').write_text(manifest_text(files))


def test_a_learner_of_another_network_is_found(bundle, tmp_path, learn):
    shutil.copytree(bundle, tmp_path / 'b')
    save_learner(learn, tmp_path / 'b/learner.pkl', ModelConfig('baseline', 64, 0.5))
    seal(tmp_path / 'b', 'learner.pkl')
    with pytest.raises(ParityError):
        verify(tmp_path / 'b')


def test_a_fresh_process_finds_other_predictions(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / 'b')
    canary = load((bundle / 'canary.safetensors').read_bytes())
    (tmp_path / 'b/canary.safetensors').write_bytes(tensor_bytes(canary | {'p': 1 - canary['p']}))
    seal(tmp_path / 'b', 'canary.safetensors')
    with pytest.raises(ParityError, match=r'nothing was exported \(.*differs by'):
        verify_afresh(tmp_path / 'b')


@pytest.mark.parametrize('when', [OSError, KeyboardInterrupt])
def test_a_stop_while_bundles_change_places_leaves_the_old_one(evaluated, bundle, tmp_path, monkeypatch, when):
    shutil.copytree(bundle, tmp_path / 'b')
    monkeypatch.setattr('cxr_fastai.publishing.exporting.fill_bundle', lambda *_: None)
    monkeypatch.setattr('cxr_fastai.publishing.exporting.verify_afresh', lambda *_: None)
    replace, calls = os.replace, []

    def stop(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise when('stopped')
        replace(a, b)

    monkeypatch.setattr('os.replace', stop)
    with pytest.raises((CXRError, KeyboardInterrupt)):
        export(evaluated, tmp_path / 'b')
    monkeypatch.undo()
    verify(tmp_path / 'b')
    assert os.listdir(tmp_path) == ['b']


def test_images_of_another_set_make_no_gate(evaluated, tmp_path, monkeypatch):
    from cxr_fastai.images.synthetic import make_demo
    from cxr_fastai.publishing.exporting import read_known

    make_demo(tmp_path / 'images', images=40, size=64, seed=9)
    monkeypatch.setattr(Run, 'images', tmp_path / 'gone')
    monkeypatch.setenv('CXR_DATA', str(tmp_path / 'images'))
    with pytest.warns(CXRWarning, match='no input gate'):
        assert read_known(evaluated, None) == {}


def test_prediction_with_a_bundle_loads_neither_torch_nor_fastai_nor_pandas(bundle, images):
    image = next((images / 'test').rglob('*.jpeg'))
    code = (
        'import sys; from cxr_fastai.cli import main; '
        f'code = main(["predict", {str(bundle)!r}, {str(image)!r}, "--no-gate"]); '
        'print(code, {"torch", "fastai", "pandas", "matplotlib", "scipy"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip().endswith('0 set()')


def test_a_probability_that_is_none_is_an_error(tmp_path):
    def broken(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(images), np.nan), np.zeros((len(images), 2))

    with pytest.raises(CXRError, match='the model is damaged'):
        Predictor(broken, CONFIG).scores(np.zeros((1, 48, 48), np.uint8))


def test_a_store_that_cannot_be_written_costs_no_learner(learn, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', '/dev/null/trust.json')
    with pytest.warns(CXRWarning, match='not in the store of trust'):
        save_learner(learn, tmp_path / 'learner.pkl', CONFIG)
    assert (tmp_path / 'learner.pkl').is_file()


def test_a_run_that_was_not_evaluated_is_not_exported(run, capsys, tmp_path):
    assert main(['export', str(run.path), '--out', str(tmp_path / 'b')]) == 2
    assert 'not evaluated' in capsys.readouterr().err


def test_verification_reads_every_file(bundle, tmp_path):
    verify(bundle)
    shutil.copytree(bundle, tmp_path / 'b')
    with open(tmp_path / 'b/MODEL_CARD.md', 'a') as file:
        file.write(' ')
    with pytest.raises(CXRError, match=r'MODEL_CARD.md: not the bytes that its manifest tells of'):
        verify(tmp_path / 'b')


def test_canary_images_tell_another_network(tmp_path):
    torch.manual_seed(0)
    one, other = (TorchEngine(build_model('baseline')) for _ in range(2))
    canary = Canary.of(one, 64)
    canary.check(one, tmp_path)
    assert canary.images.shape == (8, 64, 64) and (draw_images(64) == canary.images).all()
    again = Canary.from_dict(canary.as_dict(), tmp_path)
    assert (again.images == canary.images).all() and (again.p == canary.p).all()
    with torch.no_grad():
        other.model[1][-1].bias += 3
    with pytest.raises(ParityError, match='differs by'):
        canary.check(other, tmp_path)
    with pytest.raises(CXRError, match='canary images are damaged'):
        Canary.from_dict({'images': b''}, tmp_path)


def test_the_store_of_trust_takes_and_gives_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'new' / 'trust.json'))
    assert trusted() == {}
    (tmp_path / 'm.pkl').write_bytes(b'abc')
    known = sha256(tmp_path / 'm.pkl')
    assert main(['trust', str(tmp_path / 'm.pkl'), '--sha256', 'f' * 64]) == 2 and trusted() == {}
    assert 'it is another file' in capsys.readouterr().err
    assert main(['trust', str(tmp_path / 'm.pkl'), '--sha256', known.upper()]) == 0 and list(trusted()) == [known]
    assert main(['trust', 'list']) == 0 and known in capsys.readouterr().out
    assert oct((tmp_path / 'new/trust.json').stat().st_mode)[-3:] == '600'
    assert main(['trust', 'remove', known]) == 0 and trusted() == {}
    with pytest.raises(UsageError, match='not among'):
        distrust(known)
    for words in (['trust', 'x'], ['trust', 'list', '--sha256', known], ['trust', 'remove', 'zz']):
        assert main(words) == 2
    (tmp_path / 'new/trust.json').write_text('[]')
    with pytest.raises(CXRError, match='not a store'):
        trusted()


def test_a_run_needs_no_pickle(evaluated, images, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'none.json'))
    shutil.copytree(evaluated.path, tmp_path / 'run')
    (tmp_path / 'run/learner.pkl').unlink()
    image = next((images / 'test').rglob('*.jpeg'))
    assert next(Predictor.load(tmp_path / 'run').predict([image])) == next(
        Predictor.load(evaluated.path).predict([image])
    )
    assert Run.open(tmp_path / 'run').metrics['test']['model'] == sha256(tmp_path / 'run/model.safetensors')


def test_eight_bits_are_kept_only_where_they_are_as_good(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'cxr_fastai.publishing.exporting.verify_afresh', lambda _: None
    )  # it is tested above, and takes long
    monkeypatch.setattr('cxr_fastai.publishing.exporting._copy_learner', lambda *_: None)
    monkeypatch.setattr('cxr_fastai.publishing.exporting.MOST_CHANGE', 1.0)
    bundle = Bundle.open(export(evaluated, tmp_path / 'b', int8=True))
    verify(tmp_path / 'b')
    assert len(bundle.read('model.int8.onnx')) < 0.4 * len(bundle.read('model.onnx'))
    small, whole = bundle.engine('int8'), bundle.engine('onnx')
    images = bundle.canary.images
    assert 0 < np.abs(small(images)[0] - whole(images)[0]).max() < 0.1
    assert abs(bundle.facts['int8']['auc_change']) < 1
    monkeypatch.setattr('cxr_fastai.publishing.exporting.MOST_CHANGE', 0.0)
    with pytest.warns(CXRWarning, match='less than 0.0 is asked'):
        export(evaluated, tmp_path / 'b', int8=True)
    with pytest.raises(CXRError, match='has no model.int8.onnx'):
        Bundle.open(tmp_path / 'b').engine('int8')
    with pytest.raises(UsageError, match='--engine x: choose auto'):
        Bundle.open(tmp_path / 'b').engine('x')


def test_a_bundle_goes_to_the_hub_without_its_pickle(bundle, tmp_path, monkeypatch, capsys):
    sent = {}

    class Api:
        def create_repo(self, repo: str, **how: bool) -> None:
            sent.update(how, repo=repo)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list) -> None:
            assert delete_patterns == ['learner.pkl']
            shutil.copytree(folder_path, tmp_path / 'sent')

    monkeypatch.setattr('huggingface_hub.HfApi', Api)
    assert main(['push-to-hub', str(bundle), 'me/model', '--private']) == 0
    assert sent == {'repo': 'me/model', 'private': True, 'exist_ok': True}
    assert 'https://huggingface.co/me/model' in capsys.readouterr().out
    verify(tmp_path / 'sent')
    assert not (tmp_path / 'sent/learner.pkl').exists()
    assert (tmp_path / 'sent/README.md').read_bytes() == (bundle / 'MODEL_CARD.md').read_bytes()
    monkeypatch.setattr(Api, 'create_repo', lambda *_, **__: 1 / 0)
    assert main(['push-to-hub', str(bundle), 'me/model']) == 1 and 'the Hub refused' in capsys.readouterr().err

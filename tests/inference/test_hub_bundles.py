"""`hf:USER/NAME` names a bundle on the Hub: its files alone are downloaded, verified, and kept for use offline."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import TOKEN, Hub, Repository, files_of, running_hub, stop
from services import running_app

from cxr_fastai.cli import main
from cxr_fastai.core import environment
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.inference import hub_bundles
from cxr_fastai.inference.bundle import CARD, CONFIG, MANIFEST, Bundle, manifest_text
from cxr_fastai.inference.config import LEARNER, WEIGHTS
from cxr_fastai.inference.hub_bundles import download_bundle, list_hub_bundles
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.pretrained import FOLDER, find_model, name_model
from cxr_fastai.publishing import watched_folder
from cxr_fastai.serving.app import Settings

constants = pytest.importorskip('huggingface_hub.constants', reason='needs pip install "cxr_fastai[hub]"')

NAME = 'hf:me/model'


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub on this machine, with the repository `me/model`, and a cache of its own."""
    with running_hub() as server:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', address)
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.delenv('HF_TOKEN', raising=False)
        server.repositories['me/model'] = Repository()
        yield server


def seal(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files with a manifest of them."""
    facts = {name: {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)} for name, data in files.items()}
    return files | {MANIFEST: manifest_text(facts).encode()}


def small_bundle(text: str = 'weights') -> dict[str, bytes]:
    """The files of a bundle that can be verified, but not used."""
    return seal({CONFIG: b'{"schema": 2}', WEIGHTS: text.encode(), CARD: b'# Card\n', LEARNER: b'a pickle'})


def test_only_the_files_of_the_bundle_are_downloaded_and_no_pickle(hub):
    other = {'README.md': b'page', 'train.py': b'1', 'pytorch_model.bin': b'pickle', 'deep/config.json': b'{}'}
    commit = hub.repositories['me/model'].commit(small_bundle() | other)
    folder = download_bundle(NAME)
    assert set(files_of(folder)) == hub.downloaded == {MANIFEST, CONFIG, WEIGHTS, CARD}
    assert name_model(folder) == f'{NAME}@{commit}'
    assert Bundle(folder).read(WEIGHTS) == b'weights'
    assert find_model(NAME) == Bundle.open(NAME).path == folder
    bundle = Bundle(folder)
    assert (bundle.shown, bundle.shown_file(CONFIG)) == (f'{NAME}@{commit}', f'{NAME}@{commit}/{CONFIG}')
    for path in (Path(NAME), f'./{NAME}'):  # a file or folder
        assert find_model(path) == Path(path)


def test_a_second_call_downloads_nothing_and_a_new_commit_what_changed(hub):
    first = hub.repositories['me/model'].commit(small_bundle('old'))
    assert download_bundle(NAME).name == first
    hub.requests.clear()
    assert download_bundle(NAME).name == first and not hub.downloaded
    second = hub.repositories['me/model'].commit(small_bundle('new'))
    assert download_bundle(NAME).name == second and hub.downloaded == {MANIFEST, WEIGHTS}


def test_a_revision_is_a_branch_or_a_commit_that_never_changes(hub):
    repository = hub.repositories['me/model']
    old = repository.commit(small_bundle('old'))
    new = repository.commit(small_bundle('new'))
    trial = repository.commit(small_bundle('trial'), 'refs/pr/1')
    assert download_bundle(f'{NAME}@{old}').name == old
    assert download_bundle(f'{NAME}@main').name == download_bundle(NAME).name == new
    assert download_bundle(f'{NAME}@refs/pr/1').name == trial
    hub.requests.clear()
    assert Bundle(download_bundle(f'{NAME}@{old}')).read(WEIGHTS) == b'old' and hub.requests == []


def test_without_a_network_the_cached_commit_is_used_and_a_warning_says_so(hub):
    commit = hub.repositories['me/model'].commit(small_bundle())
    folder = download_bundle(NAME)
    stop(hub)
    with pytest.warns(CXRWarning, match=f'the Hub cannot be reached, so the commit {commit} of the cache is used'):
        assert download_bundle(NAME) == folder
    assert download_bundle(f'{NAME}@{commit}') == folder
    with pytest.raises(CXRError, match=r'hf:me/model@v1: the Hub cannot be reached .* was not downloaded before'):
        download_bundle(f'{NAME}@v1')


def test_the_cache_is_used_while_the_hub_fails(hub):
    hub.repositories['me/model'].commit(small_bundle())
    folder = download_bundle(NAME)
    hub.failure = 503
    with pytest.warns(CXRWarning, match='cannot be reached'):
        assert download_bundle(NAME) == folder


def test_an_incomplete_download_is_completed_and_not_used_before(hub):
    hub.repositories['me/model'].commit(small_bundle())
    folder = download_bundle(NAME)
    (folder / WEIGHTS).unlink()
    hub.failure = 503
    with pytest.raises(CXRError, match='cannot be reached'):
        download_bundle(NAME)
    hub.failure = None
    assert Bundle(download_bundle(NAME)).read(WEIGHTS) == b'weights'


@pytest.mark.parametrize('name', [WEIGHTS, CONFIG, CARD])
def test_a_changed_byte_is_refused_each_time(hub, name):
    files = small_bundle()
    files[name] = bytes([files[name][0] ^ 1]) + files[name][1:]
    hub.repositories['me/model'].commit(files)
    for _ in range(2):
        with pytest.raises(CXRError, match=rf'{name}: does not match its hash .* cxr-fastai cache clean {NAME}@'):
            download_bundle(NAME)


def test_a_damaged_copy_can_be_deleted_by_the_command_that_the_error_names(hub, capsys):
    hub.repositories['me/model'].commit(small_bundle())
    (download_bundle(NAME) / WEIGHTS).write_text('damaged')
    with pytest.raises(CXRError) as error:
        download_bundle(NAME)
    words = str(error.value).rpartition('cxr-fastai ')[2].split()
    assert main([*words, '--yes']) == 0 and list_hub_bundles() == []
    assert Bundle(download_bundle(NAME)).read(WEIGHTS) == b'weights'


@pytest.mark.parametrize(
    ('files', 'reason'),
    [
        ({'learner.pkl': b'pickle', 'README.md': b''}, 'but learner.pkl, which can run code and is never downloaded'),
        ({'README.md': b''}, 'no manifest.json'),
        ({'bundle/manifest.json': b'{}'}, 'no manifest.json'),
    ],
)
def test_a_repository_without_a_bundle_is_refused_unread(hub, files, reason):
    hub.repositories['me/model'].commit(files)
    with pytest.raises(UsageError, match=f'no bundle in this repository, {reason}.*push-to-hub'):
        download_bundle(NAME)
    assert not hub.downloaded and not Path(constants.HF_HUB_CACHE).exists()


@pytest.mark.parametrize(
    'manifest',
    [
        b'{"name": "a web app"}',
        b'no JSON',
        b'[]',
        json.dumps({'files': {'../x': {'sha256': '0' * 64, 'size': 1}}}).encode(),
    ],
    ids=['other', 'text', 'list', 'path'],
)
def test_a_manifest_of_something_else_is_refused(hub, manifest):
    hub.repositories['me/model'].commit(small_bundle() | {MANIFEST: manifest})
    with pytest.raises(CXRError, match=r'manifest\.json: '):
        download_bundle(NAME)
    assert hub.downloaded == {MANIFEST}


def test_a_file_that_the_repository_lacks_is_named(hub):
    files = small_bundle()
    del files[WEIGHTS]
    hub.repositories['me/model'].commit(files)
    with pytest.raises(CXRError, match=f'the repository lacks {WEIGHTS}'):
        download_bundle(NAME)


@pytest.mark.parametrize(('name', 'size'), [(MANIFEST, 2**21), (WEIGHTS, 2**31)])
def test_too_large_files_are_not_downloaded(hub, name, size):
    hub.repositories['me/model'].commit(small_bundle())
    hub.stated_sizes[name] = size
    with pytest.raises(CXRError, match='has [0-9,]+ bytes, more than [0-9,]+, so it was not downloaded'):
        download_bundle(NAME)
    assert hub.downloaded <= {MANIFEST} and name not in hub.downloaded


def test_an_unknown_repository_or_revision_is_named(hub):
    with pytest.raises(UsageError, match=r'hf:me/gone@main: no such repository, or a private one.*HF_TOKEN'):
        download_bundle('hf:me/gone')
    hub.repositories['me/model'].commit(small_bundle())
    with pytest.raises(UsageError, match='the repository has no revision v9'):
        download_bundle(f'{NAME}@v9')


def test_a_private_repository_needs_a_token_and_a_gated_one_its_conditions(hub, monkeypatch):
    hub.repositories['me/secret'] = Repository(private=True)
    hub.repositories['me/secret'].commit(small_bundle())
    with pytest.raises(UsageError, match='a private one, log in with `hf auth login`'):
        download_bundle('hf:me/secret')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert name_model(download_bundle('hf:me/secret')).startswith('hf:me/secret@')
    hub.repositories['me/gated'] = Repository(gated=True)
    with pytest.raises(UsageError, match='Accept the conditions'):
        download_bundle('hf:me/gated')


@pytest.mark.parametrize(
    'name', ['hf:', 'hf:model', 'hf:me/', 'hf:me/model/x', 'hf:me/model@', 'hf:me/../x', 'hf:me/m@../../x', 'hf:a b/c']
)
def test_other_texts_are_not_names(hub, name):
    with pytest.raises(UsageError, match=r'not the name of a bundle on the Hugging Face Hub.*hf:USER/NAME@REVISION'):
        find_model(name)
    assert hub.requests == []


def test_an_answer_of_another_server_is_an_error(hub, monkeypatch):
    repository = hub.repositories['me/model']
    repository.commits['../../x'] = small_bundle()
    repository.branches['main'] = '../../x'
    with pytest.raises(CXRError, match='the Hub named no commit'):
        download_bundle(NAME)
    hub.failure = 418
    with pytest.raises(CXRError, match='the Hub did not provide the bundle'):
        download_bundle(NAME)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(environment, 'is_installed', lambda name: name != 'huggingface_hub')
    with pytest.raises(UsageError, match=r'needs the package huggingface_hub.*pip install "cxr_fastai\[hub\]"'):
        find_model(NAME)
    monkeypatch.setattr(hub_bundles, 'is_installed', lambda _: False)
    assert list_hub_bundles() == []


def test_other_contents_of_the_cache_are_not_listed(hub, tmp_path):
    hub.repositories['me/model'].commit(small_bundle())
    folder = download_bundle(NAME)
    other = tmp_path / 'hub/models--you--other/snapshots' / folder.name
    other.mkdir(parents=True)
    (other / 'model.safetensors').write_text('other')
    assert [bundle.name for bundle in list_hub_bundles()] == [name_model(folder)]
    assert name_model(tmp_path) == str(tmp_path)


def test_commands_and_the_service_take_the_name_and_record_the_commit(hub, images, capsys):
    pytest.importorskip('onnxruntime')
    commit = hub.repositories['me/model'].commit(files_of(FOLDER))
    image = next((images / 'test').rglob('*.jpeg'))
    expected = [row['p_pneumonia'] for row in Predictor.load(FOLDER, gate=False).predict([image])]
    assert [row['p_pneumonia'] for row in Predictor.load(NAME, gate=False).predict([image])] == expected
    assert main(['predict', NAME, str(image), '--no-gate', '--json']) == 0
    document = json.loads(capsys.readouterr().out)
    assert document['model'] == f'{NAME}@{commit}' and [row['p_pneumonia'] for row in document['rows']] == expected
    assert main(['predict', document['model'], str(image), '--no-gate']) == 0
    assert f'model: {NAME}@{commit}\n' in capsys.readouterr().out
    with running_app(Settings(NAME)) as client:
        assert client.get('/v1/model').json()['sha256'] == Bundle(FOLDER).identity


def test_a_page_and_a_watch_name_the_commit(hub, images, tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    name = f'{NAME}@{hub.repositories["me/model"].commit(files_of(FOLDER))}'
    image, page = next((images / 'test').rglob('*.jpeg')), tmp_path / 'page.html'
    assert main(['predict', NAME, str(image), '--no-gate', '--html', str(page)]) == 0
    assert f'Predictions of {name}' in page.read_text().replace('<wbr>', '')
    capsys.readouterr()
    monkeypatch.setattr(watched_folder, 'watch_folder', lambda *args: iter(()))  # until it is interrupted
    assert main(['predict', NAME, '--watch', str(tmp_path), '--no-gate', '--out', str(tmp_path / 'p.csv')]) == 0
    assert f'model: {name}\n' in capsys.readouterr().out


def test_a_repository_without_a_bundle_ends_a_command_with_one_line(hub, capsys):
    hub.repositories['me/model'].commit({'learner.pkl': b'pickle'})
    for words in (['predict', NAME, 'x.png'], ['serve', NAME], ['benchmark', NAME], ['explain', NAME, 'x.png']):
        assert main(words) == 2
        assert re.fullmatch('error: hf:me/model@main: no bundle in this repository, .*\n', capsys.readouterr().err)


def test_the_environment_names_the_hub_its_cache_and_whether_to_ask_it(hub, images, tmp_path):
    pytest.importorskip('onnxruntime')
    commit = hub.repositories['me/model'].commit(files_of(FOLDER))
    image = next((images / 'test').rglob('*.jpeg'))
    command = [sys.executable, '-m', 'cxr_fastai', 'predict', NAME, str(image), '--no-gate']
    settings = os.environ | {'HF_ENDPOINT': hub.url, 'HF_HUB_CACHE': str(tmp_path / 'other')}
    for more in ({}, {'HF_HUB_OFFLINE': '1'}):
        done = subprocess.run(command, env=settings | more, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and f'model: {NAME}@{commit}\n' in done.stdout, done.stderr
        assert ('cannot be reached' in done.stderr) == bool(more)
    assert (tmp_path / 'other/models--me--model/snapshots' / commit).is_dir()


def test_the_cache_commands_list_and_delete_bundles(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'none'))
    old = hub.repositories['me/model'].commit(small_bundle('old'))
    new = hub.repositories['me/model'].commit(small_bundle('new'))
    for revision in (old, new):
        download_bundle(f'{NAME}@{revision}')
    assert main(['cache', 'list']) == 0
    _, *rows, images, bundles = capsys.readouterr().out.splitlines()
    assert {row.split()[-1] for row in rows} == {f'{NAME}@{old}', f'{NAME}@{new}'}
    assert images == f'{tmp_path / "none"}: no caches' and bundles == f'0.0 MB of bundles in {tmp_path / "hub"}'
    assert main(['cache', 'clean', f'{NAME}@{old}', '--yes']) == 0
    assert [bundle.name for bundle in list_hub_bundles()] == [f'{NAME}@{new}']
    assert main(['cache', 'clean', NAME, '--yes']) == 2
    assert 'no such cache' in capsys.readouterr().err
    assert Bundle(download_bundle(f'{NAME}@{new}')).read(WEIGHTS) == b'new'
    assert main(['cache', 'clean', '--all', '--yes']) == 0 and list_hub_bundles() == []

"""A bundle on the Hub and a Space contain no pickle, and a Space contains all that its page needs."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.publishing import exporting
from cxr_fastai.publishing.exporting import verify
from cxr_fastai.publishing.hub import SPACE_PACKAGES, space_requirements, write_space

GRADIO = Path(sys.prefix) / 'space'
"""`make test-all` installs gradio here, because it requires an older Pillow than the tested one."""
EXPLAIN_CODE = """
import sys
for name in ('fastai', 'fastcore', 'pandas', 'sklearn', 'scipy', 'statsmodels', 'requests', 'gradio'):
    sys.modules[name] = None
from pathlib import Path
from cxr_fastai.serving.service import Service
row = Service.open(Path('bundle')).explain(Path(sys.argv[1]).read_bytes())
print(row['status'], row['explanation']['format'], row['explanation']['overlay'] is not None)
"""
PREDICT_CODE = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
for image in sys.argv[2:]:
    print(client.predict(handle_file(image), api_name='/predict')[0])
    print('---')
"""


@pytest.fixture(scope='module')
def space(bundle, tmp_path_factory) -> Path:
    return write_space(Bundle.open(bundle), tmp_path_factory.mktemp('space') / 'space')


def test_a_space_contains_page_card_bundle_and_package_but_no_pickle(space):
    names = {path.name for path in space.iterdir()}
    assert names == {'app.py', 'requirements.txt', 'README.md', 'bundle', 'cxr_fastai'}
    assert not list(space.rglob('*.pkl')) and not list(space.rglob('__pycache__'))
    assert Bundle.open(space / 'bundle').read('model.onnx')


def test_the_readme_has_the_settings_of_the_space_and_the_model_card(space):
    text = (space / 'README.md').read_text()
    settings = re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)[1]
    assert 'sdk: gradio' in settings and 'app_file: app.py' in settings
    assert re.search(r'sdk_version: \d+\.\d+\.\d+', settings)
    assert text.count('\n---\n') == 1 and 'not a medical device' in text.lower()


def test_the_requirements_are_those_of_the_package_without_fastai(space):
    lines = (space / 'requirements.txt').read_text().splitlines()
    assert lines[1:] == space_requirements() and len(lines[1:]) == len(SPACE_PACKAGES)
    assert not any('fastai' in line for line in lines)


def test_a_folder_that_is_not_empty_is_not_changed(bundle, tmp_path):
    (tmp_path / 'mine').write_text('mine')
    with pytest.raises(UsageError, match='nothing in it was overwritten'):
        write_space(Bundle.open(bundle), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


def test_export_can_write_a_space(evaluated, bundle, tmp_path, monkeypatch):
    def copy_bundle(_run: object, folder: Path, *_: object) -> None:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)

    # Writing and verifying a bundle is slow, and tested in test_exporting.py.
    monkeypatch.setattr(exporting, 'write_files', copy_bundle)
    monkeypatch.setattr(exporting, 'verify_in_new_process', lambda _: None)
    options = ['--out', str(tmp_path / 'bundle'), '--space', str(tmp_path / 'space')]
    assert main(['export', str(evaluated.path), *options]) == 0
    assert (tmp_path / 'space/app.py').is_file()


def test_a_bundle_goes_to_the_hub_without_its_pickle(bundle, tmp_path, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip('huggingface_hub', reason='needs pip install "cxr_fastai[hub]"')
    requests = {}

    class Api:
        def create_repo(self, repo: str, **options: bool) -> None:
            requests.update(options, repo=repo)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list) -> None:
            assert delete_patterns == ['learner.pkl']
            shutil.copytree(folder_path, tmp_path / 'sent')

    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert main(['push-to-hub', str(bundle), 'me/model', '--private']) == 0
    assert requests == {'repo': 'me/model', 'private': True, 'exist_ok': True}
    assert 'https://huggingface.co/me/model' in capsys.readouterr().out
    verify(tmp_path / 'sent')
    assert not (tmp_path / 'sent/learner.pkl').exists()
    assert (tmp_path / 'sent/README.md').read_bytes() == (bundle / 'MODEL_CARD.md').read_bytes()
    monkeypatch.setattr(Api, 'create_repo', lambda *_, **__: 1 / 0)
    assert main(['push-to-hub', str(bundle), 'me/model']) == 1
    assert 'the Hub rejected the upload' in capsys.readouterr().err


def test_a_space_answers_with_a_map_without_the_packages_that_it_does_not_require(space, images):
    image = next((images / 'test/PNEUMONIA').iterdir())
    command = [sys.executable, '-c', EXPLAIN_CODE, str(image)]
    process = subprocess.run(command, cwd=space, capture_output=True, text=True)
    assert re.search(r'^(ok JPEG|rejected JPEG)', process.stdout, re.MULTILINE), process.stderr


@pytest.mark.slow
@pytest.mark.skipif(not GRADIO.exists(), reason='needs gradio next to the environment; run make test-all')
def test_the_page_of_a_space_starts_and_answers(space, images, tmp_path):
    image = shutil.copy(next((images / 'test/PNEUMONIA').iterdir()), tmp_path)
    text = tmp_path / 'text.png'
    text.write_text('no image')
    with socket.socket() as free_socket:
        free_socket.bind(('127.0.0.1', 0))
        port = free_socket.getsockname()[1]
    environment = os.environ | {
        'PYTHONPATH': f'{space}:{GRADIO}',
        'GRADIO_ANALYTICS_ENABLED': 'False',
        'HOME': str(tmp_path),
        'GRADIO_SERVER_PORT': str(port),
        'GRADIO_TEMP_DIR': str(tmp_path),
        'PYTHONUNBUFFERED': '1',
    }
    log = tmp_path / 'log'
    with open(log, 'w') as file:
        server = subprocess.Popen([sys.executable, 'app.py'], cwd=space, env=environment, stdout=file, stderr=file)
    try:
        command = [sys.executable, '-c', PREDICT_CODE, wait_for_address(server, log), str(image), str(text)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        server.kill()
        server.wait()
    answers = process.stdout.split('---')
    assert re.search(r'probability of pneumonia 0\.\d{3}|No probability', answers[0]), process.stderr
    assert 'No probability' in answers[1] and 'E_FORMAT' in answers[1]


def wait_for_address(server: subprocess.Popen, log: Path) -> str:
    """Return the address that the server prints when it is ready."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        address = re.search(r'http://[\w.:]+', log.read_text())
        if address:
            return address[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize(
    'setting', [{'HF_HUB_OFFLINE': '1'}, {'HF_ENDPOINT': 'http://127.0.0.1:9'}], ids=['offline', 'down']
)
def test_a_push_without_connection_says_so(bundle, setting):
    pytest.importorskip('huggingface_hub')
    command = [sys.executable, '-m', 'cxr_fastai', 'push-to-hub', str(bundle), 'me/x']
    pushed = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, timeout=120)
    assert pushed.returncode == 1
    assert 'error: me/x: the Hub cannot be reached' in pushed.stderr and 'rejected' not in pushed.stderr

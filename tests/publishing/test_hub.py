"""A Space holds all it needs and nothing that could run code by being opened, and its page answers."""

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
from cxr_fastai.publishing.hub import NEEDED, needed, write_space

GRADIO = Path(sys.prefix) / 'space'
"""Gradio wants an older Pillow than the tested one, so `make test-all` installs it beside."""
ASK = (
    'import sys; from gradio_client import Client, handle_file; client = Client(sys.argv[1], verbose=False); '
    'print(*(client.predict(handle_file(image), api_name="/judge")[0] for image in sys.argv[2:]), sep="\\n---\\n")'
)


@pytest.fixture(scope='module')
def space(bundle, tmp_path_factory) -> Path:
    return write_space(Bundle.open(bundle), tmp_path_factory.mktemp('space') / 'space')


def test_a_space_holds_page_card_bundle_and_package_but_no_pickle(space):
    assert {path.name for path in space.iterdir()} == {
        'app.py',
        'requirements.txt',
        'README.md',
        'bundle',
        'cxr_fastai',
    }
    assert not list(space.rglob('*.pkl')) and not list(space.rglob('__pycache__'))
    assert Bundle.open(space / 'bundle').read('model.onnx')


def test_its_front_matter_is_the_hubs_and_its_card_the_bundles(space):
    text = (space / 'README.md').read_text()
    front = re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)[1]
    assert 'sdk: gradio' in front and 'app_file: app.py' in front and re.search(r'sdk_version: \d+\.\d+\.\d+', front)
    assert text.count('\n---\n') == 1 and 'not a medical device' in text.lower()


def test_its_requirements_are_the_packages_own_without_fastai(space):
    lines = (space / 'requirements.txt').read_text().splitlines()
    assert lines[1:] == needed() and len(needed()) == len(NEEDED)
    assert not any('fastai' in line for line in lines)


def test_a_folder_with_something_in_it_is_left_alone(bundle, tmp_path):
    (tmp_path / 'mine').write_text('mine')
    with pytest.raises(UsageError, match='nothing in it was overwritten'):
        write_space(Bundle.open(bundle), tmp_path)


def test_export_writes_one(evaluated, tmp_path):
    assert (
        main(['export', str(evaluated.path), '--out', str(tmp_path / 'bundle'), '--space', str(tmp_path / 'space')])
        == 0
    )
    assert (tmp_path / 'space/app.py').is_file()


def test_what_a_space_needs_is_enough_to_answer_with_a_map(space, images):
    """In a process where everything else of the package's requirements cannot be imported."""
    image = next((images / 'test/PNEUMONIA').iterdir())
    banned = ('fastai', 'fastcore', 'pandas', 'sklearn', 'scipy', 'statsmodels', 'requests', 'gradio')
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            (
                f'import sys\nfor name in {banned}: sys.modules[name] = None\n'
                'from pathlib import Path\nfrom cxr_fastai.serving.service import Service\n'
                f'row = Service.open(Path("bundle")).explain(Path({str(image)!r}).read_bytes())\n'
                'print(row["status"], row["explanation"]["format"])'
            ),
        ],
        cwd=space,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1:] == ['JPEG'], done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not GRADIO.exists(), reason='gradio is not beside the environment: make test-all puts it there')
def test_its_page_starts_and_answers(space, images, tmp_path):
    image, text = next((images / 'test/PNEUMONIA').iterdir()), tmp_path / 'text.png'
    text.write_text('no image')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    there = os.environ | {
        'PYTHONPATH': f'{space}:{GRADIO}',
        'GRADIO_ANALYTICS_ENABLED': 'False',
        'HOME': str(tmp_path),
        'GRADIO_SERVER_PORT': str(port),
        'GRADIO_TEMP_DIR': str(tmp_path),
        'PYTHONUNBUFFERED': '1',
    }
    with open(tmp_path / 'log', 'w') as log:
        page = subprocess.Popen([sys.executable, 'app.py'], cwd=space, env=there, stdout=log, stderr=log)
    try:
        address = _address(page, tmp_path / 'log')
        asked = [address, str(shutil.copy(image, tmp_path)), str(text)]
        done = subprocess.run([sys.executable, '-c', ASK, *asked], env=there, capture_output=True, text=True)
    finally:
        page.kill()
        page.wait()
    first, second = done.stdout.split('\n---\n')
    assert re.search(r'probability of pneumonia 0\.\d{3}|No probability', first), done.stderr
    assert 'No probability' in second and 'E_FORMAT' in second


def _address(page: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + 120
    while not (told := re.search(r'http://[\w.:]+', log.read_text())):
        assert page.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return told[0]

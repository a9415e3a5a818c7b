"""The documented workflow with a real Orthanc: images that are stored there get their reports in the same study."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dicomstudies import save_radiographs

ORTHANC = shutil.which('Orthanc', path=os.pathsep.join([os.environ.get('PATH', ''), '/usr/sbin']))
STORESCU = shutil.which('storescu')
PAGE = Path(__file__).parents[2] / 'docs/radiology.md'
PATIENCE = 300
"""Seconds after which the test gives up waiting, on a busy machine."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ORTHANC and STORESCU), reason='needs Orthanc and storescu: install orthanc and dcmtk'),
]


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return the value of `condition` as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, 'the condition never became true'
        time.sleep(0.2)
    return value


def export_script(folder: Path) -> str:
    """The Lua script of the documentation, for this folder."""
    (script,) = re.findall(r'^```lua\n(.*?)^```', PAGE.read_text(), re.M | re.S)
    assert '/var/spool/cxr/in' in script
    return script.replace('/var/spool/cxr/in', str(folder))


class Orthanc:
    """An archive in a process of its own."""

    def __init__(self, folder: Path, incoming: Path) -> None:
        self.http, self.dicom = free_port(), free_port()
        (folder / 'export.lua').write_text(export_script(incoming))
        configuration = {
            'Name': 'test',
            'StorageDirectory': str(folder / 'storage'),
            'IndexDirectory': str(folder / 'storage'),
            'HttpPort': self.http,
            'DicomPort': self.dicom,
            'DicomAet': 'ORTHANC',
            'DicomCheckCalledAet': False,
            'DicomAlwaysAllowStore': True,
            'RemoteAccessAllowed': False,
            'AuthenticationEnabled': False,
            'LuaScripts': [str(folder / 'export.lua')],
            'Plugins': [],
        }
        (folder / 'orthanc.json').write_text(json.dumps(configuration))
        self.log = folder / 'orthanc.log'
        with self.log.open('wb') as log:
            self.process = subprocess.Popen([ORTHANC, folder / 'orthanc.json'], stdout=log, stderr=log, cwd=folder)

    def get(self, path: str) -> Any:
        """The JSON at an address of the REST API, or None while Orthanc is not ready."""
        try:
            with urllib.request.urlopen(f'http://127.0.0.1:{self.http}{path}', timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            assert self.process.poll() is None, self.log.read_text()
            return None

    def store(self, *paths: Path) -> None:
        """Send files by C-STORE."""
        address = ['127.0.0.1', str(self.dicom)]
        subprocess.run([STORESCU, '-aec', 'ORTHANC', *address, *map(str, paths)], check=True, timeout=PATIENCE)

    def modalities(self) -> dict[str, list[str]]:
        """The modalities of the series in each study, by StudyInstanceUID."""
        studies = {}
        for study in self.get('/studies?expand') or []:
            series = [self.get(f'/series/{identifier}') for identifier in study['Series']]
            modalities = sorted(entry['MainDicomTags']['Modality'] for entry in series)
            studies[study['MainDicomTags']['StudyInstanceUID']] = modalities
        return studies


@pytest.fixture
def incoming(tmp_path) -> Path:
    folder = tmp_path / 'in'
    folder.mkdir()
    return folder


@pytest.fixture
def orthanc(tmp_path, incoming) -> Iterator[Orthanc]:
    folder = tmp_path / 'orthanc'
    folder.mkdir()
    archive = Orthanc(folder, incoming)
    try:
        wait_until(lambda: archive.get('/system'))
        yield archive
    finally:
        archive.process.terminate()
        archive.process.wait(PATIENCE)


@pytest.fixture
def watching(tmp_path, incoming) -> Iterator[Path]:
    """The folder of the reports of a `predict --watch` in a process of its own, which is stopped by Ctrl-C."""
    reports = tmp_path / 'reports'
    words = ['predict', 'pretrained', '--watch', incoming, '--dicom-out', reports, '--out', tmp_path / 'p.csv']
    command = [sys.executable, '-m', 'cxr_fastai', *map(str, words), '--interval', '1', '--no-gate']
    path = os.pathsep.join(str(Path(entry or '.').resolve()) for entry in sys.path)
    with (tmp_path / 'watch.log').open('wb') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {'PYTHONPATH': path})
    try:
        yield reports
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, (tmp_path / 'watch.log').read_text()


def test_images_stored_in_orthanc_end_as_reports_in_the_same_study(orthanc, watching, images, tmp_path):
    pytest.importorskip('onnxruntime', reason='needs pip install "cxr_fastai[onnx]"')
    radiographs = save_radiographs(sorted((images / 'test').rglob('*.jpeg'))[:3], tmp_path / 'studies')
    orthanc.store(*radiographs)
    reports = wait_until(lambda: len(list(watching.glob('sr_*.dcm'))) == 3 and sorted(watching.glob('sr_*.dcm')))
    orthanc.store(*reports)
    studies = {f'1.2.4.{number}': ['DX', 'SR'] for number in (1, 2, 3)}
    wait_until(lambda: orthanc.modalities() == studies)
    orthanc.store(*reports)  # the same identifiers, so nothing new
    assert orthanc.modalities() == studies and orthanc.get('/statistics')['CountInstances'] == 6
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 1 + 3  # reports are not exported as images

"""Install the oldest permitted versions of the packages that read foreign files, and run the security tests with them.

    python tests/install/check_floors.py                   # `make test-floors`
    python tests/install/check_floors.py tests/security    # other tests

`settings.ini` names the oldest version of each package. They are installed into the environment `.venv/floors`, which
finds this package and all others in `.venv`. The exit code is that of pytest.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / '.venv' / 'floors'
PACKAGES = (
    'fastapi',
    'h11',
    'hypercorn',
    'jinja2',
    'markdown-it-py',
    'onnx',
    'onnxruntime',
    'pillow',
    'pydicom',
    'pyjpegls',
    'python-multipart',
    'requests',
    'safetensors',
    'starlette',
    'urllib3',
)
"""The packages that read what a stranger sends: images, model files, requests and answers."""
TESTS = ('tests/security', 'tests/fuzz', 'tests/images', 'tests/inference', 'tests/serving', 'tests/contracts')


def read_floors() -> list[str]:
    """Return a requirement `name==version` for each of `PACKAGES`, with the oldest version of `settings.ini`."""
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini')
    floors: dict[str, str] = {}
    for key, value in config['DEFAULT'].items():
        if key.endswith('requirements'):
            floors |= dict(re.findall(r'([a-z0-9-]+)>=([0-9.]+)', value))
    return [f'{name}=={floors[name]}' for name in PACKAGES]


def create_environment() -> Path:
    """Create the environment with the oldest versions and return its Python."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, '-m', 'venv', FOLDER], check=True)
    packages = next(FOLDER.glob('lib/python*/site-packages'))
    [tested] = (ROOT / '.venv').glob('lib/python*/site-packages')
    (packages / 'tested.pth').write_text(f'{tested}\n{ROOT}\n')
    python = FOLDER / 'bin' / 'python'
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps']
    subprocess.run([*pip, *read_floors()], check=True)
    return python


def main(tests: list[str]) -> int:
    """Run the `tests` (default: `TESTS`) with the oldest versions, and return the exit code of pytest."""
    python = create_environment()
    print('oldest versions:', *read_floors(), flush=True)
    variables = os.environ | {'PATH': f'{FOLDER / "bin"}:{os.environ["PATH"]}'}
    command = [python, '-m', 'pytest', '-n', 'logical', '--dist', 'worksteal', '-m', 'not slow']
    command += ['-W', 'ignore::DeprecationWarning']  # the oldest versions use names that newer packages deprecate
    return subprocess.run([*command, *(tests or TESTS)], cwd=ROOT, env=variables).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

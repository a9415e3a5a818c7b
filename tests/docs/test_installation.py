"""What README and quickstart say about the installation fits the requirements and the constraints."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / 'docs/quickstart.md').read_text()
PEOPLE_OF_THIS_PACKAGE = {'dev', 'docs'}
"""Extras that are not for users."""


def versions(file: str) -> dict[str, str]:
    """The versions in a file of constraints."""
    return dict(re.findall(r'^([\w.-]+)==(\S+)', (ROOT / file).read_text().lower().replace('_', '-'), re.M))


def test_each_extra_has_its_size_in_the_table():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    extras = {name.removesuffix('_requirements') for name in settings['DEFAULT'] if name.endswith('_requirements')}
    rows = dict(re.findall(r'^\| `([a-z]+)` \| .* \| ([\d,]+|not measured) \|$', QUICKSTART, re.M))
    assert rows.keys() == extras - PEOPLE_OF_THIS_PACKAGE


def test_the_builds_for_the_processor_have_the_tested_versions():
    builds = versions('constraints-cpu.txt')
    assert builds.keys() == {'torch', 'torchvision'}
    assert builds == {name: f'{versions("constraints.txt")[name]}+cpu' for name in builds}


def test_prediction_alone_needs_the_packages_of_the_container():
    (line,) = re.findall(r'pip install -c constraints\.txt (numpy .*)', QUICKSTART)
    container = re.search(r'constraints\.txt \\\n(.*?)\\\n', (ROOT / 'Dockerfile').read_text())[1]
    assert line.split() == container.split()
    assert set(line.split()) <= versions('constraints.txt').keys()


@pytest.mark.parametrize('page', ['README.md', 'docs/quickstart.md', 'docs/serving.md', 'docs/models.md'])
def test_commands_can_be_copied_into_a_shell(page):
    """A placeholder in angle brackets would be read as a redirection."""
    commands = re.findall(r'^    .*', (ROOT / page).read_text(), re.M)
    assert not [command for command in commands if re.search(r'<\w[^>]*>', command)]

"""Readers of foreign formats handle the inputs that once broke them, and a few damaged files of each format."""

import pytest
from fuzz.fuzz import FORMATS, found, load_format, run_examples

KEPT = [(name, path) for name in FORMATS for path in found(name)]


@pytest.mark.parametrize(('name', 'path'), KEPT, ids=[f'{name}-{path.name}' for name, path in KEPT])
def test_an_input_that_broke_a_reader_once_is_handled(name, path):
    load_format(name).check(path.read_bytes())


@pytest.mark.parametrize('name', FORMATS)
def test_damaged_files_are_refused_or_read(name):
    form = load_format(name)
    for data in form.seeds():
        form.check(data)
    run_examples(form, number=1, examples=20)

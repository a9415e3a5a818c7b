"""Files of others are read only if they are regular, of limited size, and strict JSON."""

import os
import socket

import pytest

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.foreign import LFS_POINTER, MAX_DEPTH, open_regular, parse_json, read_bytes, read_json, read_text


def test_a_regular_file_is_read(tmp_path):
    path = tmp_path / 'facts.json'
    path.write_text('\ufeff{"threshold": 0.5, "rule": "a [ b \\" {"}', encoding='utf-8')
    assert read_json(path) == {'threshold': 0.5, 'rule': 'a [ b " {'}
    assert read_text(path, 1000).startswith('{')


def test_pipes_devices_folders_and_missing_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to('/dev/zero')
    refusals = {
        'pipe': 'pipe: a pipe, not a file',
        'folder': 'folder: a folder, not a file',
        'link': 'link: a device, not a file',
        'missing': 'missing: no such file',
        'nu\0ll': 'cannot be read',
    }
    for name, message in refusals.items():
        with pytest.raises(UsageError, match=message):
            read_bytes(tmp_path / name, 10)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('socket')
        with pytest.raises(UsageError, match='socket: cannot be read'):
            read_bytes('socket', 10)


def test_a_large_file_is_refused(tmp_path):
    path = tmp_path / 'large'
    with open(path, 'wb') as file:
        file.truncate(2**40)  # a sparse file, which needs no disk
    with pytest.raises(CXRError, match='larger than 1,000 bytes'):
        read_bytes(path, 1000)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"a": NaN}', 'NaN is not a value of JSON'),
        ('[-Infinity]', '-Infinity is not a value'),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('1e999', 'too large'),
        ('1' * 5000, 'a number has 5000 digits'),
        ('[' * (MAX_DEPTH + 1) + ']' * (MAX_DEPTH + 1), 'nested deeper'),
        ('[' * 100_000, 'nested deeper'),
        ('"' + '\\"' * 1_000_000, 'Unterminated string'),
        (b'{"a": "\xff"}', 'not UTF-8 at byte 7'),
        ('', 'Expecting value'),
    ],
)
def test_what_other_readers_would_read_differently_is_refused(text, message):
    with pytest.raises(CXRError, match=f'^f.json: damaged .*{message}'):
        parse_json(text, 'f.json')


def test_the_largest_permitted_depth_is_read():
    value = parse_json('[' * MAX_DEPTH + ']' * MAX_DEPTH, 'f.json')
    for _ in range(MAX_DEPTH - 1):
        [value] = value
    assert value == []


def test_the_advice_and_the_class_of_the_error_can_be_chosen():
    with pytest.raises(UsageError, match='Write it again.'):
        parse_json('?', 'f.json', fix='Write it again.', error=UsageError)


@pytest.mark.parametrize(
    'read', [open_regular, read_json, lambda path: read_bytes(path, 10), lambda path: read_text(path, 10)]
)
def test_a_pointer_of_git_lfs_is_named_by_every_reader(tmp_path, read):
    path = tmp_path / 'model.onnx'
    path.write_bytes(LFS_POINTER + b'.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n')
    with pytest.raises(UsageError, match='model.onnx: a pointer of Git LFS, not the file itself. Run `git lfs pull`'):
        read(path)

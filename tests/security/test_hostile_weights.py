"""Hostile files of `--weights`: a state dict is read in a process with limits of time and memory."""

import os
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from bundlefiles import change_pickle, make_learner_pickle

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.models import weights
from cxr_fastai.models.weights import read_weights


def nested_key(depth: int) -> bytes:
    """A pickle of a dictionary whose key is a tuple of two tuples of two tuples and so on; its hash takes 2**depth."""
    steps = b''.join(b'h' + bytes([i]) + b'h' + bytes([i]) + b'\x86q' + bytes([i + 1]) for i in range(depth))
    return b'\x80\x02}X\x01\0\0\0l](' + b')q\0' + steps + b'es' + b'h' + bytes([depth]) + b'Ns.'


def test_a_file_that_would_take_for_ever_is_given_up(tmp_path, monkeypatch):
    endless = change_pickle(make_learner_pickle({'a': torch.zeros(1)}), lambda _: nested_key(64))
    (tmp_path / 'w.pth').write_bytes(endless)
    monkeypatch.setattr(weights, 'MAX_SECONDS', 6)
    with pytest.raises(CXRError, match=r'w.pth: it took longer than 6 s'):
        read_weights(f'file:{tmp_path / "w.pth"}', 'w.pth')


def test_a_file_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, monkeypatch):
    small = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(make_learner_pickle({'a': torch.zeros(2**28)}))) as old,
        zipfile.ZipFile(small, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / 'w.pth').write_bytes(small.getvalue())
    monkeypatch.setattr(weights, 'MEMORY', 2**30)
    with pytest.raises(CXRError, match='w.pth: (it needs too much memory|not a state dict|its process ended|.*memory)'):
        read_weights(f'file:{tmp_path / "w.pth"}', 'w.pth')


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'w.pth')
    for path in (tmp_path / 'w.pth', Path('/dev/zero'), tmp_path):
        with pytest.raises(UsageError, match='not a file. Name a regular file'):
            read_weights(f'file:{path}', 'w.pth')


def test_names_keep_their_order_and_tensors_may_share_memory(tmp_path):
    shared = torch.arange(4.0)
    state = {'z': shared, 'a': shared, 'm': torch.zeros(2, 3).t()}
    torch.save(state, tmp_path / 'w.pth')
    loaded = read_weights(f'file:{tmp_path / "w.pth"}', 'w.pth')
    assert list(loaded) == ['z', 'a', 'm']
    assert all(torch.equal(loaded[name], state[name]) for name in state)

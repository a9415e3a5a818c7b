"""The app starts at once, loads its model in the background, and loads no more than it needs."""

import json
import os
import subprocess
import sys
import threading

import pytest
from imagefiles import GREY, encoded
from services import ADDRESS, files, read_metrics, wait_until
from starlette.testclient import TestClient

from cxr_fastai.core.errors import UsageError
from cxr_fastai.serving.app import Settings, make_app
from cxr_fastai.serving.service import Service


def test_the_app_is_healthy_at_once_and_ready_when_the_model_is_loaded(bundle, monkeypatch):
    may_load = threading.Event()
    open_service = Service.open

    def open_late(*args, **options):
        assert may_load.wait(60)
        return open_service(*args, **options)

    monkeypatch.setattr(Service, 'open', open_late)
    with TestClient(make_app(Settings(bundle)), ADDRESS) as client:
        assert client.get('/health').json() == {'status': 'ok'}
        for path in ('/ready', '/v1/model'):
            response = client.get(path)
            assert response.status_code == 503 and response.json()['code'] == 'E_STARTING'
            assert response.headers['retry-after'] == '1'
        assert client.post('/v1/predict', files=files(encoded(GREY))).status_code == 503
        assert read_metrics(client)['cxr_ready'] == 0
        may_load.set()
        wait_until(lambda: client.get('/ready').status_code == 200)
        assert read_metrics(client)['cxr_ready'] == 1


def test_a_failure_to_load_the_model_is_reported_and_the_app_is_never_ready(bundle, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('unexpected')

    monkeypatch.setattr(Service, 'open', fail)
    failures = []
    with TestClient(make_app(Settings(bundle), failures.append), ADDRESS) as client:
        wait_until(lambda: failures)
        assert type(failures[0]) is RuntimeError and client.get('/ready').status_code == 503


@pytest.mark.parametrize('name', ['*example.org', 'a.*.org', '**'])
def test_a_wildcard_in_the_middle_of_a_host_name_is_an_error(bundle, name):
    with pytest.raises(UsageError, match='--allow-host .*: not a host name'):
        Settings(bundle, hosts=(name,))


LIST_MODULES = """
import json, sys, time
from pathlib import Path
from starlette.testclient import TestClient
from cxr_fastai.serving.app import Settings, make_app
with TestClient(make_app(Settings(Path(sys.argv[1]))), 'http://127.0.0.1') as client:
    while client.get('/ready').status_code != 200: time.sleep(0.01)
    image = [('images', ('a', Path(sys.argv[2]).read_bytes()))]
    assert client.post('/v1/predict', files=image).status_code == 200
    print(json.dumps([name for name in sys.argv[3:] if name in sys.modules]))
"""


def test_predictions_load_no_fastai_pickles_pandas_typer_or_torch(bundle, paths):
    names = ['fastai', 'cxr_fastai.inference.pickles', 'cxr_fastai.training.learner', 'pandas', 'typer', 'torch']
    command = [sys.executable, '-W', 'ignore', '-c', LIST_MODULES, str(bundle), str(paths[0]), *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    assert json.loads(done.stdout) == []

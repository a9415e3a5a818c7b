"""A server on this machine that imitates the few endpoints of the Hugging Face Hub that a download uses."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_the_token_of_a_test'
"""The token that a private repository asks for."""


class Repository:
    """A model repository: its commits, each with the bytes of its files, and the commit of each branch."""

    def __init__(self, private: bool = False, gated: bool = False) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.private = private
        self.gated = gated

    def commit(self, files: dict[str, bytes], branch: str = 'main') -> str:
        """Add a commit with `files` to `branch` and return its hash."""
        commit = hashlib.sha1(f'{len(self.commits)}'.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class Hub(ThreadingHTTPServer):
    """The repositories by name, and the path of every request; `failure` is a status that every answer has then."""

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failure: int | None = None
        self.stated_sizes: dict[str, int] = {}

    @property
    def downloaded(self) -> set[str]:
        """The names of the files that were downloaded."""
        return {path.rsplit('/', 1)[-1] for path in self.requests if path.startswith('GET') and '/resolve/' in path}


class Handler(BaseHTTPRequestHandler):
    """Answers `/api/models/USER/NAME/revision/REVISION` and `/USER/NAME/resolve/REVISION/FILE`."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f'{self.command} {unquote(path)}')
        words = [unquote(word) for word in path.strip('/').split('/')]
        is_api = words[:2] == ['api', 'models']
        if len(words) < 4:
            return self._fail(404, '')  # something else of the Hub, such as its telemetry
        user, name, _, revision, *rest = words[2:] if is_api else words
        repository = self.server.repositories.get(f'{user}/{name}')
        if self.server.failure:
            return self._fail(self.server.failure, '')
        if repository is None:
            return self._fail(401, 'RepoNotFound')
        if repository.gated:
            return self._fail(403, 'GatedRepo')
        if repository.private and self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self._fail(401, 'RepoNotFound')
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._fail(404, 'RevisionNotFound')
        files = repository.commits[commit]
        if is_api:
            return self._describe(f'{user}/{name}', commit, files)
        if '/'.join(rest) not in files:
            return self._fail(404, 'EntryNotFound')
        return self._send(commit, files['/'.join(rest)])

    def _describe(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        sizes = {file: len(data) for file, data in files.items()} | self.server.stated_sizes
        siblings = [{'rfilename': file, 'size': sizes[file], 'blobId': 'x'} for file in files]
        facts = {'_id': '1', 'id': name, 'modelId': name, 'sha': commit, 'private': False, 'tags': []}
        data = json.dumps(facts | {'downloads': 0, 'siblings': siblings}).encode()
        self._answer(200, data, {'Content-Type': 'application/json'})

    def _send(self, commit: str, data: bytes) -> None:
        self._answer(200, data, {'X-Repo-Commit': commit, 'ETag': f'"{hashlib.sha1(data).hexdigest()}"'})

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b'', {'X-Error-Code': code})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {'Content-Length': str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server that runs within this context."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def stop(hub: Hub) -> None:
    """Stop to answer, as without a network: connections are refused."""
    hub.shutdown()
    hub.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

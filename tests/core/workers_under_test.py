"""Functions that the processes of `test_workers.py` run."""

import os
import time

from cxr_fastai.core.workers import serve


def answer():
    """Serve requests whose first part names what to do."""
    serve(lambda parts: ACTIONS[parts[0].decode()](*parts[1:]))


def _fail(*parts):
    raise ValueError('first line\nsecond line')


def _print(*parts):
    print('noise')
    os.write(1, b'noise')
    return [b'quiet']


ACTIONS = {
    'echo': lambda *parts: list(parts),
    'fail': _fail,
    'print': _print,
    'sleep': lambda: time.sleep(60),
    'exit': lambda: os._exit(7),
    'allocate': lambda size: [bytes(int(size))[:3]],
}

"""The JSON files of a bundle, the recipe and the decision of a run, and the store of trusted hashes."""

import hashlib
import json
import os
import random
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.run import Run
from cxr_fastai.inference.bundle import CONFIG, MANIFEST, Bundle, manifest_text
from cxr_fastai.inference.config import ModelConfig, config_text
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.pickles import trusted
from cxr_fastai.models.architectures import make_recipe

DEADLINE = 5
VALUES: tuple[Any, ...] = (0, -1, 2, 10**400, 0.5, 1e300, True, None, '', 'x' * 1000, '\x1b[2J', '\ud800', [], {}, [[]])
"""What a field is replaced by."""


@cache
def folder() -> Path:
    """Return the folder in which the checked files are, one for the process."""
    return Path(tempfile.mkdtemp())


def seeds() -> list[bytes]:
    """Return a valid file of each kind."""
    config = config_text(ModelConfig('baseline', 64, 0.5, temperature=1.5))
    entry = {'sha256': hashlib.sha256(config.encode()).hexdigest(), 'size': len(config)}
    return [
        config.encode(),
        manifest_text({CONFIG: entry}).encode(),
        json.dumps(asdict(make_recipe('baseline'))).encode(),
        json.dumps(asdict(Decision(0.5, 'fixed:0.5', 1.5, 'a' * 64, '', {'images': 5}))).encode(),
        json.dumps({'a' * 64: {'since': '2026-01-01', 'why': 'test'}}).encode(),
    ]


def check(data: bytes) -> None:
    """Read `data` as each of the files; an error of one line is expected."""
    bundle, run, store = folder() / 'bundle', folder() / 'run', folder() / 'trust.json'
    bundle.mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    os.environ['CXR_TRUST'] = str(store)
    entry = {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)}
    for path in (bundle / CONFIG, run / 'recipe.json', run / 'decision.json', store):
        path.write_bytes(data)
    (bundle / MANIFEST).write_text(manifest_text({CONFIG: entry}))
    readers = [
        lambda: Bundle.open(bundle).config,
        lambda: (bundle / MANIFEST).write_bytes(data) and Bundle.open(bundle).manifest,
        lambda: Run.open(run).recipe,
        lambda: Decision.from_run(Run(run), 'a' * 64),
        trusted,
    ]
    for read in readers:
        try:
            read()
        except CXRError as error:
            assert '\n' not in str(error)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Replace or remove a field, or a field of a field."""
    try:
        facts = json.loads(data)
    except ValueError:
        return data
    target = facts
    while isinstance(target, dict) and target:
        name = draw.choice(sorted(target))
        if isinstance(target[name], dict) and target[name] and draw.random() < 0.7:
            target = target[name]
            continue
        if draw.random() < 0.2:
            del target[name]
        else:
            target[name] = draw.choice(VALUES)
        break
    return json.dumps(facts).encode()

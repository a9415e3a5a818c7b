"""A bundle goes to the Hugging Face Hub, with its card as the page that people see first."""
from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_fastai.core.files import CXRError, first_line
from cxr_fastai.inference.bundle import CARD, MANIFEST, Bundle, manifest_text
from cxr_fastai.inference.config import LEARNER
from cxr_fastai.models.weights import need


def push(path: Path, repo: str, private: bool = False, with_pickle: bool = False) -> str:
    """Upload the files of the bundle `path`, each checked, to the repository `repo` (`user/name`), which is made if it
    is not there; returns its address. The learner, which could run code, goes only `with_pickle`.

    Raises `CXRError` where the bundle is damaged, or the Hub refuses.
    """
    need('huggingface_hub', 'push-to-hub', 'hub')
    from huggingface_hub import HfApi
    bundle = Bundle.open(path)
    with TemporaryDirectory() as made:
        fill(Path(made), bundle, with_pickle)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=made, commit_message='Bundle of cxr_fastai',
                              delete_patterns=None if with_pickle else [LEARNER])
        except Exception as error:  # what carries its requests has errors of its own
            raise CXRError(f'{repo}: the Hub refused ({first_line(error, 200)}): log in by `hf auth login`, and name a '
                           'repository of yours as user/name.') from None
    return f'https://huggingface.co/{repo}'


def fill(folder: Path, bundle: Bundle, with_pickle: bool = False) -> None:
    """Put into `folder` what goes to the Hub: the bundle, with its card as README.md."""
    files = {name: facts for name, facts in bundle.manifest.items() if with_pickle or name != LEARNER}
    for name in files: (folder/name).write_bytes(bundle.read(name))
    (folder/MANIFEST).write_text(manifest_text(files), encoding='utf-8')
    (folder/'README.md').write_bytes(bundle.read(CARD))

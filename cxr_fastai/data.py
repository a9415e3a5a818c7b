"""Items become fastai `DataLoaders`: one channel read and augmented, three channels normalised."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, ColSplitter, IntToFloatTensor
from fastai.torch_core import TensorImage, TensorImageBW
from fasttransform import DisplayedTransform, Transform
from torch import Tensor

from cxr_fastai.cache import FilmCache
from cxr_fastai.core import VOCAB, FilmError, Recipe, in_threads
from cxr_fastai.images import Preprocessing, read_film
from cxr_fastai.models import denormalize, normalize


class OpenFilm(Transform):
    """A path, or a grey uint8 array (h, w), to a grey uint8 tensor (1, size, size), as `source` loads or fits it."""

    def __init__(self, source: Preprocessing | FilmCache):
        super().__init__()
        self.source, self.input_types = source, (str, Path, np.ndarray)  # what `dls.test_dl` accepts

    def encodes(self, film: str | Path | np.ndarray):
        grey = (self.source.fit if isinstance(film, np.ndarray) else self.source.load)(film)
        return TensorImageBW(torch.from_numpy(grey.copy())[None])


class NormalizeFilm(DisplayedTransform):
    """Grey films (n, 1, h, w) in [0, 1] to ImageNet-normalised (n, 3, h, w); the last step before the network."""
    order = 99

    def encodes(self, x: TensorImageBW): return TensorImage(normalize(x.as_subclass(Tensor)))
    def decodes(self, x: TensorImage): return TensorImage(denormalize(x.as_subclass(Tensor)))


class AugmentFilms(DisplayedTransform):
    """The specification's augmentation, drawn anew for each film of a training batch (n, 1, h, w) in [0, 1].

    As torchvision's RandomHorizontalFlip, RandomRotation, ColorJitter (brightness and contrast, in random order) and
    RandomAffine (translation in whole pixels), with flip, rotation and translation in one interpolation; like theirs,
    the nearest neighbour by default. (Bilinear smooths the training films and no others, and on the real data
    sharpness gives the label away.) Draws come from torch's global generator. The frame is filled with black after
    the change of brightness and contrast.
    """
    order, split_idx = 20, 0

    def __init__(self, flip: float = 0.5, degrees: float = 10.0, translate: float = 0.1, brightness: float = 0.2,
                 contrast: float = 0.2, interpolation: str = 'nearest'):
        super().__init__()
        self.flip, self.degrees, self.translate = flip, degrees, translate
        self.brightness, self.contrast, self.interpolation = brightness, contrast, interpolation

    def draw(self, n: int, h: int, w: int) -> dict[str, Tensor]:
        """Parameters for `n` films: `flip` and `brighter_first` bool, `angle` in degrees, `shift` (n, 2) in pixels
        right and down, `brightness` and `contrast` factors."""
        between = lambda reach: (2*torch.rand(n) - 1)*reach
        shift = torch.stack([between(self.translate*w), between(self.translate*h)], dim=1).round()
        return {'flip': torch.rand(n) < self.flip, 'angle': between(self.degrees), 'shift': shift,
                'brightness': 1 + between(self.brightness), 'contrast': 1 + between(self.contrast),
                'brighter_first': torch.rand(n) < 0.5}

    def encodes(self, x: TensorImageBW):
        p = {name: value.to(x.device) for name, value in self.draw(len(x), *x.shape[-2:]).items()}
        films = jitter(x.as_subclass(Tensor), p['brightness'], p['contrast'], p['brighter_first'])
        return TensorImageBW(warp(films, p['flip'], p['angle'], p['shift'], self.interpolation))


def jitter(films: Tensor, brightness: Tensor, contrast: Tensor, brighter_first: Tensor) -> Tensor:
    """Multiply each film (n, 1, h, w) in [0, 1] by its `brightness` (n,), and spread it by its `contrast` (n,) about
    its mean, in the order that `brighter_first` (n,) says; clamped after each, as torchvision's ColorJitter does."""
    per_film = lambda factor: factor.view(-1, 1, 1, 1)
    one = torch.ones_like(brightness)
    films = (films*per_film(torch.where(brighter_first, brightness, one))).clamp_(0, 1)
    mean, contrast = films.mean(dim=(1, 2, 3), keepdim=True), per_film(contrast)
    films = (contrast*films + (1 - contrast)*mean).clamp_(0, 1)
    return films.mul_(per_film(torch.where(brighter_first, one, brightness))).clamp_(0, 1)


def warp(films: Tensor, flip: Tensor, angle: Tensor, shift: Tensor, interpolation: str = 'nearest') -> Tensor:
    """Mirror, then rotate counter-clockwise about the centre by `angle` (n,) degrees, then shift by (n, 2) pixels right
    and down: (n, 1, h, w) to the same, in one `interpolation` (`nearest` or `bilinear`), with black outside."""
    h, w = films.shape[-2:]
    turn = torch.deg2rad(angle)
    cos, sin, (dx, dy) = torch.cos(turn), torch.sin(turn), shift.unbind(1)
    mirror = 1 - 2*flip.to(films.dtype)
    # Where an output pixel comes from, in pixels about the centre: mirror(rotate back(p - shift)).
    inverse = torch.stack([mirror*cos, -mirror*sin, mirror*(dy*sin - dx*cos), sin, cos, -dx*sin - dy*cos], dim=1)
    # grid_sample counts in half sides. (torch's affine_grid takes ten times as long for the same grid.)
    rows = inverse.view(-1, 2, 3, 1, 1)*films.new_tensor([2/w, 2/h]).view(2, 1, 1, 1)
    x, y = (torch.arange(side, device=films.device) - (side - 1)/2 for side in (w, h))
    grid = films.new_empty(len(films), h, w, 2)
    for i in range(2):
        right, down, start = rows[:, i].unbind(1)  # each (n, 1, 1)
        torch.add(right*x, down*y[:, None] + start, out=grid[..., i])
    return F.grid_sample(films, grid, mode=interpolation, padding_mode='zeros', align_corners=False)


def film_block(recipe: Recipe, cache: FilmCache | None = None) -> DataBlock:
    """The `DataBlock` of `recipe`, for a table with the columns `path` (complete), `label` and `split`. Films that
    `cache` holds are not decoded again; the batches are the same without it."""
    augment = AugmentFilms(recipe.flip, recipe.degrees, recipe.translate, recipe.brightness, recipe.contrast,
                           recipe.interpolation)
    opened = OpenFilm(cache or Preprocessing.of(recipe))
    films = TransformBlock(type_tfms=opened, batch_tfms=[IntToFloatTensor, NormalizeFilm])
    return DataBlock(blocks=(films, CategoryBlock(vocab=list(VOCAB), sort=False)), get_x=ColReader('path'),
                     get_y=ColReader('label'), splitter=ColSplitter('split', on='valid'), batch_tfms=augment)


def make_dls(items: pd.DataFrame, root: Path, recipe: Recipe, cache: FilmCache | None = None) -> DataLoaders:
    """`DataLoaders` of the items' train and valid films below `root`, with the loader's settings of `recipe`.

    Where that leaves the workers open, there is one a core, and none where `cache` holds every film.

    Batches are images (n, 3, size, size) and categories (n,). The last, smaller batch of train is used too.
    """
    # Filtered first: to fastai's splitter whatever is not valid is train, test films included.
    source = locate(items[items.split.isin(['train', 'valid'])], root)
    workers = recipe.workers
    if workers is None: workers = 0 if cache and all(path in cache for path in source.path) else os.cpu_count()
    return film_block(recipe, cache).dataloaders(source, bs=recipe.batch_size, num_workers=workers, drop_last=False,
                                                 pin_memory=torch.cuda.is_available())


def check_readable(paths: Sequence[Path]) -> None:
    """Read each film once, on all cores, so that a bad one is known before hours of training.

    Raises `FilmError` that names the first bad films and counts all.
    """
    def complaint(path: Path) -> FilmError | None:
        try: read_film(path)
        except FilmError as error: return error
        return None
    bad = [error for error in in_threads(complaint, paths) if error]
    if not bad: return
    more = f'; and {len(bad) - 3} more' if len(bad) > 3 else ''
    raise FilmError(f'{"; ".join(map(str, bad[:3]))}{more}. Remove or mend what cannot be read.', bad[0].code)


def locate(items: pd.DataFrame, root: Path) -> pd.DataFrame:
    """`items` with complete paths, as `dls.test_dl` and the `DataBlock` take them."""
    return items.assign(path=[str(root/path) for path in items.path]).reset_index(drop=True)

"""fastai `DataLoaders` of chest X-ray images: `CXRDataLoaders`, and the `DataBlock` that it is made from."""

from __future__ import annotations

import ctypes
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any, Self

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import pandas as pd
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, ColSplitter, IntToFloatTensor, Normalize
from fastai.vision.augment import CropPad, RandomCrop, RandomErasing, RandomResizedCrop, RatioResize, Resize
from fastcore.basics import listify
from fasttransform import Transform

from cxr_fastai.core.errors import CXRWarning, ImageError, UsageError, first_line
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.foreign import read_text
from cxr_fastai.core.hardware import available_cores
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import DATA_FIELDS, VOCAB, Recipe, data_recipe
from cxr_fastai.data.items import image_root, read_recipe_items, read_table, split_items
from cxr_fastai.data.listings import MAX_LISTING
from cxr_fastai.data.matching import MatchDetails, MatchHistograms
from cxr_fastai.data.splits import check_leakage, check_trainable, single_class_warning
from cxr_fastai.data.surroundings import ExchangeSurroundings, HideLungs
from cxr_fastai.data.transforms import AugmentImages, DegradeImages, NormalizeImage, OpenImage
from cxr_fastai.images.cache import ImageCache, find_cache
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.devices import choose_device

MAX_ERRORS_LISTED = 3
"""Largest number of unreadable images that a message names."""
PR_SET_PDEATHSIG = 1
"""The option of Linux's `prctl` that sends a process a signal when its parent ends."""
RESIZING = (CropPad, RandomCrop, RandomResizedCrop, RatioResize, Resize)
"""Item transforms of fastai that resize pictures of Pillow. They would leave the tensors of this pipeline unchanged."""


class CXRDataLoaders(DataLoaders):
    """fastai `DataLoaders` of chest X-ray images, with validation images of other patients than the training images.

    A batch consists of normalised images (n, 3, size, size) and categories (n,). Training images are augmented as
    `recipe` says. Test images are in no loader; `test_dl` makes a loader for any images: paths, images of Pillow, or
    grey uint8 arrays (h, w).

    Attributes:
        item_table: the items table of all splits, as `read_items` returns it.
        root: the folder that the paths in `item_table` are relative to.
        source: the folder or CSV file of the images, or None if they come from a table.
        recipe: a `Recipe` whose fields about images and augmentation describe the loaders.
    """

    item_table: pd.DataFrame
    root: Path
    source: Path | None
    recipe: Recipe
    has_own_tfms: bool = False

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        valid: str = Recipe.valid,
        valid_pct: float = 0.1,
        seed: int = 42,
        size: int = 224,
        bs: int = 32,
        recipe: str = 'reference',
        item_tfms: Any = None,
        batch_tfms: Any = None,
        num_workers: int | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Return loaders of the images in the folders `train|val|test / NORMAL|PNEUMONIA` below `path`.

        Args:
            valid: `patients` takes the proportion `valid_pct` of the patients of train and val, drawn with `seed`, for
                validation. `official` takes the folder `val`.
            size: side of the images in pixels.
            bs: number of images in a batch.
            recipe: name of the recipe whose augmentation is used. (`from_items` takes a `Recipe`.)
            item_tfms, batch_tfms: transforms of the `DataBlock`. `batch_tfms` replace the augmentation of the recipe.
            num_workers: worker processes; by default one per core, or none if every image is cached.
            device: device of the batches: `cpu`, `cuda`, `cuda:N` or `mps`; by default the GPU if there is one.
            kwargs: fields of `Recipe`, such as `limit`, `low_pass` or `crop`, and arguments of `DataBlock.dataloaders`,
                such as `val_bs` or `drop_last`.

        Raises `CXRError` if there are no images, if a class has too few, or if a patient is in two splits.
        """
        chosen = {'valid': valid, 'valid_pct': valid_pct, 'seed': seed, 'size': size}
        settings = _pop_settings(kwargs, recipe, **chosen, batch_size=bs, workers=num_workers)
        items = read_recipe_items(Path(path), settings)
        dls = cls._from_checked(items, image_root(Path(path)), settings, item_tfms, batch_tfms, device, kwargs)
        dls.source = Path(path)
        return dls

    @classmethod
    def from_csv(cls, path: str | Path, csv_fname: str = '', **kwargs: Any) -> Self:
        """Return loaders of the images in a CSV file: `path`, or `csv_fname` in the folder `path`.

        The columns are `path`, relative to the folder of the file, `label`, and optionally `split` and `patient`.
        `kwargs` are those of `from_folder`; with `fn_col`, `label_col` or `valid_col`, those of `from_df`.
        """
        csv = Path(path, csv_fname)
        if kwargs.keys() & {'fn_col', 'label_col', 'valid_col'}:
            return cls.from_df(_read_any_csv(csv), csv.parent, **kwargs)
        return cls.from_folder(csv, **kwargs)

    @classmethod
    def from_df(
        cls,
        df: pd.DataFrame,
        path: str | Path = '.',
        fn_col: str = 'path',
        label_col: str = 'label',
        valid_col: str | None = None,
        valid: str = Recipe.valid,
        valid_pct: float = 0.1,
        seed: int = 42,
        size: int = 224,
        bs: int = 32,
        recipe: str = 'reference',
        item_tfms: Any = None,
        batch_tfms: Any = None,
        num_workers: int | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Return loaders of the images in the rows of `df`, with paths in `fn_col` relative to the folder `path`.

        `label_col` has the classes. `valid_col` is true for the validation images; without it the split is the column
        `split` with `valid='official'`, else it is drawn by patient. The column `patient` is used if there is one. The
        other parameters are those of `from_folder`.
        """
        table = df.rename(columns={fn_col: 'path', label_col: 'label'})
        if valid_col is not None:
            table = table.assign(split=['valid' if is_valid else 'train' for is_valid in df[valid_col]])
            valid = 'official'
        chosen = {'valid': valid, 'valid_pct': valid_pct, 'seed': seed, 'size': size}
        settings = _pop_settings(kwargs, recipe, **chosen, batch_size=bs, workers=num_workers)
        items = split_items(read_table(table, Path(path)), Path(path), settings)
        return cls._from_checked(items, Path(path), settings, item_tfms, batch_tfms, device, kwargs)

    @classmethod
    def _from_checked(
        cls,
        items: pd.DataFrame,
        root: Path,
        recipe: Recipe,
        item_tfms: Any,
        batch_tfms: Any,
        device: Any,
        kwargs: dict[str, Any],
    ) -> Self:
        check_trainable(items, recipe.valid)
        if not recipe.allow_leakage:
            check_leakage(items)
        warning = single_class_warning(items) if recipe.valid != 'none' else None
        if warning:
            warnings.warn(warning, CXRWarning, stacklevel=3)
        cache = find_cache(root, Preprocessing.of(recipe))
        return cls.from_items(items, root, recipe, cache, item_tfms, batch_tfms, device=device, **kwargs)

    @classmethod
    def from_items(
        cls,
        items: pd.DataFrame,
        root: StrPath,
        recipe: Recipe,
        cache: ImageCache | None = None,
        item_tfms: Any = None,
        batch_tfms: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Return loaders of the train and valid images of the items table `items`, with paths relative to `root`.

        The last, smaller batch of train is kept. If `recipe` does not set the number of workers, it is the number of
        cores, or 0 if `cache` contains every image. The other parameters are those of `from_folder`.
        """
        root = Path(root)
        _check_arguments(kwargs)
        source = locate(items, root)
        workers = recipe.workers
        if workers is None:
            loaded = source.path[source.split.isin(['train', 'valid'])]
            all_cached = cache is not None and all(path in cache for path in loaded)
            workers = 0 if all_cached else available_cores()
        if device is not None:
            device = choose_device(device)
        options = {'drop_last': False, 'pin_memory': torch.cuda.is_available(), 'wif': follow_parent} | kwargs
        block = cxr_block(recipe, cache, item_tfms, batch_tfms)
        loaders = block.dataloaders(source, bs=recipe.batch_size, num_workers=workers, device=device, **options)
        dls = cls(*loaders.loaders, path=Path('.'), device=loaders.device)
        dls.item_table = items
        dls.root = root
        dls.source = None
        dls.recipe = recipe
        dls.has_own_tfms = item_tfms is not None or batch_tfms is not None
        return dls


def _read_any_csv(path: Path) -> pd.DataFrame:
    """Return the table in a CSV file with any columns. Raises `UsageError` if the file is not a table."""
    try:
        return pd.read_csv(StringIO(read_text(path, MAX_LISTING)))
    except ValueError as error:
        raise UsageError(f'{path}: not a CSV file ({first_line(error)}).') from None


def _check_arguments(names: Iterable[str]) -> None:
    """Raise `UsageError` for a name that is no argument of fastai's loaders, which would ignore it."""
    functions = (Datasets.dataloaders, TfmdDL.__init__, DataLoader.__init__)
    known = {name for function in functions for name in signature(function).parameters}
    for name in names:
        if name in Recipe.__dataclass_fields__:
            raise UsageError(
                f'{name}: not about the images. bs is the size of a batch, num_workers the number of processes; the '
                'optimisation is set by fit_recipe, and by callbacks of fastai.'
            )
        if name not in known:
            similar = get_close_matches(name, sorted({*known, *Recipe.__dataclass_fields__}))
            advice = f'Did you mean {" or ".join(similar)}?' if similar else 'CXRDataLoaders.from_folder lists them.'
            raise UsageError(f'{name}: not an argument of CXRDataLoaders or a field of Recipe. {advice}')


def _pop_settings(kwargs: dict[str, Any], recipe: str, **chosen: Any) -> Recipe:
    """Return `recipe` with the `chosen` fields, and with those about images that are taken out of `kwargs`."""
    names = [name for name in kwargs if name in DATA_FIELDS and name not in ('batch_size', 'workers')]
    return data_recipe(recipe, **{name: kwargs.pop(name) for name in names}, **chosen)


def cxr_block(
    recipe: str | Recipe = 'reference',
    cache: ImageCache | None = None,
    item_tfms: Any = None,
    batch_tfms: Any = None,
    **fields: Any,
) -> DataBlock:
    """Return the `DataBlock` of `recipe`, a recipe or the name of one, with other `fields` such as `size` and `valid`.

    Its source is a folder, a CSV file, or an items table with the complete path of each image, as `locate` returns it.
    Images in `cache` are not decoded again; the batches are the same with and without it. `item_tfms` get grey images
    as uint8 tensors (1, size, size). `batch_tfms` replace the augmentation of the recipe; they get images
    (n, 1, size, size) in [0, 1]. Raises `UsageError` for transforms that resize or normalise, which the block does.
    """
    recipe = data_recipe(recipe, **fields)
    _check_transforms(item_tfms, batch_tfms)
    open_image = OpenImage(cache or Preprocessing.of(recipe), skip=recipe.on_bad_image == 'skip')
    images = TransformBlock(type_tfms=open_image, batch_tfms=[IntToFloatTensor, NormalizeImage])
    return DataBlock(
        blocks=(images, CategoryBlock(vocab=list(VOCAB), sort=False)),
        get_items=ItemReader(recipe),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=ColSplitter('split', on='valid'),
        item_tfms=item_tfms,
        batch_tfms=augmentations(recipe) if batch_tfms is None else batch_tfms,
    )


def augmentations(recipe: Recipe) -> list[Transform]:
    """Return the batch transforms of training images for `recipe`."""
    # The transforms hold numbers and not the recipe: they are exported with a learner, and a recipe can name a folder.
    transforms: list[Transform] = []
    if recipe.match_histogram:
        transforms.append(MatchHistograms(recipe.match_histogram))
    if recipe.match_detail:
        transforms.append(MatchDetails(recipe.match_detail))
    if recipe.exchange:
        transforms.append(ExchangeSurroundings(recipe.exchange))
    if recipe.hide_lungs:
        transforms.append(HideLungs(recipe.hide_lungs))
    transforms.append(
        AugmentImages(
            flip=recipe.flip,
            degrees=recipe.degrees,
            translate=recipe.translate,
            brightness=recipe.brightness,
            contrast=recipe.contrast,
            gamma=recipe.gamma,
            interpolation=recipe.interpolation,
            crop=recipe.crop,
            crop_aspect=recipe.crop_aspect,
        )
    )
    if recipe.resolution < 1 or recipe.blur or recipe.jpeg:
        transforms.append(DegradeImages(resolution=recipe.resolution, blur=recipe.blur, jpeg=recipe.jpeg))
    if recipe.erase:
        transforms.append(RandomErasing(p=recipe.erase))
    return transforms


def _check_transforms(item_tfms: Any, batch_tfms: Any) -> None:
    for transform in listify(item_tfms):
        if isinstance(transform, RESIZING):
            raise UsageError(
                f'item_tfms {type(transform).__name__}: images are resized when they are opened. Pass size=224 and '
                'resize="squish", "pad" or "crop" instead; the field crop of the recipe crops at random.'
            )
    for transform in listify(batch_tfms):
        if isinstance(transform, Normalize):
            raise UsageError('batch_tfms Normalize: images are normalised already, with the statistics of ImageNet.')


class ItemReader:
    """The `get_items` of `cxr_block`: reads the train and valid images of a folder, a CSV file or an items table."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, source: str | Path | pd.DataFrame) -> pd.DataFrame:
        recipe = self.recipe
        if not isinstance(source, pd.DataFrame):
            path = Path(source)
            source = locate(read_recipe_items(path, recipe), image_root(path))
        # ColSplitter puts every row that is not valid into train, so test images have to be removed before.
        items = source[source.split.isin(['train', 'valid'])].reset_index(drop=True)
        return items.astype(object)  # a batch takes its rows one by one, which is slow for the strings of pandas


def locate(items: pd.DataFrame, root: StrPath) -> pd.DataFrame:
    """Return `items` with complete paths, as `dls.test_dl` and `cxr_block` expect them."""
    root = Path(root)
    return items.assign(path=[str(root / path) for path in items.path]).reset_index(drop=True)


def find_preprocessing(dls: DataLoaders) -> Preprocessing:
    """Return the preprocessing of the images of `dls`.

    Raises `UsageError` if they are not opened with `OpenImage`, because then it is not known.
    """
    for transform in dls.train_ds.tls[0].tfms.fs:
        if isinstance(transform, OpenImage):
            return transform.preprocessing
    raise UsageError(
        f'the images of this {type(dls).__name__} are not prepared by this package, so they cannot be prepared in the '
        'same way for prediction. Make the DataLoaders with CXRDataLoaders or cxr_block.'
    )


def follow_parent() -> None:
    """Prepare a worker process of a loader: ignore Ctrl-C, and on Linux end when the parent process ends.

    A terminal sends Ctrl-C to all processes, and the parent stops its workers. A worker that outlives a killed parent
    would keep the lock of the run folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith('linux'):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def find_unreadable(paths: Sequence[Path], modality: str = '') -> dict[Path, ImageError]:
    """Read each image once, in one thread per core, and return the error of each unreadable image.

    Training can take hours, so it checks its images first. `modality` has the codes of other DICOM modalities to
    accept.
    """
    errors = in_threads(partial(_read_error, modality), paths)
    return {path: error for path, error in zip(paths, errors, strict=True) if error}


def _read_error(modality: str, path: Path) -> ImageError | None:
    try:
        read_image(path, modality)
    except ImageError as error:
        return error
    return None


def describe_unreadable(errors: dict[Path, ImageError]) -> str:
    """Return the first of the `errors` that `find_unreadable` found, and the number of others."""
    messages = [str(error) for error in errors.values()]
    text = '; '.join(messages[:MAX_ERRORS_LISTED])
    if len(messages) > MAX_ERRORS_LISTED:
        text += f'; and {len(messages) - MAX_ERRORS_LISTED} more'
    return text

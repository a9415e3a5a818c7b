"""The command `explain`: what influenced the scores of images, as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, out, print_error, print_line, unused_path
from cxr_fastai.core.errors import ImageError, UsageError, visible
from cxr_fastai.core.files import check_new, writing
from cxr_fastai.core.run import Run

if TYPE_CHECKING:
    from cxr_fastai.interpretation.overlays import Explanation


def explain(
    run: opt.Explained,
    images: opt.SomeImages = None,
    method: opt.Method = 'gradcam',
    target: opt.Target = 'PNEUMONIA',
    layer: opt.Layer = None,
    folder: opt.ExplanationFolder = None,
    top_losses: opt.TopLosses = None,
    check: opt.CheckMaps = False,
    split: opt.Split = 'test',
    data: opt.Data = None,
    csv: opt.Csv = None,
    burned_in: opt.BurnedIn = False,
    batch_size: opt.BatchSize = 32,
) -> None:
    """Show what in an image influenced its score: a PNG an image, of those that are named or of a split's greatest losses;
    or check whether such maps can be believed.

    Example: cxr-fastai explain runs/resnet50 image.jpeg --method gradcam --out explained
    """
    if bool(images) + bool(top_losses) + check != 1:
        raise UsageError('name images, or give --top-losses N, or --check: one of them.')
    if images and (data or csv):
        raise UsageError('--data and --csv tell where the images of a split are.')
    how = {'method': method, 'target': target, 'layer': layer}
    is_run = (run / 'recipe.json').exists()
    known = Run.open(run) if is_run or not images else Run(run)
    if check:
        return _check(known, split, choose_source(data, csv), folder, how)
    if not (folder or is_run):
        raise UsageError(f'{run}: not a run folder: name one by --out.')
    place = folder or unused_path(run / 'figures' / 'explained')
    check_new(place)
    if top_losses:
        bad = _explain_split(known, split, choose_source(data, csv), top_losses, place, how, batch_size, burned_in)
    else:
        bad = _explain_images(run, images, place, how, batch_size, burned_in)
    if bad:
        raise typer.Exit(3)


def _explain_images(model: Path, images: list[Path], place: Path, how: dict, batch_size: int, burned_in: bool) -> int:
    from cxr_fastai.data.find import list_images, short_path
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.interpretation.explainer import Explainer, Subject

    explainer = Explainer(Predictor.load(model, engine='torch'), **how)
    subjects = [Subject(path, visible(short_path(str(path)))) for path in list_images(images)]
    return draw(explainer.explain(subjects, batch_size, burned_in), place)


def _explain_split(
    run: Run, split: str, data: Path | None, most: int, place: Path, how: dict, batch_size: int, burned_in: bool
) -> int:
    from cxr_fastai.interpretation.interpretation import CXRInterpretation, save_cams, save_galleries

    shown = CXRInterpretation.from_run(run, split, data, **how)
    bad = draw(shown.explainer.explain(shown.subjects(shown.top_losses(most)), batch_size, burned_in), place)
    save_cams(run, split, shown)
    print_line(f'in {run.path}: {", ".join(save_galleries(run, split, shown, most))}, and maps for its report')
    return bad


def _check(run: Run, split: str, data: Path | None, folder: Path | None, how: dict) -> None:
    if folder:
        raise UsageError(f'--out {folder}: a check goes into the figures of its run.')
    if how.pop('target') != 'PNEUMONIA':
        raise UsageError('--target NORMAL: --check is of maps for PNEUMONIA.')
    from cxr_fastai.cli.output import check_table
    from cxr_fastai.interpretation.checks import check_run

    found = check_run(run, split, data, **how)
    out.print(check_table(found))
    drawn = ', figures/cam_check.png' if (run / 'figures/cam_check.png').is_file() else ''
    print_line(f'in {run.path}: figures/cam_check.json{drawn}')


def draw(explained: Iterator[Explanation | ImageError | None], place: Path) -> int:
    """Draw each explanation into `place`, called by its number (None only counts); returns how many images could not be
    used."""
    from cxr_fastai.core.figures import save_figure
    from cxr_fastai.interpretation.overlays import plot_explanation

    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    bad = 0
    for number, one in enumerate(explained, 1):
        if isinstance(one, ImageError):
            print_error(f'error: {one}')
            bad += 1
        if one is None or isinstance(one, ImageError):
            continue
        save_figure(plot_explanation(one), place / f'{number:04d}.png')
        print_line(f'{place / f"{number:04d}.png"}: {one.name}: {one.words}')
    return bad

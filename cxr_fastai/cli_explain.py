"""The command `explain`: what influenced the scores of films, as pictures."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cxr_fastai import options as opt
from cxr_fastai.core import FilmError, UsageError, check_new, writing
from cxr_fastai.run import Run
from cxr_fastai.terminal import complain, free, one_of, say

if TYPE_CHECKING:
    from cxr_fastai.overlays import Explanation


def explain(run: opt.RunFolder, films: opt.SomeFilms = None, method: opt.Method = 'gradcam',
            target: opt.Target = 'PNEUMONIA', layer: opt.Layer = None, folder: opt.ExplanationFolder = None,
            top_losses: opt.TopLosses = None, split: opt.Split = 'test', data: opt.Data = None, csv: opt.Csv = None,
            burned_in: opt.BurnedIn = False, batch_size: opt.BatchSize = 32) -> None:
    """Show what in a film influenced its score: a PNG a film, of those that are named or of a split's greatest losses.

    Example: cxr-fastai explain runs/resnet50 film.jpeg --method gradcam --out explained
    """
    if bool(films) == bool(top_losses): raise UsageError('name films, or give --top-losses N: one of them.')
    if films and (data or csv): raise UsageError('--data and --csv tell where the films of --top-losses are.')
    known, place = Run.open(run), folder or free(run/'figures'/'explained')
    check_new(place)
    from cxr_fastai.explanations import CXRInterpretation, Explainer, save_cams
    from cxr_fastai.inference import Predictor, list_films
    from cxr_fastai.names import short_path
    from cxr_fastai.overlays import plot_gallery
    how = {'method': method, 'target': target, 'layer': layer}
    if top_losses:
        shown = CXRInterpretation.from_run(known, split, one_of(data, csv), **how)
        rows = shown.top_losses(top_losses)
        explained = shown.explainer.explain([shown.root/path for path in rows.path], rows.path.to_list(),
                                            rows.label.to_list(), batch_size, burned_in)
    else:
        paths = list_films(films)
        explained = Explainer(Predictor.load(run), **how).explain(
            paths, [short_path(str(path)) for path in paths], None, batch_size, burned_in)
    found, bad = _draw(explained, place)
    if top_losses and found:
        from cxr_fastai.drawing import save_figure
        save_figure(plot_gallery(found, f'{split} split, the {len(found)} greatest losses'),
                    run/'figures'/f'top_losses_{split}.png')
        save_cams(known, split, shown)
        say(f'in {run}: figures/top_losses_{split}.png, and maps for its report')
    if bad: raise typer.Exit(3)


def _draw(explained: Iterator[Explanation | FilmError], place: Path) -> tuple[list[Explanation], int]:
    """Draw each explanation into `place`, called by its number; returns them, and how many films could not be used."""
    from cxr_fastai.drawing import save_figure
    from cxr_fastai.overlays import plot_explanation
    with writing(place): place.mkdir(parents=True, exist_ok=True)
    found, bad = [], 0
    for number, one in enumerate(explained, 1):
        if isinstance(one, FilmError):
            complain(f'error: {one}')
            bad += 1
            continue
        found.append(one)
        save_figure(plot_explanation(one), place/f'{number:04d}.png')
        say(f'{place/f"{number:04d}.png"}: {one.name}: {one.words}')
    return found, bad

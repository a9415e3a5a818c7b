"""The command `explain`: what influenced the scores of films, as pictures."""
from __future__ import annotations

import typer

from cxr_fastai import options as opt
from cxr_fastai.core import FilmError, UsageError, writing
from cxr_fastai.run import Run
from cxr_fastai.terminal import complain, one_of, say


def explain(run: opt.RunFolder, films: opt.SomeFilms = None, method: opt.Method = 'gradcam',
            target: opt.Target = 'PNEUMONIA', layer: opt.Layer = None, folder: opt.ExplanationFolder = None,
            top_losses: opt.TopLosses = None, split: opt.Split = 'test', data: opt.Data = None, csv: opt.Csv = None,
            burned_in: opt.BurnedIn = False, batch_size: opt.BatchSize = 32) -> None:
    """Show what in a film influenced its score: a PNG a film, of those that are named or of a split's greatest losses.

    Example: cxr-fastai explain runs/resnet50 film.jpeg --method gradcam --out explained
    """
    if bool(films) == bool(top_losses): raise UsageError('name films, or give --top-losses N: one of them.')
    known, place = Run.open(run), folder or run/'figures'/'explained'
    from cxr_fastai.drawing import save_figure
    from cxr_fastai.explanations import CXRInterpretation, Explainer, save_cams
    from cxr_fastai.inference import Predictor, list_films
    from cxr_fastai.names import short_path
    from cxr_fastai.overlays import plot_explanation, plot_gallery
    how = {'method': method, 'target': target, 'layer': layer}
    if top_losses:
        shown = CXRInterpretation.from_run(known, split, one_of(data, csv), **how)
        rows = shown.top_losses(top_losses)
        explainer, names, labels = shown.explainer, rows.path.to_list(), rows.label.to_list()
        paths = [shown.root/path for path in rows.path]
    else:
        explainer, paths = Explainer(Predictor.load(run), **how), list_films(films)
        names, labels = [short_path(str(path)) for path in paths], None
    with writing(place): place.mkdir(parents=True, exist_ok=True)
    found, bad = [], 0
    for number, one in enumerate(explainer.explain(paths, names, labels, batch_size, burned_in), 1):
        if isinstance(one, FilmError):
            complain(f'error: {one}')
            bad += 1
            continue
        found.append(one)
        save_figure(plot_explanation(one), place/f'{number:04d}.png')
        say(f'{place/f"{number:04d}.png"}: {one.name}: {one.words}')
    if top_losses and found:
        save_figure(plot_gallery(found, f'{split} split, the {len(found)} greatest losses'),
                    run/'figures'/f'top_losses_{split}.png')
        save_cams(known, split, shown)
        say(f'in {run}: figures/top_losses_{split}.png, and maps for its report')
    if bad: raise typer.Exit(3)

"""The figures that `explain --top-losses` saves: explanations, galleries, and maps for the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.figures import cam_picture, save_picture, shown_images
from cxr_fastai.inference.config import identify_network
from cxr_fastai.interpretation.explainer import Explainer, ExplanationResult, save_explanations
from cxr_fastai.interpretation.interpretation import ERROR_KINDS, CXRInterpretation
from cxr_fastai.interpretation.overlays import Explanation, blend


def explain_split(
    interpretation: CXRInterpretation, k: int, folder: Path, batch_size: int = 32, allow_burned_in: bool = False
) -> Iterator[ExplanationResult]:
    """Explain the `k` images with the highest loss and save the figures; see `explainer.save_explanations`."""
    subjects = interpretation.subjects(interpretation.hardest(k))
    return save_explanations(interpretation.explainer.explain(subjects, batch_size, allow_burned_in), folder)


def save_galleries(interpretation: CXRInterpretation, k: int = 12) -> list[str]:
    """Save galleries of `k` images, the mean maps and the maps for the report in the `figures/` of the run.

    The galleries show the highest losses, each kind of error that occurs, and the most uncertain predictions. Returns
    their file names relative to the run folder. Raises `UsageError` for an interpretation of a learner.
    """
    run = _require_run(interpretation)
    figures = {'top_losses': interpretation.draw_gallery(interpretation.hardest(k), 'highest loss first')}
    for kind in ERROR_KINDS:
        errors = interpretation.errors(kind, k)
        if len(errors):
            title = f'{kind}s, most confident first'
            figures[f'{kind}s'.replace(' ', '_')] = interpretation.draw_gallery(errors, title)
    figures['uncertain'] = interpretation.draw_gallery(interpretation.most_uncertain(k), 'most uncertain first')
    figures['mean_maps'] = interpretation.draw_mean_maps()
    names = []
    for name, figure in figures.items():
        path = f'figures/{name}_{interpretation.split}.png'
        save_figure(figure, run / path)
        names.append(path)
    save_cams(interpretation)
    return names


def save_cams(interpretation: CXRInterpretation) -> None:
    """Save thumbnails of the images that the report shows, with their maps, in `figures/cams/` of the run.

    These are Grad-CAMs for pneumonia, whatever the target and method of `interpretation` are.
    """
    run = _require_run(interpretation)
    rows = shown_images(interpretation.predictions)
    network = identify_network(run.path)
    explainer = Explainer(interpretation.explainer.predictor)
    explanations = explainer.explain(interpretation.subjects(rows))
    for path, explanation in zip(rows.path, explanations, strict=True):
        if isinstance(explanation, Explanation):
            save_picture(blend(explanation), cam_picture(run, path, network))


def _require_run(interpretation: CXRInterpretation) -> Run:
    if interpretation.run is None:
        raise UsageError('the figures are saved in a run folder. Save the learner with save_run, then use from_run.')
    return interpretation.run

"""The arguments and options of the command `explain` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cxr_fastai.cli.options import find_model


def _read_class(name: str) -> str:
    """Return the class `name` in upper case; another name as it is, for the command to refuse."""
    from cxr_fastai.data.layout import read_class

    return read_class(name) or name


Explained = Annotated[
    Path,
    Argument(
        metavar='RUN',
        parser=find_model,
        help='Run folder; to explain images by path, also a bundle, hf:USER/NAME, or a trusted .pkl file.',
    ),
]
Method = Annotated[
    str,
    Option(
        '--method',
        metavar='METHOD',
        help='Compute maps by gradcam, gradcam++, cam (needs average pooling and one linear layer) or occlusion.',
    ),
]
Target = Annotated[
    str,
    Option(
        '--target', metavar='NORMAL|PNEUMONIA', callback=_read_class, help='Explain this class: NORMAL or PNEUMONIA.'
    ),
]
Layer = Annotated[
    str | None,
    Option(
        '--layer',
        metavar='NAME',
        show_default='the last before pooling',
        help='Explain this layer, named as in the state dict.',
    ),
]
ExplanationFolder = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='RUN/figures/explained',
        help='Write the figures to this new folder. The default is numbered if it exists.',
    ),
]
TopLosses = Annotated[
    int | None,
    Option(
        '--top-losses',
        metavar='N',
        min=1,
        show_default=False,
        help='Explain the N images of the split with the highest loss.',
    ),
]
CheckMaps = Annotated[
    bool,
    Option(
        '--check', help='Check on images of the split whether the maps can be trusted; adds a section to the report.'
    ),
]
BurnedIn = Annotated[
    bool,
    Option(
        '--allow-burned-in', help='Also show images that are marked as containing text, which may name the patient.'
    ),
]

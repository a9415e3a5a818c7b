"""The arguments and options of commands, each defined once with its name, meaning, unit and default.

Those of `train` and `lr-find` alone are in `training_options`, those of `explain` in `explanation_options`, and those
of commands that share a finished model in `sharing_options`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import SHIFT, SPLITS

DATA_DEFAULT = 'CXR_DATA, else data/chest_xray'


def find_model(text: str) -> Path:
    """Return the path of the model that `text` names: a path, `pretrained` or `hf:USER/NAME`."""
    from cxr_fastai.inference import pretrained

    return pretrained.find_model(text)


def _read_split(name: str | None) -> str | None:
    """Return the split that `name` stands for, such as `valid` for `val`. Raises `UsageError` for another name."""
    from cxr_fastai.data.layout import read_split

    if name is None:
        return None
    split = SHIFT if name.strip().lower() == SHIFT else read_split(name)
    if split is None:
        raise UsageError(f'--split {name}: no such split. Choose {", ".join(SPLITS)}.')
    return split


# Images and how they are read

Data = Annotated[
    Path | None,
    Option(
        '--data',
        metavar='DIR',
        show_default=DATA_DEFAULT,
        help='Read images from this folder (train|val|test / NORMAL|PNEUMONIA), or from a CSV.',
    ),
]
Csv = Annotated[
    Path | None,
    Option('--csv', metavar='FILE', show_default=False, help='Read images from this CSV: path,label[,split,patient].'),
]
ImageFolder = Annotated[
    Path | None,
    Argument(metavar='DIR', show_default=DATA_DEFAULT, help='Folder of images, or a CSV that lists images.'),
]
NewImageFolder = Annotated[Path, Argument(metavar='DIR', help='Folder to create; it must be empty or not exist.')]
Origin = Annotated[
    str,
    Option(
        '--source',
        metavar='mendeley|kaggle|medmnist',
        help='Download from mendeley (1.2 GB, no account), kaggle (2.3 GB, with a val folder), or medmnist (0.2 GB).',
    ),
]
Size = Annotated[
    int, Option('--size', metavar='PX', min=48, max=2048, help='Resize images to squares with this side, in pixels.')
]
ImageSize = Annotated[
    int, Option('--size', metavar='PX', min=64, max=4096, help='Draw images with this side, in pixels.')
]
Resize = Annotated[
    str,
    Option(
        '--resize',
        metavar='squish|pad|crop',
        help='Make images square: squish (ignore the aspect ratio), or pad or crop (keep it).',
    ),
]
Modality = Annotated[
    str,
    Option(
        '--modality',
        metavar='CODES',
        show_default=False,
        help='Also accept DICOM images of these modalities, such as RG or CT,MR; always accepted are CR, DX and DR.',
    ),
]
Images = Annotated[int, Option('--images', metavar='N', help='Draw this number of synthetic images.')]
BatchSize = Annotated[int, Option('--batch-size', metavar='N', min=1, help='Process this number of images per batch.')]
Threads = Annotated[
    int | None,
    Option(
        '--workers', metavar='N', min=1, show_default='number of cores', help='Load images with this number of threads.'
    ),
]
Limit = Annotated[
    int | None,
    Option(
        '--limit', metavar='N', min=1, show_default='all', help='Use only the first N images of each class and split.'
    ),
]
Seed = Annotated[int, Option('--seed', metavar='N', min=0, help='Seed all random numbers with this number.')]

# data audit

AuditFolder = Annotated[Path, Option('--out', metavar='DIR', help='Write audit.json and audit.html to this folder.')]

Anatomy = Annotated[
    bool,
    Option(
        '--anatomy',
        help='Also train a small network on images without their lungs, and report how well it tells the label; 0.5 is '
        'good. Takes one to three minutes.',
    ),
]

# data review

FoldsFolder = Annotated[Path, Argument(metavar='RUN', help='Folder of train --folds, with its finished trainings.')]
Top = Annotated[
    int | None,
    Option(
        '--top',
        metavar='N',
        min=1,
        show_default='4% of the images, from 20 to 250',
        help='List this number of images, besides the duplicates with other labels.',
    ),
]
ReviewFolder = Annotated[
    Path | None,
    Option('--out', metavar='DIR', show_default='RUN', help='Write review.csv and review.html to this folder.'),
]

# demo

DemoEpochs = Annotated[int, Option('--epochs', metavar='N', help='Train for this number of epochs.')]
Precision = Annotated[
    str,
    Option(
        '--precision',
        metavar='auto|fp32|bf16|fp16',
        help='Compute in fp32 or bf16; training also in fp16, or auto: a lower one if a trial shows that it is faster.',
    ),
]
NewFolder = Annotated[
    Path | None,
    Option('--out', metavar='DIR', show_default='demo', help='Create this folder; it must be empty or not exist.'),
]

# archs

Pattern = Annotated[
    str | None,
    Argument(
        metavar='PATTERN',
        show_default='networks of this package and registered ones',
        help='List networks with matching names, for example "resnet*" or "torchvision.*".',
    ),
]

# evaluate and report

RunFolder = Annotated[Path, Argument(metavar='RUN', help='Run folder, as written by train.')]
RunFolders = Annotated[
    list[Path], Argument(metavar='RUN...', help='Run folders, as written by train, or a folder of run folders.')
]
Split = Annotated[
    str,
    Option(
        '--split',
        metavar='train|valid|test|shift',
        callback=_read_split,
        help='Use the images of this split: train, valid, test or shift.',
    ),
]
EvaluatedSplit = Annotated[
    str | None,
    Option(
        '--split',
        metavar='train|valid|test|shift',
        callback=_read_split,
        show_default='test; for the folder of train --folds, the out-of-fold predictions',
        help='Use the images of this split: train, valid, test or shift.',
    ),
]
Rule = Annotated[
    str | None,
    Option(
        '--threshold',
        metavar='RULE',
        show_default='as before, else sensitivity:0.95',
        help='Choose the threshold on validation images by this rule: fixed:T, sensitivity:S, youden, or cost:FN/FP.',
    ),
]
ChooseOn = Annotated[
    str | None,
    Option(
        '--choose-on',
        metavar='valid|shift',
        show_default='as before, else valid',
        help='Choose the threshold on the validation images, or on the soft images that the training held out; by the '
        'rule of --threshold, or by sensitivity:0.95 without it.',
    ),
]
Views = Annotated[
    bool | None,
    Option(
        '--tta/--no-tta',
        show_default='as the threshold was chosen',
        help='Average the probabilities of each image and its mirror image (test-time views), or do not.',
    ),
]
Shift = Annotated[
    bool,
    Option(
        '--shift',
        help='Evaluate the soft images that the training held out (--set shift_pct=0.2), beside the validation images.',
    ),
]
OutOfFold = Annotated[
    Path | None,
    Option(
        '--out-of-fold',
        metavar='FOLDS',
        show_default=False,
        help='Use the out-of-fold predictions of train --folds as the validation of a run with --valid none.',
    ),
]
Prevalences = Annotated[
    list[str] | None,
    Option(
        '--prevalence',
        metavar='SHARE',
        show_default='those used last for this split, else 2%, 10% and 30%',
        help='Report PPV and NPV at this prevalence, for example 5% or 0.05. Repeat for more.',
    ),
]
By = Annotated[
    list[str] | None,
    Option(
        '--by',
        metavar='COLUMN',
        show_default='those used last for this split',
        help='Report metrics by kind and for each group in this column of the CSV. Repeat for more.',
    ),
]
Robustness = Annotated[
    bool,
    Option(
        '--robustness',
        help='Also measure the AUC under 8 kinds of corruption at 5 strengths, and without shortcuts (42 passes).',
    ),
]
NewComparison = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='comparison',
        help='Write the comparison of several runs to this folder. One of the same runs is replaced; the default is '
        'numbered if it has something else.',
    ),
]
Each = Annotated[
    bool, Option('--each', help='Also print the tables of each run, after the comparison of several runs.')
]
Audit = Annotated[
    Path | None,
    Option(
        '--audit', metavar='DIR', show_default='audit, if of these images', help='Show the findings in this folder.'
    ),
]
Pdf = Annotated[bool, Option('--pdf', help='Also print the report to report.pdf, with Chromium or Chrome.')]
HideNames = Annotated[bool, Option('--hide-names', help='Show numbers instead of the names of images.')]

# combine

CombinedRuns = Annotated[
    list[Path],
    Argument(metavar='RUN...', help='Run folders of one architecture, or the folder of train --folds or --seeds.'),
]
How = Annotated[
    str,
    Option(
        '--how',
        metavar='auto|soup|ensemble',
        help='Average the weights (soup) or the logits (ensemble) of all runs, or choose on validation images (auto).',
    ),
]
NewRun = Annotated[Path, Option('--out', metavar='DIR', help='Create this run folder; it must be empty or not exist.')]

# explain and benchmark

SomeImages = Annotated[
    list[Path] | None,
    Argument(
        metavar='IMAGE|DIR|CSV...',
        show_default=False,
        help='Images, folders of images, or CSV files with a column path.',
    ),
]
# predict

Model = Annotated[
    Path,
    Argument(
        metavar='MODEL',
        parser=find_model,
        help='Bundle (folder or zip), run folder, a trusted .pkl file, pretrained for the model in the package, or '
        'hf:USER/NAME[@REVISION] for a bundle on the Hugging Face Hub.',
    ),
]
PredictImages = Annotated[
    list[Path] | None,
    Argument(
        metavar='IMAGE|DIR|CSV|-...',
        show_default=False,
        help='Images, folders, CSV files with a column path, lists in .txt files, or - for a list on standard input.',
    ),
]
NewTable = Annotated[
    Path | None,
    Option(
        '--out', metavar='FILE', show_default='print only', help='Write rows to this new file: .csv, .json, .parquet.'
    ),
]
ResumeTable = Annotated[bool, Option('--resume', help='Resume an interrupted --out table, with the same images.')]
Cut = Annotated[
    float | None,
    Option(
        '--threshold',
        metavar='T',
        min=0,
        max=1,
        show_default='from the model',
        help='Classify images as PNEUMONIA from this probability.',
    ),
]
Calibrated = Annotated[
    bool,
    Option(
        '--calibrated',
        help='Scale probabilities and threshold by the temperature of the model; predictions stay the same.',
    ),
]
NewPage = Annotated[
    Path | None,
    Option(
        '--html',
        metavar='FILE',
        show_default=False,
        help='Write a self-contained page with pictures and decisions to this new file.',
    ),
]
Maps = Annotated[
    bool,
    Option(
        '--explain', help='Also draw what influenced each score, in a folder next to --out and on the page of --html.'
    ),
]
NoGate = Annotated[
    bool, Option('--no-gate', help='Score rejected images too: switch off the input gate (out-of-distribution check).')
]
EngineKind = Annotated[
    str,
    Option(
        '--engine',
        metavar='auto|onnx|torch',
        help='Run bundles with this engine: onnx, torch, or auto (ONNX Runtime if installed).',
    ),
]

AsJson = Annotated[
    bool,
    Option('--json', help='Print one JSON document to standard output instead of text; messages go to standard error.'),
]
Device = Annotated[
    str,
    Option(
        '--device',
        metavar='auto|cpu|cuda|cuda:N|mps',
        help='Compute on cpu, cuda, cuda:N, mps, or auto (the GPU if there is one).',
    ),
]

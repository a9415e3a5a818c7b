"""What a user may type after a command: one name and one meaning for each option, in every command that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Data = Annotated[
    Path | None,
    Option(
        '--data',
        metavar='DIR',
        show_default='CXR_DATA, else data/chest_xray',
        help=('Folder of images (train|val|test / NORMAL|PNEUMONIA), or a CSV of them.'),
    ),
]
Csv = Annotated[
    Path | None,
    Option('--csv', metavar='FILE', show_default='none', help=('CSV of images instead: path,label[,split,patient].')),
]
ImageFolder = Annotated[
    Path | None,
    Argument(
        metavar='DIR', show_default='CXR_DATA, else data/chest_xray', help=('Folder of images, or a CSV of them.')
    ),
]
Resize = Annotated[
    str,
    Option(
        '--resize',
        help=('How an image becomes a square: squish (the specification), or its aspect kept by pad or crop.'),
    ),
]
Leakage = Annotated[bool, Option('--allow-leakage', help='Train though a patient is in two splits; it is recorded.')]
BadImage = Annotated[
    str,
    Option('--on-bad-image', help=('What to do with an image that cannot be read: fail, or skip it with a warning.')),
]
Origin = Annotated[
    str,
    Option(
        '--source',
        help=(
            'mendeley: 1.2 GB, no account needed. kaggle: the same images, with a val folder. medmnist: 0.2 GB, 224 px.'
        ),
    ),
]
AuditFolder = Annotated[Path, Option('--out', metavar='DIR', help='Folder for audit.json and audit.html.')]
Arch = Annotated[
    str, Option('--arch', help=('Network: baseline, resnet50, efficientnet_lite0, or any name that timm knows.'))
]
RecipeName = Annotated[
    str, Option('--recipe', help=('How to train: reference is the specification, tuned the best classifier.'))
]
Fields = Annotated[
    list[str] | None,
    Option(
        '--set',
        metavar='FIELD=VALUE',
        show_default='none',
        help=('Another value for a field of the recipe, such as ema=0 (`Recipe` has them all); repeat it for more.'),
    ),
]
Precision = Annotated[
    str,
    Option(
        '--precision',
        help=('Numbers that training reckons in: fp32, fp16, bf16, or auto: fp32 on a CPU, else what the GPU has.'),
    ),
]
Compile = Annotated[
    str,
    Option('--compile', help=('Compile the steps of training: on, off, or auto: where that is known to save time.')),
]
Track = Annotated[
    str | None,
    Option(
        '--track',
        metavar='NAME',
        show_default='history.csv alone',
        help=('Also tell the history to tensorboard, wandb or mlflow.'),
    ),
]
NewRun = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='RUN',
        show_default='runs/ARCH, or the next free',
        help=('Run folder to make; it must not hold anything.'),
    ),
]
Resume = Annotated[
    Path | None,
    Option(
        '--resume',
        metavar='RUN',
        show_default='start anew',
        help=('Go on with a run that was stopped, as it was begun.'),
    ),
]
NewFolder = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='demo, or the next free',
        help=('Folder to make; it must not hold anything.'),
    ),
]
NewCurve = Annotated[Path, Option('--out', metavar='FILE', help='PNG to write; the numbers go to a CSV beside it.')]
Steps = Annotated[int, Option('--steps', metavar='N', min=20, help='Batches at most.')]
NewTable = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='FILE',
        show_default='print only',
        help=('Table to write, .csv, .json or .parquet; it must not exist.'),
    ),
]
Epochs = Annotated[
    int | None,
    Option('--epochs', metavar='N', show_default='reference 15, tuned 6', help=('Epochs in all, over the phases.')),
]
DemoEpochs = Annotated[int, Option('--epochs', metavar='N', help='Epochs.')]
LearningRate = Annotated[
    float | None,
    Option(
        '--lr',
        show_default="the recipe's",
        help=("The first phase's learning rate; later phases keep their ratio to it."),
    ),
]
Weights = Annotated[
    str | None,
    Option(
        '--weights',
        show_default='imagenet where there are any',
        help=('What to start from: imagenet, imagenet-v2, none, or the file of a state dict.'),
    ),
]
Valid = Annotated[str, Option('--valid', help='official: the val folder. patients: a tenth of the patients.')]
Split = Annotated[str, Option('--split', help='Split to measure: train, valid or test.')]
Rule = Annotated[
    str | None,
    Option(
        '--threshold',
        metavar='RULE',
        show_default='that of before, else sensitivity:0.95',
        help=(
            'How the threshold is chosen, on validation images alone: fixed:T, sensitivity:S, youden, or cost:FN/FP.'
        ),
    ),
]
Prevalences = Annotated[
    list[float] | None,
    Option(
        '--prevalence',
        metavar='PERCENT',
        min=0.01,
        max=99.99,
        show_default='2, 10 and 30',
        help=('Tell PPV and NPV where so many of a hundred images show pneumonia; repeat it for more.'),
    ),
]
Model = Annotated[Path, Argument(metavar='MODEL', help='Bundle (folder or zip), run folder, or an exported .pkl.')]
PredictImages = Annotated[
    list[Path],
    Argument(
        metavar='IMAGE|DIR|CSV|-...',
        help=('Images, folders of images, CSVs with a column path, or - for paths on standard input.'),
    ),
]
ResumeTable = Annotated[bool, Option('--resume', help='Go on with an --out that was stopped; the images are the same.')]
Cut = Annotated[
    float | None,
    Option(
        '--threshold',
        metavar='T',
        min=0,
        max=1,
        show_default="the model's",
        help=('Another threshold for these images.'),
    ),
]
Mirrored = Annotated[bool, Option('--tta', help=("Mean of an image's probability and that of its mirror image."))]
Maps = Annotated[
    bool, Option('--explain', help=('Also draw what influenced each score, by number, into a folder beside --out.'))
]
NoGate = Annotated[bool, Option('--no-gate', help='Tell a probability also of what the gate turns away.')]
EngineKind = Annotated[
    str,
    Option(
        '--engine',
        help=('What computes with a bundle: onnx, int8, torch, or auto: ONNX Runtime where it is installed.'),
    ),
]
NewBundle = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='RUN/bundle',
        help=('Folder, or with --zip file, to make; an older bundle there is replaced.'),
    ),
]
Int8 = Annotated[
    bool,
    Option(
        '--int8',
        help=('Also an ONNX file in 8 bits, kept where the AUC on validation images changes by less than .002.'),
    ),
]
BundlePath = Annotated[Path, Argument(metavar='BUNDLE', help='Folder or zip that `export` made.')]
NewSpace = Annotated[
    Path | None,
    Option(
        '--space',
        metavar='DIR',
        show_default='none',
        help=('Also write a Hugging Face Space, a Gradio page in front of the bundle, to this new folder.'),
    ),
]
Repo = Annotated[str, Argument(metavar='USER/NAME', help='Repository on the Hub; it is made if it is not there.')]
Private = Annotated[bool, Option('--private', help='Make a new repository private.')]
WithPickle = Annotated[bool, Option('--with-pickle', help='Upload learner.pkl too, which others have to trust.')]
AsZip = Annotated[bool, Option('--zip', help='One file instead of a folder.')]
TrustWhat = Annotated[
    list[str],
    Argument(metavar='FILE|list|remove HEX', help=('A pickle to trust; or `list`; or `remove` and a SHA-256.')),
]
Hash = Annotated[
    str | None,
    Option(
        '--sha256',
        metavar='HEX',
        show_default='none',
        help=('The SHA-256 of the file that its maker told you, by another way than the file came.'),
    ),
]
SomeImages = Annotated[
    list[Path] | None,
    Argument(
        metavar='IMAGE|DIR|CSV...', show_default='none', help=('Images, folders of images, or CSVs with a column path.')
    ),
]
Method = Annotated[
    str,
    Option(
        '--method',
        help=(
            'How the map is made: gradcam, gradcam++, cam (heads of average pooling and one layer), or occlusion (slow).'
        ),
    ),
]
Target = Annotated[str, Option('--target', help='The class whose evidence is shown: NORMAL or PNEUMONIA.')]
Layer = Annotated[
    str | None,
    Option(
        '--layer',
        metavar='NAME',
        show_default='the last before pooling',
        help=('The layer whose maps are weighed, as named in the state dict.'),
    ),
]
ExplanationFolder = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='RUN/figures/explained, or the next free',
        help=('Folder to make for the pictures, called by number.'),
    ),
]
TopLosses = Annotated[
    int | None,
    Option(
        '--top-losses',
        metavar='N',
        min=1,
        show_default='name images',
        help=('Explain the N images of the split with the greatest loss.'),
    ),
]
CheckMaps = Annotated[
    bool,
    Option(
        '--check',
        help=(
            'Check whether maps can be believed, on images of the split: numbers with targets, and figures for the report.'
        ),
    ),
]
BurnedIn = Annotated[
    bool,
    Option(
        '--allow-burned-in', help=('Also show images whose files say that text in the picture may name the patient.')
    ),
]
By = Annotated[
    list[str] | None,
    Option(
        '--by',
        metavar='COLUMN',
        show_default='kind',
        help=(
            'Also tell sensitivity, specificity and AUC of the groups in this column of the CSV; repeat it for more.'
        ),
    ),
]
NewComparison = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='comparison, or the next free',
        help='With several runs: folder to make for what sets them apart.',
    ),
]
Calibrated = Annotated[
    bool,
    Option(
        '--calibrated',
        help=('Probabilities, and the threshold, at the temperature fitted on validation images; no decision changes.'),
    ),
]
Robustness = Annotated[
    bool,
    Option(
        '--robustness',
        help=('Also measure the AUC on images corrupted in 8 kinds and 5 strengths, and without shortcuts: 42 passes.'),
    ),
]
Size = Annotated[
    int, Option('--size', metavar='PX', min=48, max=2048, help=('Side of the image the network sees, in pixels.'))
]
ImageSize = Annotated[int, Option('--size', metavar='PX', min=64, max=4096, help='Side of an image, in pixels.')]
Images = Annotated[int, Option('--images', metavar='N', help='Synthetic images in all.')]
BatchSize = Annotated[int, Option('--batch-size', metavar='N', min=1, help='Images in a batch.')]
Workers = Annotated[
    int | None,
    Option(
        '--workers',
        metavar='N',
        min=0,
        show_default='the cores; 0 with a cache',
        help=('Processes that read images; 0 reads them in this one.'),
    ),
]
Threads = Annotated[
    int | None, Option('--workers', metavar='N', min=1, show_default='the cores', help=('Threads that read images.'))
]
Limit = Annotated[
    int | None,
    Option(
        '--limit',
        metavar='N',
        min=1,
        show_default='all',
        help=('Only the first N images of each class and split, for trials.'),
    ),
]
Seed = Annotated[int, Option('--seed', metavar='N', min=0, help='Seed of everything random.')]
Audit = Annotated[
    Path | None,
    Option(
        '--audit',
        metavar='DIR',
        show_default='audit, if it is of these images',
        help=('Folder that `data audit` wrote.'),
    ),
]
Pdf = Annotated[bool, Option('--pdf', help='Also print it to report.pdf, by Chromium or Chrome.')]
HideNames = Annotated[
    bool, Option('--hide-names', help=('Call images by numbers whose names may be those of persons.'))
]
RunFolders = Annotated[
    list[Path], Argument(metavar='RUN...', help=('Folders that `train` made, or a folder of such folders.'))
]
RunFolder = Annotated[Path, Argument(metavar='RUN', help='Folder that `train` made.')]
Explained = Annotated[
    Path,
    Argument(
        metavar='RUN',
        help=('Folder that `train` made; to explain images that are named, a bundle or a trusted .pkl as well.'),
    ),
]

Host = Annotated[str, Option('--host', help='Address to listen at; 0.0.0.0 is every network that this machine has.')]
Port = Annotated[int, Option('--port', min=0, max=65535, help='Port to listen at; 0 takes a free one.')]
TokenFile = Annotated[
    Path | None,
    Option(
        '--token-file',
        metavar='FILE',
        show_default='none',
        help=('File with the bearer token that requests have to bring.'),
    ),
]
AllowHost = Annotated[
    list[str] | None,
    Option(
        '--allow-host',
        metavar='NAME',
        show_default='localhost, --host',
        help=('Name that the service goes by, as in a Host header; repeat it for more, `*` takes any.'),
    ),
]
MaxBody = Annotated[int, Option('--max-body', metavar='MB', min=1, help='Megabytes of a request.')]
MaxImages = Annotated[int, Option('--max-images', metavar='N', min=1, help='Images in a request.')]
QueueLength = Annotated[int, Option('--queue', metavar='N', min=1, help='Requests that wait at most.')]
ClientShare = Annotated[
    int,
    Option('--per-client', metavar='N', min=0, show_default='no limit', help=('Requests at a time from one address.')),
]
RequestTime = Annotated[float, Option('--timeout', metavar='SECONDS', min=1, help='For the answer to a request.')]
SendTime = Annotated[
    float,
    Option('--send-timeout', metavar='SECONDS', min=1, help=('For a client to send a whole request; it is cut then.')),
]

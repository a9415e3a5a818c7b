"""The commands `cxr-fastai data ...`: create, download, prepare and audit images, and review labels."""

from __future__ import annotations

from pathlib import Path

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.console import move_messages_to_stderr
from cxr_fastai.cli.documents import print_json
from cxr_fastai.cli.failures import Failure, print_failures
from cxr_fastai.cli.output import choose_source, out, print_line
from cxr_fastai.cli.verbosity import Command, CommandGroup
from cxr_fastai.core.files import check_writable
from cxr_fastai.core.progress import counted

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help='Create, download, prepare and audit images; review labels.'
)


@app.command('demo', cls=Command)
def data_demo(
    folder: opt.NewImageFolder,
    images: opt.Images = 480,
    size: opt.ImageSize = 256,
    seed: opt.Seed = 0,
) -> None:
    """Create synthetic chest images in the layout of the real data set, with masks of their opacities.

    Example: cxr-fastai data demo images --images 200
    """
    from cxr_fastai.images.synthetic import make_demo

    counts = make_demo(folder, images, size, seed).groupby(['split', 'label'], sort=False).size()
    print_line(f'{folder}: {images} images; masks of the opacities are in {folder / "masks"}')
    out.print(counts.unstack().to_string())


@app.command('download', cls=Command)
def data_download(folder: opt.NewImageFolder, source: opt.Origin = 'mendeley') -> None:
    """Download the 5,856 real images in the Kaggle layout. Run the command again to resume an interrupted download.

    Example: cxr-fastai data download data/chest_xray --source mendeley
    """
    from cxr_fastai.data.items import describe_items
    from cxr_fastai.data.sources import SOURCES, download

    items = download(folder, source)
    print_line(f'{folder}: {describe_items(items)}. Licence {SOURCES[source].licence}, {SOURCES[source].page}')


@app.command('prepare', cls=Command)
def data_prepare(
    folder: opt.ImageFolder = None,
    csv: opt.Csv = None,
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    modality: opt.Modality = '',
    workers: opt.Threads = None,
) -> None:
    """Decode and resize all images once; `train` then reads them from the cache.

    Run the command again after an interruption or after images have changed. The exit code is 3 if an image cannot be
    read.

    Example: cxr-fastai data prepare data/chest_xray --size 224
    """
    from cxr_fastai.data.items import data_root, image_root, log_ignored, read_items
    from cxr_fastai.images.cache import prepare
    from cxr_fastai.images.preprocessing import Preprocessing

    root = data_root(choose_source(folder, csv))
    items = read_items(root)
    log_ignored(items, root)
    preprocessing = Preprocessing(size, resize, modality=modality)
    cache, added, errors = prepare(items.path, image_root(root), preprocessing, workers)
    print_failures(map(Failure.from_error, errors))
    print_line(f'{cache}: {counted(len(items) - len(errors))}, {added:,} of them new')
    if errors:
        raise typer.Exit(3)


@app.command('audit', cls=Command)
def data_audit(
    folder: opt.ImageFolder = None,
    csv: opt.Csv = None,
    report: opt.AuditFolder = Path('audit'),
    workers: opt.Threads = None,
    hide_names: opt.HideNames = False,
    modality: opt.Modality = '',
    anatomy: opt.Anatomy = False,
    as_json: opt.AsJson = False,
) -> None:
    """Find problems in a set of images before training: leakage, duplicates, unreadable images, shortcuts.

    The exit code is 1 if there are errors, and 0 if there are only warnings. With --json the contents of audit.json are
    printed: data, images, identity, counts, probes, facts, findings.

    Example: cxr-fastai data audit data/chest_xray --out audit
    """
    if as_json:
        move_messages_to_stderr()
    from cxr_fastai.cli.output import audit_tables
    from cxr_fastai.data.auditing import audit, save_audit
    from cxr_fastai.data.items import data_root

    check_writable(report)  # before all images are read
    result = audit(data_root(choose_source(folder, csv)), workers, hide_names, modality, anatomy)
    save_audit(result, report)
    if as_json:
        print_json(result.as_dict())
    else:
        out.print(audit_tables(result))
    print_line(f'{report}: audit.json and audit.html')
    if any(finding.level == 'error' for finding in result.findings):
        raise typer.Exit(1)


@app.command('review', cls=Command)
def data_review(
    run: opt.FoldsFolder,
    data: opt.Data = None,
    csv: opt.Csv = None,
    top: opt.Top = None,
    folder: opt.ReviewFolder = None,
    workers: opt.Threads = None,
    hide_names: opt.HideNames = False,
    batch_size: opt.BatchSize = 32,
    device: opt.Device = 'auto',
) -> None:
    """List the images whose label a human should look at again, with pictures and maps. Nothing is relabelled.

    RUN is the folder of train --folds, so that each image is scored by a network that was not trained on it. The list
    has the duplicates with another label, and then the images whose label the prediction contradicts most. The folds
    are evaluated first if they have not been.

    Example: cxr-fastai data review runs/folds --top 100
    """
    from cxr_fastai.evaluation.label_review import CONTRADICTS, DUPLICATE, open_folds, review_labels
    from cxr_fastai.publishing.review_page import check_replaceable, save_review

    folder = folder or run
    series = open_folds(run)
    check_replaceable(folder)  # before all images are read
    review = review_labels(series, choose_source(data, csv), top, batch_size, workers, device)
    save_review(review, folder, hide_names, device, batch_size)
    print_line(
        f'{run}: {len(review.table):,} of {counted(len(review.predictions))} listed: {review.count(DUPLICATE):,} '
        f'duplicates with another label, {review.count(CONTRADICTS):,} whose label the prediction contradicts'
    )
    print_line(f'{folder}: review.csv and review.html. No label was changed.')

"""The commands `cxr-fastai data ...`: parse, call one function of the library, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import choose_source, out, print_error, print_line

app = typer.Typer(no_args_is_help=True, help='Get and look after images.')


@app.command('demo')
def data_demo(
    folder: Annotated[Path, Argument(metavar='DIR', help='Folder to make; it must not hold anything.')],
    images: opt.Images = 480,
    size: opt.ImageSize = 256,
    seed: opt.Seed = 0,
) -> None:
    """Write synthetic chest images, with masks of their opacities, in the real data set's layout.

    Example: cxr-fastai data demo images --images 200
    """
    from cxr_fastai.images.synthetic import make_demo

    counts = make_demo(folder, images, size, seed).groupby(['split', 'label'], sort=False).size()
    print_line(f'{folder}: {images} images, and masks of the opacities in {folder / "masks"}')
    out.print(counts.unstack().to_string())


@app.command('download')
def data_download(
    folder: Annotated[Path, Argument(metavar='DIR', help='Folder to make; it must not hold anything.')],
    source: opt.Origin = 'mendeley',
) -> None:
    """Fetch the 5,856 real images in the layout of the Kaggle set; run it again to go on after a cut.

    Example: cxr-fastai data download data/chest_xray --source mendeley
    """
    from cxr_fastai.data.items import describe_items
    from cxr_fastai.data.sources import SOURCES, download

    items = download(folder, source)
    print_line(f'{folder}: {describe_items(items)}. {SOURCES[source].licence}, {SOURCES[source].page}')


@app.command('prepare')
def data_prepare(
    folder: opt.ImageFolder = None,
    csv: opt.Csv = None,
    size: opt.Size = 224,
    resize: opt.Resize = 'squish',
    workers: opt.Threads = None,
) -> None:
    """Decode every image once; `train` then takes them from there by itself. Run it again after a stop or a change.

    Example: cxr-fastai data prepare data/chest_xray --size 224
    """
    from cxr_fastai.data.items import data_root, image_root, read_items
    from cxr_fastai.images.cache import prepare
    from cxr_fastai.images.preprocessing import Preprocessing

    root = data_root(choose_source(folder, csv))
    items = read_items(root)
    place, added, bad = prepare(items.path, image_root(root), Preprocessing(size, resize), workers)
    for error in bad:
        print_error(f'error: {error}')
    print_line(f'{place}: {len(items) - len(bad):,} images, {added:,} of them added now')
    if bad:
        raise typer.Exit(3)


@app.command('audit')
def data_audit(
    folder: opt.ImageFolder = None,
    csv: opt.Csv = None,
    report: opt.AuditFolder = Path('audit'),
    workers: opt.Threads = None,
) -> None:
    """Tell what is wrong with a set of images before a network learns it; exit code 1 where a finding is an error.

    Example: cxr-fastai data audit data/chest_xray --out audit
    """
    from cxr_fastai.cli.output import audit_tables
    from cxr_fastai.data.auditing import audit, save_audit
    from cxr_fastai.data.items import data_root

    found = audit(data_root(choose_source(folder, csv)), workers)
    save_audit(found, report)
    out.print(audit_tables(found))
    print_line(f'{report}: audit.json and audit.html')
    if any(finding.level == 'error' for finding in found.findings):
        raise typer.Exit(1)

"""Draw the pictures of the documentation from the output of `cxr-fastai demo` and from measured speeds.

    cxr-fastai demo --out demo
    python docs/pictures.py demo

`report.png`, `audit.png` and `serve*.png` are screenshots and need Playwright with Chromium or Chrome; `serve*.png`
also need the extra `serve`. The pictures of real images (`robustness_*.png`, `cam_check_real.png`) are written by the
commands on their pages.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import torch
from fastai.torch_core import TensorCategory, TensorImageBW
from matplotlib.figure import Figure
from PIL import Image

from cxr_fastai.all import Explainer, Predictor, Preprocessing, Run, list_images, make_recipe, open_image
from cxr_fastai.core.figures import BLUE, GREY, INK, save_figure, tidy
from cxr_fastai.data.auditing import audit, save_audit
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import augmentations
from cxr_fastai.evaluation.curves import plot_calibration, plot_net_benefit, plot_risk_coverage, plot_roc, plot_scores
from cxr_fastai.evaluation.plots import plot_history
from cxr_fastai.interpretation.explainer import Subject
from cxr_fastai.interpretation.overlays import show_image, show_overlay
from cxr_fastai.publishing.printing import find_browser

HERE = Path(__file__).parent
KINDS = ('normal', 'normal', 'bacteria', 'bacteria', 'virus', 'virus')
SPEED = {
    'files to batches, training': {
        'Pillow + torchvision': (75, 1),
        'fastai DataBlock': (68, 0.93),
        'cxr_fastai, decoding': (177, 2.5),
        'cxr_fastai, cache': (1951, 25.8),
    },
    'a training step, baseline': {'plain PyTorch script': (11.9, 1), 'cxr_fastai': (53.9, 4.65)},
    'file to probability, EfficientNet-Lite0': {
        'learn.predict': (31, 1),
        'learn.get_preds': (38, 1.2),
        'cxr_fastai, torch': (43, 1.4),
        'cxr_fastai, ONNX': (84, 2.7),
    },
    'a training step, EfficientNet-Lite0': {'plain PyTorch script': (9.5, 1), 'cxr_fastai': (34.9, 3.59)},
}
"""Images per second at 224 pixels on two cores of an AMD EPYC with bf16, and the median ratio to the first row of each
group. The values are those of docs/benchmarks.md."""


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure of `width` x `height` inches and its axes (rows, columns) without frames."""
    figure = Figure(figsize=(width, height), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax in panels.ravel():
        ax.axis('off')
    return figure, panels


def images(demo: Path) -> Figure:
    """Draw synthetic images of each kind and the masks of their opacities."""
    train = demo / 'images/train'
    normals = sorted((train / 'NORMAL').iterdir())
    bacteria = sorted((train / 'PNEUMONIA').glob('*bacteria*'))
    viruses = sorted((train / 'PNEUMONIA').glob('*virus*'))
    paths = [*normals[:2], *bacteria[:2], *viruses[:2]]
    figure, panels = grid(2, len(paths), 9, 3.4)
    for (above, below), path, kind in zip(panels.T, paths, KINDS, strict=True):
        show_image(above, open_image(path).pixels)
        above.set_title(kind, fontsize=9)
        mask = demo / 'images/masks/train/PNEUMONIA' / f'{path.stem}.png'
        if mask.exists():
            below.imshow(Image.open(mask), cmap='gray')
        else:
            below.text(0.5, 0.5, 'no opacity', ha='center', va='center', fontsize=9, color=GREY)
    return figure


def augmentation(demo: Path) -> Figure:
    """Draw one image as augmented by both recipes."""
    train = demo / 'images/train'
    paths = next((train / 'PNEUMONIA').glob('*bacteria*')), next((train / 'NORMAL').iterdir())
    figure, panels = grid(2, 7, 9, 3)
    torch.manual_seed(4)
    for row, name in zip(panels, ('reference', 'tuned'), strict=True):
        recipe = make_recipe('baseline', name)
        pair = np.stack([Preprocessing.of(recipe).load(path) for path in paths])  # the other one is the neighbour
        images = TensorImageBW(torch.tensor(pair)[:, None].repeat(len(row) - 1, 1, 1, 1).float() / 255)
        batch = images, TensorCategory(torch.zeros(len(images), dtype=torch.int64))
        for step in augmentations(recipe):
            batch = step(batch, split_idx=0)
        shown = [pair[0] / 255, *np.asarray(batch[0])[::2, 0]]
        for ax, image in zip(row, shown, strict=True):
            show_image(ax, 255 * np.clip(image, 0, 1))
        row[0].set_title(f'{name}: validation', fontsize=8, loc='left')
        row[1].set_title('training', fontsize=8, loc='left')
    return figure


def explained(demo: Path) -> Figure:
    """Draw images with pneumonia, the masks of their opacities, and their maps."""
    run = Run.open(demo / 'run')
    rows = run.predicted('test').query('label == "PNEUMONIA"').iloc[::9].head(4)
    explainer = Explainer(Predictor.load(run.path))
    subjects = [
        Subject(demo / 'images' / path, path, 'PNEUMONIA', p)
        for path, p in zip(rows.path, rows.p_pneumonia, strict=True)
    ]
    figure, panels = grid(3, len(subjects), 6.1, 4.9)
    for column, explanation in zip(panels.T, explainer.explain(subjects), strict=True):
        mask = demo / 'images/masks' / Path(explanation.name).with_suffix('.png')
        show_image(column[0], explanation.image)
        column[1].imshow(Image.open(mask), cmap='gray')
        show_overlay(column[2], explanation)
        column[0].set_title(f'p(pneumonia) {explanation.p:.3f}', fontsize=9)
    for ax, name in zip(panels[:, 0], ('image', 'its opacity (the mask)', 'Grad-CAM'), strict=True):
        ax.text(-0.03, 0.5, name, rotation=90, va='center', ha='right', fontsize=9, transform=ax.transAxes)
    figure.supxlabel('influenced the score; not a lesion outline', fontsize=9)
    return figure


def gate(demo: Path) -> Figure:
    """Draw an image and modified versions of it with the decision of the demo bundle's input gate."""
    predictor = Predictor.load(demo / 'bundle')
    seen = Preprocessing.of(predictor.config)
    image = seen.load(list_images([demo / 'images/test/PNEUMONIA'])[1])
    half = len(image) // 2
    rng = np.random.default_rng(0)
    pictures = {
        'the image': image,
        'mirrored': image[:, ::-1],
        'upside down': image[::-1],
        'rotated left': np.rot90(image),
        'negative': 255 - image,
        'a quarter': seen.fit(np.ascontiguousarray(image[:half, :half])),
        'halves swapped': np.roll(image, half, axis=0),
        'noise': rng.integers(0, 256, image.shape, dtype=np.uint8),
    }
    batch = np.stack([np.ascontiguousarray(picture) for picture in pictures.values()])
    p, features = predictor.engine(batch)
    figure, panels = grid(2, 4, 7, 4.3)
    rejected = predictor.gate.measure(features, batch) > 1
    for ax, name, picture, score, reject in zip(panels.ravel(), pictures, batch, p, rejected, strict=True):
        show_image(ax, picture)
        ax.set_title(f'{name}: network {score:.2f}\n{"rejected" if reject else "accepted"}', fontsize=9)
    return figure


def speed() -> Figure:
    """Draw the images per second in `SPEED`."""
    figure = Figure(figsize=(8.6, 4.6), layout='constrained')
    for ax, (title, speeds) in zip(figure.subplots(2, 2).ravel(), SPEED.items(), strict=True):
        rates, ratios = zip(*speeds.values(), strict=True)
        colours = [BLUE if 'cxr_fastai' in name else GREY for name in speeds]
        bars = tidy(ax).barh(list(speeds), rates, color=colours)
        labels = [f' {rate:,g} ({ratio:g} times)' for rate, ratio in zip(rates, ratios, strict=True)]
        ax.bar_label(bars, [f' {rates[0]:g}', *labels[1:]], fontsize=8, color=INK)
        ax.set_xlim(0, 1.45 * max(rates))
        ax.set_title(title, fontsize=10)
        ax.invert_yaxis()
        ax.tick_params(labelsize=8)
    figure.supxlabel('images per second', fontsize=9)
    return figure


def curves(demo: Path, out: Path) -> None:
    """Draw four figures of the run as one picture."""
    run = Run.open(demo / 'run')
    predictions = run.predicted('test')
    metrics = run.metrics['test']
    parts = []
    for plot in (plot_roc, plot_calibration, plot_net_benefit, plot_risk_coverage):
        save_figure(plot(predictions, metrics, 'test'), out)
        parts.append(Image.open(out).convert('RGB'))
    width = parts[0].width
    height = parts[0].height + parts[2].height
    sheet = Image.new('RGB', (2 * width, height), 'white')
    for i, part in enumerate(parts):
        sheet.paste(part, (i % 2 * width, i // 2 * parts[0].height))
    sheet.save(out, optimize=True)
    save_figure(plot_scores(predictions, metrics, 'test'), out.with_name('scores.png'))
    save_figure(plot_history(run.history, run.kept_epoch), out.with_name('history.png'))


def report_screenshots(demo: Path) -> Image.Image:
    """Return two parts of the report next to each other: its top, and the section Performance."""
    page = demo / 'run/report.html'
    shots = [screenshot(page, 1000, 1276, anchor) for anchor in ('', 'performance')]
    parts = [shot.resize((616, 786), Image.Resampling.LANCZOS) for shot in shots]
    gap = 22
    sheet = Image.new('RGB', (2 * parts[0].width + gap, parts[0].height), '#d8dde4')
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (parts[0].width + gap, 0))
    return sheet


def audit_screenshot(demo: Path) -> Image.Image:
    """Return the top of the audit of a copy of the demo's images with planted faults."""
    with TemporaryDirectory() as folder:
        faulty = Path(folder, 'faulty_images')
        shutil.copytree(demo / 'images', faulty)
        plant_faults(faulty)
        save_audit(audit(faulty), Path(folder, 'audit'))
        return screenshot(Path(folder, 'audit/audit.html'), 900, 1215)


def plant_faults(images: Path) -> None:
    """Add a truncated image, a patient in two splits, and duplicates across classes and inside train."""
    normal = images / 'train/NORMAL'
    pneumonia = images / 'train/PNEUMONIA'
    normals = sorted(normal.iterdir())
    truncated = normals[-1]
    truncated.write_bytes(truncated.read_bytes()[:1500])
    shrink(normals[0], pneumonia / 'person9003_virus_1.jpeg')
    shrink(normals[1], normal / 'IM-9001-0001.jpeg')
    train = read_items(images).query('split == "train" and kind == "bacteria"')
    path = train[train.duplicated('patient')].path.iloc[0]
    shutil.move(images / path, images / path.replace('train', 'test', 1))


def shrink(source: Path, copy: Path) -> None:
    """Save a smaller copy of an image."""
    image = Image.open(source)
    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(copy, quality=60)


def screenshot(page: Path, width: int, height: int, anchor: str = '') -> Image.Image:
    """Return the HTML file `page` as shown by a browser, from its section `anchor` on."""
    with open_tab(width, height) as tab:
        tab.goto(f'{page.resolve().as_uri()}#{anchor}')
        return capture(tab)


def serve_screenshots(demo: Path) -> tuple[Image.Image, Image.Image]:
    """Return the served page with test images and a file without a prediction, and with the details of an image."""
    from cxr_fastai.serving import Settings
    from cxr_fastai.serving.server import Server

    images = demo / 'images/test'
    files = [*sorted(images.glob('NORMAL/*'))[:4], *sorted(images.glob('PNEUMONIA/*'))[:4], demo / 'run/recipe.json']
    server = Server(Settings(demo / 'bundle', port=0))
    thread = Thread(target=server.run)
    thread.start()
    try:
        with open_tab(1000, 850) as tab:
            tab.goto(server.url)
            tab.locator('#chooser:enabled').set_input_files(files)
            tab.wait_for_function('() => !document.querySelector("#count").textContent.includes("progress")')
            table = capture(tab)
            tab.locator('#rows tr', has_text=files[-2].name).click()
            tab.set_viewport_size({'width': 1000, 'height': 680})
            return table, capture(tab)
    finally:
        server.stop()
        thread.join()


@contextmanager
def open_tab(width: int, height: int) -> Iterator[Any]:
    """Open a page of this size in a browser, without transitions."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=['--no-sandbox', '--disable-gpu'])
        yield browser.new_page(viewport={'width': width, 'height': height}, reduced_motion='reduce')
        browser.close()


def capture(tab: Any) -> Image.Image:
    """Return what a page in a browser shows."""
    return Image.open(BytesIO(tab.screenshot())).convert('RGB')


def save_small(picture: Image.Image, path: Path) -> None:
    """Save `picture` with 200 colors. The default method of Pillow turns rare ones, such as orange, into brown."""
    method = Image.Quantize.MAXCOVERAGE
    picture.quantize(200, method=method, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('demo', type=Path, help='folder that `cxr-fastai demo` wrote')
    parser.add_argument('--out', type=Path, default=HERE)
    args = parser.parse_args()
    for draw in (images, augmentation, explained, gate):
        path = args.out / f'{draw.__name__}.png'
        save_figure(draw(args.demo), path)
        if draw is not explained:
            save_small(Image.open(path).convert('RGB'), path)
    save_figure(speed(), args.out / 'speed.png')
    curves(args.demo, args.out / 'curves.png')
    save_small(report_screenshots(args.demo), args.out / 'report.png')
    save_small(audit_screenshot(args.demo), args.out / 'audit.png')
    table, details = serve_screenshots(args.demo)
    save_small(table, args.out / 'serve.png')
    details.save(args.out / 'serve_details.png', optimize=True)  # so few colors distort the map


if __name__ == '__main__':
    main()

"""Training images per second of the Learner and of a plain PyTorch script of the specification, in turn.

    python benchmarks/train_throughput.py --arch baseline --rounds 7
    python benchmarks/train_throughput.py --compile             # the Learner as with `train --compile on`
    python benchmarks/train_throughput.py --arch efficientnet_lite0 --recipe tuned
    python benchmarks/train_throughput.py --precision fp32      # the Learner in fp32 also where bf16 is faster
    python benchmarks/train_throughput.py --memory kept         # both in one process that keeps freed memory
    python benchmarks/train_throughput.py --memory default      # both in one process with the default of glibc
    python benchmarks/train_throughput.py --profile             # also profile the Learner

Both read, augment, collate and train. A round is a few batches of one side, while the other side waits. The images are
synthetic; `--data DIR` takes others. How freed memory is handled is a property of a process, so by default each side
has a process of its own: the plain script with the default of glibc, the Learner with what `learner.reuse_memory` sets.
`--memory kept` and `--memory default` run both sides in one process. The time of the compilation is not part of a
round; the time of the first two batches, which contains it, is printed separately. The Learner trains in the precision
that `train --precision auto` would choose for a long training; the plain script always trains in fp32.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import torch
import torchvision
from fastai.callback.core import Callback, CancelTrainException, CancelValidException
from fastai.learner import Learner
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from cxr_fastai.core.recipe import CHOICES, VOCAB, Recipe
from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.images.cache import ImageCache
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.callbacks import GrowImages, recipe_callbacks
from cxr_fastai.training.hardware import CompileSteps, reuse_memory
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.precision import AUTO, choose_precision
from cxr_fastai.training.recipes import start_phase


def plain_baseline() -> nn.Module:
    """Return the CNN of the specification."""
    layers: list[nn.Module] = []
    for inputs, outputs in [(3, 32), (32, 64), (64, 128), (128, 256)]:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 2),
    )


def plain_resnet50() -> nn.Module:
    """Return torchvision's ResNet50 with two outputs."""
    model = torchvision.models.resnet50(weights=None)
    model.fc = nn.Linear(2048, 2)
    return model


def plain_lite() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with two outputs."""
    import timm

    return timm.create_model('tf_efficientnet_lite0', num_classes=2)


Train = Callable[[int], None]
"""A function that trains for a number of batches."""
IMAGES_OF_A_LONG_TRAINING = 5000
PLAIN = {'baseline': plain_baseline, 'resnet50': plain_resnet50, 'efficientnet_lite0': plain_lite}


class PlainImages(torch.utils.data.Dataset):
    """RGB images read with Pillow and augmented one by one with torchvision's transforms."""

    def __init__(self, items: pd.DataFrame, root: Path, size: int):
        self.rows = [(root / path, VOCAB.index(label)) for path, label in zip(items.path, items.label, strict=True)]
        self.transform = T.Compose(
            [
                T.Resize((size, size)),
                T.RandomHorizontalFlip(),
                T.RandomRotation(10),
                T.ColorJitter(brightness=0.2, contrast=0.2),
                T.RandomAffine(0, translate=(0.1, 0.1)),
                T.ToTensor(),
                T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path, target = self.rows[i]
        return self.transform(Image.open(path).convert('RGB')), target


def make_plain(arch: str, items: pd.DataFrame, root: Path, size: int, bs: int) -> Train:
    """Return a function that trains the plain script for n batches."""
    loader = torch.utils.data.DataLoader(
        PlainImages(items, root, size), batch_size=bs, shuffle=True, num_workers=0, drop_last=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model = PLAIN[arch]().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    loss_func = nn.CrossEntropyLoss()

    def train(n: int) -> None:
        for xb, yb in itertools.islice(batches, n):
            optimiser.zero_grad()
            loss = loss_func(model(xb), yb)
            loss.backward()
            optimiser.step()
            loss.item()

    return train


class NoValidation(Callback):
    """Train an epoch without validation."""

    order = 100  # after the callbacks that prepare validation and clean up after it

    def before_validate(self) -> None:
        raise CancelValidException


class FirstBatches(NoValidation):
    """End the epoch after `n` batches, without validation."""

    n = 1

    def after_batch(self) -> None:
        if self.training and self.iter + 1 == self.n:
            raise CancelTrainException


def our_learner(
    recipe: Recipe, items: pd.DataFrame, root: Path, compiled: bool = False, cache: ImageCache | None = None
) -> Learner:
    """Return the Learner of `recipe` at the start of its last phase, as `train` makes it."""
    learn = recipe_learner(CXRDataLoaders.from_items(items, root, recipe, cache), recipe)
    start_phase(learn, recipe.phases[-1])
    learn.add_cbs(callback for callback in recipe_callbacks(recipe) if not isinstance(callback, GrowImages))
    if compiled:
        learn.add_cb(CompileSteps(recipe.size))
    return learn


def make_ours(learn: Learner) -> Train:
    """Return a function that trains `learn` for n batches of its own loader."""
    first_batches = FirstBatches()

    def train(n: int) -> None:
        first_batches.n = n
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=first_batches)

    return train


class InOwnProcess:
    """A side in a process of its own: calling it calls the function that `make(*arguments)` returns there."""

    def __init__(self, make: Callable[..., Train], *arguments: object):
        self.connection, other_end = multiprocessing.Pipe()
        context = multiprocessing.get_context('spawn')
        context.Process(target=serve, args=(other_end, make, *arguments), daemon=True).start()

    def __call__(self, n: int) -> None:
        self.connection.send(n)
        self.connection.recv()


def serve(connection: Connection, make: Callable[..., Train], *arguments: object) -> None:
    """Train each number of batches that arrives, and confirm it."""
    train = make(*arguments)
    with suppress(EOFError):  # the other process has ended
        while True:
            train(connection.recv())
            connection.send(None)


def make_ours_in_process(recipe: Recipe, items: pd.DataFrame, root: Path, compiled: bool) -> Train:
    """Return the function of `make_ours` in a new process, which keeps freed memory."""
    reuse_memory()
    return make_ours(our_learner(recipe, items, root, compiled))


def measure_seconds(train: Train, batches: int) -> float:
    """Return the seconds that `train` takes for `batches`."""
    start = time.perf_counter()
    train(batches)
    return time.perf_counter() - start


def compare(plain: Train, ours: Train, rounds: int, batches: int, batch_size: int) -> list[tuple[float, float]]:
    """Return the images per second of both sides for each round; the sides take turns in going first."""
    rates = []
    for number in range(rounds):
        if number % 2 == 0:
            plain_seconds = measure_seconds(plain, batches)
            our_seconds = measure_seconds(ours, batches)
        else:
            our_seconds = measure_seconds(ours, batches)
            plain_seconds = measure_seconds(plain, batches)
        plain_rate = batches * batch_size / plain_seconds
        our_rate = batches * batch_size / our_seconds
        rates.append((plain_rate, our_rate))
        ratio = our_rate / plain_rate
        print(
            f'round {number + 1}: plain {plain_rate:.1f}, ours {our_rate:.1f} images/s, ratio {ratio:.2f}', flush=True
        )
    return rates


def print_profile(learn: Learner, batches: int = 4) -> None:
    """Print the time of each operator, the share of convolutions, and the rate compared with matrix products."""
    train = make_ours(learn)
    train(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(batches)
    seconds = measure_seconds(train, batches) / batches
    operators = profile.key_averages()
    print(operators.table(sort_by='self_cpu_time_total', row_limit=15, max_name_column_width=45))
    total_time = sum(operator.self_cpu_time_total for operator in operators)
    conv_time = sum(operator.self_cpu_time_total for operator in operators if 'conv' in operator.key.lower())
    gflop = count_gflop(learn)
    matrix_rate = measure_matrix_rate()
    rate = gflop / seconds
    print(
        f'convolutions: {conv_time / total_time:.0%} of the time; {gflop:.1f} GFLOP per step in {seconds:.2f} s: '
        f'{rate:.0f} GFLOP/s, {rate / matrix_rate:.0%} of the rate of matrix products ({matrix_rate:.0f} GFLOP/s)'
    )


def count_gflop(learn: Learner) -> float:
    """Return the operations of the products and convolutions of a training step, in GFLOP.

    They are three times those of the forward pass, because the backward pass has one product for the weights and one
    for the input. (`FlopCounterMode` ignores the groups of convolutions in the backward pass.)
    """
    images, _ = learn.dls.one_batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learn.model.train()(images)
    return 3 * counter.get_total_flops() / 1e9


def measure_matrix_rate(n: int = 2048, tries: int = 5) -> float:
    """Return the best rate of a product of two n x n matrices of 32-bit numbers, in GFLOP/s."""
    a, b = torch.rand(2, n, n)
    seconds = min(measure_seconds(lambda _: torch.matmul(a, b), 1) for _ in range(tries))
    return 2 * n**3 / seconds / 1e9


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about the steps that are measured: their precision and images, and the number of rounds."""
    parser.add_argument('--precision', default=AUTO, choices=[AUTO, *CHOICES['precision']])
    parser.add_argument('--data', type=Path, help='images (default: synthetic)')
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=7)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='baseline', choices=list(PLAIN))
    parser.add_argument('--recipe', default='reference', help='recipe of the Learner')
    add_step_options(parser)
    parser.add_argument('--batches', type=int, default=4, help='batches of each side in a round')
    parser.add_argument('--compile', action='store_true', help='compile the steps of the Learner')
    parser.add_argument('--profile', action='store_true', help='also profile the Learner')
    parser.add_argument('--memory', choices=['as-used', 'kept', 'default'], default='as-used')
    return parser.parse_args()


def make_our_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe of the Learner, in the precision that `args` ask for or that a trial chooses."""
    recipe = make_recipe(args.arch, args.recipe, weights='none', size=args.size, batch_size=args.batch_size)
    precision = args.precision
    if precision == AUTO:
        precision = choose_precision(recipe, torch.device('cpu'), IMAGES_OF_A_LONG_TRAINING)['precision']
    return replace(recipe, precision=precision)


def main() -> None:
    """Measure, and print a line per round and then the medians."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = args.data
        if root is None:
            root = Path(folder, 'images')
            make_demo(root, images=320, size=args.size)
        items = read_items(root)
        train_items = items[items.split == 'train']
        plain_arguments = (args.arch, train_items, image_root(root), args.size, args.batch_size)
        our_arguments = (make_our_recipe(args), items, image_root(root), args.compile)
        if args.memory == 'kept':
            reuse_memory()
        learn = our_learner(*our_arguments)
        if args.memory == 'as-used':
            plain: Train = InOwnProcess(make_plain, *plain_arguments)
            ours: Train = InOwnProcess(make_ours_in_process, *our_arguments)
        else:
            plain = make_plain(*plain_arguments)
            ours = make_ours(learn)
        first = [measure_seconds(train, 2) for train in (plain, ours)]  # warm up
        print(f'first two batches: plain {first[0]:.1f} s, ours {first[1]:.1f} s', flush=True)
        rates = compare(plain, ours, args.rounds, args.batches, args.batch_size)
        if args.profile:
            reuse_memory()
            print_profile(learn)
    print_summary(args, our_arguments[0], rates)


def print_summary(args: argparse.Namespace, recipe: Recipe, rates: list[tuple[float, float]]) -> None:
    """Print the median rates of both sides, and the median and range of their ratio."""
    plain_rate = statistics.median(plain for plain, _ in rates)
    our_rate = statistics.median(ours for _, ours in rates)
    ratios = [ours / plain for plain, ours in rates]
    compiled = ', compiled' if args.compile else ''
    print(
        f'{args.arch}, {args.recipe}, {recipe.precision}, {args.size} px, batch {args.batch_size}, '
        f'memory {args.memory}{compiled}, {torch.get_num_threads()} threads: '
        f'median plain {plain_rate:.1f}, ours {our_rate:.1f} images/s, '
        f'ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
    )


if __name__ == '__main__':
    main()

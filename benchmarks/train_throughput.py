"""Training images per second: our Learner against the specification's plain PyTorch script, in alternating rounds.

    python benchmarks/train_throughput.py --arch baseline --rounds 7
    python benchmarks/train_throughput.py --compile             # ours as `train --compile on` has it
    python benchmarks/train_throughput.py --arch efficientnet_lite0
    python benchmarks/train_throughput.py --memory kept         # both in one process, as ours keeps memory
    python benchmarks/train_throughput.py --memory default      # both in one process, glibc's own behaviour
    python benchmarks/train_throughput.py --profile             # then also where our time goes

Both read, augment, collate and train; a round is a few whole batches of each, while the other side waits. The images are
synthetic (`--data DIR` for others). How memory is kept belongs to a process, so by default each side has its own: the
plain script with glibc's behaviour, ours with what `learner.reuse_memory` sets. `--memory kept` and `--memory default`
put both into one process, with the same for both. Compiling itself is not timed: its seconds are printed apart.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from fastai.callback.core import Callback, CancelTrainException, CancelValidException
from fastai.learner import Learner
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.hardware import CompileSteps
from cxr_fastai.training.learner import make_learner, reuse_memory, start_phase


def plain_baseline() -> nn.Module:
    """The specification's CNN."""
    layers = []
    for i, o in [(3, 32), (32, 64), (64, 128), (128, 256)]:
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
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
    """torchvision's ResNet50 with two outputs, all of it training."""
    model = torchvision.models.resnet50(weights=None)
    model.fc = nn.Linear(2048, 2)
    return model


def plain_lite() -> nn.Module:
    """timm's EfficientNet-Lite0 with two outputs, all of it training."""
    import timm

    return timm.create_model('tf_efficientnet_lite0', num_classes=2)


PLAIN = {'baseline': plain_baseline, 'resnet50': plain_resnet50, 'efficientnet_lite0': plain_lite}


class PlainImages(torch.utils.data.Dataset):
    """Pillow in RGB and torchvision's transforms, image by image."""

    def __init__(self, items, root: Path, size: int):
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

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        path, target = self.rows[i]
        return self.transform(Image.open(path).convert('RGB')), target


def plain_round(arch: str, items, root: Path, size: int, bs: int):
    """A function that trains the plain script for n batches."""
    images = torch.utils.data.DataLoader(
        PlainImages(items, root, size), batch_size=bs, shuffle=True, num_workers=0, drop_last=True
    )
    endless = itertools.chain.from_iterable(itertools.repeat(images))
    model = PLAIN[arch]().train()
    optimiser, loss_func = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4), nn.CrossEntropyLoss()

    def train(n: int) -> None:
        for xb, yb in itertools.islice(endless, n):
            optimiser.zero_grad()
            loss = loss_func(model(xb), yb)
            loss.backward()
            optimiser.step()
            loss.item()

    return train


class FirstBatches(Callback):
    """Stop the epoch after n batches, and skip validation."""

    n = 1

    def after_batch(self):
        if self.training and self.iter + 1 == self.n:
            raise CancelTrainException

    def before_validate(self):
        raise CancelValidException


def our_learner(arch: str, items, root: Path, size: int, bs: int, compiled: bool = False) -> Learner:
    """Our Learner before its last phase, as `train` makes it."""
    recipe = make_recipe(arch, weights='none', size=size, batch_size=bs)
    learn = make_learner(make_dls(items, root, recipe), recipe)
    start_phase(learn, recipe.phases[-1])
    if compiled:
        learn.add_cb(CompileSteps(size))
    return learn


def our_round(learn: Learner):
    """A function that trains `learn` for n batches of its own loader."""
    first = FirstBatches()

    def train(n: int) -> None:
        first.n = n
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=first)

    return train


def matrix_rate(n: int = 2048, tries: int = 5) -> float:
    """The best rate of a product of two matrices n x n in 32 bits, in GFLOP/s."""
    a, b = torch.rand(2, n, n)
    return 2 * n**3 / min(timed(lambda _: a @ b, 1) for _ in range(tries)) / 1e9


def step_flops(learn: Learner) -> float:
    """What the products and convolutions of a training step come to, in GFLOP: three times those of the forward pass,
    since backward has one for the weights and one for the input. (FlopCounterMode does not see groups in backward.)"""
    xb, _ = learn.dls.one_batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learn.model.train()(xb)
    return 3 * counter.get_total_flops() / 1e9


def print_profile(learn: Learner, batches: int = 4) -> None:
    """Where the time of our steps goes: operators, the share of convolutions, and the rate against that of matrices."""
    train, work, best = our_round(learn), step_flops(learn), matrix_rate()
    train(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(batches)
    seconds = timed(train, batches) / batches
    found = profile.key_averages()
    print(found.table(sort_by='self_cpu_time_total', row_limit=15, max_name_column_width=45))
    all_time = sum(event.self_cpu_time_total for event in found)
    conv_time = sum(event.self_cpu_time_total for event in found if 'conv' in event.key.lower())
    print(
        f'convolutions: {conv_time / all_time:.0%} of the time; {work:.1f} GFLOP a step in {seconds:.2f} s: '
        f'{work / seconds:.0f} GFLOP/s, {work / seconds / best:.0%} of the rate of matrix products ({best:.0f} GFLOP/s)'
    )


def timed(train, batches: int) -> float:
    """Seconds that `train` takes for `batches`."""
    start = time.perf_counter()
    train(batches)
    return time.perf_counter() - start


class InOwnProcess:
    """A side that trains in a process of its own, since how memory is kept belongs to a process: call it as the
    function that `make` of `arguments` returns there."""

    def __init__(self, make, *arguments):
        self.here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context('spawn')
        context.Process(target=serve, args=(there, make, *arguments), daemon=True).start()

    def __call__(self, n: int) -> None:
        self.here.send(n)
        self.here.recv()


def serve(there, make, *arguments) -> None:
    """Train whenever a number of batches comes."""
    train = make(*arguments)
    with suppress(EOFError):  # the other end is gone
        while True:
            train(there.recv())
            there.send(None)


def our_side(arch: str, items, root: Path, size: int, bs: int, compiled: bool, kept: bool):
    """Our round in a new process."""
    if kept:
        reuse_memory()
    return our_round(our_learner(arch, items, root, size, bs, compiled))


def compare(plain, ours, rounds: int, batches: int, batch_size: int) -> list[tuple[float, float]]:
    """Images per second of both sides, round by round; every second round the other side goes first."""
    rates = []
    for i in range(rounds):
        order = (plain, ours) if i % 2 == 0 else (ours, plain)
        seconds = {train: timed(train, batches) for train in order}
        rates.append(tuple(batches * batch_size / seconds[train] for train in (plain, ours)))
        print(
            f'round {i + 1}: plain {rates[-1][0]:.1f}, ours {rates[-1][1]:.1f} images/s, '
            f'ratio {rates[-1][1] / rates[-1][0]:.2f}',
            flush=True,
        )
    return rates


def main() -> None:
    """Measure and print a line a round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='baseline', choices=list(PLAIN))
    parser.add_argument('--data', type=Path, help='images (default: synthetic)')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=4, help='in a round, for each side')
    parser.add_argument('--compile', action='store_true', help='our steps by torch.compile')
    parser.add_argument('--profile', action='store_true', help='then also where our time goes')
    parser.add_argument('--memory', choices=['as-used', 'kept', 'default'], default='as-used')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_demo(root := Path(folder, 'images'), images=320, size=args.size)
        else:
            root = args.data
        items = read_items(root)
        shape = (image_root(root), args.size, args.batch_size)
        train_items = items[items.split == 'train']
        if args.memory == 'kept':
            reuse_memory()
        learn = our_learner(args.arch, items, *shape, args.compile)
        if args.memory == 'as-used':
            plain = InOwnProcess(plain_round, args.arch, train_items, *shape)
            ours = InOwnProcess(our_side, args.arch, items, *shape, args.compile, True)
        else:
            plain, ours = plain_round(args.arch, train_items, *shape), our_round(learn)
        first = [timed(train, 2) for train in (plain, ours)]  # warm up
        print(f'first two batches: plain {first[0]:.1f} s, ours {first[1]:.1f} s', flush=True)
        rates = compare(plain, ours, args.rounds, args.batches, args.batch_size)
        if args.profile:
            reuse_memory()
            print_profile(learn)
    plain_rate, our_rate = (statistics.median(side) for side in zip(*rates, strict=True))
    ratios = [our / plain for plain, our in rates]
    print(
        f'{args.arch}, {args.size} px, batch {args.batch_size}, memory {args.memory}'
        f'{", compiled" if args.compile else ""}, '
        f'{torch.get_num_threads()} threads: '
        f'median plain {plain_rate:.1f}, ours {our_rate:.1f} images/s, ratio {statistics.median(ratios):.2f} '
        f'({min(ratios):.2f} to {max(ratios):.2f})'
    )


if __name__ == '__main__':
    main()

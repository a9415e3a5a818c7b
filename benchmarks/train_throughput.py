"""Training films per second: our Learner against the specification's plain PyTorch script, in alternating rounds.

    python benchmarks/train_throughput.py --arch baseline --rounds 7
    python benchmarks/train_throughput.py --memory default      # glibc's own behaviour for both

Both read, augment, collate and train, in this one process; a round is a few whole batches of each. The films are
synthetic (`--data DIR` for others). `--memory kept` gives both sides what `learner.reuse_memory` gives ours in use, so
that the ratio shows the rest; what keeping memory itself is worth shows between two runs of the script.
"""
import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from fastai.callback.core import Callback, CancelTrainException, CancelValidException
from PIL import Image
from torch import nn
from torchvision import transforms as T

from cxr_fastai.core import VOCAB
from cxr_fastai.data import make_dls
from cxr_fastai.demo import make_demo
from cxr_fastai.items import film_root, read_items
from cxr_fastai.learner import make_learner, reuse_memory, start_phase
from cxr_fastai.models import make_recipe


def plain_baseline() -> nn.Module:
    """The specification's CNN."""
    layers = []
    for i, o in [(3, 32), (32, 64), (64, 128), (128, 256)]:
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 128),
                         nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 2))


def plain_resnet50() -> nn.Module:
    """torchvision's ResNet50 with two outputs, all of it training."""
    model = torchvision.models.resnet50(weights=None)
    model.fc = nn.Linear(2048, 2)
    return model


class PlainFilms(torch.utils.data.Dataset):
    """Pillow in RGB and torchvision's transforms, film by film."""

    def __init__(self, items, root: Path, size: int):
        self.rows = [(root/path, VOCAB.index(label)) for path, label in zip(items.path, items.label, strict=True)]
        self.transform = T.Compose([
            T.Resize((size, size)), T.RandomHorizontalFlip(), T.RandomRotation(10),
            T.ColorJitter(brightness=0.2, contrast=0.2), T.RandomAffine(0, translate=(0.1, 0.1)), T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        path, target = self.rows[i]
        return self.transform(Image.open(path).convert('RGB')), target


def plain_round(arch: str, items, root: Path, size: int, bs: int):
    """A function that trains the plain script for n batches."""
    films = torch.utils.data.DataLoader(PlainFilms(items, root, size), batch_size=bs, shuffle=True, num_workers=0,
                                        drop_last=True)
    endless = itertools.chain.from_iterable(itertools.repeat(films))
    model = {'baseline': plain_baseline, 'resnet50': plain_resnet50}[arch]().train()
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
        if self.training and self.iter + 1 == self.n: raise CancelTrainException

    def before_validate(self): raise CancelValidException


def our_round(arch: str, items, root: Path, size: int, bs: int):
    """A function that trains our Learner for n batches of its own loader."""
    recipe = make_recipe(arch, weights='none', size=size, batch_size=bs)
    learn = make_learner(make_dls(items, root, recipe), recipe)
    start_phase(learn, recipe.phases[-1])
    first = FirstBatches()

    def train(n: int) -> None:
        first.n = n
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=first)
    return train


def timed(train, batches: int) -> float:
    """Seconds that `train` takes for `batches`."""
    start = time.perf_counter()
    train(batches)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a line a round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='baseline', choices=['baseline', 'resnet50'])
    parser.add_argument('--data', type=Path, help='films (default: synthetic)')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=4, help='in a round, for each side')
    parser.add_argument('--memory', choices=['kept', 'default'], default='kept')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None: make_demo(root := Path(folder, 'films'), films=320, size=args.size)
        else: root = args.data
        items = read_items(root)
        if args.memory == 'kept': reuse_memory()
        shape = (film_root(root), args.size, args.batch_size)
        train_items = items[items.split == 'train']
        plain, ours = plain_round(args.arch, train_items, *shape), our_round(args.arch, items, *shape)
        for train in (plain, ours): train(2)  # warm up
        films, ratios, rates = args.batches*args.batch_size, [], []
        for i in range(args.rounds):
            # Every second round the other side goes first.
            order = (plain, ours) if i % 2 == 0 else (ours, plain)
            seconds = {train: timed(train, args.batches) for train in order}
            rates.append((films/seconds[plain], films/seconds[ours]))
            ratios.append(seconds[plain]/seconds[ours])
            print(f'round {i + 1}: plain {rates[-1][0]:.1f}, ours {rates[-1][1]:.1f} films/s, ratio {ratios[-1]:.2f}',
                  flush=True)
    plain_rate, our_rate = (statistics.median(side) for side in zip(*rates, strict=True))
    print(f'{args.arch}, {args.size} px, batch {args.batch_size}, memory {args.memory}, '
          f'{torch.get_num_threads()} threads: '
          f'median plain {plain_rate:.1f}, ours {our_rate:.1f} films/s, ratio {statistics.median(ratios):.2f} '
          f'({min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__': main()

"""How much of a training step is not the network's: steps on one batch, and with loading, in turn.

    python benchmarks/step_share.py --arch baseline --cache
    python benchmarks/step_share.py --arch efficientnet_lite0 --recipe reference --precision fp32

A round takes the same number of steps three times: on one batch, which is prepared already; with batches that the main
thread prepares between the steps, as `train` does on a processor; and with batches that a second thread prepares during
the steps, as `train` does on a GPU. The images are synthetic; `--data DIR` takes others. The difference to the first is
what loading and augmentation cost.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from fastai.callback.core import Callback
from fastai.learner import Learner
from train_throughput import NoValidation, add_step_options, make_our_recipe, our_learner

from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.training.ahead import PrepareAhead
from cxr_fastai.training.hardware import reuse_memory


class SameBatch(Callback):
    """Train with the same batch `n` times."""

    order = PrepareAhead.order + 1

    def __init__(self, learn: Learner, n: int) -> None:
        self.batches = [learn.dls.train.one_batch()] * n

    def before_train(self) -> None:
        self.learn.dl = self.batches


def measure_step(learn: Learner, batches: int, same: SameBatch | None = None, overlap: bool = False) -> float:
    """Return the milliseconds of a step, over so many `batches`."""
    learn.prepare_ahead.overlap = overlap
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[NoValidation(), *([same] if same else [])])
    return 1000 * (time.perf_counter() - start) / batches


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='baseline')
    parser.add_argument('--recipe', default='tuned')
    add_step_options(parser)
    parser.add_argument('--cache', action='store_true', help='read the images from a cache, as after `data prepare`')
    parser.add_argument('--batches', type=int, default=6, help='steps of each kind in a round')
    return parser.parse_args()


def main() -> None:
    """Measure, and print a line per round and then the medians."""
    args = parse_arguments()
    reuse_memory()
    with tempfile.TemporaryDirectory() as folder:
        root = args.data
        if root is None:
            root = Path(folder, 'images')
            make_demo(root, images=400, size=args.size)
        items = read_items(root)
        recipe = make_our_recipe(args)
        cache = None
        if args.cache:
            prepare(items.path, image_root(root), Preprocessing.of(recipe))
            cache = find_cache(image_root(root), Preprocessing.of(recipe))
        learn = our_learner(recipe, items, image_root(root), cache=cache)
        same = SameBatch(learn, args.batches)
        indices = learn.dls.train.get_idxs
        learn.dls.train.get_idxs = lambda: indices()[: args.batches * args.batch_size]
        measure_step(learn, args.batches)  # warm up
        shares = []
        for number in range(args.rounds):
            network = measure_step(learn, args.batches, same)
            between = measure_step(learn, args.batches)
            during = measure_step(learn, args.batches, overlap=True)
            shares.append((1 - network / between, 1 - network / during))
            print(
                f'round {number + 1}: network {network:.0f} ms; loading between the steps {between:.0f} ms '
                f'({shares[-1][0]:.0%} not the network), during the steps {during:.0f} ms ({shares[-1][1]:.0%})',
                flush=True,
            )
    between_steps, during_steps = (statistics.median(column) for column in zip(*shares, strict=True))
    print(
        f'{args.arch}, {args.recipe}, {recipe.precision}, {args.size} px, batch {args.batch_size}'
        f'{", cached" if args.cache else ""}: median share that is not the network: {between_steps:.0%} with loading '
        f'between the steps, {during_steps:.0%} during the steps'
    )


if __name__ == '__main__':
    main()

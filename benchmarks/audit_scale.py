"""Measure time and memory of the search for duplicates among many synthetic thumbnails.

    python benchmarks/audit_scale.py --images 100000

The thumbnails are blurred noise; every 1,000th is a copy of the one before with some noise added. Prints the number of
duplicates found, the seconds, and the peak of resident memory of the process (Linux).
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from cxr_fastai.data.image_stats import THUMBNAIL_SIZE, find_duplicates

COPY_EVERY = 1000


def make_thumbnails(n: int, block: int = 10_000) -> np.ndarray:
    """Return synthetic thumbnails: uint8 (n, 32, 32)."""
    rng = np.random.default_rng(0)
    images = np.empty((n, THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    for start in range(0, n, block):
        count = min(block, n - start)
        noise = rng.standard_normal((count, THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.float32)
        noise = gaussian_filter(noise, (0, 2, 2))
        images[start : start + block] = np.clip(128 + 400 * noise, 0, 255)
    copies = np.arange(1, n, COPY_EVERY)
    change = rng.integers(-2, 3, (len(copies), THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    images[copies] = np.clip(images[copies - 1] + change, 0, 255)
    return images


def peak_memory() -> str:
    """Return the peak of resident memory of this process."""
    status = Path('/proc/self/status')
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith('VmHWM'):
                return f'{int(line.split()[1]) / 1000:.0f} MB'
    return 'unknown'


def main() -> None:
    """Make thumbnails, search for duplicates, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=100_000)
    n = parser.parse_args().images
    images = make_thumbnails(n)
    print(f'{n:,} thumbnails, peak memory {peak_memory()}')
    start = time.perf_counter()
    pairs = find_duplicates(images)
    seconds = time.perf_counter() - start
    copies = {(i - 1, i) for i in range(1, n, COPY_EVERY)}
    found = copies & {(i, j) for i, j, _ in pairs}
    print(f'{len(pairs)} pairs, {len(found)} of {len(copies)} copies; {seconds:.1f} s, peak memory {peak_memory()}')


if __name__ == '__main__':
    main()

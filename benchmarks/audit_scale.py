"""Time and memory of the search for copies among many synthetic thumbnails, some of them planted copies.

    python benchmarks/audit_scale.py --images 100000

Blurred noise that differs from image to image; every 1,000th is a copy of the one before with noise added. Prints the
copies found, the seconds, and the process's peak of resident memory (Linux).
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from cxr_fastai.data.image_stats import THUMBNAIL_SIZE, find_duplicates


def thumbnails(n: int, block: int = 10_000) -> np.ndarray:
    """Synthetic thumbnails: uint8 (n, 32, 32)."""
    rng, images = np.random.default_rng(0), np.empty((n, THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    for start in range(0, n, block):
        noise = rng.standard_normal((min(block, n - start), THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.float32)
        noise = gaussian_filter(noise, (0, 2, 2))
        images[start : start + block] = np.clip(128 + 400 * noise, 0, 255)
    copies = np.arange(1, n, 1000)
    images[copies] = np.clip(images[copies - 1] + rng.integers(-2, 3, (len(copies), THUMBNAIL_SIZE, THUMBNAIL_SIZE)), 0, 255)
    return images


def peak() -> str:
    """The process's peak of resident memory, in MB."""
    status = Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    return next((f'{int(line.split()[1]) / 1000:.0f} MB' for line in lines if line.startswith('VmHWM')), 'unknown')


def main() -> None:
    """Make, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=100_000)
    n = parser.parse_args().images
    images = thumbnails(n)
    print(f'{n:,} thumbnails made, peak {peak()}')
    start = time.perf_counter()
    pairs = find_duplicates(images)
    planted = {(i - 1, i) for i in range(1, n, 1000)}
    print(
        f'{len(pairs)} pairs, {len(planted & {(i, j) for i, j, _ in pairs})} of {len(planted)} planted; '
        f'{time.perf_counter() - start:.1f} s, peak {peak()}'
    )


if __name__ == '__main__':
    main()

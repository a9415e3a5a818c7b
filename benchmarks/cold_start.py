"""Seconds of `cxr-fastai predict MODEL IMAGE`, from the start of the process to its exit.

    python benchmarks/cold_start.py BUNDLE IMAGE
    python benchmarks/cold_start.py BUNDLE IMAGE --run RUN --rounds 5

A round starts each of these once: a bare script, which imports NumPy, Pillow and ONNX Runtime and predicts without any
check; the bundle; and the run folder. Compiled Python files are used, as after an installation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = """
import sys
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
side = session.get_inputs()[0].shape[-1]
image = Image.open(sys.argv[2]).convert('L').resize((side, side))
print(session.run(None, {session.get_inputs()[0].name: np.asarray(image)[None, None]})[0])
"""


def time_command(command: list[str]) -> float:
    """Return the seconds of a process. Raises `CalledProcessError` if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print the median and the range of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('image', type=Path)
    parser.add_argument('--run', type=Path, help='run folder')
    parser.add_argument('--rounds', type=int, default=10)
    args = parser.parse_args()
    model, image = str(next(args.bundle.glob('*.onnx'))), str(args.image)
    predict = [sys.executable, '-m', 'cxr_fastai', 'predict']
    commands = {
        'bare script': [sys.executable, '-c', BARE, model, image],
        'bundle': [*predict, str(args.bundle), image],
    }
    if args.run:
        commands['run folder'] = [*predict, str(args.run), image]
    for command in commands.values():
        time_command(command)  # the first start reads the files from the disk and compiles modules
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            seconds[name].append(time_command(command))
    for name, values in seconds.items():
        print(f'{name:12} median {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})')


if __name__ == '__main__':
    main()

"""What serving costs: images a second and latency at 1, 4, 8 and 32 clients, against the Predictor's own batches.

    python benchmarks/serve.py BUNDLE IMAGES --rounds 3
    python benchmarks/serve.py BUNDLE IMAGES --soak 900

The clients are threads of this process, each with one connection that it keeps, on the loopback, and share the cores
with the service; each posts one image and waits for its answer. Rounds alternate between the Predictor (batches of 32,
the same files) and every number of clients.

`--soak` posts for so many seconds with 8 clients, checks each answer against the
Predictor's, and prints the memory of the service every minute.
"""

import argparse
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cxr_fastai.data.find import list_images
from cxr_fastai.inference.predictor import Predictor

CLIENTS = (1, 4, 8, 32)
BOUNDARY = 'image-boundary-0'
HEADERS = {'Content-Type': f'multipart/form-data; boundary={BOUNDARY}'}


def body(image: bytes) -> bytes:
    """A form with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="f"\r\n\r\n'.encode()
    return head + image + f'\r\n--{BOUNDARY}--\r\n'.encode()


@contextmanager
def serving(bundle: Path):
    """The port of a service of `bundle`, how long it took to get ready, and its process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-m', 'cxr_fastai', 'serve', str(bundle), '--port', '0'],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = int(re.search(r':(\d+) ', process.stdout.readline())[1])
    while ask(port, 'GET', '/ready')[0] != 200:
        time.sleep(0.01)
    try:
        yield port, time.perf_counter() - start, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


def ask(port: int, method: str, path: str, sent: bytes | None = None, kept: http.client.HTTPConnection | None = None):
    """Status and body of the answer; 0 where the connection broke."""
    connection = kept or http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    try:
        connection.request(method, path, sent, HEADERS if sent else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, b''


def post_all(port: int, images: list[bytes], clients: int, until: float | None = None, check=lambda image, told: None):
    """The latencies of each answer when `clients` post all images, or go on until a time; and counts of statuses."""
    latencies, statuses, lock, jobs = [], Counter(), threading.Lock(), iter(range(10**9))

    def client() -> None:
        kept = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        while True:
            with lock:
                job = next(jobs)
            if (until is None and job >= len(images)) or (until and time.monotonic() > until):
                return
            start = time.perf_counter()
            status, told = ask(port, 'POST', '/v1/predict', images[job % len(images)], kept)
            seconds = time.perf_counter() - start
            with lock:
                statuses[status] += 1
                if status == 200:
                    latencies.append(seconds)
            if status == 200:
                check(job % len(images), told)
            else:
                time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, statuses


def memory(pid: int) -> int:
    """Resident bytes of a process and those it started."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') + sum(memory(int(child)) for child in children)


def compare(bundle: Path, paths: list[Path], rounds: int) -> None:
    """Images a second and latencies of all numbers of clients, and their ratio to the Predictor's rate."""
    images, rows = [body(path.read_bytes()) for path in paths], {clients: [] for clients in CLIENTS}
    predictor = Predictor.load(bundle, engine='onnx')
    list(predictor.predict(paths))
    with serving(bundle) as (port, ready, _):
        print(f'ready after {ready:.2f} s; {len(paths)} images')
        for clients in CLIENTS:
            post_all(port, images, clients)
        for _ in range(rounds):
            for clients in CLIENTS:
                start = time.perf_counter()
                list(predictor.predict(paths))
                own = len(paths) / (time.perf_counter() - start)
                start = time.perf_counter()
                latencies, statuses = post_all(port, images, clients)
                rate = len(latencies) / (time.perf_counter() - start)
                rows[clients].append((rate, rate / own, own, *np.percentile(latencies, (50, 95, 99))))
                if set(statuses) != {200}:
                    print('statuses', dict(statuses))
    print('clients  images/s  of the Predictor (range)    p50 ms  p95 ms  p99 ms')
    for clients, found in rows.items():
        rate, _, _, p50, p95, p99 = np.median(found, axis=0)
        ratios = [row[1] for row in found]
        print(
            f'{clients:7}  {rate:7.1f}  {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
            f'{1000 * p50:16.0f}{1000 * p95:8.0f}{1000 * p99:8.0f}'
        )
    single = np.median(rows[1], axis=0)[3]
    own = np.median([row[2] for found in rows.values() for row in found])
    print(
        f'Predictor {own:.1f} images/s; p95 at 4 clients is '
        f'{np.median(rows[4], axis=0)[4] / single:.2f} times the latency of a single image'
    )


def soak(bundle: Path, paths: list[Path], seconds: int) -> None:
    """Post with 8 clients, and look at answers and memory."""
    import json

    known = [row['p_pneumonia'] for row in Predictor.load(bundle, engine='onnx').predict(paths)]
    images, wrong, statuses, sizes = [body(path.read_bytes()) for path in paths], [], Counter(), []

    def check(image: int, told: bytes) -> None:
        p = json.loads(told)['images'][0]['p_pneumonia']
        if (p is None) != (known[image] is None) or p is not None and abs(p - known[image]) > 1e-6:
            wrong.append(image)

    with serving(bundle) as (port, _, process):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _, found = post_all(port, images, 8, min(time.monotonic() + 60, end), check)
            statuses += found
            sizes.append(memory(process.pid))
            print(f'{dict(statuses)}, wrong {len(wrong)}, {sizes[-1] / 1e6:.0f} MB', flush=True)
    drift = sizes[-1] / sizes[min(1, len(sizes) - 1)] - 1
    print(f'memory from the second minute on: {100 * drift:+.1f} %')
    if wrong or set(statuses) - {200, 429, 503} or drift > 0.1:
        sys.exit('the service did not hold')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--limit', type=int, default=200)
    parser.add_argument('--soak', type=int, default=0, metavar='SECONDS')
    args = parser.parse_args()
    paths = list_images([args.images])[: args.limit]
    soak(args.bundle, paths, args.soak) if args.soak else compare(args.bundle, paths, args.rounds)

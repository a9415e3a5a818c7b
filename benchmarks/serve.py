"""Throughput and latency of the service with 1, 4, 8 and 32 clients, compared with batches of the Predictor.

    python benchmarks/serve.py BUNDLE IMAGES --rounds 3
    python benchmarks/serve.py BUNDLE IMAGES --soak 900

The clients are threads of this process, each with one persistent connection over the loopback interface. They share
the cores with the service. Each client posts one image and waits for the response. Rounds alternate between the
Predictor (batches of 32, the same files) and each number of clients.

The clients take time of the cores that a service has for itself if its clients are other computers. The CPU time of
each kind of process is therefore printed too (Linux only): that of the service, by its web, decoder and ONNX processes,
that of the Predictor, and that of the clients. `without clients` is the fraction of the Predictor's rate if the CPU
time of the clients, spread over all cores, is subtracted from the elapsed time. `CPU` is the CPU time of the Predictor
per image as a fraction of that of the service. With `OPENBLAS_NUM_THREADS=1` in the environment, the Predictor computes
its input gate in one thread, as the service does.

`--soak` posts for that many seconds with 8 clients, compares each response with the Predictor, and prints the memory of
the service every minute.
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from cxr_fastai.core.hardware import available_cores
from cxr_fastai.data.find import list_images
from cxr_fastai.inference.predictor import Predictor

CLIENTS = (1, 4, 8, 32)
BOUNDARY = 'image-boundary-0'
HEADERS = {'Content-Type': f'multipart/form-data; boundary={BOUNDARY}'}
TOLERANCE = 1e-6
"""Largest difference between a probability of the service and one of the Predictor."""
MAX_MEMORY_GROWTH = 0.1
KINDS = ('main', 'decoders', 'onnx')
"""Kinds of processes: that of the service or the Predictor itself, those that decode images, and ONNX Runtime."""


def make_form(image: bytes) -> bytes:
    """Return a multipart form with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="f"\r\n\r\n'.encode()
    return head + image + f'\r\n--{BOUNDARY}--\r\n'.encode()


@dataclass
class RunningService:
    """The command `serve` in a process, and the seconds that it took to be ready."""

    process: subprocess.Popen
    port: int
    startup_seconds: float


@contextmanager
def run_service(bundle: Path) -> Iterator[RunningService]:
    """Serve `bundle` within this context."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-m', 'cxr_fastai', 'serve', str(bundle), '--port', '0'],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = int(re.search(r':(\d+) ', process.stdout.readline())[1])
    while request(connect(port), 'GET', '/ready')[0] != 200:
        time.sleep(0.01)
    try:
        yield RunningService(process, port, time.perf_counter() - start)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


def connect(port: int) -> http.client.HTTPConnection:
    """Return a connection to the service."""
    return http.client.HTTPConnection('127.0.0.1', port, timeout=60)


def request(
    connection: http.client.HTTPConnection, method: str, path: str, form: bytes | None = None
) -> tuple[int, bytes]:
    """Return the status and the body of the response; the status is 0 if the connection was closed."""
    try:
        connection.request(method, path, form, HEADERS if form else {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, b''


@dataclass
class Load:
    """Posts of several clients: the seconds of each successful response, and the number of responses by status."""

    forms: list[bytes]
    seconds: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)

    def post_once(self, port: int, clients: int) -> None:
        """Post every form once."""
        self._run(port, clients, lambda number: number < len(self.forms), None)

    def post_for(self, port: int, clients: int, seconds: float, check: Callable[[int, bytes], None]) -> None:
        """Post for that many seconds; `check` gets the number of the form and the body of each response."""
        end = time.monotonic() + seconds
        self._run(port, clients, lambda number: time.monotonic() < end, check)

    def _run(
        self,
        port: int,
        clients: int,
        has_time: Callable[[int], bool],
        check: Callable[[int, bytes], None] | None,
    ) -> None:
        numbers = count()
        lock = threading.Lock()

        def work() -> None:
            connection = connect(port)
            while True:
                with lock:
                    number = next(numbers)
                if not has_time(number):
                    return
                form_number = number % len(self.forms)
                start = time.perf_counter()
                status, body = request(connection, 'POST', '/v1/predict', self.forms[form_number])
                elapsed = time.perf_counter() - start
                with lock:
                    self.statuses[status] += 1
                    if status == 200:
                        self.seconds.append(elapsed)
                if status != 200:
                    time.sleep(0.05)
                elif check:
                    check(form_number, body)

        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@dataclass
class Round:
    """Images per second of the service and of the Predictor, and latencies of the service in milliseconds.

    The CPU times are in seconds per image, by kind of process; `client_cpu` is that of all clients.
    """

    service_rate: float
    predictor_rate: float
    p50: float
    p95: float
    p99: float
    service_cpu: Counter
    predictor_cpu: Counter
    client_cpu: float

    @property
    def ratio(self) -> float:
        """The rate of the service as a fraction of the rate of the Predictor."""
        return self.service_rate / self.predictor_rate

    @property
    def ratio_without_clients(self) -> float:
        """The same if the clients had run on other computers."""
        seconds = 1 / self.service_rate - self.client_cpu / available_cores()
        return 1 / seconds / self.predictor_rate

    @property
    def cpu_ratio(self) -> float:
        """The CPU time of the Predictor as a fraction of that of the service."""
        return self.predictor_cpu.total() / max(self.service_cpu.total(), 1e-9)


def compare(bundle: Path, paths: list[Path], rounds: int) -> None:
    """Print rates and latencies for each number of clients."""
    forms = [make_form(path.read_bytes()) for path in paths]
    predictor = Predictor.load(bundle, engine='onnx')
    list(predictor.predict(paths))
    results: dict[int, list[Round]] = {clients: [] for clients in CLIENTS}
    with run_service(bundle) as service:
        print(f'ready after {service.startup_seconds:.2f} s; {len(paths)} images')
        for clients in CLIENTS:
            Load(forms).post_once(service.port, clients)
        for _ in range(rounds):
            for clients in CLIENTS:
                results[clients].append(measure_round(predictor, paths, forms, service, clients))
    print_results(results)


def measure_round(
    predictor: Predictor, paths: list[Path], forms: list[bytes], service: RunningService, clients: int
) -> Round:
    """Measure the Predictor, and then the service."""
    own = os.getpid()
    cpu, start = cpu_seconds(own, service.process.pid), time.perf_counter()
    list(predictor.predict(paths))
    predictor_rate = len(paths) / (time.perf_counter() - start)
    predictor_cpu = cpu_seconds(own, service.process.pid) - cpu
    load = Load(forms)
    client_cpu, cpu, start = time.process_time(), cpu_seconds(service.process.pid), time.perf_counter()
    load.post_once(service.port, clients)
    service_rate = len(load.seconds) / (time.perf_counter() - start)
    service_cpu = cpu_seconds(service.process.pid) - cpu
    client_cpu = time.process_time() - client_cpu
    if set(load.statuses) != {200}:
        print('statuses', dict(load.statuses))
    p50, p95, p99 = 1000 * np.percentile(load.seconds, (50, 95, 99))
    return Round(
        service_rate,
        predictor_rate,
        p50,
        p95,
        p99,
        Counter({kind: seconds / len(paths) for kind, seconds in service_cpu.items()}),
        Counter({kind: seconds / len(paths) for kind, seconds in predictor_cpu.items()}),
        client_cpu / len(paths),
    )


def cpu_seconds(pid: int, other: int = 0) -> Counter:
    """Return the CPU time of a process and its children, without the child `other`, by kind of process."""
    seconds: Counter = Counter()
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):  # the process has ended
            stat = (folder / 'stat').read_text().rpartition(')')[2].split()
            number, parent = int(folder.name), int(stat[1])
            if number == pid or (parent == pid and number != other):
                seconds[kind_of_process(folder, number == pid)] += int(stat[11]) + int(stat[12])
    ticks = os.sysconf('SC_CLK_TCK')
    return Counter({kind: count / ticks for kind, count in seconds.items()})


def kind_of_process(folder: Path, is_parent: bool) -> str:
    """Return `main`, `decoders` or `onnx` for the process of a folder in `/proc`."""
    if is_parent:
        return 'main'
    return 'decoders' if b'decoder_process' in (folder / 'cmdline').read_bytes() else 'onnx'


def print_results(results: dict[int, list[Round]]) -> None:
    """Print the medians over the rounds."""
    print('clients  images/s  of the Predictor (range)  without clients   CPU   p50 ms  p95 ms  p99 ms')
    for clients, rounds in results.items():
        ratios = [each.ratio for each in rounds]
        rate = np.median([each.service_rate for each in rounds])
        without_clients = np.median([each.ratio_without_clients for each in rounds])
        cpu_ratio = np.median([each.cpu_ratio for each in rounds])
        p50, p95, p99 = np.median([(each.p50, each.p95, each.p99) for each in rounds], axis=0)
        print(
            f'{clients:7}  {rate:8.1f}  {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
            f'{without_clients:20.2f}{cpu_ratio:10.2f}{p50:9.1f}{p95:8.1f}{p99:8.1f}'
        )
    print('CPU time per image')
    for clients, rounds in results.items():
        client_cpu = np.median([each.client_cpu for each in rounds])
        service_cpu = describe_cpu([each.service_cpu for each in rounds])
        print(f'{clients:7}  service {service_cpu}, clients {1000 * client_cpu:.1f} ms')
    every = [each for rounds in results.values() for each in rounds]
    predictor_rate = np.median([each.predictor_rate for each in every])
    print(f'Predictor {predictor_rate:.1f} images/s, CPU {describe_cpu([each.predictor_cpu for each in every])}')


def describe_cpu(seconds: list[Counter]) -> str:
    """Return the medians of the total and of each kind of process in milliseconds."""
    total = np.median([each.total() for each in seconds])
    kinds = [f'{kind} {1000 * np.median([each[kind] for each in seconds]):.1f}' for kind in KINDS]
    return f'{1000 * total:.1f} ms ({", ".join(kinds)})'


def soak(bundle: Path, paths: list[Path], seconds: int) -> None:
    """Post with 8 clients, and check responses and memory. Exits with 1 if the service fails."""
    expected = [row['p_pneumonia'] for row in Predictor.load(bundle, engine='onnx').predict(paths)]
    wrong: list[int] = []

    def check(number: int, body: bytes) -> None:
        p = json.loads(body)['images'][0]['p_pneumonia']
        if p is None or expected[number] is None:
            is_right = p is expected[number]
        else:
            is_right = abs(p - expected[number]) <= TOLERANCE
        if not is_right:
            wrong.append(number)

    load = Load([make_form(path.read_bytes()) for path in paths])
    memory: list[int] = []
    with run_service(bundle) as service:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load.post_for(service.port, 8, min(60, end - time.monotonic()), check)
            memory.append(resident_bytes(service.process.pid))
            print(f'{dict(load.statuses)}, wrong {len(wrong)}, {memory[-1] / 1e6:.0f} MB', flush=True)
    second_minute = memory[min(1, len(memory) - 1)]
    growth = memory[-1] / second_minute - 1
    print(f'memory since the second minute: {growth:+.1%}')
    if wrong or set(load.statuses) - {200, 503} or growth > MAX_MEMORY_GROWTH:
        sys.exit('error: wrong responses, unexpected statuses, or growing memory')


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--limit', type=int, default=200, help='number of images')
    parser.add_argument('--soak', type=int, default=0, metavar='SECONDS')
    args = parser.parse_args()
    paths = list_images([args.images])[: args.limit]
    if args.soak:
        soak(args.bundle, paths, args.soak)
    else:
        compare(args.bundle, paths, args.rounds)

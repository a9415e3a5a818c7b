"""Latency of the service for ordinary clients, with and without attackers.

    python benchmarks/service_under_attack.py BUNDLE IMAGES --rounds 3

Ordinary clients post one image each and wait for the response. The attackers do the same with small files that take
seconds, or much memory, to decode, and post the next as soon as they have an answer. Rounds without and with attackers
alternate. All clients are threads of this process, and share the cores with the service.

The exit code is 1 if the 95th percentile of the ordinary clients is above 2 s in any round, or if one of their requests
is not answered.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless
from serve import connect, make_form, request, run_service

from cxr_fastai.data.find import list_images

MAX_P95 = 2.0
"""Largest 95th percentile of the seconds of ordinary clients under attack."""
WINDOWS = 32_767
SIDE = 6300
"""Side of the largest pictures that are accepted, in pixels."""


def make_attacks() -> dict[str, bytes]:
    """Return a name and the contents of each hostile file."""
    pattern = np.tile(np.arange(SIDE) % 256, (SIDE, 1)).astype(np.uint8)
    return {
        f'DICOM with {WINDOWS} windows': many_windows(),
        'JPEG 2000 of 40 megapixels': jpeg_2000(pattern),
        'PNG of 40 megapixels with 16 bits': png(256 * pattern.astype(np.uint16)),
        'PNG of 40 megapixels with colour': png(np.stack([pattern] * 3, axis=-1)),
        'text': b'not an image',
    }


def many_windows() -> bytes:
    """Return a DICOM file whose pairs of window centre and width show nothing."""
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    image = radiograph(pixels, ImplicitVRLittleEndian)
    image.WindowCenter = ['1'] * WINDOWS
    image.WindowWidth = ['1'] * WINDOWS
    image.PixelData = pixels.tobytes()
    return saved(image)


def jpeg_2000(pixels: np.ndarray) -> bytes:
    """Return a DICOM file with one JPEG 2000 picture."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG2000')
    image = radiograph(pixels, JPEG2000Lossless)
    image.PixelData = encapsulate([buffer.getvalue()])
    return saved(image)


def radiograph(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    """Return the dataset of a digital radiograph, without its pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    meta.MediaStorageSOPInstanceUID = '1.2.3'
    image = FileDataset('', Dataset(), file_meta=meta, preamble=b'\0' * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Modality, image.PhotometricInterpretation = 'DX', 'MONOCHROME2'
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PixelRepresentation = 1, 0
    image.BitsAllocated = image.BitsStored = 8 * pixels.itemsize
    image.HighBit = image.BitsStored - 1
    return image


def saved(image: FileDataset) -> bytes:
    """Return the file of a dataset."""
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of `pixels`."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()


class Clients:
    """Threads that post forms, one after the other, until `stop`."""

    def __init__(self, port: int, forms: list[bytes], number: int) -> None:
        self.port = port
        self.forms = forms
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._post, args=(first,)) for first in range(number)]
        for thread in self.threads:
            thread.start()

    def _post(self, first: int) -> None:
        connection = connect(self.port)
        number = first
        while not self.stopping.is_set():
            start = time.perf_counter()
            status, _ = request(connection, 'POST', '/v1/predict', self.forms[number % len(self.forms)])
            self.seconds.append(time.perf_counter() - start)
            self.statuses[status] += 1
            number += 1

    def stop(self) -> None:
        """Wait for the last responses."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()


@dataclass
class Round:
    """Latencies of ordinary clients in milliseconds, and the statuses of all clients."""

    p50: float
    p95: float
    slowest: float
    responses: int
    statuses: Counter[int]
    attack_statuses: Counter[int]


def measure(port: int, forms: list[bytes], clients: int, attackers: Callable[[], Clients], seconds: float) -> Round:
    """Measure ordinary clients for some `seconds`, which begin when the attackers are in full swing."""
    attack = attackers()
    time.sleep(1)
    ordinary = Clients(port, forms, clients)
    time.sleep(seconds)
    ordinary.stop()
    attack.stop()
    p50, p95, slowest = 1000 * np.percentile(ordinary.seconds, (50, 95, 100))
    return Round(p50, p95, slowest, len(ordinary.seconds), ordinary.statuses, attack.statuses)


def print_round(name: str, result: Round) -> None:
    """Print one line."""
    print(
        f'{name:<16}{result.p50:8.0f}{result.p95:8.0f}{result.slowest:8.0f}{result.responses:10}  '
        f'{dict(result.statuses)}  {dict(result.attack_statuses) or ""}',
        flush=True,
    )


def main(bundle: Path, paths: list[Path], rounds: int, seconds: float, clients: int, attackers: int) -> int:
    """Print the latencies of all rounds. Return 1 if ordinary clients wait too long under attack."""
    forms = [make_form(path.read_bytes()) for path in paths]
    attacks = make_attacks()
    for name, data in attacks.items():
        print(f'{name}: {len(data) / 1000:.0f} kB')
    attack_forms = [make_form(data) for data in attacks.values()]
    quiet, attacked = [], []
    print(f'{clients} clients, {attackers} attackers\n{"":<16}  p50 ms  p95 ms  max ms responses  statuses')
    with run_service(bundle) as service:
        for _ in range(rounds):
            for name, number, results in (('quiet', 0, quiet), ('under attack', attackers, attacked)):
                result = measure(
                    service.port,
                    forms,
                    clients,
                    lambda number=number: Clients(service.port, attack_forms, number),
                    seconds,
                )
                print_round(name, result)
                results.append(result)
    ratio = np.median([each.p95 for each in attacked]) / np.median([each.p95 for each in quiet])
    worst = max(each.p95 for each in attacked) / 1000
    print(f'p95 under attack: {worst:.2f} s at worst, {ratio:.1f} times that of quiet rounds (medians)')
    all_answered = all(set(each.statuses) == {200} for each in attacked)
    return 0 if worst < MAX_P95 and all_answered else 1


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=20, help='length of a round')
    parser.add_argument('--clients', type=int, default=4)
    parser.add_argument('--attackers', type=int, default=8)
    parser.add_argument('--limit', type=int, default=60, help='number of images')
    args = parser.parse_args()
    paths = list_images([args.images])[: args.limit]
    sys.exit(main(args.bundle, paths, args.rounds, args.seconds, args.clients, args.attackers))

"""Images of strangers are decoded in processes: what a slow, large or fatal image costs, and whom it affects."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from imagefiles import GREY, dicom, encoded
from services import wait_until

from cxr_fastai.core.errors import CXRError, ImageError
from cxr_fastai.images import decoder_start
from cxr_fastai.images.decode import decode_image, open_image
from cxr_fastai.images.decoder_pool import DecodeGroup, DecoderPool
from cxr_fastai.images.decoder_start import start_decoder
from cxr_fastai.images.preprocessing import Preprocessing

FILES = {
    'JPEG': encoded(GREY, 'JPEG'),
    '16-bit PNG': encoded(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) * 7),
    'DICOM': dicom(),
    'burned in': dicom(BurnedInAnnotation='YES'),
}
PATIENCE = 60


@pytest.fixture(scope='module')
def pool():
    with DecoderPool(2) as pool:
        yield pool


@pytest.fixture(scope='module')
def slow() -> bytes:
    """A valid image that takes about a second to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (6000, 6600), np.uint8)
    return encoded(pixels, 'JPEG', progressive=True, quality=95)


def error_of(future) -> ImageError:
    error = future.exception(PATIENCE)
    assert isinstance(error, ImageError)
    return error


@pytest.mark.parametrize('kind', FILES)
def test_a_process_gives_the_same_image_as_this_one(pool, kind):
    preprocessing = Preprocessing(64, low_pass=0.01)
    image = pool.decode(FILES[kind], preprocessing)
    expected = decode_image(FILES[kind], preprocessing)
    assert np.array_equal(image.pixels, expected.pixels)
    assert np.array_equal(image.square, preprocessing.fit(expected.pixels))
    for name in ('format', 'mode', 'bits', 'width', 'height', 'notes', 'burned_in'):
        assert getattr(image, name) == getattr(expected, name)


def test_a_process_that_cannot_be_started_is_an_error_and_not_a_wait(tmp_path, monkeypatch):
    python = tmp_path / 'python'
    python.touch(mode=0o600)  # not executable
    with DecoderPool(1) as pool:
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
            patch.setattr(sys, 'executable', str(python))
            future = threads.submit(pool.decode, FILES['JPEG'], Preprocessing(64))
            error = future.exception(PATIENCE)
        assert isinstance(error, CXRError) and 'did not start' in str(error) and 'Permission denied' in str(error)
        assert pool.decode(FILES['JPEG'], Preprocessing(64)).format == 'JPEG'  # with the next image it is tried again


def test_an_image_uses_the_process_that_was_started_for_it():
    before = children()
    with DecoderPool(2) as pool:
        pool.start(1)
        assert pool.decode(FILES['JPEG']).format == 'JPEG'
        assert len(children() - before) == 1


def test_processes_that_were_started_for_nothing_end_with_the_pool():
    before = children()
    with DecoderPool(2) as pool:
        pool.start(5)
        wait_until(lambda: len(children() - before) == 2)
    assert children() <= before


def test_pixels_are_reduced_or_left_out_on_request(pool):
    data = encoded(np.tile(GREY, (10, 10)))
    assert max(pool.decode(data, side=100).pixels.shape) == 100
    assert pool.decode(data, Preprocessing(64), side=0).pixels.size == 0


@pytest.mark.parametrize('data', [b'', b'text', encoded(GREY)[:-200], dicom(Modality='CT')])
def test_an_image_that_cannot_be_used_has_the_same_error(pool, data):
    with pytest.raises(ImageError) as expected:
        decode_image(data)
    error = error_of(pool.submit(data))
    assert (error.code, str(error)) == (expected.value.code, str(expected.value))


def test_images_of_pillow_and_arrays_need_no_process(tmp_path):
    with DecoderPool(1) as pool:
        pool.close()
        assert np.array_equal(open_image(GREY, decode=pool.decode).pixels, GREY)
        (tmp_path / 'a.png').write_bytes(encoded(GREY))
        with pytest.raises(CancelledError):
            open_image(tmp_path / 'a.png', decode=pool.decode)


def test_an_image_over_the_deadline_times_out_alone(slow):
    with DecoderPool(1, seconds=0.5) as pool:
        quick, late, last = pool.submit(FILES['JPEG']), pool.submit(slow), pool.submit(FILES['DICOM'])
        assert error_of(late).code == 'E_TIMEOUT'
        assert quick.result(PATIENCE).format == 'JPEG' and last.result(PATIENCE).format == 'DICOM'


def test_an_image_that_needs_too_much_memory_is_too_large_alone():
    with DecoderPool(1, memory=200 * 2**20) as pool:
        large, other = pool.submit(encoded(np.tile(GREY, (60, 60)))), pool.submit(FILES['JPEG'])
        assert error_of(large).code == 'E_TOO_LARGE' and error_of(large).status == 'rejected'
        assert other.result(PATIENCE).format == 'JPEG'


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGSEGV, 'E_TRUNCATED'), (signal.SIGKILL, 'E_TOO_LARGE')])
def test_a_crash_of_a_decoder_costs_its_image_only(slow, number, code):
    with DecoderPool(1) as pool:
        process = only_process(pool)
        idle = cpu_seconds(process)
        broken, other = pool.submit(slow), pool.submit(FILES['JPEG'])
        wait_until(lambda: cpu_seconds(process) > idle + 0.1)
        os.kill(process, number)
        assert error_of(broken).code == code
        assert other.result(PATIENCE).format == 'JPEG'


def test_slow_images_do_not_delay_others(slow):
    """The images of others are ready while most of the slow ones still wait for their own process."""
    with DecoderPool(1, quick_seconds=0.05) as pool:
        slow_ones = [pool.submit(slow) for _ in range(3)]
        others = [pool.submit(FILES['JPEG']) for _ in range(10)]
        assert not wait(others, PATIENCE).not_done
        assert not all(future.done() for future in slow_ones)
        assert not wait(slow_ones, PATIENCE).not_done
        assert all(future.result().width == 6600 for future in slow_ones)


def test_a_slow_file_that_comes_again_does_not_disturb_the_quick_process(slow):
    with DecoderPool(1, quick_seconds=0.05) as pool:
        first, other = pool.submit(slow), pool.submit(FILES['JPEG'])
        assert not wait([first, other], PATIENCE).not_done
        pool.decode(FILES['JPEG'])
        processes = children()
        again, other = pool.submit(slow), pool.submit(FILES['JPEG'])
        assert not wait([again, other], PATIENCE).not_done
        assert children() == processes and again.result().width == 6600


def test_too_many_slow_images_are_refused(slow):
    with DecoderPool(1, quick_seconds=0.05) as pool:
        first, other = pool.submit(slow), pool.submit(FILES['JPEG'])
        assert not wait([first, other], PATIENCE).not_done
        many = [pool.submit(slow) for _ in range(20)]
        refused = wait_until(lambda: [future for future in many if future.done() and future.exception()])
        assert {error_of(future).code for future in refused} == {'E_TIMEOUT'}
        assert pool.decode(FILES['JPEG']).format == 'JPEG'


def test_a_slow_image_is_not_begun_again_if_nobody_waits(slow):
    with DecoderPool(1, quick_seconds=0.05) as pool:
        before = children()
        assert pool.decode(slow).width == 6600
        assert len(children() - before) == 1


def test_a_request_with_many_images_does_not_keep_others_waiting():
    with DecoderPool(1) as pool:
        finished = []
        many = [pool.submit(FILES['16-bit PNG'], position=position) for position in range(200)]
        one = pool.submit(FILES['JPEG'])
        for future in (*many, one):
            future.add_done_callback(finished.append)
        assert not wait([*many, one], PATIENCE).not_done
        assert finished.index(one) < 100


def test_cancelled_images_free_their_process(slow):
    with DecoderPool(1) as pool:
        cancelled = [pool.submit(slow) for _ in range(20)]
        assert all(future.cancel() for future in cancelled)
        begin = time.monotonic()
        assert pool.decode(FILES['JPEG']).format == 'JPEG'
        assert time.monotonic() - begin < PATIENCE and all(future.cancelled() for future in cancelled)


def test_an_interrupted_command_does_not_wait_for_its_slow_images(slow):
    with DecoderPool(1) as pool, ThreadPoolExecutor(4) as threads:
        with DecodeGroup(pool) as group:
            waiting = [threads.submit(group.decode, slow) for _ in range(4)]
            wait_until(lambda: len(group.results) == 4)
        assert all(isinstance(future.exception(PATIENCE), CancelledError) for future in waiting)
        with pytest.raises(CancelledError):
            group.decode(FILES['JPEG'])


def test_closing_ends_all_processes_and_cancels_what_waits(slow):
    before = children()
    pool = DecoderPool(2)
    futures = [pool.submit(slow) for _ in range(6)]
    wait_until(lambda: len(children() - before) == 2)
    pool.close()
    assert children() == before
    assert all(future.cancelled() for future in futures)
    assert pool.submit(FILES['JPEG']).cancelled()


PARENT = """
import sys
from pathlib import Path
from cxr_fastai.images import decoder_start
from cxr_fastai.images.decoder_pool import DecodeGroup, DecoderPool
pool = DecoderPool(1, seconds=1)
pool.decode(Path(sys.argv[1]).read_bytes())
print('ready', flush=True)
for _ in range(9):
    pool.submit(Path(sys.argv[2]).read_bytes())
sys.stdin.read()
"""


def test_the_processes_end_if_this_one_is_killed(tmp_path, slow):
    quick_file, slow_file = tmp_path / 'quick', tmp_path / 'slow'
    quick_file.write_bytes(FILES['JPEG'])
    slow_file.write_bytes(slow)
    path = os.pathsep.join(str(Path(entry or '.').resolve()) for entry in sys.path)
    command = [sys.executable, '-c', PARENT, str(quick_file), str(slow_file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {'PYTHONPATH': path}
    ) as parent:
        assert parent.stdout.readline() == b'ready\n'
        workers = children(parent.pid)
        parent.kill()
    assert workers
    wait_until(lambda: not any(is_running(process) for process in workers))


def test_nothing_in_the_current_folder_is_imported(tmp_path, monkeypatch):
    (tmp_path / 'numpy.py').write_text('raise SystemExit')
    monkeypatch.chdir(tmp_path)
    with DecoderPool(1) as pool:
        assert pool.decode(FILES['JPEG']).format == 'JPEG'


def test_a_process_may_not_write_to_files_and_leaves_interrupts_to_its_parent(slow):
    with DecoderPool(1) as pool:
        process = only_process(pool)
        idle = cpu_seconds(process)
        future = pool.submit(slow)
        wait_until(lambda: cpu_seconds(process) > idle + 0.1)
        limits = Path(f'/proc/{process}/limits').read_text()
        os.kill(process, signal.SIGINT)
        assert future.result(PATIENCE).width == 6600
    (line,) = [line for line in limits.splitlines() if line.startswith('Max file size')]
    assert line.split()[3] == '0'


def only_process(pool: DecoderPool) -> int:
    """The process of a pool that has just been made with one worker, as soon as it has decoded an image."""
    before = children()
    pool.decode(FILES['JPEG'])
    (process,) = children() - before
    return process


def children(parent: int | None = None) -> set[int]:
    """The decoder processes that `parent` (default: this process) has started and that still run."""
    pids = {int(path.name) for path in Path('/proc').glob('[0-9]*')}
    return {pid for pid in pids if parent_of(pid) == (parent or os.getpid())}


def parent_of(pid: int) -> int:
    fields = status(pid)
    return int(fields[1]) if fields and fields[0] != 'Z' else 0


def status(pid: int) -> list[str]:
    """State, parent and further fields of the process; empty if there is none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []


def is_running(pid: int) -> bool:
    fields = status(pid)
    return bool(fields) and fields[0] != 'Z' and b'decoder_process' in command_of(pid)


def command_of(pid: int) -> bytes:
    try:
        return Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return b''


def cpu_seconds(pid: int) -> float:
    fields = status(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK') if fields else 0


def test_a_process_that_ended_before_it_was_needed_is_replaced():
    start_decoder()
    [process] = decoder_start._started_ahead.values()
    process.kill()
    process.wait()
    with DecoderPool(1) as pool:
        assert pool.decode(FILES['JPEG'], Preprocessing(64)).square.shape == (64, 64)

"""Progress bars on a terminal, and silence elsewhere."""

import logging

import pytest

from cxr_fastai.core import progress as progress_module
from cxr_fastai.core.progress import ShownProgress, are, counted, format_seconds, in_threads, progress


def test_a_terminal_shows_a_bar_with_the_rate(terminal):
    with terminal.used():
        assert list(progress(iter('abc'), total=3)) == list('abc')
    assert '/3 [' in terminal.getvalue()
    assert 'image/s' in terminal.getvalue()


def test_nothing_is_drawn_without_a_terminal(capfd):
    assert list(progress('abc')) == list('abc')
    assert capfd.readouterr() == ('', '')


def test_only_the_main_process_shows_progress(terminal, second_process):
    with terminal.used():
        assert list(progress('abc')) == list('abc')
    assert terminal.getvalue() == ''


def test_threads_return_results_in_order():
    assert list(in_threads(str.upper, ['a', 'b'] * 100, workers=3)) == ['A', 'B'] * 100


@pytest.mark.parametrize(
    ('number', 'unit', 'text'),
    [
        (1, 'image', '1 image is'),
        (0, 'image', '0 images are'),
        (1, 'batch', '1 batch is'),
        (2000, 'batch', '2,000 batches are'),
        (1, 'probability', '1 probability is'),
        (2, 'probability', '2 probabilities are'),
    ],
)
def test_a_number_its_word_and_its_verb_agree(number, unit, text):
    assert f'{counted(number, unit)} {are(number)}' == text


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list that the test changes."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, 'monotonic', lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_half_minute_has_the_rate_and_the_time_left(clock, caplog):
    shown = ShownProgress(150, 'frozen 1', unit='batch')
    with caplog.at_level(logging.INFO, 'cxr_fastai.core.progress'):
        for _ in range(15):
            clock[0] += 7
            shown.update(images=32)
    assert caplog.messages == [
        'frozen 1: 5 of 150 batches, 4.57 images/s, 16 min 55 s left',
        'frozen 1: 10 of 150 batches, 4.57 images/s, 16 min 20 s left',
        'frozen 1: 15 of 150 batches, 4.57 images/s, 15 min 45 s left',
    ]


def test_without_a_total_there_is_no_time_left(clock, caplog):
    with caplog.at_level(logging.INFO, 'cxr_fastai.core.progress'):
        for _ in progress(iter('abc')):
            clock[0] += 31
    assert caplog.messages[0] == '1 of ? images, 0.0323 images/s'


def test_other_processes_log_no_lines(clock, caplog, second_process):
    with caplog.at_level(logging.INFO, 'cxr_fastai.core.progress'):
        for _ in progress('abc'):
            clock[0] += 31
    assert not caplog.messages


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0 s'), (59.6, '1 min 0 s'), (3599, '59 min 59 s'), (90000, '25 h 0 min')]
)
def test_times_are_rounded_once(seconds, text):
    assert format_seconds(seconds) == text

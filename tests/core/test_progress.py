"""Progress bars on a terminal, and silence elsewhere."""

from cxr_fastai.core.progress import in_threads, progress


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

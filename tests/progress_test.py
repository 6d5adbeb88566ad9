"""What a command says while it waits. Time is a clock of the tests' own; one test has a thread and real time."""

import sys
import threading

import pytest

from dit_jax.runtime import progress
from dit_jax.runtime.progress import Progress, Silence


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def silence(monkeypatch):
    monkeypatch.setattr(Silence, "_watch", lambda *_: None)  # `slow` stands for the thread
    monkeypatch.setattr(progress, "silence", Silence(Clock()))
    return progress.silence


def slow(silence, seconds):
    """A slow function that prints nothing, with what the thread does in the meantime."""
    for _ in range(seconds):
        silence.clock.now += 1
        silence.tick()


def test_a_line_after_ten_seconds_and_then_every_thirty(silence, capsys):
    with silence.doing("compiling the step"):
        slow(silence, 9)
        assert capsys.readouterr().out == ""
        slow(silence, 66)
    lines = ["compiling the step (10 s)", "compiling the step (40 s)", "compiling the step (1 min 10 s)"]
    assert capsys.readouterr().out.splitlines() == lines
    slow(silence, 100)  # nothing goes on
    assert capsys.readouterr().out == ""


def test_where_something_is_printed_nothing_is_added(silence, capsys):
    with silence.doing("training"):
        for i in range(5):
            slow(silence, 9)
            progress.say(f"line {i}")
        slow(silence, 9)
    assert capsys.readouterr().out.splitlines() == [f"line {i}" for i in range(5)]


def test_the_innermost_task_is_named_until_it_ends(silence, capsys):
    with silence.doing("still working"):
        slow(silence, 5)
        with pytest.raises(KeyError), silence.doing("reading the weights"):
            slow(silence, 8)
            raise KeyError
        slow(silence, 30)
        with silence.doing(""):  # a server, which may wait
            slow(silence, 100)
    lines = ["reading the weights (5 s)", "still working (40 s)"]
    assert capsys.readouterr().out.splitlines() == lines


def test_progress_says_how_far_it_is(silence, capsys):
    with silence.doing("still working"):
        bar = Progress("train", 10, "steps")
        slow(silence, 12)
        for step in range(1, 4):
            bar.update(step)
            slow(silence, 9)
        with silence.doing("making the samples of the grid"):
            slow(silence, 3)
        slow(silence, 40)
        bar.close()
        slow(silence, 40)
    lines = [
        "train: compiling, before the first of 10 steps (10 s)",
        "making the samples of the grid (1 s)",
        "train: 3/10 steps, still working (40 s)",
        "still working (1 min 32 s)",
        "still working (2 min 02 s)",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_on_a_terminal_a_line_moves_until_something_is_printed(silence, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with silence.doing("compiling"):
        slow(silence, 3)
        out, err = capsys.readouterr()
        assert not out and err == "".join(f"\rcompiling ({i} s)\x1b[K\r" for i in (1, 2, 3))
        progress.say("compiled")
        out, err = capsys.readouterr()
        assert out == "compiled\n" and err == "\r\x1b[K"
        bar = Progress("sample", 10, "steps")
        before = bar.bar.last_print_t
        slow(silence, 2)
        assert bar.bar.last_print_t > before or "sample" in capsys.readouterr().err  # its time moves
        bar.close()
        slow(silence, 1)
    assert capsys.readouterr().err.endswith("\r\x1b[K")


def test_only_the_first_host_speaks_and_a_table_is_kept_clean(silence, capsys):
    silence.quiet = True
    with silence.doing("compiling"):
        slow(silence, 100)
        assert capsys.readouterr() == ("", "")
        silence.quiet, silence.stream = False, sys.stderr
        slow(silence, 1)
    assert capsys.readouterr() == ("", "compiling (1 min 41 s)\n")


def test_the_thread_speaks_while_a_function_is_slow_and_ends_with_it(monkeypatch):
    monkeypatch.setattr(Silence, "TICK", 0.01)
    spoke = threading.Event()
    silence, before = Silence(), threading.active_count()
    monkeypatch.setattr(silence, "tick", spoke.set)
    with silence.doing("waiting"):
        assert spoke.wait(60) and threading.active_count() == before + 1
    for thread in threading.enumerate():
        if "_watch" in thread.name:
            thread.join(60)
    assert threading.active_count() == before

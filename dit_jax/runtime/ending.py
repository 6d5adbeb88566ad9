"""Ends a process at once on a signal or an error, with one line on stderr and an exit status.

Nothing is unwound, closed or waited for. It need not be: runtime/files.py writes every file aside and renames it when
it is whole, so the files on disk can be used at any moment. It must not be: when the interpreter shuts down, threads of
libraries (orbax, gRPC) print tracebacks or wait for each other for minutes.

Exit status 75 (EX_TEMPFAIL) means that the same command, run again, resumes.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

AGAIN = 75
RESUME = "run the same command to resume (or start over if nothing was saved)"
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SIGNALS = (signal.SIGINT, *STOPS)

prefix = ""  # what each line begins with if there are several hosts, as in "host 1: "
at_end: list[Callable[[], object]] = []  # called after the last line of a process that ends early
_ended = threading.Lock()
_actions: dict[int, Callable[[], object]] = {}  # by the number of the signal


def end(status: int, line: str, then: Callable[[], object] = lambda: None) -> NoReturn:
    """Ends this process with an error line and an exit status. Any thread may call it. then: called in between."""
    last_words(line)
    then()
    os._exit(status)


def finish(status: int) -> NoReturn:
    """Ends this process after its work is done.

    A signal has no effect from here on. Python's own end would restore the default actions of signals half a second
    before the process is gone.
    """
    sys.stdout.flush()
    atexit._run_exitfuncs()
    _ended.acquire()
    os._exit(status)


def last_words(line: str) -> None:
    """Prints one error line to stderr. Only the first thread that calls this returns; the process ends after it."""
    if not _ended.acquire(blocking=False):
        threading.Event().wait()
    with contextlib.suppress(Exception):  # stdout may be a pipe without a reader, or a file on a full disk
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr)  # clears the progress bar
        print(f"error: {prefix}{' '.join(line.split(chr(10)))}", file=sys.stderr, flush=True)
    for function in at_end:
        with contextlib.suppress(Exception):
            function()


def end_interrupted() -> NoReturn:
    """Ends this process because of Ctrl-C."""
    end(1, f"interrupted; {RESUME}")


def end_stopped(number: int) -> NoReturn:
    """Ends this process because of the signal of this number."""
    end(AGAIN, f"stopped by {signal.Signals(number).name}; {RESUME}")


def on_signal(number: int, action: Callable[[], object]) -> None:
    """Makes a new thread call action() as soon as this signal comes. Must be called by the main thread.

    The main thread cannot act itself: it may be in a compilation, where Python's own handlers wait, or in a library
    that an exception must not interrupt. A signal that this process was started to ignore (as by nohup) stays ignored.
    """
    if signal.getsignal(number) is not signal.SIG_IGN:
        _actions[number] = action
        signal.signal(number, lambda *_: None)


def raise_on_signals() -> None:
    """Makes signals raise KeyboardInterrupt in the main thread, for commands that must end their child processes."""
    for number in SIGNALS:
        if _actions.pop(number, None):
            signal.signal(number, signal.default_int_handler)


def _watch(pipe):
    """Runs the thread that waits for signals.

    A second Ctrl-C ends the process, whatever the action of the first one waits for. Two within half a second count as
    one: `timeout` sends two.
    """
    interrupts = []
    while number := os.read(pipe, 1):
        action = _actions.get(number[0])
        if action and number[0] == signal.SIGINT:
            interrupts.append(time.monotonic())
            if interrupts[-1] - interrupts[0] > 0.5:
                threading.Timer(1, os._exit, [1]).start()
                action = end_interrupted
            elif interrupts[1:]:
                continue
        if action:
            threading.Thread(target=action, daemon=True).start()


def is_command() -> bool:
    """Returns whether this process is a command of this package, as in python -m dit_jax.train."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return bool(spec and re.fullmatch(r"(dit_jax|benchmarks)\.\w+(\.__main__)?", spec.name))


def catch_signals() -> None:
    """Makes signals end this process with a line, if it is a command. Does nothing the second time."""
    if _actions or not is_command():
        return
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # started with it closed: a file that is opened must not get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    on_signal(signal.SIGINT, end_interrupted)
    for number in STOPS:
        on_signal(number, functools.partial(end_stopped, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def restart(environment: dict[str, str]) -> NoReturn:
    """Starts this process anew with another environment. Must be called before `catch_signals`.

    A signal that comes meanwhile waits for the new process's `catch_signals`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(sys.executable, sys.orig_argv, environment)

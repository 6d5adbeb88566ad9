"""How a process ends: a signal or an error is one line on stderr and an exit status, at once.

Nothing is unwound, closed or waited for on the way. It need not be: every file is written aside and renamed when it is
whole (runtime/files.py), so what is on disk can be used at any moment. And it must not be: libraries' threads (orbax,
gRPC) write tracebacks or wait for each other for minutes when the interpreter shuts down under them.

Exit status 75 (EX_TEMPFAIL) says that the same command, run again, goes on.
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

AGAIN = 75
GOES_ON = "the same command goes on from what is whole, or starts over"
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SIGNALS = (signal.SIGINT, *STOPS)

name = ""  # of this process among several, as in "host 1: "
at_end = []  # functions that are called before the process ends by `end`
_ended, _actions = threading.Lock(), {}


def end(status, line, then=lambda: None):
    """The last line of this process, and its end, from whatever thread. then: called in between."""
    last_words(line)
    then()
    os._exit(status)


def finish(status):
    """The end of a process that has done its work. Python's own gives signals back to the system half a second before."""
    sys.stdout.flush()
    atexit._run_exitfuncs()
    _ended.acquire()  # a signal comes too late now
    os._exit(status)


def last_words(line):
    """One line on stderr, of one thread only: the process ends after it."""
    if not _ended.acquire(blocking=False):
        threading.Event().wait()  # another thread is at it
    with contextlib.suppress(Exception):  # stdout may be a pipe that nobody reads, or a file on a full disk
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr)  # where a progress bar stands
        print(f"error: {name}{' '.join(line.split(chr(10)))}", file=sys.stderr, flush=True)
    for function in at_end:
        with contextlib.suppress(Exception):
            function()


def interrupted():
    end(1, f"interrupted; {GOES_ON}")


def terminated(number):
    end(AGAIN, f"stopped by {signal.Signals(number).name}; {GOES_ON}")


def on_signal(number, action):
    """action() is called by a thread of its own as soon as the signal comes: the main thread may be amid a compilation,
    where Python's own handlers wait, or in a library that an exception must not interrupt. A signal that whoever started
    this process had it ignore (as nohup does) stays ignored. To be called by the main thread."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        _actions[number] = action
        signal.signal(number, lambda *_: None)


def raise_on_signals():
    """From here on these signals raise KeyboardInterrupt in the main thread: for commands that have other processes to
    end."""
    for number in SIGNALS:
        if _actions.pop(number, None):
            signal.signal(number, signal.default_int_handler)


def _watch(pipe):
    """The thread that waits for signals. A second Ctrl-C ends the process, whatever the first one's action waits for. One that
    comes with the first is the same: `timeout` sends two."""
    interrupts = []
    while number := os.read(pipe, 1):
        action = _actions.get(number[0])
        if action and number[0] == signal.SIGINT:
            interrupts.append(time.monotonic())
            if interrupts[-1] - interrupts[0] > 0.5:
                threading.Timer(1, os._exit, [1]).start()
                action = interrupted
            elif interrupts[1:]:
                continue
        if action:
            threading.Thread(target=action, daemon=True).start()


def is_command():
    """Whether this process is a command of this package, python -m dit_jax.X."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return bool(spec and re.fullmatch(r"(dit_jax|benchmarks)\.\w+(\.__main__)?", spec.name))


def begin():
    """From here on a signal ends this process with a line, if it is a command."""
    if _actions or not is_command():
        return
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:  # closed by who started this: its number must not become a file's
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, stream, os.fdopen(number, "w" if number else "r"))
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    on_signal(signal.SIGINT, interrupted)
    for number in STOPS:
        on_signal(number, functools.partial(terminated, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start_anew(environment):
    """This process from its beginning, with another environment. A signal that comes meanwhile waits for `begin`, before
    which this is to be called."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(sys.executable, sys.orig_argv, environment)


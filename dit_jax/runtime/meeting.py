"""Lets the processes of several hosts meet before jax.distributed joins them.

jax.distributed waits in silence when the flags of two processes contradict each other, as it does for a host that never
comes. Here a contradiction ends all processes within seconds.

Each process, process 0 too, connects to the coordinator's port at process 0 and says in one line of JSON who it is: its
greeting. A thread of process 0 answers with lines {"dit_jax": [exit status, text]}. The status is null until
the meeting is over.
"""

import contextlib
import dataclasses
import json
import math
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.runtime import ending
from dit_jax.runtime.ending import AGAIN
from dit_jax.runtime.errors import UserError

PULSE = 5  # seconds between the lines of process 0 to a process that waits
POLL = 0.5  # seconds

Greeting = dict[str, Any]
Status = int | None  # the exit status that the meeting ends with; None until then


@dataclasses.dataclass
class _Guest:
    connection: socket.socket
    greeting: Greeting | None = None
    told: tuple[Status, int] | None = None  # the last answer: status and number of the pulse


def meet(address: str, index: int, count: int, deadline: float) -> tuple[int, str, Callable[[], None]]:
    """Waits until all `count` processes have come to `address`, or until time.monotonic() is `deadline`.

    Returns (status, what is wrong, a function that waits until process 0 has told all). Status 0: all have come, and
    the port is free again; 1: flags contradict each other; AGAIN: some did not come. Raises UserError.
    """
    own = {
        "protocol": 1,
        "command": os.path.basename(sys.argv[0]),
        "process_count": count,
        "process_id": index,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "key": os.urandom(8).hex(),
    }
    wait_until_told = lambda: None
    if index == 0:
        thread = threading.Thread(target=_answer, args=(_listen(address), own, deadline), daemon=True)
        thread.start()
        wait_until_told = thread.join
    status, text = _ask(address, own, deadline)
    if status == 0:
        wait_until_told()
        if index:
            time.sleep(POLL / 5)  # jax.distributed of process 0 may not listen yet, and is tried again only after 1 s
    return status, text, wait_until_told


def _listen(address):
    dual = socket.has_dualstack_ipv6()
    try:  # with SO_REUSEADDR, so that jax.distributed gets the port right after
        return socket.create_server(
            ("", int(address.rpartition(":")[2])),
            dualstack_ipv6=dual,
            backlog=1024,
            family=socket.AF_INET6 if dual else socket.AF_INET,
        )
    except OSError as e:
        raise UserError(
            f"--coordinator={address}: this port cannot be opened ({os.strerror(e.errno or 0)}; perhaps another "
            "process has --process_id=0); name another"
        ) from None


def _verdict(greetings: list[Greeting], own: Greeting, late: bool) -> tuple[Status, str]:
    """Returns (status, text) of a meeting with these greetings. own: of process 0. late: the deadline has passed."""

    def who(greeting):
        return f"pid {greeting['pid']} on {greeting['host']}"

    present = {}
    for greeting in greetings:
        for key, name in ("protocol", "protocol"), ("command", "command"), ("process_count", "--process_count"):
            if greeting[key] != own[key]:
                return 1, (
                    f"{name}={own[key]} at process 0 ({who(own)}), and {greeting[key]} at process "
                    f"{greeting['process_id']} ({who(greeting)}): give all the same"
                )
        first = present.setdefault(greeting["process_id"], greeting)
        if first["key"] != greeting["key"]:
            process_id = greeting["process_id"]
            return 1, f"--process_id={process_id} was given to two processes: {who(first)} and {who(greeting)}"
    missing = [i for i in range(own["process_count"]) if i not in present]
    if not missing:
        return 0, ""
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    return AGAIN if late else None, f"not there: process {', '.join(map(str, missing[:10]))}{more}"


def _read_greeting(connection, own):
    """Returns the greeting that a process sent; None if it is gone, or if something else connected to this port."""
    try:
        # One read: a greeting that arrives in pieces is dropped, and its process sends it again.
        greeting = json.loads(connection.recv(4096))
        return greeting if all(type(greeting[key]) is type(value) for key, value in own.items()) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _answer(server: socket.socket, own: Greeting, deadline: float) -> None:
    """Runs the thread of process 0.

    It answers a greeting at once, then every PULSE seconds, and when the meeting is over. A process whose connection
    breaks may come again. After a contradiction it also tells those that come within the next PULSE seconds.
    """
    start, status, text, end = time.monotonic(), None, "", math.inf
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while (now := time.monotonic()) < end:
            for guest in [key.data for key, _ in selector.select(POLL)]:
                if guest is None:
                    with contextlib.suppress(OSError):
                        connection = server.accept()[0]
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, _Guest(connection))
                elif guest.greeting is None and (greeting := _read_greeting(guest.connection, own)):
                    guest.greeting = greeting
                else:
                    selector.unregister(guest.connection)
                    guest.connection.close()
            guests: list[_Guest] = [key.data for key in selector.get_map().values() if key.data]
            greetings = [guest.greeting for guest in guests if guest.greeting]
            if status is None:
                status, text = _verdict(greetings, own, now > deadline)
                if status is not None:
                    end = now + (PULSE if status == 1 else 0)
                if status == 0:
                    server.close()  # before any process turns to jax.distributed
            news = status, int((now - start) / PULSE)
            for guest in guests:
                if guest.greeting and guest.told != news:
                    guest.told = news
                    with contextlib.suppress(OSError):  # it is gone, which the next select shows
                        guest.connection.sendall(json.dumps({"dit_jax": [status, text]}).encode() + b"\n")
        for key in selector.get_map().values():
            (key.data.connection if key.data else server).close()


def _ask(address: str, own: Greeting, deadline: float) -> tuple[int, str]:
    """Greets process 0 and returns (status, text) that the meeting ends with.

    Looks for process 0 until `deadline`. Once it is reached, it decides how long the meeting lasts. Prints a line now
    and then while it waits.
    """
    host, _, port = address.rpartition(":")
    start, quiet = time.monotonic(), 2 * PULSE

    def report(text):
        nonlocal quiet
        if time.monotonic() - start > quiet:
            quiet *= 2
            print(f"{ending.prefix}waits; {text}", flush=True)

    while True:
        try:
            left = max(1, min(2 * PULSE, deadline - time.monotonic()))
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                if connection.getsockname() == connection.getpeername():
                    raise ConnectionError("nobody is there")  # a free port can be connected to itself
                connection.sendall(json.dumps(own).encode() + b"\n")
                for status, text in _answers(connection, address):
                    if status is not None:
                        return status, text
                    if own["process_id"] == 0:
                        report(text)
        except UserError:
            raise
        except (OSError, ValueError) as e:  # an answer may be cut short
            text = f"{address}: {getattr(e, 'strerror', None) or e}"
        report(text)
        if time.monotonic() > deadline:
            return AGAIN, text
        time.sleep(POLL)


def _answers(connection: socket.socket, address: str) -> Iterator[tuple[Status, str]]:
    """Yields (status, text) of each answer of process 0. Raises ConnectionError at the end, UserError on other text."""
    connection.settimeout(3 * PULSE)
    with connection.makefile("rb") as lines:
        while line := lines.readline(4096):
            if line.startswith(b"\0\0"):  # HTTP/2: jax.distributed of a run that may end soon, as it lost this host
                raise ConnectionError("a run that has begun is there")
            if not line.startswith(b'{"dit_jax": '):
                raise UserError(f"--coordinator={address}: another program answers at this address ({line[:40]!r})")
            yield json.loads(line)["dit_jax"]
    raise ConnectionError("the connection was closed")

"""The processes of several hosts meet before jax.distributed joins them: where the flags of two contradict each other,
that waits in silence, as for a host that never comes.

Each process, process 0 too, connects to the coordinator's port at process 0 and says in one line of JSON who it is. A
thread of process 0 answers with lines {"dit_jax": [exit status, text]}. The status is null while the meeting goes on.
"""

import contextlib
import json
import math
import os
import selectors
import socket
import sys
import threading
import time

from dit_jax.runtime import ending
from dit_jax.runtime.ending import AGAIN
from dit_jax.runtime.errors import UserError

PULSE = 5  # seconds between the lines of process 0 to one that waits
POLL = 0.5  # seconds between looks


def meet(address, index, count, deadline):
    """-> (the exit status that the meeting ends with, what is wrong, a function that waits until process 0 has said so to
    all). Status 0: all have come, and the port is free again."""
    mine = {"protocol": 1, "command": os.path.basename(sys.argv[0]), "process_count": count, "process_id": index,
            "host": socket.gethostname(), "pid": os.getpid(), "key": os.urandom(8).hex()}
    answered = lambda: None
    if index == 0:
        thread = threading.Thread(target=_answer, args=(_listen(address), mine, deadline), daemon=True)
        thread.start()
        answered = thread.join
    status, text = _ask(address, mine, deadline)
    if status == 0:
        answered()
        if index:
            time.sleep(POLL / 5)  # else jax.distributed is not there yet, and is tried again after a second
    return status, text, answered


def _listen(address):
    both = socket.has_dualstack_ipv6()
    try:  # with SO_REUSEADDR, so that jax.distributed gets the port right after
        return socket.create_server(("", int(address.rpartition(":")[2])), dualstack_ipv6=both, backlog=1024,
                                    family=socket.AF_INET6 if both else socket.AF_INET)
    except OSError as e:
        raise UserError(f"--coordinator={address}: the port cannot be had here ({os.strerror(e.errno)}; perhaps "
                        "another process has --process_id=0); name another") from None


def _verdict(greetings, mine, late):
    """How the meeting stands: (the exit status it ends with or None, text)."""
    def who(one):
        return f"pid {one['pid']} on {one['host']}"

    here = {}
    for one in greetings:
        for key, name in ("protocol", "protocol"), ("command", "command"), ("process_count", "--process_count"):
            if one[key] != mine[key]:
                return 1, (f"{name}={mine[key]} at process 0 ({who(mine)}), and {one[key]} at process "
                           f"{one['process_id']} ({who(one)}): give all the same")
        other = here.setdefault(one["process_id"], one)
        if other["key"] != one["key"]:
            return 1, f"--process_id={one['process_id']} was given to two processes: {who(other)} and {who(one)}"
    missing = [i for i in range(mine["process_count"]) if i not in here]
    if not missing:
        return 0, ""
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    return AGAIN if late else None, f"not there: process {', '.join(map(str, missing[:10]))}{more}"


def _greeting(connection, like):
    """What a process says of itself. None where it is gone, or is something else that tries this port."""
    try:
        one = json.loads(connection.recv(4096))  # in one piece, or it is dropped and says it again
        return one if all(type(one[key]) is type(value) for key, value in like.items()) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _answer(server, mine, deadline):
    """The thread of process 0. It answers a greeting at once, every PULSE seconds, and when the meeting is over. A
    process whose connection breaks may come again. Where two contradict each other, it also tells those that come a
    little later."""
    start, status, text, end = time.monotonic(), None, "", math.inf
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while (now := time.monotonic()) < end:
            for connection, _, _, guest in [key for key, _ in selector.select(POLL)]:
                if guest is None:
                    with contextlib.suppress(OSError):
                        connection = server.accept()[0]
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, {"greeting": None, "told": None})
                elif guest["greeting"] is None and (one := _greeting(connection, mine)):
                    guest["greeting"] = one
                else:
                    selector.unregister(connection)
                    connection.close()
            here = [key for key in selector.get_map().values() if key.data and key.data["greeting"]]
            if status is None:
                status, text = _verdict([key.data["greeting"] for key in here], mine, now > deadline)
                if status is not None:
                    end = now + (PULSE if status == 1 else 0)
                if status == 0:
                    server.close()  # before any of them turns to jax.distributed
            news = status, int((now - start) / PULSE)
            for connection, _, _, guest in here:
                if guest["told"] != news:
                    guest["told"] = news
                    with contextlib.suppress(OSError):  # it is gone, which the next look shows
                        connection.sendall(json.dumps({"dit_jax": [status, text]}).encode() + b"\n")
        for key in selector.get_map().values():
            key.fileobj.close()


def _ask(address, mine, deadline):
    """(exit status, text) that the meeting ends with. Process 0 is looked for until `deadline`. Once it is reached, it
    says when there is no more use in waiting."""
    host, _, port = address.rpartition(":")
    start, quiet = time.monotonic(), 2 * PULSE

    def wait(text):
        nonlocal quiet
        if time.monotonic() - start > quiet:
            quiet *= 2
            print(f"{ending.name}waits; {text}", flush=True)

    while True:
        try:
            left = max(1, min(2 * PULSE, deadline - time.monotonic()))
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                if connection.getsockname() == connection.getpeername():
                    raise ConnectionError("nobody is there")  # a port at which nobody listens can connect to itself
                connection.sendall(json.dumps(mine).encode() + b"\n")
                for status, text in _answers(connection, address):
                    if status is not None:
                        return status, text
                    if mine["process_id"] == 0:
                        wait(text)
        except UserError:
            raise
        except (OSError, ValueError) as e:  # an answer may be cut short
            text = f"{address}: {getattr(e, 'strerror', None) or e}"
        wait(text)
        if time.monotonic() > deadline:
            return AGAIN, text
        time.sleep(POLL)


def _answers(connection, address):
    """What process 0 says, as it comes."""
    connection.settimeout(3 * PULSE)
    with connection.makefile("rb") as lines:
        while line := lines.readline(4096):
            if line.startswith(b"\0\0"):  # HTTP/2: jax.distributed of a run that may end soon, as it lost this host
                raise ConnectionError("a run that has begun is there")
            if not line.startswith(b'{"dit_jax": '):
                raise UserError(f"--coordinator={address}: what answers there is no process of dit_jax ({line[:40]!r})")
            yield json.loads(line)["dit_jax"]
    raise ConnectionError("the connection was closed")

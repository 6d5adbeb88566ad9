"""Several hosts: how their processes join, share values, notice a lost host, and stop after the same step.

One process runs on each host, all with the same command. They communicate through the key-value store of
jax.distributed, which the coordinator (process 0) holds and which a thread of each process reads twice a second. With
one process nothing here has an effect.
"""

import functools
import itertools
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from dit_jax.runtime import ending, meeting, process, progress
from dit_jax.runtime.ending import AGAIN
from dit_jax.runtime.errors import UserError, chain, first_line, line_of

POLL = 0.5  # seconds between reads of the store
RESUME = "run the same command on every host to resume from what was saved last"
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a lost host ends the wait sooner

_client: Any = None  # of jax.distributed; None with one process
_index, _count = 0, 1
_timeout: float = 0  # seconds without a sign of a host after which it is lost
_turn = itertools.count()  # numbers the calls of share
_preemption: "Preemption | None" = None


def _metadata(key):
    """Returns an attribute of this machine from Google Cloud's metadata server, or None."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def tpu_slice() -> tuple[int, str | None]:
    """Returns (number of hosts of this TPU slice or slices, jax.distributed's name of the environment).

    GKE sets environment variables; a TPU VM has a metadata server. Without a TPU neither is read: (1, None).
    """
    if not process.tpu_attached():
        return 1, None
    names, slices = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES")), None
    method = "gketpu"
    if names is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        names, method = _metadata("worker-network-endpoints"), "gcetpu"
        for line in (_metadata("tpu-env") or "").splitlines():
            key, _, value = line.partition(":")
            slices = value.strip(" '\"") if key.strip() == "MEGASCALE_NUM_SLICES" else slices
    slices = os.environ.get("MEGASCALE_NUM_SLICES", slices)
    return len((names or "").split(",")) * int(slices or 1), method


def _arguments(coordinator: str | None, count: int | None, index: int | None) -> dict[str, Any] | None:
    """Returns the arguments of jax.distributed.initialize that three flags ask for; None if this process is alone.

    Raises UserError naming the flag.
    """
    given = {"coordinator": coordinator, "process_count": count, "process_id": index}
    if all(value is None for value in given.values()):
        count, method = tpu_slice()
        return {"cluster_detection_method": method} if count > 1 else None
    if given == {"coordinator": None, "process_count": 1, "process_id": None}:
        return None
    if coordinator is None or count is None or index is None:
        missing = [f"--{name}" for name, value in given.items() if value is None]
        raise UserError(
            f"{' and '.join(missing)} missing: several hosts take --coordinator=HOST:PORT, "
            "--process_count=N and --process_id=I on each"
        )
    if count < 1 or not 0 <= index < count:
        raise UserError(f"--process_id={index} --process_count={count}: of N processes the ids are 0 to N-1")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: HOST:PORT, the address of process 0 and a free port there")
    if count == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",  # the flags decide, also in a SLURM or MPI job
    }


def join(coordinator: str | None, process_count: int | None, process_id: int | None, host_timeout: float) -> None:
    """Joins the other hosts that the flags of these names give, or those of the TPU slice.

    Must be called before anything else of JAX. Raises UserError naming the flag. Ends the process if the hosts do not
    come together within 5 * host_timeout seconds.
    """
    global _client, _index, _count, _timeout
    arguments = _arguments(coordinator, process_count, process_id)
    if arguments is None:
        return
    from jax._src.distributed import global_state

    _timeout = host_timeout
    if "coordinator_address" in arguments:
        process.silence_stdout()
    process.on_lost_host(_lost)
    process.own_preemption()
    _index, _count = arguments.get("process_id", 0), arguments.get("num_processes", 1)
    ending.prefix = f"host {_index}: " if _count > 1 else ""
    start, address = time.monotonic(), arguments.get("coordinator_address")
    if address:
        status, text, wait_until_told = meeting.meet(address, _index, _count, start + 5 * _timeout)
        if status == AGAIN:
            _too_late(start, address, text, wait_until_told)
        if status:
            ending.end(status, text, wait_until_told)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(5 * _timeout),
            heartbeat_timeout_seconds=int(_timeout),
            shutdown_timeout_seconds=int(5 * _timeout),
        )
    except Exception as e:
        why = "" if "bad_cast" in str(e) else f"{type(e).__name__}: {first_line(e)}"
        _too_late(start, address, why)
    _client, _index, _count = global_state.client, global_state.process_id, global_state.num_processes
    ending.prefix, progress.silence.quiet = f"host {_index}: ", _index > 0
    ending.on_signal(signal.SIGINT, lambda: stop(1, f"interrupted; {RESUME}"))
    for number in ending.STOPS:
        ending.on_signal(number, functools.partial(stop, AGAIN, f"stopped by {number.name}; {RESUME}"))
    threading.Thread(target=_watch, daemon=True).start()


def _too_late(start, address, why, then=lambda: None):
    ending.end(
        AGAIN,
        f"the hosts did not all come together within {time.monotonic() - start:.0f} s"
        f"{f' ({why})' if why else ''}; check that each runs and reaches {address or 'the first'}, then run "
        "the same command again",
        then,
    )


def _lost():
    ending.end(
        AGAIN, f"another host was lost (no sign of it for {_timeout:.0f} s, or the coordinator is gone); {RESUME}"
    )


def _watch():
    """Runs the thread that reads the store twice a second.

    It ends this process when another host says that it ends, and calls Preemption.agree after SIGTERM on any host.
    """
    while True:
        time.sleep(POLL)
        try:
            messages = dict(_client.key_value_dir_get("dit_jax/said"))
            for key, value in messages.items():
                if key.endswith("/end"):
                    host, status, line = json.loads(value)
                    ending.end(status, f"host {host} stopped: {line}")
            preempted = any(key.endswith("/sigterm") for key in messages)
            if _preemption is not None and (_preemption.noticed is not None or preempted):
                _preemption.agree()
        except Exception:
            continue  # the coordinator is gone: jaxlib notices as well


def share(value: Any) -> list[Any]:
    """Returns the JSON value of each host, by index. Every host must make the same calls in the same order."""
    if _client is None:
        return [value]
    turn = f"dit_jax/share/{next(_turn)}"
    _client.key_value_set(f"{turn}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_client.blocking_key_value_get(f"{turn}/{i}", FOREVER)) for i in range(_count)]


def stop(status: int, line: str) -> NoReturn:
    """Tells the other hosts, then ends this process."""

    def tell():
        if _client is not None:
            try:
                _client.key_value_set(f"dit_jax/said/{_index}/end", json.dumps([_index, status, line]))
                time.sleep(4 * POLL)  # they read it while the coordinator is still there
            except Exception:
                pass

    ending.end(status, line, tell)


def fail(error: BaseException) -> NoReturn:
    """Ends this process with the line of an exception, and all others with a line that says so."""
    errors = chain(error)
    text = " ".join(map(str, errors))
    if _client is not None and "Gloo" in text:
        # On CPU the loss of a host breaks a connection before jaxlib notices it.
        time.sleep(4 * POLL)  # that host may have said why
        ending.end(AGAIN, f"another host was lost (its connection is closed); {RESUME}")
    from_runtime = any(isinstance(e, jax.errors.JaxRuntimeError) for e in errors)
    from_program = "RESOURCE_EXHAUSTED" in text or "INVALID_ARGUMENT" in text
    if _client is not None and from_runtime and not from_program:
        time.sleep(_timeout + 5)  # another host may be lost: jaxlib then calls _lost
    stop(1, line_of(error))


def finish() -> None:
    """Waits until process 0, which writes and measures, is done: jax.distributed itself waits only for minutes."""
    if _client is not None:
        if _index == 0:
            _client.key_value_set("dit_jax/done", "")
        while _index:
            try:
                _client.blocking_key_value_get("dit_jax/done", 1000)
                break
            except jax.errors.JaxRuntimeError:
                pass
        jax.distributed.shutdown()


class Preemption:
    """SIGTERM on any host: all hosts stop after the same step if they are at steps, else at once.

    A second SIGTERM, 10 s later or more, ends the process.

    A host that has called reached(n) may have begun step n + 1, in which the others must take part. So from the notice
    on, no host passes another step until each has said which step it has reached. The last step is the largest of
    these plus one.
    """

    def __init__(self) -> None:
        global _preemption
        self.noticed: float | None = None  # when SIGTERM came
        self.step = 0  # that this host has reached
        self.last: int | None = None
        self.lock = threading.Lock()
        self.running = False  # whether the run is at steps
        _preemption = self
        ending.on_signal(signal.SIGTERM, self._notice)

    def _notice(self):
        # A shutdown may signal this process and the one that started it, which passes the signal on: one notice.
        now = time.monotonic()
        if not self.running or self.noticed is not None and now - self.noticed > 10:
            stop(AGAIN, f"stopped by SIGTERM; {RESUME if _count > 1 else ending.RESUME}")
        self.noticed = self.noticed or now

    def begin(self, advice: Callable[[], str]) -> None:
        """Says that the run is at steps from here on. advice(): ends the line after Ctrl-C; called by a new thread."""
        ending.on_signal(signal.SIGINT, lambda: stop(1, f"interrupted; {advice()}"))
        self.running = True

    def end(self) -> None:
        """Says that the run is past its steps."""
        self.running = False

    def agree(self) -> None:
        """Agrees with the other hosts on the last step. Called by the watching thread."""
        if self.last is not None:
            return
        with self.lock:
            _client.key_value_set(f"dit_jax/said/{_index}/sigterm", "")
            _client.key_value_set(f"dit_jax/steps/{_index}", str(self.step))
            steps = [int(_client.blocking_key_value_get(f"dit_jax/steps/{i}", FOREVER)) for i in range(_count)]
            self.last = max(steps) + 1

    def reached(self, step: int) -> bool:
        """Returns whether `step`, which has begun, is the last one. Must be called at each step."""
        if _client is None:
            return self.noticed is not None
        with self.lock:
            self.step = step
            return self.last is not None and step >= self.last

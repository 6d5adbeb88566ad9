"""Several hosts: how their processes join, agree, notice that one is lost, and stop after the same step.

One process runs on each host, all with the same command. They speak through the key-value store of jax.distributed,
which the coordinator (process 0) holds, and where a thread of each process looks twice a second. With one process all
of this does nothing.
"""

import functools
import itertools
import json
import os
import signal
import threading
import time
import urllib.request

import jax

from dit_jax.runtime import ending, meeting, process
from dit_jax.runtime.ending import AGAIN
from dit_jax.runtime.errors import UserError, chain, first_line, line_of

POLL = 0.5  # seconds between looks at the store
GOES_ON = "the same command on every host goes on from what was saved last"
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a lost host ends the wait sooner

_client, _index, _count, _timeout = None, 0, 1, None  # jax.distributed's client where there are several hosts
_turn, _steps = itertools.count(), None


def _metadata(key):
    """An attribute of this machine, from Google Cloud's metadata server, or None."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def tpu_slice():
    """(how many hosts share this TPU slice, or these slices; under which name jax.distributed knows the environment).
    GKE sets environment variables; a TPU VM has a metadata server. Without a TPU nobody is asked."""
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


def _arguments(coordinator, count, index):
    """The arguments of jax.distributed.initialize that three flags ask for, or None where this process runs alone."""
    given = {"coordinator": coordinator, "process_count": count, "process_id": index}
    if all(value is None for value in given.values()):
        count, method = tpu_slice()
        return {"cluster_detection_method": method} if count > 1 else None
    if given == {"coordinator": None, "process_count": 1, "process_id": None}:
        return None
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: several hosts take --coordinator=HOST:PORT, "
                        "--process_count=N and --process_id=I on each")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"--process_id={index} --process_count={count}: of N processes the ids are 0 to N-1")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: HOST:PORT, the address of process 0 and a free port there")
    if count == 1:
        return None
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate"}  # a SLURM or MPI job is what the flags say, and no more


def join(coordinator, process_count, process_id, host_timeout):
    """Joins the other hosts, by the flags of these names or on a TPU slice. Called before anything else of JAX."""
    global _client, _index, _count, _timeout
    arguments = _arguments(coordinator, process_count, process_id)
    if arguments is None:
        return
    _timeout = host_timeout
    if "coordinator_address" in arguments:
        process.silence_stdout()
    process.on_lost_host(_lost)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: see Preemption
    _index, _count = arguments.get("process_id", 0), arguments.get("num_processes", 1)
    ending.name = f"host {_index}: " if _count > 1 else ""
    start, address = time.monotonic(), arguments.get("coordinator_address")
    if address:
        status, text, answered = meeting.meet(address, _index, _count, start + 5 * _timeout)
        if status == AGAIN:
            _too_late(start, address, text, answered)
        if status:
            ending.end(status, text, answered)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=int(5 * _timeout),
                                   heartbeat_timeout_seconds=int(_timeout), shutdown_timeout_seconds=int(5 * _timeout))
    except Exception as e:
        why = "" if "bad_cast" in str(e) else f"{type(e).__name__}: {first_line(e)}"
        _too_late(start, address, why)
    state = jax._src.distributed.global_state
    _client, _index, _count = state.client, state.process_id, state.num_processes
    ending.name = f"host {_index}: "
    ending.on_signal(signal.SIGINT, lambda: stop(1, f"interrupted; {GOES_ON}"))
    for number in ending.STOPS:
        ending.on_signal(number, functools.partial(stop, AGAIN, f"stopped by {number.name}; {GOES_ON}"))
    threading.Thread(target=_watch, daemon=True).start()


def _too_late(start, address, why, then=lambda: None):
    ending.end(AGAIN, f"the hosts did not all come together within {time.monotonic() - start:.0f} s"
               f"{f' ({why})' if why else ''}; look whether each runs and reaches {address or 'the first'}, then run "
               "the same command again", then)


def _lost():
    ending.end(AGAIN, f"another host was lost (no sign of it for {_timeout:.0f} s, or the coordinator is gone); {GOES_ON}")


def _watch():
    """Ends this process where another says that it ends, and begins the agreement on a last step."""
    while True:
        time.sleep(POLL)
        try:
            said = dict(_client.key_value_dir_get("dit_jax/said"))
            for key, value in said.items():
                if key.endswith("/end"):
                    host, status, line = json.loads(value)
                    ending.end(status, f"host {host} stopped: {line}")
            if _steps is not None and (_steps.noticed is not None or any(key.endswith("/sigterm") for key in said)):
                _steps.agree()
        except Exception:
            continue  # the coordinator is gone: jaxlib notices as well


def share(value):
    """[the JSON value of each host]. Every host calls this, and in the same order."""
    if _client is None:
        return [value]
    turn = f"dit_jax/share/{next(_turn)}"
    _client.key_value_set(f"{turn}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_client.blocking_key_value_get(f"{turn}/{i}", FOREVER)) for i in range(_count)]


def stop(status, line):
    """The other hosts are told, then the process ends."""
    def tell():
        if _client is not None:
            try:
                _client.key_value_set(f"dit_jax/said/{_index}/end", json.dumps([_index, status, line]))
                time.sleep(4 * POLL)  # they read it while the coordinator is still there
            except Exception:
                pass

    ending.end(status, line, tell)


def fail(error):
    """An exception ends this process and, with a line that says so, all others."""
    errors = chain(error)
    text = " ".join(map(str, errors))
    if _client is not None and "Gloo" in text:  # on a CPU the loss of a host breaks a connection, before jaxlib misses it
        time.sleep(4 * POLL)  # perhaps that host has said why
        ending.end(AGAIN, f"another host was lost (its connection is closed); {GOES_ON}")
    if _client is not None and any(isinstance(e, jax.errors.JaxRuntimeError) for e in errors) and not any(
            own in text for own in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")):
        time.sleep(_timeout + 5)  # perhaps another host is lost, and jaxlib will know
    stop(1, line_of(error))


def finish():
    """The others wait until process 0, which writes and measures, is done: jax.distributed waits for minutes only."""
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
    """SIGTERM on any host: all stop after the same step, if they are at steps (`running`), else at once. One more, 10 s
    later or more, ends the process.

    A host that has asked reached(n) may have begun step n + 1, in which the others must take part. So from the notice
    on none passes another step until each has said how far it is; the last step is then one more than the furthest.
    """

    def __init__(self):
        global _steps
        self.noticed, self.step, self.last, self.lock, self.running = None, 0, None, threading.Lock(), False
        _steps = self
        ending.on_signal(signal.SIGTERM, self._notice)

    def _notice(self):
        # A shutdown may signal this process and what started it, which passes the signal on: that is one notice.
        now = time.monotonic()
        if not self.running or self.noticed is not None and now - self.noticed > 10:
            stop(AGAIN, f"stopped by SIGTERM; {GOES_ON if _count > 1 else ending.GOES_ON}")
        self.noticed = self.noticed or now

    def begin(self, goes_on):
        """The run is at steps from here on. goes_on(): text for who interrupts it, in a thread of its own."""
        ending.on_signal(signal.SIGINT, lambda: stop(1, f"interrupted; {goes_on()}"))
        self.running = True

    def end(self):
        """The run is past its steps."""
        self.running = False

    def agree(self):
        """Called by the watching thread."""
        if self.last is not None:
            return
        with self.lock:
            _client.key_value_set(f"dit_jax/said/{_index}/sigterm", "")
            _client.key_value_set(f"dit_jax/steps/{_index}", str(self.step))
            steps = [int(_client.blocking_key_value_get(f"dit_jax/steps/{i}", FOREVER)) for i in range(_count)]
            self.last = max(steps) + 1

    def reached(self, step):
        """Whether `step`, which was begun, is the last. To be asked at each step."""
        if _client is None:
            return self.noticed is not None
        with self.lock:
            self.step = step
            return self.last is not None and step >= self.last

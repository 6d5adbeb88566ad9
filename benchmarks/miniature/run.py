"""Runs a plan's commands, has the judges look at the samples, and keeps what they say."""

import contextlib
import json
import os
import subprocess
import sys
import time

from benchmarks.machine import machine
from benchmarks.miniature import STUDIES, measure
from benchmarks.miniature.plan import SEEDS
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import duration, say

PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "mlxtend"
# Says which cores a command has, and that it ends with this process.
LAUNCH = """
import os, runpy, sys
from dit_jax.runtime import process
process.end_with_parent(int(sys.argv[1]))
cores, sys.argv = sys.argv[2], sys.argv[3:]
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def slots():
    """Returns the cores of each command that runs at a time, as text. On an accelerator one command has all cores."""
    if process.accelerator_attached() or not hasattr(os, "sched_getaffinity"):
        return [""]
    mine = sorted(os.sched_getaffinity(0))
    count = min(len(mine), 4)
    return [",".join(map(str, mine[i::count])) for i in range(count)]


class Commands:
    """Runs a plan's tasks, as many at a time as there are slots, the longest first. Ends them when it is left.

    failed: {name: what its log ends with}. What needs such a task is never begun.
    """

    def __init__(self, plan, slots):
        self.plan, self.free, self.running, self.finished, self.failed = plan, list(slots), {}, set(), {}
        self.count, self.taken, self.estimated = len(slots), 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for command, *_ in self.running.values():
            command.terminate()  # training saves where it is
        for command, *_ in self.running.values():
            try:
                command.wait(60)
            except subprocess.TimeoutExpired:
                command.kill()

    def _log(self, task):
        return os.path.join(self.plan.out, "logs", f"{task.name}.log")

    def start(self):
        """Starts tasks as long as there are free slots and tasks whose needs are met."""
        tasks = self.plan.tasks
        begun = {*self.running, *self.finished, *self.failed}
        ready = [
            t
            for t in tasks.values()
            if not t.is_done
            and t.name not in begun
            and (t.needs is None or tasks[t.needs].is_done and t.needs not in self.running)
        ]
        for task in sorted(ready, key=lambda t: -t.seconds):
            if not self.free:
                return
            slot = self.free.pop(0)
            with open(self._log(task), "a") as log:
                argv = [sys.executable, "-c", LAUNCH, str(os.getpid()), slot, *task.argv]
                command = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.running[task.name] = command, slot, time.perf_counter()

    def ended(self):
        """Yields the tasks that have ended well since the last call."""
        for name, (command, slot, start) in list(self.running.items()):
            if command.poll() is None:
                continue
            del self.running[name]
            self.free.append(slot)
            task = self.plan.tasks[name]
            if command.returncode:
                with open(self._log(task), errors="replace") as f:
                    last = [line.strip() for line in f if line.strip()][-1:] or ["no word"]
                self.failed[name] = (
                    f"{name} ended with status {command.returncode}: {last[0]} (all of it: {self._log(task)})"
                )
                say(self.failed[name])
                continue
            self.finished.add(name)
            self.taken += time.perf_counter() - start
            self.estimated += task.seconds
            yield task

    def left(self):
        """Returns the seconds to the end of all, by the estimates and by how long the finished tasks took."""
        pace, now = self.taken / self.estimated if self.estimated else 1.0, time.perf_counter()
        rest = {
            name: task.seconds * pace
            for name, task in self.plan.tasks.items()
            if not task.is_done and name not in {*self.finished, *self.failed} and task.needs not in self.failed
        }
        rest |= {name: max(0, rest.get(name, 0) - (now - start)) for name, (_, _, start) in self.running.items()}
        return max([sum(rest.values()) / self.count, *(rest[name] for name in self.running)])


def read(path, default=None):
    """Returns what a JSON file holds, or `default` where there is none. Raises UserError where it is damaged."""
    if not os.path.exists(path):
        return default
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError:
        raise UserError(f"{path}: is damaged: remove it, and run the same command again") from None


def write(path, value):
    """Writes a JSON file."""
    write_aside(path, (json.dumps(value, indent=1) + "\n").encode())


def judge_samples(judges, task):
    """Returns the result of a task that made samples."""
    return task.about | {"judges": judges.measure(task.about["samples"], task.about["sets"])}


def carry_out(plan, judge=judge_samples):
    """Does all that is not done yet: runs, samples, and what the judges say of them.

    judge(judges, task) returns the result of a task that made samples. Returns {name: problem} of the commands that
    failed.
    """
    out, cores = plan.out, slots()
    real, made = os.path.join(out, "results", "real.json"), os.path.join(out, "made.json")
    todo = [t for t in plan.tasks.values() if not t.is_done]
    if not todo and os.path.exists(real) and os.path.exists(made):
        return {}
    clock, spent = time.perf_counter(), read(os.path.join(out, "seconds.json"), 0.0)
    said = clock

    def clocked():
        write(os.path.join(out, "seconds.json"), spent + time.perf_counter() - clock)

    with contextlib.ExitStack() as stack:
        stack.callback(clocked)  # at whatever end
        commands = stack.enter_context(Commands(plan, cores))
        say(f"{len(todo)} of {len(plan.tasks)} commands to run, {len(cores)} at a time; what they say is in {out}/logs")
        commands.start()
        judges = measure.Judges(plan.recipe["input_size"], plan.samples)  # while the first commands run
        write(real, judges.real())
        done = len(plan.tasks) - len(todo)
        while commands.running:
            for task in commands.ended():
                commands.start()
                if task.about:
                    write(task.done, judge(judges, task))
                done += 1
                said = 0
            if time.perf_counter() - said > 60:
                said = time.perf_counter()
                clocked()
                say(
                    f"{done} of {len(plan.tasks)} done, {duration(commands.left())} left; running: "
                    f"{', '.join(commands.running) or 'none'}"
                )
            commands.start()
            time.sleep(0.2)
        write(made, {"date": time.strftime("%Y-%m-%d"), "machine": machine(PACKAGES)})
        return commands.failed


def collect(plan, failed):
    """Returns what results.json holds, and writes it into plan.out: the plan, the results that are there, and how they
    came about. Raises UserError where there are none.

    plan: of all studies. failed: of carry_out.
    """
    out = plan.out
    done = {name: read(t.done, {}) for name, t in plan.tasks.items() if t.about and t.is_done}
    results = {name: {k: v for k, v in result.items() if k != "samples"} for name, result in done.items()}
    if not results:
        raise UserError(next(iter(failed.values())))
    study = (
        plan.manifest
        | read(os.path.join(out, "made.json"))
        | {
            "seconds": read(os.path.join(out, "seconds.json")),
            "real": read(os.path.join(out, "results", "real.json")),
            "failed": failed,
            "results": results,
        }
    )
    write(os.path.join(out, "results.json"), study)
    return study


def earlier_study(folder, plan):
    """Returns (its Plan, its results.json) of the study in `folder`, beside which `plan` is to stand.

    Raises UserError where there is none, or where the two cannot be compared.
    """
    there = read(os.path.join(folder, "results.json"))
    if not isinstance(there, dict) or "seed" not in there:
        raise UserError(f"--beside={folder}: holds no finished study: there is no results.json of one")
    differ = [
        f"{key} ({there.get(key)} there, {value} here)"
        for key, value in plan.manifest.items()
        if key != "seed" and there.get(key) != value
    ]
    if differ:
        raise UserError(f"--beside={folder}: cannot be compared: {', '.join(differ)}")
    if abs(there["seed"] - plan.seed) < SEEDS:
        raise UserError(
            f"--beside={folder}: has seed {there['seed']} and the {SEEDS - 1} after it, and some runs of "
            f"--seed={plan.seed} would be the same: give a --seed that is at least {SEEDS} away"
        )
    return plan.with_studies(STUDIES, folder, there["seed"]), there

"""The paper's claims in miniature, on digits that come through pip: python -m dit_jax.reproduce

    python -m dit_jax.reproduce --out=runs/mini                    # everything; an hour and 10 minutes on 2 cores
    python -m dit_jax.reproduce --out=runs/mini --study=blocks     # one question; others can be added later
    python -m dit_jax.reproduce --out=runs/mini --dry_run          # the plan: runs, commands, estimated time
    python -m dit_jax.reproduce --out=runs/again --seed=3 --beside=runs/mini   # again: does it come out the same?

The studies: scaling (figures 2, 7, 8), blocks (figure 5), guidance (appendix A), sampling (figure 10), training
(figures 6, 9). Each run is an ordinary `train` command in OUT/runs, each set of samples an ordinary `sample` command in
OUT/samples, side by side on the cores of a CPU. Two judges fitted on real training pictures look at the samples; what
they say is in OUT/results, one JSON file a command, and at the end in OUT/results.json, of which OUT/report.md and its
plots are made. After any end the same command goes on. Where a command fails, the others go on, and the page says so.
"""

from dit_jax import cli

from absl import flags

STUDIES = ("scaling", "blocks", "guidance", "sampling", "training")

if __name__ == "__main__":
    cli.define_path("out", None, "a folder for all of it: made, or gone on with")
    flags.DEFINE_list("study", ",".join(STUDIES), f"one or more of {','.join(STUDIES)}")
    flags.DEFINE_enum("budget", "small", ["small", "full", "tiny"], "small: 2 cores of a laptop; full: an accelerator; "
                      "tiny: to see in minutes that all works, it decides nothing")
    flags.DEFINE_integer("steps", None, "training steps of every run, a multiple of 8; by default the budget's",
                         lower_bound=8)
    flags.DEFINE_integer("samples", None, "pictures in a set, a multiple of 10, of which a distance is measured; by "
                         "default the budget's", lower_bound=10)
    flags.DEFINE_integer("seed", 0, "the first of the seeds, of which a model has up to 3",
                         lower_bound=0, upper_bound=2**31)
    cli.define_path("beside", None, "a folder with the results.json of a study of another --seed: whether this one lands "
                        "within its ranges goes on the page")
    flags.DEFINE_bool("dry_run", False, "print the plan and do nothing")
    cli.parse()  # above the imports that take time

import contextlib
import functools
import json
import os
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field

import jax

from dit_jax import config as configs, flops
from dit_jax.benchmark import machine
from dit_jax.config import UserError
from dit_jax.logging import duration, say
from dit_jax.miniature import measure, page
from dit_jax.models.blocks import BLOCKS
from dit_jax.runtime import ending, files
from dit_jax.runtime.files import write_aside
from dit_jax.sample import same_manifest

CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "mini.py")
SEEDS = 3  # at most, of a model
SETS = 2  # of samples of a finished run
# What is measured. ddim: steps of the sampler of every study but `sampling`, whose DDPM steps are few (of the large
# model) and many (of the small one); samples: pictures in a set.
MEASURED = {"small": dict(samples=1000, ddim=32, scales=(1.25, 1.5, 2.0, 4.0), few=(16, 32),
                          many=(16, 32, 64, 128, 256)),
            "full": dict(samples=1000, ddim=50, scales=(1.25, 1.5, 2.0, 3.0, 4.0), few=(16, 32, 64, 128, 256),
                         many=(16, 32, 64, 128, 256, 1000)),
            "tiny": dict(samples=40, ddim=2, scales=(2.0,), few=(2,), many=(2, 4))}
# For the estimate alone: FLOP/s of one core in these models, and seconds to start a command.
TRAIN, SAMPLE, START = 2.7e10, 7e10, 10.0
PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "mlxtend"
# Says which cores a command has, and that it ends with this process.
LAUNCH = """
import os, runpy, sys
from dit_jax import cli
cli.end_with_parent(int(sys.argv[1]))
cores, sys.argv = sys.argv[2], sys.argv[3:]
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclass
class Task:
    """A command, and the file or folder that says it is done. seconds: an estimate on one core. needs: the name of the
    task that goes before. about: what the result is of, where these are samples."""
    name: str
    argv: list
    done: str
    seconds: float
    needs: str = None
    about: dict = field(default_factory=dict)

    @property
    def is_done(self):
        return os.path.exists(self.done)


@functools.cache
def num_params(**args):
    return flops.num_params(**args)[1]


class Plan:
    """tasks: {name: Task}, each after what it needs; studies: {study: names of the samples that it is made of}.
    samples: pictures in a set. seed: the first of the runs' seeds, and that of the samples."""

    def __init__(self, out, budget, studies, steps=None, samples=None, seed=0):
        self.out, self.tasks, self.studies, self.seed = out, {}, {}, seed
        if not os.path.isfile(CONFIG):
            raise UserError(f"{CONFIG}: is missing: run from a checkout installed with pip install -e '.[mnist]'")
        mini = runpy.run_path(CONFIG)
        self.budget, self.get_config = budget, mini["get_config"]
        m = MEASURED[budget]
        self.recipe = json.loads(json.dumps(mini["BUDGETS"][budget] | m))  # as it comes back from a file
        self.steps, self.samples = steps or self.recipe["steps"], samples or m["samples"]
        if self.steps % 8:
            raise UserError(f"--steps={self.steps}: must be a multiple of 8, as checkpoints are kept of every eighth")
        if self.samples % 10:
            raise UserError(f"--samples={self.samples}: must be a multiple of 10, the number of classes")
        ddim, patches = ("ddim", m["ddim"]), self.recipe["patches"]
        middle = patches[len(patches) // 2]
        small, medium, large = self.recipe["sizes"]
        chosen, last = (medium, middle), self.steps

        def seeds(size, patch):
            """Those that cost the most are trained once; the one of other studies as often as there."""
            once = (medium, patches[0]), (large, patches[0]), (large, middle)
            return range(1 if (size, patch) in once else SEEDS if (size, patch) == chosen else 2)

        grid = [(size, patch, nth) for size in self.recipe["sizes"] for patch in patches for nth in seeds(size, patch)]
        makers = {
            "scaling": lambda: [self.add(size, patch, nth=nth, sampler=ddim) for size, patch, nth in grid],
            "blocks": lambda: [self.add(*chosen, block, nth, sampler=ddim) for block in BLOCKS for nth in range(SEEDS)],
            "guidance": lambda: [self.add(*chosen, nth=nth, scale=scale, sampler=ddim)
                                 for scale in (1.0, *m["scales"]) for nth in range(SEEDS)],
            "sampling": lambda: [self.add(size, middle, nth=nth, sampler=("ddpm", n)) for size, steps in
                                 ((small, m["many"]), (large, m["few"])) for n in steps for nth in seeds(size, middle)],
            "training": lambda: [self.add(size, patch, nth=nth, step=step, sampler=ddim, sets=1 if step < last else SETS)
                                 for size, patch, nth in grid for step in (last // 8, last // 4, last // 2, last)
                         if nth < 2 or step == last]}
        if not studies:
            raise UserError(f"--study is empty: one or more of {','.join(STUDIES)}")
        for study in studies:
            if study not in STUDIES:
                raise UserError(f"--study={study}: unknown; one or more of {','.join(STUDIES)}")
        for study in STUDIES:
            if study in studies:
                self.studies[study] = makers[study]()

    @property
    def manifest(self):
        """What the results follow from."""
        return {"budget": self.budget, "steps": self.steps, "samples": self.samples, "seed": self.seed,
                "recipe": self.recipe}

    def add(self, size, patch, block="adaln_zero", nth=0, *, sampler, step=None, scale=1.0, sets=SETS):
        """The name of these samples of a model's nth seed. Their task, and that of the run, are planned if they are not
        yet."""
        step, seed = step or self.steps, self.seed + nth
        model = f"{self.budget}/{size}/{patch}/{block}"
        run = f"{size}{patch}-{block}-{seed}"
        workdir = os.path.join(self.out, "runs", run)
        config = configs.resolve(self.get_config(model))
        args = {k: config["model"][k] for k in ("input_size", "patch_size", "in_channels", "hidden_size", "depth",
                                                "block", "num_heads", "num_classes")}
        if run not in self.tasks:
            flop = flops.train_flops(**args) * config["batch_size"] * self.steps
            every = self.steps // 8
            self.tasks[run] = Task(
                run, ["dit_jax.train", f"--config={CONFIG}:{model}", f"--workdir={workdir}", f"--config.seed={seed}",
                      f"--config.steps={self.steps}", f"--config.checkpoint.every={every}",
                      f"--config.checkpoint.keep_every={0 if nth > 1 or block != 'adaln_zero' else every}"],
                os.path.join(workdir, "checkpoints", str(self.steps)), START + flop / TRAIN)
        kind, n = sampler
        name, num = f"{run}-{step}-{kind}{n}-{scale:g}", sets * self.samples
        if name not in self.tasks:
            folder = os.path.join(self.out, "samples", name)
            flop = 2 * flops.macs(**args) * num * n * (1 if scale == 1 else 2)
            self.tasks[name] = Task(
                name, ["dit_jax.sample", f"--workdir={workdir}", f"--step={step}", f"--out={folder}", f"--num={num}",
                       "--classes=balanced", f"--cfg_scale={scale}", "--cfg_channels=0", f"--sampler={kind}",
                       f"--steps={n}", f"--seed={seed}", "--batch_size=100"],
                os.path.join(self.out, "results", f"{name}.json"), START + flop / SAMPLE, run,
                {"run": run, "size": size, "patch": patch, "block": block, "seed": seed, "step": step, "sampler": kind,
                 "sampler_steps": n, "cfg_scale": scale, "sets": sets, "gflops": flops.paper_gflops(**args),
                 "params": num_params(**args), "batch_size": config["batch_size"], "samples": folder})
        return name

    def describe(self, slots):
        """Lines: each task with its estimate, and the whole."""
        tasks = self.tasks.values()
        on_cpu = self.budget != "full"
        lines = [f"{task.seconds / 60:6.1f} min  " * on_cpu + f"python -m {shlex.join(task.argv)}" for task in tasks]
        whole = f"; about {duration(sum(t.seconds for t in tasks) / slots)}, {slots} at a time, each on a core of a laptop"
        return lines + [f"{sum(not t.about for t in tasks)} runs, {sum(bool(t.about) for t in tasks)} sets of samples"
                        + whole * on_cpu]


def cores():
    """The cores of each command that runs at a time, as text: on an accelerator one, on all."""
    if cli.accelerator_attached() or not hasattr(os, "sched_getaffinity"):
        return [""]
    mine = sorted(os.sched_getaffinity(0))
    slots = min(len(mine), 4)
    return [",".join(map(str, mine[i::slots])) for i in range(slots)]


class Commands:
    """Runs a plan's tasks, as many at a time as there are slots, the longest first. Ends them when it is left. failed:
    {name: what its log ends with}; what needs such a task is never begun."""

    def __init__(self, plan, slots):
        self.plan, self.free, self.running, self.finished, self.failed = plan, list(slots), {}, set(), {}
        self.count, self.taken, self.estimated = len(slots), 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, *_ in self.running.values():
            process.terminate()  # training saves where it is
        for process, *_ in self.running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def _log(self, task):
        return os.path.join(self.plan.out, "logs", f"{task.name}.log")

    def start(self):
        tasks = self.plan.tasks
        ready = [t for t in tasks.values() if not t.is_done and t.name not in {*self.running, *self.finished, *self.failed}
                 and (t.needs is None or tasks[t.needs].is_done and t.needs not in self.running)]
        for task in sorted(ready, key=lambda t: -t.seconds):
            if not self.free:
                return
            slot = self.free.pop(0)
            with open(self._log(task), "a") as log:
                argv = [sys.executable, "-c", LAUNCH, str(os.getpid()), slot, *task.argv]
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                           start_new_session=True)
            self.running[task.name] = process, slot, time.perf_counter()

    def ended(self):
        """The tasks that have ended since, well."""
        for name, (process, slot, start) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            self.free.append(slot)
            task = self.plan.tasks[name]
            if process.returncode:
                with open(self._log(task), errors="replace") as f:
                    last = [line.strip() for line in f if line.strip()][-1:] or ["no word"]
                self.failed[name] = f"{name} ended with status {process.returncode}: {last[0]} (all of it: {self._log(task)})"
                say(self.failed[name])
                continue
            self.finished.add(name)
            self.taken += time.perf_counter() - start
            self.estimated += task.seconds
            yield task

    def left(self):
        """Seconds to the end of all, by the estimates and how they have fared."""
        pace, now = self.taken / self.estimated if self.estimated else 1.0, time.perf_counter()
        rest = {name: task.seconds * pace for name, task in self.plan.tasks.items()
                if not task.is_done and name not in {*self.finished, *self.failed} and task.needs not in self.failed}
        rest |= {name: max(0, rest.get(name, 0) - (now - start)) for name, (_, _, start) in self.running.items()}
        return max([sum(rest.values()) / self.count, *(rest[name] for name in self.running)])


def read(path, default=None):
    if not os.path.exists(path):
        return default
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError:
        raise UserError(f"{path}: is damaged: remove it, and run the same command again") from None


def write(path, value):
    write_aside(path, (json.dumps(value, indent=1) + "\n").encode())


def carry_out(plan):
    """All that is not done yet: runs, samples, and what the judges say of them -> {name: problem} of the failed ones."""
    out, slots = plan.out, cores()
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
        commands = stack.enter_context(Commands(plan, slots))
        say(f"{len(todo)} of {len(plan.tasks)} commands to run, {len(slots)} at a time; what they say is in {out}/logs")
        commands.start()
        judges = measure.Judges(plan.recipe["input_size"], plan.samples)  # while the first commands run
        write(real, judges.real())
        done = len(plan.tasks) - len(todo)
        while commands.running:
            for task in commands.ended():
                commands.start()
                if task.about:
                    write(task.done, task.about | {"judges": judges.measure(task.about["samples"], task.about["sets"])})
                done += 1
                said = 0
            if time.perf_counter() - said > 60:
                said = time.perf_counter()
                clocked()
                say(f"{done} of {len(plan.tasks)} done, {duration(commands.left())} left; running: "
                    f"{', '.join(commands.running) or 'none'}")
            commands.start()
            time.sleep(0.2)
        write(made, {"date": time.strftime("%Y-%m-%d"), "machine": machine(PACKAGES)})
        return commands.failed


def main():
    f = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # of this process: a TPU belongs to one, and that is to be a child
    if not f.out:
        raise UserError("--out is missing: name a folder")
    if os.path.exists(f.out) and not os.path.isdir(f.out):
        raise UserError(f"--out={f.out}: is no folder")
    plan, beside = Plan(f.out, f.budget, f.study, f.steps, f.samples, f.seed), None
    if f.beside:
        path = os.path.join(f.beside, "results.json")
        there = read(path)
        if not isinstance(there, dict) or "seed" not in there:
            raise UserError(f"--beside={f.beside}: holds no finished study: there is no results.json of one")
        differ = [f"{key} ({there.get(key)} there, {value} here)" for key, value in plan.manifest.items()
                  if key != "seed" and there.get(key) != value]
        if differ:
            raise UserError(f"--beside={f.beside}: cannot be compared: {', '.join(differ)}")
        if abs(there["seed"] - f.seed) < SEEDS:
            raise UserError(f"--beside={f.beside}: has seed {there['seed']} and the {SEEDS - 1} after it, and some runs of "
                            f"--seed={f.seed} would be the same: give a --seed that is at least {SEEDS} away")
        beside = Plan(f.beside, f.budget, STUDIES, plan.steps, plan.samples, there["seed"]), there
    if f.dry_run:
        say("\n".join(plan.describe(len(cores()))))
        return
    ending.raise_on_signals()
    for folder in ("runs", "samples", "results", "logs"):
        cli.make_workdir(os.path.join(f.out, folder), "out")
    with files.hold(f.out, "out"):
        path = os.path.join(f.out, "plan.json")
        if not same_manifest(path, plan.manifest)[0]:
            write(path, plan.manifest)
        failed = carry_out(plan)
        everything = Plan(f.out, f.budget, STUDIES, f.steps, f.samples, f.seed)  # an earlier command's studies as well
        results = {name: {k: v for k, v in read(t.done).items() if k != "samples"}
                   for name, t in everything.tasks.items() if t.about and t.is_done}
        if not results:
            raise UserError(next(iter(failed.values())))
        study = plan.manifest | read(os.path.join(f.out, "made.json")) | {
            "seconds": read(os.path.join(f.out, "seconds.json")), "real": read(os.path.join(f.out, "results", "real.json")),
            "failed": failed, "results": results}
        write(os.path.join(f.out, "results.json"), study)
        page.write(everything, study, os.path.join(f.out, "report.md"), beside)
    if failed:
        raise UserError(f"{len(failed)} failed, and {f.out}/report.md is of the rest: {next(iter(failed.values()))}")
    say(f"{f.out}/report.md")


if __name__ == "__main__":
    cli.run(main)

"""Which runs are trained, and which samples are made of them."""

import functools
import json
import os
import runpy
import shlex
from dataclasses import dataclass, field

from benchmarks import ROOT
from benchmarks.miniature import STUDIES
from dit_jax import config as configs
from dit_jax.models import flops
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import duration

CONFIG = os.path.join(ROOT, "configs", "mini.py")
BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")  # the paper's, of figure 5
SEEDS = 3  # at most, of a model
SETS = 2  # of samples of a finished run
# What is measured. ddim: steps of the sampler of every study but `sampling`, whose DDPM steps are few (of the large
# model) and many (of the small one); samples: pictures in a set.
MEASURED = {
    "small": dict(samples=1000, ddim=32, scales=(1.25, 1.5, 2.0, 4.0), few=(16, 32), many=(16, 32, 64, 128, 256)),
    "full": dict(
        samples=1000,
        ddim=50,
        scales=(1.25, 1.5, 2.0, 3.0, 4.0),
        few=(16, 32, 64, 128, 256),
        many=(16, 32, 64, 128, 256, 1000),
    ),
    "tiny": dict(samples=40, ddim=2, scales=(2.0,), few=(2,), many=(2, 4)),
}
# For the estimate alone: FLOP/s of one core in these models, and seconds to start a command.
TRAIN, SAMPLE, START = 2.7e10, 7e10, 10.0


@dataclass
class Task:
    """A command.

    done: the file or folder that says it is done. seconds: an estimate on one core. needs: the name of the task that
    goes before. about: what the result is of, where the command makes samples.
    """

    name: str
    argv: list
    done: str
    seconds: float
    needs: str | None = None
    about: dict = field(default_factory=dict)

    @property
    def is_done(self):
        return os.path.exists(self.done)


@functools.cache
def num_params(**args):
    """Returns the number of trained parameters of a DiT with these arguments."""
    return flops.num_params(**args)[1]


class Plan:
    """The tasks of some studies.

    Attributes: tasks, {name: Task}, each after what it needs; studies, {study: names of the samples that it is made
    of}; steps, of every run; samples, pictures in a set; seed, the first of the runs' seeds, and that of the samples;
    recipe, the budget's settings. Raises UserError naming the flag that is wrong.
    """

    def __init__(self, out, budget, studies, steps=None, samples=None, seed=0):
        self.out, self.tasks, self.studies, self.seed = out, {}, {}, seed
        if not os.path.isfile(CONFIG):
            raise UserError(f"{CONFIG}: is missing: run from a checkout installed with pip install -e '.[mnist]'")
        mini = runpy.run_path(CONFIG)
        self.budget, self.get_config = budget, mini["get_config"]
        self.recipe = json.loads(json.dumps(mini["BUDGETS"][budget] | MEASURED[budget]))  # as it comes back from a file
        self.steps, self.samples = steps or self.recipe["steps"], samples or MEASURED[budget]["samples"]
        if self.steps % 8:
            raise UserError(f"--steps={self.steps}: must be a multiple of 8, as checkpoints are kept of every eighth")
        if self.samples % 10:
            raise UserError(f"--samples={self.samples}: must be a multiple of 10, the number of classes")
        if not studies:
            raise UserError(f"--study is empty: one or more of {','.join(STUDIES)}")
        for study in studies:
            if study not in STUDIES:
                raise UserError(f"--study={study}: unknown; one or more of {','.join(STUDIES)}")
        for study in STUDIES:
            if study in studies:
                self.studies[study] = self._samples_of(study)

    def with_studies(self, studies, out=None, seed=None):
        """Returns the same plan of other studies, and where these are given in another folder and of another seed."""
        seed = self.seed if seed is None else seed
        return Plan(out or self.out, self.budget, studies, self.steps, self.samples, seed)

    @property
    def manifest(self):
        """What the results follow from."""
        return {
            "budget": self.budget,
            "steps": self.steps,
            "samples": self.samples,
            "seed": self.seed,
            "recipe": self.recipe,
        }

    def _samples_of(self, study):
        """Plans the tasks of a study, and returns the names of its samples."""
        measured, patches, sizes = MEASURED[self.budget], self.recipe["patches"], list(self.recipe["sizes"])
        ddim, middle, last = ("ddim", measured["ddim"]), patches[len(patches) // 2], self.steps
        small, medium, large = sizes
        chosen = medium, middle

        def seeds(size, patch):
            """Models that cost the most are trained once; the one of other studies as often as there."""
            once = (medium, patches[0]), (large, patches[0]), (large, middle)
            return range(1 if (size, patch) in once else SEEDS if (size, patch) == chosen else 2)

        grid = [(size, patch, nth) for size in sizes for patch in patches for nth in seeds(size, patch)]
        if study == "scaling":
            return [self.add(size, patch, nth=nth, sampler=ddim) for size, patch, nth in grid]
        if study == "blocks":
            return [self.add(*chosen, block, nth, sampler=ddim) for block in BLOCKS for nth in range(SEEDS)]
        if study == "guidance":
            return [
                self.add(*chosen, nth=nth, scale=scale, sampler=ddim)
                for scale in (1.0, *measured["scales"])
                for nth in range(SEEDS)
            ]
        if study == "sampling":
            return [
                self.add(size, middle, nth=nth, sampler=("ddpm", n))
                for size, steps in ((small, measured["many"]), (large, measured["few"]))
                for n in steps
                for nth in seeds(size, middle)
            ]
        return [
            self.add(size, patch, nth=nth, step=step, sampler=ddim, sets=1 if step < last else SETS)
            for size, patch, nth in grid
            for step in (last // 8, last // 4, last // 2, last)
            if nth < 2 or step == last
        ]

    def add(self, size, patch, block="adaln_zero", nth=0, *, sampler, step=None, scale=1.0, sets=SETS):
        """Returns the name of these samples of a model's nth seed. Plans their task, and the run's, where there is none
        yet."""
        step, seed = step or self.steps, self.seed + nth
        model = f"{self.budget}/{size}/{patch}/{block}"
        run = f"{size}{patch}-{block}-{seed}"
        workdir = os.path.join(self.out, "runs", run)
        config = configs.resolve(self.get_config(model))
        args = {
            k: config["model"][k]
            for k in (
                "input_size",
                "patch_size",
                "in_channels",
                "hidden_size",
                "depth",
                "block",
                "num_heads",
                "num_classes",
            )
        }
        if run not in self.tasks:
            flop = flops.train_flops(**args) * config["batch_size"] * self.steps
            every = self.steps // 8
            self.tasks[run] = Task(
                run,
                [
                    "dit_jax.train",
                    f"--config={CONFIG}:{model}",
                    f"--workdir={workdir}",
                    f"--config.seed={seed}",
                    f"--config.steps={self.steps}",
                    f"--config.checkpoint.every={every}",
                    f"--config.checkpoint.keep_every={0 if nth > 1 or block != 'adaln_zero' else every}",
                ],
                os.path.join(workdir, "checkpoints", str(self.steps)),
                START + flop / TRAIN,
            )
        kind, n = sampler
        name, num = f"{run}-{step}-{kind}{n}-{scale:g}", sets * self.samples
        if name not in self.tasks:
            folder = os.path.join(self.out, "samples", name)
            flop = 2 * flops.macs(**args) * num * n * (1 if scale == 1 else 2)
            self.tasks[name] = Task(
                name,
                [
                    "dit_jax.sample",
                    f"--workdir={workdir}",
                    f"--step={step}",
                    f"--out={folder}",
                    f"--num={num}",
                    "--classes=balanced",
                    f"--cfg_scale={scale}",
                    "--cfg_channels=0",
                    f"--sampler={kind}",
                    f"--steps={n}",
                    f"--seed={seed}",
                    "--batch_size=100",
                ],
                os.path.join(self.out, "results", f"{name}.json"),
                START + flop / SAMPLE,
                run,
                {
                    "run": run,
                    "size": size,
                    "patch": patch,
                    "block": block,
                    "seed": seed,
                    "step": step,
                    "sampler": kind,
                    "sampler_steps": n,
                    "cfg_scale": scale,
                    "sets": sets,
                    "gflops": flops.paper_gflops(**args),
                    "params": num_params(**args),
                    "batch_size": config["batch_size"],
                    "samples": folder,
                },
            )
        return name

    def describe(self, slots):
        """Returns lines: each task with its estimate, and the whole. slots: how many run at a time."""
        tasks = self.tasks.values()
        on_cpu = self.budget != "full"
        lines = [f"{task.seconds / 60:6.1f} min  " * on_cpu + f"python -m {shlex.join(task.argv)}" for task in tasks]
        whole = (
            f"; about {duration(sum(t.seconds for t in tasks) / slots)}, {slots} at a time, each on a core of a laptop"
        )
        return lines + [
            f"{sum(not t.about for t in tasks)} runs, {sum(bool(t.about) for t in tasks)} sets of samples"
            + whole * on_cpu
        ]

"""Which runs are trained, and with which samplers and how many evaluations each of them is sampled."""

import json
import os
import runpy
import shlex

from benchmarks.miniature.plan import CONFIG, START, Task
from dit_jax import config as configs
from dit_jax.diffusion import catalog
from dit_jax.diffusion.objectives import Objective
from dit_jax.models import flops
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import duration

# model: of configs/mini.py. passes: the training of a run, in forward passes of a batch; a step costs
# objective.train_passes of them. seeds: runs of an objective. samples: pictures in a set. cfg_scale: the guidance; with
# this one the distance is smaller than without by both judges (benchmarks/miniature/report.md).
# A new sampler or objective joins these when the study is made again: its page and numbers are of what is named here.
OBJECTIVES = ("ddpm", "flow", "meanflow")
SAMPLERS = (
    *("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "sde_dpmpp_2m", "unipc", "edm", "euler"),
    *("heun", "midpoint", "heun3", "rk4", "sde_euler", "sde_heun", "meanflow"),
)
BUDGETS = {
    "small": dict(
        model="small/S/4/adaln_zero",
        passes=18_000,
        batch_size=32,
        seeds=3,
        samples=300,
        cfg_scale=1.25,
        samplers=SAMPLERS,
        evaluations=(1, 2, 4, 8, 16, 50, 250),
    ),
    "tiny": dict(
        model="tiny/S/8/adaln_zero",
        passes=96,
        batch_size=8,
        seeds=2,
        samples=40,
        cfg_scale=1.25,
        samplers=("ddpm", "dpmpp_2m", "heun", "meanflow"),
        evaluations=(1, 4),
    ),
}
# Up to how many evaluations a run is sampled first. The rest is a task of its own, and comes when all runs have this.
FEW = 64
# For the estimate alone, on one core: FLOP/s, and seconds to compile a setting, which the first seed does for all.
TRAIN, SAMPLE, COMPILE = 5e10, 7e10, 2.5


def counts(sampler: str, objective: Objective, wanted) -> list[int]:
    """Returns the numbers of evaluations that a sampler can make and that are nearest to those wanted."""
    found = []
    for n in wanted:
        for near in sorted(range(1, n + 4), key=lambda k: (abs(k - n), k)):
            try:
                found.append(len(catalog.make(sampler, objective, near)))
                break
            except UserError:  # names the numbers that fit
                continue
    return list(dict.fromkeys(found))


class Plan:
    """The tasks of the study.

    Attributes: tasks, {name: Task}, each after what it needs; recipe, the budget's settings; steps, {objective: of a
    run}; settings, {objective: {sampler: numbers of evaluations}}; seeds, of the runs; seed, the first of them;
    samples, pictures in a set.
    """

    def __init__(self, out, budget="small", seed=0):
        if not os.path.isfile(CONFIG):
            raise UserError(f"{CONFIG}: is missing: run from a checkout installed with pip install -e '.[mnist]'")
        self.out, self.budget, self.seed, self.tasks = out, budget, seed, {}
        config = runpy.run_path(CONFIG)["get_config"](BUDGETS[budget]["model"])
        recipe = BUDGETS[budget] | {
            "input_size": config.model.input_size,
            "learning_rate": config.optimizer.learning_rate,
            "b2": config.optimizer.b2,
            "ema_decay": config.ema_decay,
            "depth": config.model.depth,
            "hidden_size": config.model.hidden_size,
            "patch_size": config.model.patch_size,
        }
        self.recipe = json.loads(json.dumps(recipe))  # as it comes back from a file
        self.samples, self.steps, self.settings = recipe["samples"], {}, {}
        self.seeds = range(seed, seed + recipe["seeds"])
        for name in OBJECTIVES:
            self._add(config, name)

    @property
    def manifest(self):
        """What the results follow from."""
        return {"budget": self.budget, "seed": self.seed, "recipe": self.recipe, "steps": self.steps}

    def _fields(self, name):
        """Returns the config's fields that an objective sets."""
        scale = self.recipe["cfg_scale"]
        # omega + kappa (u(y) - ..) with omega = 1 aims at the velocity that a scale of 1 / (1 - kappa) guides to.
        own = {
            "flow": {"flow.time": "logit_normal"},
            "meanflow": {"meanflow.omega": 1.0, "meanflow.kappa": round(1 - 1 / scale, 6)},
        }
        return {"objective": name, "batch_size": self.recipe["batch_size"]} | own.get(name, {})

    def guidance(self, name):
        """Returns the guidance scale when an objective is sampled. MeanFlow's is trained in."""
        return 1.0 if name == "meanflow" else self.recipe["cfg_scale"]

    def _add(self, config, name):
        """Plans the runs of an objective, and their samples."""
        config, fields = config.copy_and_resolve_references(), self._fields(name)
        config.update_from_flattened_dict(fields)
        resolved = configs.resolve(config)
        objective = configs.objective_of(resolved)
        steps, rest = divmod(self.recipe["passes"], objective.train_passes)
        assert not rest, f"passes must be a multiple of {objective.train_passes}"
        self.steps[name] = steps
        wanted = self.recipe["evaluations"]
        chosen = [s for s in catalog.fitting(objective) if s in self.recipe["samplers"]]
        self.settings[name] = {s: counts(s, objective, wanted) for s in chosen}
        args = resolved["model"] | {"learn_sigma": objective.learn_sigma, "second_time": objective.second_time}
        macs = flops.macs(**args)
        for seed in self.seeds:
            run = f"{name}-{seed}"
            workdir = os.path.join(self.out, "runs", run)
            self.tasks[run] = Task(
                run,
                [
                    "dit_jax.train",
                    f"--config={CONFIG}:{self.recipe['model']}",
                    f"--workdir={workdir}",
                    f"--config.seed={seed}",
                    f"--config.steps={steps}",
                    f"--config.checkpoint.every={max(1, steps // 4)}",
                    "--config.checkpoint.keep_every=0",
                    *(f"--config.{field}={value}" for field, value in fields.items()),
                ],
                os.path.join(workdir, "checkpoints", str(steps)),
                START + 2 * macs * self.recipe["passes"] * self.recipe["batch_size"] / TRAIN,
            )
            needs = run
            for part, least, most in (("few", 1, FEW), ("many", FEW + 1, 10**9)):
                chosen = [(s, n) for s, of in self.settings[name].items() for n in of if least <= n <= most]
                if not chosen:
                    continue
                task, folder = f"{run}-{part}", os.path.join(self.out, "samples", run)
                scale = self.guidance(name)
                passes = sum(n for _, n in chosen) * (1 if scale == 1 else 2)
                self.tasks[task] = Task(
                    task,
                    [
                        "benchmarks.samplers.draw",
                        f"--workdir={workdir}",
                        f"--out={folder}",
                        f"--num={self.samples}",
                        f"--cfg_scale={scale}",
                        f"--seed={seed}",
                        f"--settings={','.join(f'{s}-{n}' for s, n in chosen)}",
                    ],
                    os.path.join(self.out, "results", f"{task}.json"),
                    START + COMPILE * len(chosen) * (seed == self.seed) + 2 * macs * self.samples * passes / SAMPLE,
                    needs,
                    {
                        "objective": name,
                        "seed": seed,
                        "samples": folder,
                        "settings": [f"{s}-{n}" for s, n in chosen],
                    },
                )
                needs = task

    def describe(self, slots):
        """Returns lines: each task with its estimate, and the whole. slots: how many run at a time."""
        tasks = self.tasks.values()
        return [f"{task.seconds / 60:6.1f} min  python -m {shlex.join(task.argv)}" for task in tasks] + [
            f"{sum(not t.about for t in tasks)} runs, {sum(len(t.about.get('settings', ())) for t in tasks)} sets of "
            f"{self.samples} samples; about {duration(sum(t.seconds for t in tasks) / slots)}, {slots} at a time, each "
            "on a core of a laptop"
        ]

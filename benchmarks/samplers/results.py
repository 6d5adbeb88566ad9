"""From samples to values: what the judges say of each setting, over all seeds."""

import os
from dataclasses import dataclass

import numpy as np

from benchmarks.miniature.decisions import JUDGES, Value, student

METRICS = "frechet", "recognised"


def judge(judges, task):
    """Returns the result of a task: its objective and seed, and {setting: {judge: {metric: value}}}."""
    found = {}
    for setting in task.about["settings"]:
        of = judges.judge(np.load(os.path.join(task.about["samples"], f"{setting}.npy")))
        found[setting] = {j: {m: float(f"{of[j][m]:.4g}") for m in METRICS} for j in JUDGES}
    return {key: task.about[key] for key in ("objective", "seed")} | {"judges": found}


@dataclass(frozen=True, order=True)
class Setting:
    """How samples are made. evaluations: of the network; one that is guided asks it with the class and without."""

    objective: str
    sampler: str
    evaluations: int

    def __str__(self):
        return f"{self.sampler} with {self.evaluations}"


def by_setting(results, seeds):
    """Returns {Setting: {judge: {metric: the values of all seeds, in order}}}, of those that have all seeds.

    results: what results.json holds: of any number of tasks. Distances are logarithms.
    """
    found = {}
    for result in results:
        for name, values in result["judges"].items():
            sampler, _, n = name.rpartition("-")
            found.setdefault(Setting(result["objective"], sampler, int(n)), {})[result["seed"]] = values
    return {
        setting: {j: {m: _array([of[seed][j][m] for seed in seeds], m) for m in METRICS} for j in JUDGES}
        for setting, of in found.items()
        if all(seed in of for seed in seeds)
    }


def _array(values, metric):
    values = np.array(values, np.float64)
    return np.log(values) if metric == "frechet" else values


def distance(values):
    """Returns the geometric mean of the seeds' distances, with the range in which that of a new study is expected.

    values: the logarithms. The range is by Student's t from these seeds alone; both studies' means are off by chance.
    """
    n = len(values)
    margin = student(n - 1) * np.std(values, ddof=1) * (2 / n) ** 0.5
    return Value(*(float(np.exp(np.mean(values) + sign * margin)) for sign in (0, -1, 1)))

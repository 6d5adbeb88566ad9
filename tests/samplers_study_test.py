"""python -m benchmarks.samplers: its plan, its rules and its page."""

import json
import os
import re

import numpy as np
import pytest
from benchmark_test import run_command
from conftest import ROOT, long, one_error
from reproduce_test import QUICK, numbers

from benchmarks.machine import machine
from benchmarks.miniature import run
from benchmarks.miniature.decisions import JUDGES
from benchmarks.samplers import page, verdicts
from benchmarks.samplers.plan import SAMPLERS, Plan, counts
from benchmarks.samplers.results import Setting, by_setting, distance
from dit_jax.diffusion import catalog
from dit_jax.diffusion.objectives import DDPM, Flow, MeanFlow


def values(*distances, other=None):
    """The seeds' values of a setting. other: the distances by the second judge, by default the same in another unit."""
    other = np.array(distances) / 7 if other is None else np.array(other)
    both = dict(zip(JUDGES, (np.array(distances), other)))
    return {j: {"frechet": np.log(v), "recognised": np.full(len(v), 0.5)} for j, v in both.items()}


A, B, OTHER = Setting("flow", "heun", 8), Setting("flow", "euler", 8), Setting("ddpm", "ddim", 8)


def decided(rule, a, b, second=B):
    decisions = rule(verdicts.ratio({A: a, second: b}, A, second))
    return tuple(decisions[j] for j in JUDGES)


def test_ratios_are_compared_seed_by_seed_where_the_networks_are_the_same():
    # Seeds lie far apart, their ratios do not.
    a, b = values(10, 20, 40), values(12, 25, 49)
    assert decided(verdicts.smaller, a, b) == (1, 1) and decided(verdicts.smaller, b, a) == (-1, -1)
    assert decided(verdicts.smaller, a, b, OTHER) == (0, 0)
    assert decided(verdicts.smaller, values(10, 11, 12), values(30, 31, 32), OTHER) == (1, 1)
    ratio = verdicts.ratio({A: a, B: b}, A, B)["network"]
    logs = np.log([10 / 12, 20 / 25, 40 / 49])
    margin = 4.3027 * logs.std(ddof=1) / 3**0.5  # Student's t of two degrees of freedom
    expected = np.exp(logs.mean() + margin * np.array([0, -1, 1]))
    assert [ratio.mean, ratio.low, ratio.high] == pytest.approx(expected, rel=1e-4)


def test_what_is_better_as_good_and_alike():
    base = values(10, 10, 10)

    def of(rule, *distances, other=None):
        return decided(rule, values(*distances, other=other), base)

    assert of(verdicts.smaller, 8, 8.1, 8.2) == (1, 1) and of(verdicts.smaller, 12, 12.1, 12.2) == (-1, -1)
    assert of(verdicts.smaller, 8, 12, 10) == (0, 0)
    assert of(verdicts.as_good, 11, 11.1, 11.2) == of(verdicts.as_good, 2, 2.1, 2.2) == (1, 1)
    assert of(verdicts.as_good, 14, 14.1, 14.2) == (-1, -1)
    assert of(verdicts.as_good, 9, 14, 11) == (0, 0)  # too far apart to say
    assert of(verdicts.alike, 11, 11.1, 11.2) == of(verdicts.alike, 9, 9.1, 9.2) == (1, 1)
    assert of(verdicts.alike, 14, 14.1, 14.2) == of(verdicts.alike, 5, 5.1, 5.2) == (-1, -1)
    assert of(verdicts.alike, 9, 14, 11) == (0, 0)
    assert of(verdicts.smaller, 8, 8.1, 8.2, other=[12 / 7, 12.1 / 7, 12.2 / 7]) == (1, -1)


def made_up(change=lambda setting: 1.0, seed=0, budget="small"):
    """As results.json: distances of 10 times `change` of a setting, each within a percent."""
    plan, rng = Plan("nowhere", budget, seed), np.random.default_rng(0)
    results = {}
    for name, task in plan.tasks.items():
        if not task.about:
            continue
        judges = {}
        for setting in task.about["settings"]:
            sampler, _, n = setting.rpartition("-")
            of = 10 * change(Setting(task.about["objective"], sampler, int(n))) * rng.uniform(0.99, 1.01)
            judges[setting] = {j: {"frechet": of, "recognised": 0.5} for j in JUDGES}
        results[name] = {"objective": task.about["objective"], "seed": task.about["seed"], "judges": judges}
    one = {"frechet": 1.5}
    return plan, plan.manifest | {
        "date": "2026-01-02",
        "machine": machine(run.PACKAGES),
        "seconds": 100.0,
        "failed": {},
        "real": {
            "train": 4000,
            "held_out": 1000,
            "judges": {j: {"accuracy": 0.9, "training": one, "noise": one} for j in JUDGES},
        },
        "results": results,
    }


def found_in(plan, study):
    return by_setting(study["results"].values(), plan.seeds)


def decisions(change):
    return {v.claim: v.decision for _, of in verdicts.verdicts(found_in(*made_up(change))) for v in of}


def test_verdicts_say_what_the_numbers_say():
    """In worlds in which all claims hold, in which none does, and in which nothing differs."""

    def claimed(setting):
        if setting.objective == "meanflow":
            return 1.2 if setting.evaluations > 1 else 1.4
        noisy = setting.sampler == "ddpm" or setting.sampler.startswith("sde_")
        if setting.evaluations > 100:
            return (1.2 if setting.objective == "flow" else 1.4) * (0.9 if noisy else 1)
        order = {"euler": 4, "ddim": 1.2, "heun": 2, "midpoint": 2, "heun3": 1.1, "rk4": 1.1, "dpmpp_3m": 1.1}
        of = order.get(setting.sampler, 5 if noisy else 1.2 if setting.objective == "flow" else 1.3)
        return of * (5 if setting.evaluations <= 2 else 1)

    def worse(setting):
        references = {("ddpm", "ddpm"): 1.0, ("ddpm", "ddim"): 1.0, ("flow", "heun"): 0.2, ("flow", "euler"): 1.0}
        return references.get((setting.objective, setting.sampler), 3.0) if setting.evaluations == 250 else 3.0

    of = decisions(claimed)
    assert len(of) == 20 and set(of.values()) == {1}, {claim: d for claim, d in of.items() if d != 1}
    better = {claim for claim in of if " better " in claim}
    of = decisions(lambda setting: 1 / claimed(setting))
    assert len(better) == 12 and {of[claim] for claim in better} == {-1}
    of = decisions(worse)
    assert {of[claim] for claim in of if claim not in better} == {-1}, of
    of = decisions(lambda setting: 1.0)
    assert {of[claim] for claim in of if claim not in better} == {1} and {of[claim] for claim in better} == {0}


def test_missing_settings_decide_nothing():
    plan, study = made_up()
    found = {s: v for s, v in found_in(plan, study).items() if s.evaluations == 4}
    assert {v.decision for _, of in verdicts.verdicts(found) for v in of} == {0}
    assert verdicts.near(found, "flow", "rk4", 4) == Setting("flow", "rk4", 4)
    assert verdicts.near(found, "flow", "rk4", 5) is None
    del study["results"]["flow-1-few"]  # a seed is missing
    found = found_in(plan, study)
    assert {s.evaluations > 64 for s in found if s.objective == "flow"} == {True}


def test_enough_is_where_the_distance_stays_small():
    def change(setting):
        return {1: 1.0, 2: 9.0, 4: 1.4, 8: 1.1, 16: 1.2}.get(setting.evaluations, 1.0)

    found = found_in(*made_up(change))
    assert verdicts.enough(found, "ddpm", "ddim") == 8
    assert verdicts.enough(found, "ddpm", "edm") == 3
    worse = {s: v for s, v in found.items() if s.sampler != "ddim"}
    worse |= {s: values(99, 99, 99) for s in found if s.sampler == "ddim"}
    assert verdicts.enough(worse, "ddpm", "ddim") is None


def test_evaluations_that_a_sampler_can_make():
    wanted = (1, 2, 4, 8, 16, 50, 250)
    assert counts("euler", Flow(), wanted) == list(wanted)
    assert counts("heun", Flow(), wanted) == [2, 4, 8, 16, 50, 250]
    assert counts("edm", DDPM(), wanted) == [3, 7, 15, 49, 249]
    assert counts("rk4", MeanFlow(), wanted) == [4, 8, 16, 48, 248]
    assert counts("sde_euler", Flow(), (1, 2)) == [2]


def test_the_plan_has_equal_compute_and_every_sampler_of_the_study():
    plan = Plan("out")
    passes = {name: steps * n for (name, steps), n in zip(plan.steps.items(), (3, 3, 6))}
    assert list(passes) == ["ddpm", "flow", "meanflow"] and len(set(passes.values())) == 1
    for objective in (DDPM(), Flow(), MeanFlow()):
        assert list(plan.settings[objective.name]) == [s for s in catalog.fitting(objective) if s in SAMPLERS]
    assert {s for of in plan.settings.values() for s in of} == set(SAMPLERS) == set(page.STYLES)
    assert {*SAMPLERS} >= {"ddpm", "unipc", "sde_heun", "meanflow"} and set(SAMPLERS) <= set(catalog.SAMPLERS)
    assert len(plan.seeds) >= 3 and {t.about["seed"] for t in plan.tasks.values() if t.about} == set(plan.seeds)
    scales = {t.about["objective"]: t.argv[4] for t in plan.tasks.values() if t.about}
    assert scales["ddpm"] == scales["flow"] and scales["meanflow"] == "--cfg_scale=1.0"
    kappa = next(a for a in plan.tasks["meanflow-0"].argv if "kappa" in a)
    assert 1 / (1 - float(kappa.partition("=")[2])) == pytest.approx(plan.recipe["cfg_scale"])
    # The second task of a run waits for the first.
    assert plan.tasks["flow-2-many"].needs == "flow-2-few" and plan.tasks["flow-2-few"].needs == "flow-2"
    assert f"{len(plan.seeds) * 3} runs" in plan.describe(2)[-1]


def test_the_page_is_made_of_the_results(tmp_path):
    plan, study = made_up(lambda s: 1 + 10 / s.evaluations + 0.1 * len(s.sampler))
    samples = tmp_path / "samples" / "ddpm-0"
    samples.mkdir(parents=True)
    np.save(samples / "ddpm-250.npy", np.zeros((20, 16, 16, 3), np.uint8))
    page.write(study, str(tmp_path / "report.md"), str(tmp_path / "samples"))
    text = (tmp_path / "report.md").read_text()
    assert "2026-01-02" in text and "1 min 40 s" in text and f"jax {study['machine']['versions']['jax']}" in text
    shown = numbers(text)
    for values in found_in(plan, study).values():
        assert all(f"{distance(values[j]['frechet']).mean:.3g}" in shown for j in JUDGES)
    linked = set(re.findall(r"!\[[\w ]+\]\((\w+\.png)\)", text))
    assert linked == {"network.png", "strokes.png", "samples.png"}
    assert all((tmp_path / name).stat().st_size > 1000 for name in linked)
    assert len(re.findall(r"^- \*\*(?:Holds|Does not hold|Undecided)\*\*: ", text, re.MULTILINE)) == 20
    assert f"| DDPM{' ' * 10}| edm" in text and "(249)" in text
    page.write(study | {"results": {}, "failed": {"ddpm-0": "ddpm-0 diverged"}}, str(tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text()
    assert "Not run" in text and "**Failed**: ddpm-0 diverged" in text


def test_the_committed_page_is_that_of_its_results(tmp_path):
    """But for the samples, which are not committed."""
    folder = ROOT / "benchmarks" / "samplers"
    study = json.loads((folder / "results.json").read_text())
    plan = Plan(str(tmp_path), study["budget"], study["seed"])
    assert plan.manifest == {key: study[key] for key in plan.manifest}
    page.write(study, str(tmp_path / "report.md"))
    committed, _, samples = (folder / "report.md").read_text().partition("## Samples")
    assert "samples.png" in samples and (tmp_path / "report.md").read_text().split() == committed.split()
    assert (folder / "results.json").stat().st_size < 300_000


def test_bad_flags(tmp_path):
    one_error(run_command("benchmarks.samplers"), "--out")
    one_error(run_command("benchmarks.samplers", "--out=README.md", "--dry_run"), "--out=README.md: is no folder")
    status, said, err = run_command("benchmarks.samplers", "--out", tmp_path / "new", "--dry_run")
    assert status == 0 and "benchmarks.samplers.draw" in said and "9 runs" in said, err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@long
def test_the_whole_study_of_the_smallest_budget(tmp_path):
    """All of it; and a setting that is lost is sampled again, to the same result."""
    status, said, err = run_command("benchmarks.samplers", "--out", tmp_path, "--budget=tiny", code=QUICK)
    assert status == 0, err + said
    study = json.loads((tmp_path / "results.json").read_text())
    plan = Plan(str(tmp_path), "tiny")
    found = found_in(plan, study)
    assert {(s.objective, s.sampler) for s in found} == {(o, s) for o, of in plan.settings.items() for s in of}
    assert all(np.isfinite(v[j]["frechet"]).all() for v in found.values() for j in JUDGES)
    # One evaluation of a multistep solver is Euler's step, and MeanFlow's network has its own.
    same = [(tmp_path / "samples" / f"ddpm-{seed}" / "ddpm-1.npy").read_bytes() for seed in plan.seeds]
    assert len(set(same)) == 2
    text = (tmp_path / "report.md").read_text()
    assert "decides nothing" in text and "samples.png" in text
    task = plan.tasks["flow-1-few"]
    os.unlink(task.done)
    os.unlink(tmp_path / "samples" / "flow-1" / "heun-2.npy")
    status, said, err = run_command("benchmarks.samplers", "--out", tmp_path, "--budget=tiny", code=QUICK)
    assert status == 0 and "1 of 12 commands to run" in said + err, err + said
    assert json.loads((tmp_path / "results.json").read_text())["results"] == study["results"]
    # Another budget does not go into the same folder.
    one_error(run_command("benchmarks.samplers", "--out", tmp_path), "--out", "budget")

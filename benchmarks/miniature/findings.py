"""From results to outcomes: what is said of each of the paper's claims is chosen here, by the numbers alone."""

import itertools

import numpy as np

from benchmarks.miniature import compute
from benchmarks.miniature.decisions import (
    EXPECTED,
    JUDGES,
    METRICS,
    agreed,
    chance,
    correlation,
    groups,
    lower,
    of_seeds,
    sentence,
    share,
    student,
    tally,
    trend,
    value,
)
from dit_jax.evaluation import paper
from dit_jax.models import flops

LEARNED = 0.5  # so many samples must be recognised where a model is said to have learned the class
# The order of figure 5, best first, with the paper's names.
ORDER = {"adaln_zero": "adaLN-Zero", "adaln": "adaLN", "cross_attention": "cross-attention", "in_context": "in-context"}


def unlearned(models):
    """Returns a sentence on the models of which few samples are recognised; "" where there are none.

    models: {name: share of samples recognised by the network}.
    """
    few = [f"{name} ({share:.0%})" for name, share in models.items() if share < LEARNED]
    if not few:
        return ""
    return f"The class is not well learned: the network recognises less than half of the samples of {', '.join(few)}."


def paper_models():
    """Returns [(name, Gflops, FID-50K at 400K steps, million parameters)] of the twelve models of table 4."""
    names = [(name, name.removeprefix("DiT-").replace("/", "").lower()) for name in flops.PAPER if " " not in name]
    return [
        (name, float(flops.PAPER[name][0]), paper.NO_GUIDANCE[config, 400_000], flops.PAPER[name][1])
        for name, config in names
    ]


def paper_counts():
    """Returns what `scaling` counts, in the paper's table 4: [(how many go the paper's way, of how many)]."""
    models = {tuple(name.removeprefix("DiT-").split("/")): (gflops, fid) for name, gflops, fid, _ in paper_models()}
    order = sorted(models, key=lambda name: models[name])
    pairs = [(b, a) for i, a in enumerate(order) for b in order[i + 1 :]]
    sizes = [((b, p), (a, p)) for a, b in itertools.pairwise(("S", "B", "L", "XL")) for p in "248"]
    patches = [((s, a), (s, b)) for a, b in itertools.pairwise("248") for s in ("S", "B", "L", "XL")]
    return [(sum(models[a][1] < models[b][1] for a, b in of), len(of)) for of in (pairs, sizes, patches)]


def scaling(results, spread):
    """Figures 2 and 8: are models of more Gflops better? Returns (rows, correlations, sentences).

    spread: of seed_spread. Rows are (model, Gflops, number of seeds, {judge: Value}, {judge: recognised}), by Gflops.
    correlations: {judge: (with log Gflops, a Value; with Gflops; with the logarithm of the number of parameters)}.
    """
    models = {key[:2]: same for key, same in groups(results).items()}
    values = {key: {j: value(same, j, spread) for j in JUDGES} for key, same in models.items()}
    gflops, params = ({key: same[0][what] for key, same in models.items()} for what in ("gflops", "params"))
    order = sorted(models, key=lambda key: gflops[key])
    name = "{0[0]}/{0[1]}".format
    rows = [
        (
            name(key),
            gflops[key],
            len({r["seed"] for r in models[key]}),
            values[key],
            {j: share(models[key], j) for j in JUDGES},
        )
        for key in order
    ]
    x, weights = np.array([gflops[key] for key in order]), np.array([params[key] for key in order])
    found, decision = trend(np.log(x), [values[key] for key in order])
    means = {j: [values[key][j].mean for key in order] for j in JUDGES}
    correlations = {j: (found[j], correlation(x, means[j]), correlation(np.log(weights), means[j])) for j in JUDGES}
    shown = f"r = {' and '.join(f'{found[j].mean:.2f} by {j}' for j in JUDGES)} (by chance, to ±{chance(len(x)):.2f})"
    sentences = [
        sentence(
            decision,
            f"models of more Gflops make better samples on the whole, {shown}",
            f"models of more Gflops make worse samples on the whole, {shown}",
            f"a judge's correlation is no larger than by chance, {shown}",
        )
    ]

    sizes, patches = list(dict.fromkeys(s for s, _ in models)), sorted({p for _, p in models})
    for what, pairs, in_paper in (
        (
            "pairs of models the one of more Gflops",
            [(b, a) for i, a in enumerate(order) for b in order[i + 1 :]],
            paper_counts()[0],
        ),
        (
            "pairs of neighbours in size, of the same patch, the larger one",
            [((b, p), (a, p)) for a, b in itertools.pairwise(sizes) for p in patches],
            paper_counts()[1],
        ),
        (
            "pairs of neighbours in patch, of the same size, that of smaller patches",
            [((s, a), (s, b)) for a, b in itertools.pairwise(patches) for s in sizes],
            paper_counts()[2],
        ),
    ):
        found = [{j: lower(values[a][j], values[b][j]) for j in JUDGES} for a, b in pairs]
        whole, counts = tally(found, what, "is better", in_paper)
        worse = [
            f"{name(a)} worse than {name(b)} by {' and '.join(j for j in JUDGES if of[j] < 0)}"
            for (a, b), of in zip(pairs, found)
            if min(of.values()) < 0
        ]
        counts += f" ({', '.join(worse)})" * bool(worse)
        sentences.append(sentence(whole, counts, counts, counts))
    return rows, correlations, sentences


def stages(results, spread):
    """Figure 6: are more Gflops better at every stage of the training? Returns (rows, sentences).

    Rows are (step, {judge: correlation of the distance with log Gflops, a Value}).
    """
    rows, decisions = [], {}
    for step in sorted({r["step"] for r in results}):
        here = sorted(
            (same for key, same in groups(results).items() if key[3] == step), key=lambda same: same[0]["gflops"]
        )
        found, decisions[step] = trend(
            np.log([same[0]["gflops"] for same in here]), [{j: value(same, j, spread) for j in JUDGES} for same in here]
        )
        rows.append((step, found))
    shown = " and ".join(f"{step:,}" for step, d in decisions.items() if d > 0)
    return rows, [
        sentence(
            agreed(decisions.values()),
            "models of more Gflops are better on the whole at every stage",
            "models of more Gflops are worse on the whole at every stage",
            "they are better on the whole, by both judges, at "
            + (f"step {shown} alone" if shown else "no step")
            + f", of {', '.join(f'{step:,}' for step in decisions)}",
        )
    ]


def blocks(results, spread):
    """Figure 5: which block design is best? Returns (rows, sentences).

    Rows are (block, Gflops, {judge: Value}, {judge: {seed: mean}}, {judge: recognised}), in the paper's order.
    """
    designs = {key[2]: same for key, same in groups(results).items()}
    values = {block: {j: value(designs[block], j, spread) for j in JUDGES} for block in ORDER}
    first, *others = ORDER
    rows = [
        (
            block,
            designs[block][0]["gflops"],
            values[block],
            {j: {r["seed"]: float(np.mean(r["judges"][j]["frechet"])) for r in designs[block]} for j in JUDGES},
            {j: share(designs[block], j) for j in JUDGES},
        )
        for block in ORDER
    ]
    sentences = []

    def compared(what, by_judge, yes, no):
        why = ", ".join(f"by {j} {['they are too close for their ranges', yes, no][d]}" for j, d in by_judge.items())
        sentences.append(f"{what}: {sentence(agreed(by_judge.values()), yes, no, why)}")

    for better, worse in itertools.combinations(ORDER, 2):
        compared(
            f"{ORDER[better]} and {ORDER[worse]}",
            {j: lower(values[better][j], values[worse][j]) for j in JUDGES},
            f"{ORDER[better]} is better",
            f"{ORDER[worse]} is better",
        )
    compared(
        f"{ORDER[first]} against all others",
        {j: min(lower(values[first][j], values[block][j]) for block in others) for j in JUDGES},
        "it is the best",
        "another one is better",
    )
    return rows, sentences


def guidance(results, spread):
    """Appendix A: what does guidance do to quality and recall? Returns (rows, sentences).

    Rows are (scale, {judge: {metric: Value}}). Two scales are compared seed by seed, as a seed's samples are of the
    same noise and classes at each. That is done by Student's t of the differences, which asks for 2 seeds and more.
    Where the best of several scales is taken, each is judged the more strictly (Bonferroni). Recall and precision are
    compared at the largest scale of the paper's table, and at the largest here.
    """
    scales = {key[6]: sorted(same, key=lambda r: r["seed"]) for key, same in sorted(groups(results).items())}
    rows = [
        (scale, {j: {m: value(same, j, spread, m) for m in METRICS} for j in JUDGES}) for scale, same in scales.items()
    ]
    plain, *guided = scales

    def fall(metric, scale, level=EXPECTED):
        """Returns {judge: 1, -1 or 0}: whether the metric falls from no guidance to this scale."""
        decisions = {}
        for j in JUDGES:
            change = np.subtract(*(of_seeds(scales[s], j, metric) for s in (scale, plain)))
            n = len(change)
            margin = student(n - 1, level) * np.std(change, ddof=1) / n**0.5 if n > 1 else np.inf
            decisions[j] = int(change.mean() < -margin) - int(change.mean() > margin)
        return decisions

    falls = {scale: fall("frechet", scale, 1 - (1 - EXPECTED) / len(guided)) for scale in guided}
    both = {scale: agreed(of.values()) for scale, of in falls.items()}
    smaller = {
        j: ", ".join(f"{s:g}" for s in guided if of(s) > 0) or "none"
        for j, of in (("both", lambda s: both[s]), *((j, lambda s, j=j: falls[s][j]) for j in JUDGES))
    }
    sentences = [
        "Distance: "
        + sentence(
            1 if max(both.values()) > 0 else min(both.values(), key=abs),
            f"beyond what seeds differ in, it is smaller at the scale {smaller['both']} by both judges",
            "every scale makes it larger",
            "the scales at which it is smaller, beyond what seeds differ in, are not the same: "
            + ", ".join(f"by {j} {smaller[j]}" for j in JUDGES),
        )
    ]
    largest = max(scale for _, scale in paper.GUIDED)
    for scale in sorted({max((s for s in guided if s <= largest), default=guided[-1]), guided[-1]}):
        for metric, sign in (("recall", 1), ("precision", -1)):
            yes, no = ("it falls", "it rises")[::sign]
            changes = {j: sign * d for j, d in fall(metric, scale).items()}
            sentences.append(
                f"{metric.capitalize()}, from none to {scale:g}: "
                + sentence(
                    agreed(changes.values()),
                    yes,
                    no,
                    ", ".join(
                        f"by {j} {['its change is within what seeds differ in', yes, no][d]}"
                        for j, d in changes.items()
                    ),
                )
            )
    return rows, sentences


def within(results, spread, others):
    """Says whether the means of `others`, the same samples of other seeds, lie within the ranges of `results`.

    Returns [(model and sampler, metric, judge, Value there, mean of the others, 1: above, -1: below, 0: within)].
    """
    of_others, rows = groups(others), []
    for key, same in groups(results).items():
        size, patch, block, step, sampler, steps, scale = key
        name = f"{size}/{patch} {ORDER[block]}, step {step:,}, {sampler.upper()} {steps}, scale {scale:g}"
        for j, metric in itertools.product(JUDGES, METRICS) if key in of_others else ():
            there = value(same, j, spread, metric, len(of_others[key]))
            mean = value(of_others[key], j, spread, metric).mean
            rows.append((name, metric, j, there, mean, (mean > there.high) - (mean < there.low)))
    return rows


# Of each study, what ends with its sentences.
OUTCOMES = {
    "scaling": [scaling],
    "blocks": [blocks],
    "guidance": [guidance],
    "sampling": [compute.sampling],
    "training": [compute.training, stages],
}

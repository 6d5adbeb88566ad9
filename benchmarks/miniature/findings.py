"""From results to outcomes: what is said of each of the paper's claims is chosen here, by the numbers alone.

A result is what reproduce writes of one set or more of samples: {"size", "patch", "block", "seed", "step", "gflops",
"judges": {judge: {metric: [a value for each set]}}, ...}. A decision is 1 (as in the paper), -1 (the other way round)
or 0 (cannot be decided).
"""

import itertools
from dataclasses import astuple, dataclass
from math import log

import numpy as np
from scipy.special import stdtrit

from dit_jax import flops, paper

JUDGES = ("network", "strokes")  # of measure.Judges
METRICS = ("frechet", "precision", "recall", "recognised")
EXPECTED = 0.95  # of the values of another study are to lie in the ranges
LEARNED = 0.5  # so many samples must be recognised where a model is said to have learned the class
# The order of figure 5, best first, with the paper's names.
ORDER = {"adaln_zero": "adaLN-Zero", "adaln": "adaLN", "cross_attention": "cross-attention", "in_context": "in-context"}


@dataclass(frozen=True)
class Value:
    """The mean over seeds, and the range in which that of another study of as many seeds is expected."""
    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def groups(results):
    """{(size, patch, block, step, sampler, steps, scale): the results of all seeds}"""
    found = {}
    for r in results:
        key = tuple(r[k] for k in ("size", "patch", "block", "step", "sampler", "sampler_steps", "cfg_scale"))
        found.setdefault(key, []).append(r)
    return found


def _seeds(results, judge, metric):
    """Each seed's mean over its sets; of a distance, its logarithm."""
    means = np.array([np.mean(r["judges"][judge][metric]) for r in results])
    return np.log(means) if metric == "frechet" else means


def student(freedom, level=EXPECTED):
    """As many deviations to either side hold `level` of Student's distribution."""
    return float(stdtrit(freedom, (1 + level) / 2))


def seed_spread(results):
    """{(judge, metric, step): half the range of one seed around its model's mean, with which EXPECTED of all are in it}:
    Student's t times the deviation of seeds, pooled over all models with several seeds at this step. Of distances it is of
    their logarithm. Of the settings in which a model was sampled, the first one counts (unguided DDIM, where that is
    among them): the others are of the same runs."""
    first, squares = {}, {}
    for key, same in sorted(groups(results).items()):
        if len(same) > 1:
            first.setdefault(key[:4], same)
    for (*_, step), same in first.items():
        for judge in JUDGES:
            for metric in METRICS:
                of = squares.setdefault((judge, metric, step), [0.0, 0])
                of[0] += np.var(_seeds(same, judge, metric)) * len(same)
                of[1] += len(same) - 1
    return {key: student(freedom) * (total / freedom) ** 0.5 for key, (total, freedom) in squares.items()}


def set_spread(results):
    """{judge: by what share the distances of two sets of one run deviate from their mean}, over all runs; None where none
    has two."""
    logs = {j: [np.log(r["judges"][j]["frechet"]) for r in results if len(r["judges"][j]["frechet"]) > 1] for j in JUDGES}
    return {j: float(np.mean([np.var(of, ddof=1) for of in sets])) ** 0.5 if sets else None for j, sets in logs.items()}


def value(results, judge, spread, metric="frechet", others=None):
    """Of results that differ in the seed alone. spread: of seed_spread. others: how many seeds the other study has, by
    default as many. Both means are off by chance: hence the sum."""
    mean, n = np.mean(_seeds(results, judge, metric)), len(results)
    margin = spread[judge, metric, results[0]["step"]] * (1 / n + 1 / (others or n)) ** 0.5
    three = mean, mean - margin, mean + margin
    return Value(*(float(np.exp(v) if metric == "frechet" else np.clip(v, 0, 1)) for v in three))


def share(results, judge, metric="recognised"):
    """The mean alone."""
    return float(np.mean(_seeds(results, judge, metric)))


def lower(a, b):
    """1 where a is lower than b, -1 where it is higher, 0 where not each of their means is outside of the other's range,
    which is as far as two of one mean are apart by chance."""
    return 1 if a.mean < b.low and a.high < b.mean else -1 if b.mean < a.low and b.high < a.mean else 0


def agreed(decisions):
    """The decision of all judges; 0 where they differ."""
    decisions = set(decisions)
    return decisions.pop() if len(decisions) == 1 else 0


def sentence(decision, yes, no, why):
    """yes, no: what is then the case."""
    return {1: f"**As in the paper**: {yes}.", -1: f"**Not as in the paper**: {no}.",
            0: f"**Cannot be decided here**: {why}."}[decision]


def tally(found, what, better, theirs=None):
    """Many comparisons, [{judge: decision}] -> (the decision of all, the counts in words): for what more than half of them
    are decided by both judges, if of those decided no larger share goes the other way than in the paper. theirs: (how many
    go the paper's way in the paper itself, of how many); by default all."""
    decisions = [agreed(of.values()) for of in found]
    n = [sum(d == k for d in decisions) for k in (1, -1)]
    allowed = (theirs[1] - theirs[0]) / theirs[1] if theirs else 0
    whole = next((k for k, most, other in ((1, *n[:2]), (-1, *n[1::-1]))
                  if 2 * most > len(decisions) and other <= allowed * (most + other)), 0)
    reference = f"; in the paper itself, {theirs[0]} of {theirs[1]}" if theirs else ""
    alone = ", ".join(f"{j} {sum(of[j] > 0 for of in found)} and {sum(of[j] < 0 for of in found)}" for j in JUDGES)
    return whole, (f"in {n[0]} of {len(found)} {what} {better} by both judges, in {n[1]} it is the other way round by both, and in "
                   f"{sum(min(of.values()) < 0 < max(of.values()) for of in found)} they contradict each other (each alone: "
                   f"{alone}){reference}")


def correlation(x, y):
    """Of x (n,) with each y (..., n)."""
    x, y = x - np.mean(x), y - np.mean(y, axis=-1, keepdims=True)
    return y @ x / np.sqrt(x @ x * np.square(y).sum(-1))


def chance(n):
    """The correlation of n pairs of unrelated numbers is further from 0 once in 20 times."""
    t = student(n - 2)
    return t / (n - 2 + t * t) ** 0.5


def trend(x, values, draws=4000):
    """Correlations of x with the means of values, [{judge: Value}] -> ({judge: Value}, the decision: by both judges beyond
    `chance`, negative being better). The range is that of another study, as two studies differ that are drawn around these
    means: in the inverse hyperbolic tangent of r, as near -1 all of another study's r may lie to one side."""
    found, rng = {}, np.random.default_rng(0)
    for j in JUDGES:
        mean, low, high = (np.log([getattr(v[j], what) for v in values]) for what in ("mean", "low", "high"))
        deviation = (high - low) / 2 / student(np.inf) / 2**0.5  # half of the range's square is of each study
        one, other = np.arctanh(correlation(x, np.exp(mean + deviation * rng.standard_normal((2, draws, len(mean))))))
        r, far = correlation(x, np.exp(mean)), np.quantile(np.abs(other - one), EXPECTED)
        found[j] = Value(*(float(np.tanh(np.arctanh(r) + sign * far)) for sign in (0, -1, 1)))
    least = chance(len(x))
    return found, agreed(1 if r.mean < -least else -1 if r.mean > least else 0 for r in found.values())


def unlearned(models):
    """A sentence on {name: share of samples recognised by the network}."""
    few = [f"{name} ({share:.0%})" for name, share in models.items() if share < LEARNED]
    return f"The class is not well learned: the network recognises less than half of the samples of {', '.join(few)}." \
        if few else ""


def paper_models():
    """[(name, Gflops, FID-50K at 400K steps, million parameters)] of the twelve models: table 4."""
    names = [(name, name.removeprefix("DiT-").replace("/", "").lower()) for name in flops.PAPER if " " not in name]
    return [(name, float(flops.PAPER[name][0]), paper.NO_GUIDANCE[config, 400_000], flops.PAPER[name][1])
            for name, config in names]


def paper_counts():
    """What `scaling` counts, in the paper's table 4: [(in how many the better one is the paper's, of how many)]."""
    models = {tuple(name.removeprefix("DiT-").split("/")): (gflops, fid) for name, gflops, fid, _ in paper_models()}
    order = sorted(models, key=models.get)
    pairs = [(b, a) for i, a in enumerate(order) for b in order[i + 1:]]
    sizes = [((b, p), (a, p)) for a, b in itertools.pairwise(("S", "B", "L", "XL")) for p in "248"]
    patches = [((s, a), (s, b)) for a, b in itertools.pairwise("248") for s in ("S", "B", "L", "XL")]
    return [(sum(models[a][1] < models[b][1] for a, b in of), len(of)) for of in (pairs, sizes, patches)]


def scaling(results, spread):
    """spread: of seed_spread -> (rows: [(model, Gflops, number of seeds, {judge: Value}, {judge: recognised})] by Gflops,
    correlations: {judge: (with log Gflops, a Value; with Gflops; with the logarithm of the number of parameters)},
    sentences)"""
    models = {key[:2]: same for key, same in groups(results).items()}
    values = {key: {j: value(same, j, spread) for j in JUDGES} for key, same in models.items()}
    gflops, params = ({key: same[0][what] for key, same in models.items()} for what in ("gflops", "params"))
    order = sorted(models, key=gflops.get)
    name = "{0[0]}/{0[1]}".format
    rows = [(name(key), gflops[key], len({r["seed"] for r in models[key]}), values[key],
             {j: share(models[key], j) for j in JUDGES}) for key in order]
    x, weights = np.array([gflops[key] for key in order]), np.array([params[key] for key in order])
    found, decision = trend(np.log(x), [values[key] for key in order])
    means = {j: [values[key][j].mean for key in order] for j in JUDGES}
    correlations = {j: (found[j], correlation(x, means[j]), correlation(np.log(weights), means[j])) for j in JUDGES}
    shown = f"r = {' and '.join(f'{found[j].mean:.2f} by {j}' for j in JUDGES)} (by chance, to ±{chance(len(x)):.2f})"
    sentences = [sentence(decision, f"models of more Gflops make better samples on the whole, {shown}",
                          f"models of more Gflops make worse samples on the whole, {shown}",
                          f"a judge's correlation is no larger than by chance, {shown}")]

    sizes, patches = list(dict.fromkeys(s for s, _ in models)), sorted({p for _, p in models})
    for what, pairs, theirs in (
            ("pairs of models the one of more Gflops", [(b, a) for i, a in enumerate(order) for b in order[i + 1:]],
             paper_counts()[0]),
            ("pairs of neighbours in size, of the same patch, the larger one",
             [((b, p), (a, p)) for a, b in itertools.pairwise(sizes) for p in patches], paper_counts()[1]),
            ("pairs of neighbours in patch, of the same size, that of smaller patches",
             [((s, a), (s, b)) for a, b in itertools.pairwise(patches) for s in sizes], paper_counts()[2])):
        found = [{j: lower(values[a][j], values[b][j]) for j in JUDGES} for a, b in pairs]
        whole, counts = tally(found, what, "is better", theirs)
        worse = [f"{name(a)} worse than {name(b)} by {' and '.join(j for j in JUDGES if of[j] < 0)}"
                 for (a, b), of in zip(pairs, found) if min(of.values()) < 0]
        counts += f" ({', '.join(worse)})" * bool(worse)
        sentences.append(sentence(whole, counts, counts, counts))
    return rows, correlations, sentences


def stages(results, spread):
    """Figure 6, that more Gflops are better at every stage of the training -> (rows: [(step, {judge: correlation of the
    distance with log Gflops, a Value})], sentences)"""
    rows, decisions = [], {}
    for step in sorted({r["step"] for r in results}):
        here = sorted((same for key, same in groups(results).items() if key[3] == step), key=lambda same: same[0]["gflops"])
        found, decisions[step] = trend(np.log([same[0]["gflops"] for same in here]),
                                       [{j: value(same, j, spread) for j in JUDGES} for same in here])
        rows.append((step, found))
    shown = " and ".join(f"{step:,}" for step, d in decisions.items() if d > 0)
    return rows, [sentence(agreed(decisions.values()), "models of more Gflops are better on the whole at every stage",
                           "models of more Gflops are worse on the whole at every stage",
                           "they are better on the whole, by both judges, at "
                           + (f"step {shown} alone" if shown else "no step")
                           + f", of {', '.join(f'{step:,}' for step in decisions)}")]


def blocks(results, spread):
    """-> (rows: [(block, Gflops, {judge: Value}, {judge: {seed: mean}}, {judge: recognised})] in the paper's order,
    sentences)"""
    designs = {key[2]: same for key, same in groups(results).items()}
    values = {block: {j: value(designs[block], j, spread) for j in JUDGES} for block in ORDER}
    first, *others = ORDER
    rows = [(block, designs[block][0]["gflops"], values[block], {j: {r["seed"]: float(np.mean(
        r["judges"][j]["frechet"])) for r in designs[block]} for j in JUDGES},
             {j: share(designs[block], j) for j in JUDGES}) for block in ORDER]
    sentences = []

    def compared(what, by_judge, yes, no):
        why = ", ".join(f"by {j} {['they are too close for their ranges', yes, no][d]}" for j, d in by_judge.items())
        sentences.append(f"{what}: {sentence(agreed(by_judge.values()), yes, no, why)}")

    for better, worse in itertools.combinations(ORDER, 2):
        compared(f"{ORDER[better]} and {ORDER[worse]}", {j: lower(values[better][j], values[worse][j]) for j in JUDGES},
                 f"{ORDER[better]} is better", f"{ORDER[worse]} is better")
    compared(f"{ORDER[first]} against all others", {j: min(lower(values[first][j], values[block][j]) for block in others)
                                                    for j in JUDGES}, "it is the best", "another one is better")
    return rows, sentences


def guidance(results, spread):
    """-> (rows: [(scale, {judge: {metric: Value}})], sentences). Two scales are compared seed by seed, as a seed's samples
    are of the same noise and classes at each: by Student's t of the differences, which asks for 2 seeds and more. Where the
    best of several scales is taken, each is judged the more strictly (Bonferroni). Recall and precision at the largest
    scale of the paper's table, and at the largest here."""
    scales = {key[6]: sorted(same, key=lambda r: r["seed"]) for key, same in sorted(groups(results).items())}
    rows = [(scale, {j: {m: value(same, j, spread, m) for m in METRICS} for j in JUDGES}) for scale, same in scales.items()]
    plain, *guided = scales

    def fall(metric, scale, level=EXPECTED):
        """{judge: 1, -1 or 0}: whether the metric falls from no guidance to this scale."""
        decisions = {}
        for j in JUDGES:
            change = np.subtract(*(_seeds(scales[s], j, metric) for s in (scale, plain)))
            n = len(change)
            margin = student(n - 1, level) * np.std(change, ddof=1) / n**0.5 if n > 1 else np.inf
            decisions[j] = int(change.mean() < -margin) - int(change.mean() > margin)
        return decisions

    falls = {scale: fall("frechet", scale, 1 - (1 - EXPECTED) / len(guided)) for scale in guided}
    both = {scale: agreed(of.values()) for scale, of in falls.items()}
    smaller = {j: ", ".join(f"{s:g}" for s in guided if of(s) > 0) or "none" for j, of in (
        ("both", both.get), *((j, lambda s, j=j: falls[s][j]) for j in JUDGES))}
    sentences = ["Distance: " + sentence(
        1 if max(both.values()) > 0 else min(both.values(), key=abs),
        f"beyond what seeds differ in, it is smaller at the scale {smaller['both']} by both judges", "every scale makes it larger",
        "the scales at which it is smaller, beyond what seeds differ in, are not the same: "
        + ", ".join(f"by {j} {smaller[j]}" for j in JUDGES))]
    theirs = max(scale for _, scale in paper.GUIDED)
    for scale in sorted({max((s for s in guided if s <= theirs), default=guided[-1]), guided[-1]}):
        for metric, sign in (("recall", 1), ("precision", -1)):
            yes, no = ("it falls", "it rises")[::sign]
            changes = {j: sign * d for j, d in fall(metric, scale).items()}
            sentences.append(f"{metric.capitalize()}, from none to {scale:g}: " + sentence(
                agreed(changes.values()), yes, no, ", ".join(
                    f"by {j} {['its change is within what seeds differ in', yes, no][d]}" for j, d in changes.items())))
    return rows, sentences


def within(results, spread, others):
    """Whether the means of `others`, the same samples of other seeds, lie within the ranges of `results` -> [(model and
    sampler, metric, judge, Value there, mean of the others, 1: above, -1: below, 0: within)]"""
    theirs, rows = groups(others), []
    for key, same in groups(results).items():
        size, patch, block, step, sampler, steps, scale = key
        name = f"{size}/{patch} {ORDER[block]}, step {step:,}, {sampler.upper()} {steps}, scale {scale:g}"
        for j, metric in itertools.product(JUDGES, METRICS) if key in theirs else ():
            there, mean = value(same, j, spread, metric, len(theirs[key])), value(theirs[key], j, spread, metric).mean
            rows.append((name, metric, j, there, mean, (mean > there.high) - (mean < there.low)))
    return rows


@dataclass(frozen=True)
class Row:
    """Of a study of compute. steps: of sampling, or of training; cost: Gflops."""
    model: str
    steps: int
    cost: float
    values: dict  # {judge: Value}


def sampling(results, spread):
    """spread: of seed_spread -> (Rows, whose cost is that of a sample, sentences). The small model with its best number of
    steps, against the large one's best among those that cost no more than the small one's most."""
    rows = sorted((Row(f"{key[0]}/{key[1]}", key[5], same[0]["gflops"] * key[5], {j: value(same, j, spread) for j in JUDGES})
                   for key, same in groups(results).items()), key=lambda row: row.cost)
    costs = {}
    for row in rows:
        costs.setdefault(row.model, []).append(row.cost)
    small, large = sorted(costs, key=lambda model: min(costs[model]))
    decisions, shown = [], []
    for j in JUDGES:
        best = min((r for r in rows if r.model == small), key=lambda r: r.values[j].mean)
        rivals = [r for r in rows if r.model == large and r.cost <= max(costs[small])]
        if not rivals:
            return rows, [sentence(0, "", "", "the large model's fewest steps cost more than the small one's most")]
        rival = min(rivals, key=lambda r: r.values[j].mean)
        decisions.append(lower(rival.values[j], best.values[j]))
        shown.append(f"{large} with {rival.steps} steps ({rival.cost:.3g} Gflops) has {rival.values[j]}, {small} at its best, "
                     f"with {best.steps} steps ({best.cost:.3g} Gflops), {best.values[j]} by {j}")
    shown = "; ".join(shown)
    return rows, [sentence(agreed(decisions), f"more steps do not make up for a smaller model: {shown}",
                           f"more steps make up for a smaller model: {shown}", shown)]


def at_compute(rows, compute):
    """{judge: Value} at this training compute, on the straight lines between these Rows of one model in logarithms; None
    outside of them."""
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a.cost <= compute <= b.cost]
    if not pairs:
        return None
    a, b = pairs[0]
    w = log(compute / a.cost) / log(b.cost / a.cost)
    return {j: Value(*(x ** (1 - w) * y**w for x, y in zip(astuple(a.values[j]), astuple(b.values[j])))) for j in JUDGES}


def training(results, spread):
    """spread: of seed_spread -> (Rows, whose cost is Gflops x batch x steps x 3, sentences). The smaller of two neighbours
    in size, at its end, against the larger one between its checkpoints, at equal compute. The claim is of models that were
    trained for long: nothing is decided while more than half of the smaller ones still improve."""
    of = {}
    for key, same in groups(results).items():
        cost = same[0]["gflops"] * same[0]["batch_size"] * key[3] * 3
        of.setdefault(key[:2], []).append(Row(f"{key[0]}/{key[1]}", key[3], cost, {j: value(same, j, spread) for j in JUDGES}))
    of = {model: sorted(rows, key=lambda row: row.steps) for model, rows in of.items()}
    sizes = sorted({size for size, _ in of}, key=lambda size: min(of[key][0].cost for key in of if key[0] == size))
    decisions, improving = [], []
    for patch in sorted({patch for _, patch in of}):
        for a, b in itertools.pairwise(sizes):
            *_, middle, small = of[a, patch]
            if large := at_compute(of[b, patch], small.cost):
                decisions.append({j: lower(large[j], small.values[j]) for j in JUDGES})
                improving.append(agreed(lower(small.values[j], middle.values[j]) for j in JUDGES) > 0)
    whole, counts = tally(decisions, "pairs of neighbours in size, of the same patch and at all of the smaller one's training "
                          "compute (the larger one between two checkpoints), the larger one", "is better")
    counts += (f". Of the smaller ones, {sum(improving)} of {len(improving)} still improved in the second half of their "
               "training")
    if 2 * sum(improving) > len(improving):
        whole, counts = 0, f"{counts}; the paper's claim is of models that have been trained for long, which is not tested"
    return sorted(itertools.chain(*of.values()), key=lambda row: row.cost), [sentence(whole, counts, counts, counts)]


# Of each study, what ends with its sentences.
OUTCOMES = {"scaling": [scaling], "blocks": [blocks], "guidance": [guidance], "sampling": [sampling],
            "training": [training, stages]}


def outcome(text):
    """What a sentence of these says of the paper's claim: the words of `sentence`."""
    return text.split("**")[1]

"""From results to outcomes: what is said of each of the paper's claims is chosen here, by the numbers alone.

A result is what reproduce writes of one set or more of samples: {"size", "patch", "block", "seed", "step", "gflops",
"judges": {judge: {metric: [a value for each set]}}, ...}. A decision is 1 (as in the paper), -1 (the other way round)
or 0 (cannot be decided).
"""

from dataclasses import astuple, dataclass
from math import log

import numpy as np
from scipy.special import stdtrit

from dit_jax import flops, paper

JUDGES = ("network", "strokes")  # of measure.Judges
METRICS = ("frechet", "precision", "recall", "recognised")
EXPECTED = 0.95  # of the values of another study are to lie in the ranges
LEVEL = 0.95  # a model that the second half of its training left less of its distance was still improving
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


def seed_spread(results):
    """{(judge, metric, step): half the range of one seed around its model's mean, with which EXPECTED of all are in it}:
    Student's t times the deviation of seeds, pooled over all that is measured at this step with several seeds. Of
    distances it is of their logarithm."""
    squares = {}
    for key, same in groups(results).items():
        for judge in JUDGES:
            for metric in METRICS if len(same) > 1 else ():
                of = squares.setdefault((judge, metric, key[3]), [0.0, 0])
                of[0] += np.var(_seeds(same, judge, metric)) * len(same)
                of[1] += len(same) - 1
    return {key: float(stdtrit(freedom, (1 + EXPECTED) / 2) * (total / freedom) ** 0.5)
            for key, (total, freedom) in squares.items()}


def value(results, judge, spread, metric="frechet"):
    """Of results that differ in the seed alone. spread: of seed_spread. Both this mean and another study's are off by
    chance: hence the 2."""
    mean = np.mean(_seeds(results, judge, metric))
    margin = spread[judge, metric, results[0]["step"]] * (2 / len(results)) ** 0.5
    three = mean, mean - margin, mean + margin
    return Value(*(float(np.exp(v) if metric == "frechet" else v) for v in three))


def lower(a, b):
    """1 where a is lower than b, -1 where it is higher, 0 where not each of their means is outside of the other's range,
    which is as far as two of one mean are apart by chance."""
    return 1 if a.mean < b.low and a.high < b.mean else -1 if b.mean < a.low and b.high < a.mean else 0


def agreed(decisions):
    """The decision of all judges; 0 where they differ."""
    decisions = set(decisions)
    return decisions.pop() if len(decisions) == 1 else 0


def sentence(decision, yes, no, why="too close for their ranges, or the judges differ"):
    """yes, no: what is then the case."""
    return {1: f"**As in the paper**: {yes}.", -1: f"**Not as in the paper**: {no}.",
            0: f"**Cannot be decided here**: {why}."}[decision]


def tally(decisions, what, better):
    """Many comparisons -> (what more than half of them are decided for, the counts in words)."""
    n = [sum(d == k for d in decisions) for k in (1, -1, 0)]
    whole = next((k for k, times in zip((1, -1), n) if 2 * times > len(decisions)), 0)
    return whole, f"of {len(decisions)} {what}, {n[0]} {better}, {n[1]} the other way round, {n[2]} undecided"


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def trend(x, values):
    """Correlations of x with the means of values, [{judge: Value}] -> ({judge: (correlation, its lowest and highest value
    with one model left out)}, the decision: of the sign that it keeps whichever model is left out, negative being better)"""
    found = {}
    for j in JUDGES:
        y = np.array([v[j].mean for v in values])
        without = [correlation(np.delete(x, i), np.delete(y, i)) for i in range(len(x))]
        found[j] = correlation(x, y), min(without), max(without)
    return found, agreed(1 if high < 0 else -1 if low > 0 else 0 for _, low, high in found.values())


def unlearned(models):
    """A sentence on {name: share of samples recognised by the network}."""
    few = [f"{name} ({share:.0%})" for name, share in models.items() if share < LEARNED]
    return (f"Less than {LEARNED:.0%} of the samples are recognised as their class (by the network) of {', '.join(few)}: these "
            "had not well learned the class." if few else "")


def paper_models():
    """[(name, Gflops, FID-50K at 400K steps, million parameters)] of the twelve models: table 4."""
    names = [(name, name.removeprefix("DiT-").replace("/", "").lower()) for name in flops.PAPER if " " not in name]
    return [(name, float(flops.PAPER[name][0]), paper.NO_GUIDANCE[config, 400_000], flops.PAPER[name][1])
            for name, config in names]


def scaling(results, spread):
    """spread: of seed_spread -> (rows: [(model, Gflops, number of seeds, {judge: Value}, {judge: recognised})] by Gflops,
    correlations: {judge: (with log Gflops, lowest and highest of these with one model left out, with Gflops, with the
    logarithm of the number of parameters)}, sentences)"""
    models = {key[:2]: same for key, same in groups(results).items()}
    values = {key: {j: value(same, j, spread) for j in JUDGES} for key, same in models.items()}
    gflops, params = ({key: same[0][what] for key, same in models.items()} for what in ("gflops", "params"))
    order = sorted(models, key=gflops.get)
    name = "{0[0]}/{0[1]}".format
    rows = [(name(key), gflops[key], len({r["seed"] for r in models[key]}), values[key],
             {j: value(models[key], j, spread, "recognised") for j in JUDGES}) for key in order]
    x, weights = np.array([gflops[key] for key in order]), np.array([params[key] for key in order])
    correlations, decision = trend(np.log(x), [values[key] for key in order])
    for judge in JUDGES:
        y = [values[key][judge].mean for key in order]
        correlations[judge] += correlation(x, y), correlation(np.log(weights), y)
    shown = " and ".join(f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f}, one model left out) by {j}"
                         for j, r in correlations.items())
    sentences = [sentence(decision, f"models of more Gflops make better samples on the whole, r = {shown}",
                          f"models of more Gflops make worse samples on the whole, r = {shown}",
                          f"the correlation's sign hangs on one model, or on the judge, r = {shown}")]

    def better(a, b):
        return agreed(lower(values[a][j], values[b][j]) for j in JUDGES)

    sizes, patches = list(dict.fromkeys(s for s, _ in models)), sorted({p for _, p in models})
    for what, pairs, wins in (
            ("pairs of models", [(b, a) for i, a in enumerate(order) for b in order[i + 1:]],
             "have the one of more Gflops ahead, however they are spent"),
            ("steps to larger sizes at the same patch", [((b, p), (a, p)) for a, b in zip(sizes, sizes[1:])
                                                         for p in patches], "make better samples"),
            ("steps to smaller patches at the same size", [((s, a), (s, b)) for a, b in zip(patches, patches[1:])
                                                           for s in sizes], "make better samples")):
        decisions = [better(a, b) for a, b in pairs]
        whole, counts = tally(decisions, what, wins)
        worse = [f"{name(a)} worse than {name(b)}" for (a, b), d in zip(pairs, decisions) if d < 0]
        counts += f" ({', '.join(worse)})" * bool(worse)
        sentences.append(sentence(whole, counts, counts, counts))
    return rows, correlations, sentences


def stages(results, spread):
    """Figure 6, that more Gflops are better at every stage of the training -> (rows: [(step, {judge: (correlation of the
    distance with log Gflops, lowest and highest with one model left out)})], sentences)"""
    rows, decisions = [], {}
    for step in sorted({r["step"] for r in results}):
        here = [same for key, same in groups(results).items() if key[3] == step]
        found, decisions[step] = trend(np.log([same[0]["gflops"] for same in here]),
                                       [{j: value(same, j, spread) for j in JUDGES} for same in here])
        rows.append((step, found))
    shown = " and ".join(f"{step:,}" for step, d in decisions.items() if d > 0)
    return rows, [sentence(agreed(decisions.values()), "models of more Gflops are better on the whole at every stage",
                           "models of more Gflops are worse on the whole at every stage",
                           "they are better on the whole, by both judges and whichever model is left out, at "
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
             {j: value(designs[block], j, spread, "recognised") for j in JUDGES}) for block in ORDER]
    sentences = []
    for better, worse in zip(ORDER, others):
        decision = agreed(lower(values[better][j], values[worse][j]) for j in JUDGES)
        sentences.append(f"{ORDER[better]} and {ORDER[worse]}: " + sentence(
            decision, f"{ORDER[better]} is better", f"{ORDER[worse]} is better"))
    best = agreed(min(lower(values[first][j], values[block][j]) for block in others) for j in JUDGES)
    sentences.append(f"{ORDER[first]} against all others: " + sentence(best, "it is the best", "another one is better"))
    return rows, sentences


def guidance(results, spread):
    """-> (rows: [(scale, {judge: {metric: Value}})], sentences). Two scales are compared set by set, as the sets of a seed
    are of the same noise and classes at each scale: what is decided is so for every set of every seed. Recall and
    precision at the largest scale of the paper's table, and at the largest here."""
    scales = {key[6]: sorted(same, key=lambda r: r["seed"]) for key, same in sorted(groups(results).items())}
    rows = [(scale, {j: {m: value(same, j, spread, m) for m in METRICS} for j in JUDGES}) for scale, same in scales.items()]
    plain, *guided = scales

    def fall(metric, j, scale):
        """1, -1 or 0 of each set: whether the metric falls from no guidance to this scale."""
        before, after = ([v for r in scales[s] for v in r["judges"][j][metric]] for s in (plain, scale))
        return [int(a < b) - int(a > b) for a, b in zip(after, before, strict=True)]

    improved = agreed(max(agreed(fall("frechet", j, scale)) for scale in guided) for j in JUDGES)
    sentences = ["Distance: " + sentence(improved, "some guidance makes it smaller", "every scale makes it larger",
                                         "no scale makes it smaller in every set by both judges")]
    theirs = max(scale for _, scale in paper.GUIDED)
    for scale in sorted({max((s for s in guided if s <= theirs), default=guided[-1]), guided[-1]}):
        for metric, sign in (("recall", 1), ("precision", -1)):
            yes, no = ("it falls", "it rises")[::sign]
            falls = {j: fall(metric, j, scale) for j in JUDGES}
            decision = agreed(sign * agreed(f) for f in falls.values())
            counts = ", ".join(f"by {j} it falls in {f.count(1)} sets and rises in {f.count(-1)}" for j, f in falls.items())
            sentences.append(f"{metric.capitalize()}, from none to {scale:g}: " + sentence(
                decision, f"{yes} ({counts})", f"{no} ({counts})", counts))
    return rows, sentences


def within(results, spread, others):
    """Whether the means of `others`, the same samples of other seeds, lie within the ranges of `results` -> [(model and
    sampler, judge, Value there, mean of the others, 1: above, -1: below, 0: within)]"""
    theirs, rows = groups(others), []
    for key, same in groups(results).items():
        size, patch, block, step, sampler, steps, scale = key
        name = f"{size}/{patch} {ORDER[block]}, step {step:,}, {sampler.upper()} {steps}, scale {scale:g}"
        for j in JUDGES if key in theirs else ():
            there, mean = value(same, j, spread), value(theirs[key], j, spread).mean
            rows.append((name, j, there, mean, (mean > there.high) - (mean < there.low)))
    return rows


def sampling(results, spread):
    """spread: of seed_spread -> (rows: [(size, steps, Gflops a sample, {judge: Value})], sentences). The small model with
    its best number of steps, against the large one's best among those that cost no more than the small one's most."""
    rows = sorted(((key[0], key[5], same[0]["gflops"] * key[5], {
        j: value(same, j, spread) for j in JUDGES}) for key, same in groups(results).items()),
        key=lambda row: row[2])
    costs = {}
    for size, _, cost, _ in rows:
        costs.setdefault(size, []).append(cost)
    small, large = sorted(costs, key=lambda size: min(costs[size]))
    decisions, shown = [], []
    for j in JUDGES:
        best = min((r for r in rows if r[0] == small), key=lambda r: r[3][j].mean)
        most = max(r[2] for r in rows if r[0] == small)
        rivals = [r for r in rows if r[0] == large and r[2] <= most]
        if not rivals:
            return rows, [sentence(0, "", "", "the large model's fewest steps cost more than the small one's most")]
        rival = min(rivals, key=lambda r: r[3][j].mean)
        decisions.append(lower(rival[3][j], best[3][j]))
        shown.append(f"{large} with {rival[1]} steps ({rival[2]:.3g} Gflops) has {rival[3][j]}, {small} at its best, "
                     f"with {best[1]} steps ({best[2]:.3g} Gflops), {best[3][j]} by {j}")
    shown = "; ".join(shown)
    return rows, [sentence(agreed(decisions), f"more steps do not make up for a smaller model: {shown}",
                           f"more steps make up for a smaller model: {shown}", shown)]


def at_compute(rows, compute):
    """{judge: Value} at this training compute, on the straight lines between these rows of one model in logarithms; None
    outside of them."""
    pairs = [(a, b) for a, b in zip(rows, rows[1:]) if a[3] <= compute <= b[3]]
    if not pairs:
        return None
    a, b = pairs[0]
    w = log(compute / a[3]) / log(b[3] / a[3])
    return {j: Value(*(x ** (1 - w) * y**w for x, y in zip(astuple(a[4][j]), astuple(b[4][j])))) for j in JUDGES}


def training(results, spread):
    """spread: of seed_spread -> (rows: [(size, patch, step, Gflops x batch x steps x 3, {judge: Value})], sentences).
    The smaller of two neighbours in size, at its end, against the larger one between its checkpoints, at equal compute.
    That the smaller ones are ahead decides nothing while they improve: the claim is of what comes at last."""
    rows = [(key[0], key[1], key[3], same[0]["gflops"] * same[0]["batch_size"] * key[3] * 3,
             {j: value(same, j, spread) for j in JUDGES}) for key, same in groups(results).items()]
    rows.sort(key=lambda row: (log(row[3]), row[2]))
    of = {}
    for row in rows:
        of.setdefault(row[:2], []).append(row)
    sizes = sorted({size for size, _ in of}, key=lambda size: min(r[3] for r in rows if r[0] == size))
    decisions, left = [], []
    for patch in sorted({patch for _, patch in of}):
        for a, b in zip(sizes, sizes[1:]):
            *_, middle, small = of[a, patch]
            if large := at_compute(of[b, patch], small[3]):
                decisions.append(agreed(lower(large[j], small[4][j]) for j in JUDGES))
                left.append(max(small[4][j].mean / middle[4][j].mean for j in JUDGES))
    whole, counts = tally(decisions, "pairs of neighbours in size at the same patch, at all of the smaller one's training "
                          "compute (the larger one between two checkpoints)", "have the larger one ahead")
    improving = sum(share < LEVEL for share in left)
    counts += (f". Of the smaller ones, {improving} of {len(left)} were still improving: the second half of their training "
               f"left {min(left):.0%} to {max(left):.0%} of their distance" if left else "")
    if whole < 0 and improving:
        whole, counts = 0, f"{counts}; the paper's claim is of models that have been trained for long"
    return rows, [sentence(whole, counts, counts, counts)]


# Of each study, the sentences alone.
OUTCOMES = {"scaling": lambda results, spread: scaling(results, spread)[2],
            "blocks": lambda results, spread: blocks(results, spread)[1],
            "guidance": lambda results, spread: guidance(results, spread)[1],
            "sampling": lambda results, spread: sampling(results, spread)[1],
            "training": lambda results, spread: training(results, spread)[1] + stages(results, spread)[1]}


def outcome(text):
    """What a sentence of these says of the paper's claim: the words of `sentence`."""
    return text.split("**")[1]

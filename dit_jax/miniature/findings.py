"""From results to outcomes: what is said of each of the paper's claims is chosen here, by the numbers alone.

A result is what reproduce writes of one set or more of samples: {"size", "patch", "block", "seed", "step", "gflops",
"judges": {judge: {metric: [a value for each set]}}, ...}. A decision is 1 (as in the paper), -1 (the other way round)
or 0 (cannot be decided).
"""

from dataclasses import astuple, dataclass
from math import log

import numpy as np

from dit_jax import flops, paper

JUDGES = ("network", "strokes")  # of measure.Judges
METRICS = ("frechet", "precision", "recall", "recognised")
UNPAIRED = "it is not so for every set, or the judges differ"
# The order of figure 5, best first, with the paper's names.
ORDER = {"adaln_zero": "adaLN-Zero", "adaln": "adaLN", "cross_attention": "cross-attention", "in_context": "in-context"}


@dataclass(frozen=True)
class Value:
    """The mean over seeds and sets, the lowest and the highest."""
    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def value(results, judge, metric="frechet", seed_spread=0.0):
    """Of results that differ in the seed alone. Where there is one seed, the range is made wider by `seed_spread`, that
    share of it at either end, which is what other seeds have been seen to do."""
    values = [v for r in results for v in r["judges"][judge][metric]]
    wider = seed_spread if len({r["seed"] for r in results}) == 1 else 0.0
    low, high = min(values), max(values)
    return Value(min(max(float(np.mean(values)), low), high), low * (1 - wider), high * (1 + wider))


def groups(results):
    """{(size, patch, block, step, sampler, steps, scale): the results of all seeds}"""
    found = {}
    for r in results:
        key = tuple(r[k] for k in ("size", "patch", "block", "step", "sampler", "sampler_steps", "cfg_scale"))
        found.setdefault(key, []).append(r)
    return found


def seed_spread(results):
    """{judge: the largest deviation of a seed's distance from the mean of its model's, as a share of it, over all
    models that have several seeds}; 0 where none has."""
    spread = dict.fromkeys(JUDGES, 0.0)
    for same in groups(results).values():
        for judge in JUDGES:
            means = [np.mean(r["judges"][judge]["frechet"]) for r in same]
            spread[judge] = max(spread[judge], *(float(abs(m / np.mean(means) - 1)) for m in means))
    return spread


def lower(a, b):
    """1 where a is lower than b, -1 where it is higher, 0 where their ranges overlap."""
    return 1 if a.high < b.low else -1 if b.high < a.low else 0


def agreed(decisions):
    """The decision of all judges; 0 where they differ."""
    decisions = set(decisions)
    return decisions.pop() if len(decisions) == 1 else 0


def sentence(decision, yes, no, why="the ranges overlap, or the judges differ"):
    """yes, no: what is then the case."""
    return {1: f"**As in the paper**: {yes}.", -1: f"**Not as in the paper**: {no}.",
            0: f"**Cannot be decided here**: {why}."}[decision]


def count(decisions, what, better):
    """A sentence on many comparisons: what more than half of them are decided for."""
    n = [sum(d == k for d in decisions) for k in (1, -1, 0)]
    whole = next((k for k, times in zip((1, -1), n) if 2 * times > len(decisions)), 0)
    counts = f"of {len(decisions)} {what}, {n[0]} {better}, {n[1]} the other way round, {n[2]} undecided"
    return sentence(whole, counts, counts, counts)


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def paper_models():
    """[(name, Gflops, FID-50K at 400K steps)] of the twelve models: table 4."""
    names = [(name, name.removeprefix("DiT-").replace("/", "").lower()) for name in flops.PAPER if " " not in name]
    return [(name, float(flops.PAPER[name][0]), paper.NO_GUIDANCE[config, 400_000]) for name, config in names]


def scaling(results, spread):
    """spread: of seed_spread -> (rows: [(model, Gflops, {judge: Value}, {judge: recognised})] by Gflops, correlations:
    {judge: (with log Gflops, lowest and highest of these with one model left out, with Gflops)}, sentences)"""
    models = {key[:2]: same for key, same in groups(results).items()}
    values = {key: {j: value(same, j, seed_spread=spread[j]) for j in JUDGES} for key, same in models.items()}
    gflops = {key: same[0]["gflops"] for key, same in models.items()}
    order = sorted(models, key=gflops.get)
    rows = [(f"{size}/{patch}", gflops[size, patch], values[size, patch],
             {j: value(models[size, patch], j, "recognised") for j in JUDGES}) for size, patch in order]
    x, correlations = np.array([gflops[key] for key in order]), {}
    for judge in JUDGES:
        y = np.array([values[key][judge].mean for key in order])
        without = [correlation(np.delete(np.log(x), i), np.delete(y, i)) for i in range(len(x))]
        correlations[judge] = correlation(np.log(x), y), min(without), max(without), correlation(x, y)
    decision = agreed(1 if high < 0 else -1 if low > 0 else 0 for _, low, high, _ in correlations.values())
    shown = " and ".join(f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f}, one model left out) by {j}"
                         for j, r in correlations.items())
    sentences = [sentence(decision, f"models of more Gflops make better samples, r = {shown}",
                          f"models of more Gflops make worse samples, r = {shown}",
                          f"the correlation's sign hangs on one model, or on the judge, r = {shown}")]
    sizes, patches = list(dict.fromkeys(s for s, _ in models)), sorted({p for _, p in models})
    for what, pairs in (("larger sizes at the same patch", [((b, p), (a, p)) for a, b in zip(sizes, sizes[1:])
                                                            for p in patches]),
                        ("smaller patches at the same size", [((s, a), (s, b)) for a, b in zip(patches, patches[1:])
                                                              for s in sizes])):
        decisions = [agreed(lower(values[a][j], values[b][j]) for j in JUDGES) for a, b in pairs]
        sentences.append(count(decisions, f"steps to {what}", "make better samples"))
    return rows, correlations, sentences


def blocks(results):
    """-> (rows: [(block, Gflops, {judge: Value}, {judge: {seed: mean}})] in the paper's order, sentences)"""
    designs = {key[2]: same for key, same in groups(results).items()}
    values = {block: {j: value(designs[block], j) for j in JUDGES} for block in ORDER}
    first, *others = ORDER
    rows = [(block, designs[block][0]["gflops"], values[block], {j: {r["seed"]: float(np.mean(
        r["judges"][j]["frechet"])) for r in designs[block]} for j in JUDGES}) for block in ORDER]
    sentences = []
    for better, worse in zip(ORDER, others):
        decision = agreed(lower(values[better][j], values[worse][j]) for j in JUDGES)
        sentences.append(f"{ORDER[better]} and {ORDER[worse]}: " + sentence(
            decision, f"{ORDER[better]} is better", f"{ORDER[worse]} is better"))
    best = agreed(min(lower(values[first][j], values[block][j]) for block in others) for j in JUDGES)
    sentences.append(f"{ORDER[first]} against all others: " + sentence(best, "it is the best", "another one is better"))
    return rows, sentences


def guidance(results):
    """-> (rows: [(scale, {judge: {metric: Value}})], sentences). Two scales are compared set by set, as the sets of a seed
    are of the same noise and classes at each scale: what is decided is so for every set of every seed."""
    scales = {key[6]: sorted(same, key=lambda r: r["seed"]) for key, same in sorted(groups(results).items())}
    rows = [(scale, {j: {m: value(same, j, m) for m in METRICS} for j in JUDGES}) for scale, same in scales.items()]
    plain, *guided = scales

    def over(metric, j, first, second):
        a, b = ([v for r in scales[scale] for v in r["judges"][j][metric]] for scale in (first, second))
        return agreed(int(x < y) - int(x > y) for x, y in zip(a, b, strict=True))

    at = guided[-1]
    improved = agreed(max(over("frechet", j, scale, plain) for scale in guided) for j in JUDGES)
    recall = agreed(over("recall", j, at, plain) for j in JUDGES)
    precision = agreed(over("precision", j, plain, at) for j in JUDGES)
    return rows, [
        sentence(improved, "some guidance makes the distance smaller",
                 "every scale makes the distance larger", UNPAIRED),
        "Recall: " + sentence(recall, f"it falls, from none to {at:g}", f"it rises, from none to {at:g}", UNPAIRED),
        "Precision: " + sentence(precision, f"it rises, from none to {at:g}", f"it falls, from none to {at:g}", UNPAIRED)]


def within(results, spread, others):
    """Whether the means of `others`, the same samples of other seeds, lie within the ranges of `results` -> [(model and
    sampler, judge, Value there, mean of the others, 1: above, -1: below, 0: within)]"""
    theirs, rows = groups(others), []
    for key, same in groups(results).items():
        size, patch, block, step, sampler, steps, scale = key
        name = f"{size}/{patch} {ORDER[block]}, step {step:,}, {sampler.upper()} {steps}, scale {scale:g}"
        for j in JUDGES if key in theirs else ():
            there, mean = value(same, j, seed_spread=spread[j]), value(theirs[key], j).mean
            rows.append((name, j, there, mean, (mean > there.high) - (mean < there.low)))
    return rows


def sampling(results, spread):
    """spread: of seed_spread -> (rows: [(size, steps, Gflops a sample, {judge: Value})], sentences). The small model with
    its best number of steps, against the large one's best among those that cost no more than the small one's most."""
    rows = sorted(((key[0], key[5], same[0]["gflops"] * key[5], {
        j: value(same, j, seed_spread=spread[j]) for j in JUDGES}) for key, same in groups(results).items()),
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
    The smaller of two neighbours in size, at its end, against the larger one between its checkpoints, at equal compute."""
    rows = [(key[0], key[1], key[3], same[0]["gflops"] * same[0]["batch_size"] * key[3] * 3,
             {j: value(same, j, seed_spread=spread[j]) for j in JUDGES}) for key, same in groups(results).items()]
    rows.sort(key=lambda row: (log(row[3]), row[2]))
    sizes = sorted({row[0] for row in rows}, key=lambda size: min(r[3] for r in rows if r[0] == size))
    decisions = []
    for patch in sorted({row[1] for row in rows}):
        for a, b in zip(sizes, sizes[1:]):
            small = max((r for r in rows if r[:2] == (a, patch)), key=lambda r: r[3])
            large = at_compute([r for r in rows if r[:2] == (b, patch)], small[3])
            if large:
                decisions.append(agreed(lower(large[j], small[4][j]) for j in JUDGES))
    return rows, [count(decisions, "pairs of neighbours in size at the same patch, at all of the smaller one's training "
                        "compute (the larger one between two checkpoints)", "have the larger one ahead")]


def levelled(rows):
    """A sentence, of the rows of `training`: how much of the distance the last doubling of the steps left."""
    models = {}
    for row in rows:
        models.setdefault(row[:2], {})[row[2]] = row[4]
    left = [by_step[last][j].mean / by_step[last // 2][j].mean for by_step in models.values() for last in [max(by_step)]
            for j in JUDGES]
    return (f"Here the second half of the training left {min(left):.0%} to {max(left):.0%} of the distance at its middle, "
            "in all models: " + ("some" if max(left) > 0.95 else "none") + " had come to where longer training no longer "
            "helps, of which the claim is.")


# Of each study, the sentences alone.
OUTCOMES = {"scaling": lambda results, spread: scaling(results, spread)[2],
            "blocks": lambda results, spread: blocks(results)[1],
            "guidance": lambda results, spread: guidance(results)[1],
            "sampling": lambda results, spread: sampling(results, spread)[1],
            "training": lambda results, spread: training(results, spread)[1]}


def outcome(text):
    """What a sentence of these says of the paper's claim: the words of `sentence`."""
    return text.split("**")[1]

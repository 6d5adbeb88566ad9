"""Values with ranges, and what is decided by them.

A result is what run.py writes of one or more sets of samples: {"size", "patch", "block", "seed", "step", "gflops",
"judges": {judge: {metric: [a value for each set]}}, ...}. A decision is 1 (as in the paper), -1 (the other way round)
or 0 (cannot be decided).
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

JUDGES = ("network", "strokes")  # of measure.Judges
METRICS = ("frechet", "precision", "recall", "recognised")
EXPECTED = 0.95  # of the values of another study are to lie in the ranges


@dataclass(frozen=True)
class Value:
    """The mean over seeds, and the range in which that of another study of as many seeds is expected."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"

    def decimals(self):
        """Returns the value with two decimals, as text."""
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def whole(results, names):
    """Returns the results of these names, None unless all are there."""
    return [results[name] for name in names] if all(name in results for name in names) else None


def groups(results):
    """Returns {(size, patch, block, step, sampler, steps, scale): the results of all seeds}."""
    found = {}
    for r in results:
        key = tuple(r[k] for k in ("size", "patch", "block", "step", "sampler", "sampler_steps", "cfg_scale"))
        found.setdefault(key, []).append(r)
    return found


def of_seeds(results, judge, metric):
    """Returns each seed's mean over its sets, as an array. Of a distance it is the mean's logarithm."""
    means = np.array([np.mean(r["judges"][judge][metric]) for r in results])
    return np.log(means) if metric == "frechet" else means


def student(freedom, level=EXPECTED):
    """Returns how many deviations to either side hold `level` of Student's distribution."""
    return float(stdtrit(freedom, (1 + level) / 2))


def seed_spread(results):
    """Returns {(judge, metric, step): half the range of one seed around its model's mean, which holds EXPECTED of all}.

    It is Student's t times the deviation of seeds, pooled over all models with several seeds at this step. Of distances
    it is of their logarithm. Of the settings in which a model was sampled, the first one counts, which is unguided DDIM
    where that is among them: the others are of the same runs.
    """
    first, squares = {}, {}
    for key, same in sorted(groups(results).items()):
        if len(same) > 1:
            first.setdefault(key[:4], same)
    for (*_, step), same in first.items():
        for judge in JUDGES:
            for metric in METRICS:
                of = squares.setdefault((judge, metric, step), [0.0, 0])
                of[0] += np.var(of_seeds(same, judge, metric)) * len(same)
                of[1] += len(same) - 1
    return {key: student(freedom) * (total / freedom) ** 0.5 for key, (total, freedom) in squares.items()}


def set_spread(results):
    """Returns {judge: by what share the distances of two sets of one run deviate from their mean}, over all runs.

    The share is None where no run has two sets.
    """
    logs = {
        j: [np.log(r["judges"][j]["frechet"]) for r in results if len(r["judges"][j]["frechet"]) > 1] for j in JUDGES
    }
    return {j: float(np.mean([np.var(of, ddof=1) for of in sets])) ** 0.5 if sets else None for j, sets in logs.items()}


def value(results, judge, spread, metric="frechet", others=None):
    """Returns the Value of results that differ in the seed alone.

    spread: of seed_spread. others: how many seeds the other study has, by default as many. Both studies' means are off
    by chance, hence the sum in the margin.
    """
    mean, n = np.mean(of_seeds(results, judge, metric)), len(results)
    margin = spread[judge, metric, results[0]["step"]] * (1 / n + 1 / (others or n)) ** 0.5
    three = mean, mean - margin, mean + margin
    return Value(*(float(np.exp(v) if metric == "frechet" else np.clip(v, 0, 1)) for v in three))


def share(results, judge, metric="recognised"):
    """Returns the mean over seeds alone."""
    return float(np.mean(of_seeds(results, judge, metric)))


def lower(a, b):
    """Returns 1 where Value a is lower than b, -1 where it is higher, and 0 where they are too close.

    They are told apart where each mean is outside of the other's range, which is as far as two values of one mean are
    apart by chance.
    """
    return 1 if a.mean < b.low and a.high < b.mean else -1 if b.mean < a.low and b.high < a.mean else 0


def agreed(decisions):
    """Returns the decision of all judges; 0 where they differ."""
    decisions = set(decisions)
    return decisions.pop() if len(decisions) == 1 else 0


def sentence(decision, yes, no, why):
    """Returns what is said of a decision. yes, no: what is then the case. why: why it cannot be decided."""
    return {
        1: f"**As in the paper**: {yes}.",
        -1: f"**Not as in the paper**: {no}.",
        0: f"**Cannot be decided here**: {why}.",
    }[decision]


def outcome(text):
    """Returns what a sentence says of the paper's claim: the words of `sentence`."""
    return text.split("**")[1]


def tally(found, what, better, in_paper=None):
    """Returns (the decision of many comparisons, [{judge: decision}], and their counts in words).

    All of them are decided one way where both judges decide more than half of them that way, and where of those decided
    no larger share goes the other way than in the paper. in_paper: (how many go the paper's way in the paper itself, of
    how many); by default all.
    """
    decisions = [agreed(of.values()) for of in found]
    n = [sum(d == k for d in decisions) for k in (1, -1)]
    allowed = (in_paper[1] - in_paper[0]) / in_paper[1] if in_paper else 0
    whole = next(
        (
            k
            for k, most, other in ((1, *n[:2]), (-1, *n[1::-1]))
            if 2 * most > len(decisions) and other <= allowed * (most + other)
        ),
        0,
    )
    reference = f"; in the paper itself, {in_paper[0]} of {in_paper[1]}" if in_paper else ""
    alone = ", ".join(f"{j} {sum(of[j] > 0 for of in found)} and {sum(of[j] < 0 for of in found)}" for j in JUDGES)
    contradict = sum(min(of.values()) < 0 < max(of.values()) for of in found)
    return whole, (
        f"in {n[0]} of {len(found)} {what} {better} by both judges, in {n[1]} it is the other way round by "
        f"both, and in {contradict} they contradict each other (each alone: {alone}){reference}"
    )


def correlation(x, y):
    """Returns the correlation of x (n,) with each y (..., n)."""
    x, y = x - np.mean(x), y - np.mean(y, axis=-1, keepdims=True)
    return y @ x / np.sqrt(x @ x * np.square(y).sum(-1))


def chance(n):
    """Returns the correlation that n pairs of unrelated numbers exceed, to either side, once in 20 times."""
    t = student(n - 2)
    return t / (n - 2 + t * t) ** 0.5


def trend(x, values, draws=4000):
    """Returns ({judge: the correlation of x with the means of values, a Value}, the decision).

    values: [{judge: Value}]. The decision asks for a correlation beyond `chance` by both judges; a negative one is as
    in the paper. The range is that of another study: as far as two studies differ that are drawn around these means. It
    is computed in the inverse hyperbolic tangent of r, as near -1 all of another study's r may lie to one side.
    """
    found, rng = {}, np.random.default_rng(0)
    for j in JUDGES:
        mean, low, high = (np.log([getattr(v[j], what) for v in values]) for what in ("mean", "low", "high"))
        deviation = (high - low) / 2 / student(np.inf) / 2**0.5  # half of the range's square is of each study
        one, other = np.arctanh(correlation(x, np.exp(mean + deviation * rng.standard_normal((2, draws, len(mean))))))
        r, far = correlation(x, np.exp(mean)), np.quantile(np.abs(other - one), EXPECTED)
        found[j] = Value(*(float(np.tanh(np.arctanh(r) + sign * far)) for sign in (0, -1, 1)))
    least = chance(len(x))
    return found, agreed(1 if r.mean < -least else -1 if r.mean > least else 0 for r in found.values())

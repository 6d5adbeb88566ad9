"""What is said of each claim on samplers: chosen by the numbers alone, by rules that were set before any was seen.

Two distances are compared as their ratio, with the range in which it lies 95 times in 100: by Student's t over the
seeds, seed by seed if both are of the same networks. A decision is 1 (the claim holds), -1 (it does not) or 0
(undecided).
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.miniature.decisions import JUDGES, Value, agreed, student, tally
from benchmarks.samplers.results import Setting

LIMIT = 1.25  # times the distance of another setting: up to this one is as good
WORDS = {1: "Holds", -1: "Does not hold", 0: "Undecided"}
REFERENCE = 250  # evaluations, the paper's
TITLES = {"ddpm": "DDPM", "flow": "flow matching", "meanflow": "MeanFlow"}
# Deterministic samplers, and those that add noise: the same method without it first.
ODE = {
    "ddpm": ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "edm", "euler"),
    "flow": ("euler", "heun", "midpoint", "heun3", "rk4", "dpmpp_2m", "dpmpp_3m", "unipc", "edm"),
}
TWINS = (
    ("ddpm", "ddim", "ddpm"),
    ("ddpm", "dpmpp_2m", "sde_dpmpp_2m"),
    ("flow", "euler", "sde_euler"),
    ("flow", "heun", "sde_heun"),
    ("flow", "dpmpp_2m", "sde_dpmpp_2m"),
)


@dataclass(frozen=True)
class Verdict:
    """claim: a sentence without its full stop. numbers: what the decision rests on, or why there is none."""

    claim: str
    decision: int
    numbers: str

    def __str__(self):
        return f"**{WORDS[self.decision]}**: {self.claim}. {self.numbers[:1].upper()}{self.numbers[1:]}."


def ratio(found, a, b):
    """Returns {judge: the distance of Setting a in multiples of that of b, a Value}. found: of results.by_setting."""
    ratios = {}
    for j in JUDGES:
        x, y = (found[setting][j]["frechet"] for setting in (a, b))
        n = len(x)
        if a.objective == b.objective:
            margin = student(n - 1) * np.std(x - y, ddof=1) / n**0.5
        else:
            margin = student(2 * n - 2) * ((np.var(x, ddof=1) + np.var(y, ddof=1)) / n) ** 0.5
        ratios[j] = Value(*(float(np.exp(np.mean(x) - np.mean(y) + sign * margin)) for sign in (0, -1, 1)))
    return ratios


def smaller(ratios):
    """Returns {judge: 1 if the first distance is smaller, -1 if it is larger, 0 if the range holds 1}."""
    return {j: int(r.high < 1) - int(r.low > 1) for j, r in ratios.items()}


def as_good(ratios):
    """Returns {judge: 1 if the first distance is at most LIMIT times the second, -1 if it is more, else 0}."""
    return {j: int(r.high <= LIMIT) - int(r.low > LIMIT) for j, r in ratios.items()}


def alike(ratios):
    """Returns {judge: 1 if the distances differ by less than LIMIT times, -1 if by more, else 0}."""
    return {
        j: int(1 / LIMIT <= r.low and r.high <= LIMIT) - int(r.low > LIMIT or r.high < 1 / LIMIT)
        for j, r in ratios.items()
    }


def near(found, objective, sampler, evaluations):
    """Returns the Setting with the number of evaluations that is nearest, None if it is an eighth away or more."""
    settings = [s for s in found if (s.objective, s.sampler) == (objective, sampler)]
    best = min(settings, key=lambda s: (abs(s.evaluations - evaluations), s), default=None)
    return best if best and abs(best.evaluations - evaluations) <= evaluations / 8 else None


def pair(found, claim, rule, a, b):
    """Returns the Verdict on two settings, each (objective, sampler, evaluations). rule: of ratios."""
    one, two = near(found, *a), near(found, *b)
    if not one or not two:
        return Verdict(claim, 0, "one of them was not sampled")
    ratios = ratio(found, one, two)
    shown = " and ".join(f"{r} by {j}" for j, r in ratios.items())
    return Verdict(claim, agreed(rule(ratios).values()), f"its distance is {shown} times that of {two}")


def many(found, claim, rule, pairs, better):
    """Returns the Verdict on several pairs of settings: decisions.tally's. better: what is said of one that holds."""
    settings = [(near(found, *a), near(found, *b)) for a, b in pairs]
    settings = [(a, b) for a, b in settings if a and b]
    if len(settings) < len(pairs) or not pairs:
        return Verdict(claim, 0, "not all of them were sampled")
    ratios = [ratio(found, a, b) for a, b in settings]
    decision, counts = tally([rule(r) for r in ratios], "comparisons", better)
    several = len({a.objective for a, _ in settings}) > 1
    shown = ", ".join(
        f"{TITLES[a.objective] + ' ' if several else ''}{_named(a, b)} to {_named(b, a)} "
        + " and ".join(f"{r[j].mean:.2f}" for j in JUDGES)
        for (a, b), r in zip(settings, ratios)
    )
    return Verdict(claim, decision, f"{counts}. Ratios by {' and '.join(JUDGES)}: {shown}")


def _named(setting, other):
    """Returns the sampler's name, with the evaluations where the other's are not the same."""
    return setting.sampler if setting.evaluations == other.evaluations else str(setting)


def one_evaluation(found, claim, most):
    """Returns the Verdict on MeanFlow with one evaluation against all of the other objectives with `most` at most."""
    mine = near(found, "meanflow", "meanflow", 1)
    others = [s for s in found if s.objective != "meanflow" and s.evaluations <= most]
    if not mine or {s.objective for s in others} != {"ddpm", "flow"}:
        return Verdict(claim, 0, "not all of them were sampled")
    ratios = {s: ratio(found, mine, s) for s in others}
    decisions = [agreed(smaller(r).values()) for r in ratios.values()]
    closest = {j: max(ratios, key=lambda s, j=j: ratios[s][j].mean) for j in JUDGES}
    shown = "; ".join(f"by {j} {TITLES[s.objective]}, {s}: {ratios[s][j]}" for j, s in closest.items())
    return Verdict(claim, min(decisions), f"the nearest of {len(others)}, and the ratio to it: {shown}")


def verdicts(found):
    """Returns [(title, [Verdict])]. found: of results.by_setting."""
    few = [
        pair(
            found,
            f"{sampler} with {n} evaluations is as good as DDPM with {REFERENCE}",
            as_good,
            ("ddpm", sampler, n),
            ("ddpm", "ddpm", REFERENCE),
        )
        for sampler, n in (("dpmpp_2m", 8), ("dpmpp_2m", 16), ("unipc", 8), ("unipc", 16), ("ddim", 50))
    ]
    second = ("heun", "midpoint", "dpmpp_2m", "unipc")
    order = [
        many(
            found,
            f"of flow matching, samplers of second order are better than Euler's method at {n} evaluations",
            smaller,
            [(("flow", sampler, n), ("flow", "euler", n)) for sampler in second],
            "the one of second order is better",
        )
        for n in (8, 16)
    ]
    order.append(
        many(
            found,
            "of flow matching, samplers of third and fourth order are better than those of second at 16 evaluations",
            smaller,
            [
                (("flow", high, 16), ("flow", low, 16))
                for high, low in (("heun3", "heun"), ("rk4", "heun"), ("dpmpp_3m", "dpmpp_2m"))
            ],
            "the higher order is better",
        )
    )
    order.append(
        many(
            found,
            "of flow matching, multistep samplers are better than single-step ones of the same order at 8 evaluations",
            smaller,
            [
                (("flow", multi, 8), ("flow", single, 8))
                for multi in ("dpmpp_2m", "unipc")
                for single in ("heun", "midpoint")
            ],
            "the multistep one is better",
        )
    )
    noise = [
        many(
            found,
            f"a sampler is better without noise than with it at {n} evaluations",
            smaller,
            [((objective, ode, n), (objective, sde, n)) for objective, ode, sde in TWINS],
            "the one without noise is better",
        )
        for n in (8, 16)
    ]
    noise.append(
        many(
            found,
            f"a sampler is better with noise than without it at {REFERENCE} evaluations",
            smaller,
            [((objective, sde, REFERENCE), (objective, ode, REFERENCE)) for objective, ode, sde in TWINS],
            "the one with noise is better",
        )
    )
    noise += [
        many(
            found,
            f"of {TITLES[objective]}, samplers without noise are alike at {REFERENCE} evaluations",
            alike,
            [((objective, other, REFERENCE), (objective, first, REFERENCE)) for other in others],
            f"it is like {first}",
        )
        for objective, (first, *others) in ODE.items()
    ]
    meanflow = [
        one_evaluation(
            found, "MeanFlow with 1 evaluation is better than every sampler of the other objectives with 1 or 2", 2
        ),
        one_evaluation(
            found,
            "MeanFlow with 1 evaluation is better than every sampler of the other objectives with 1 (a claim added "
            "after the results were seen)",
            1,
        ),
        pair(
            found,
            f"MeanFlow with 1 evaluation is as good as flow matching with {REFERENCE}, of Heun's method",
            as_good,
            ("meanflow", "meanflow", 1),
            ("flow", "heun", REFERENCE),
        ),
        pair(
            found,
            "MeanFlow is better with 2 evaluations than with 1",
            smaller,
            ("meanflow", "meanflow", 2),
            ("meanflow", "meanflow", 1),
        ),
    ]
    objectives = [
        pair(
            found,
            f"flow matching with Heun's method is better than DDPM with its own sampler at {REFERENCE} evaluations",
            smaller,
            ("flow", "heun", REFERENCE),
            ("ddpm", "ddpm", REFERENCE),
        ),
        pair(
            found,
            "flow matching is better than DDPM at 8 evaluations, both with dpmpp_2m",
            smaller,
            ("flow", "dpmpp_2m", 8),
            ("ddpm", "dpmpp_2m", 8),
        ),
    ]
    return [
        ("Few evaluations", few),
        ("Order", order),
        ("Noise", noise),
        ("MeanFlow", meanflow),
        ("Objectives", objectives),
    ]


def enough(found, objective, sampler):
    """Returns the fewest evaluations from which on the mean distance is at most LIMIT times the objective's smallest
    with about REFERENCE, by both judges; None where there are none."""
    best = {
        j: min((float(np.mean(found[s][j]["frechet"])) for s in found if _is_reference(s, objective)), default=-np.inf)
        for j in JUDGES
    }
    fewest = None
    for setting in sorted((s for s in found if (s.objective, s.sampler) == (objective, sampler)), reverse=True):
        if any(np.mean(found[setting][j]["frechet"]) > best[j] + np.log(LIMIT) for j in JUDGES):
            return fewest
        fewest = setting.evaluations
    return fewest


def _is_reference(setting: Setting, objective):
    return setting.objective == objective and abs(setting.evaluations - REFERENCE) <= REFERENCE / 8

"""Findings on compute: can more sampling steps, or longer training, make up for a smaller model?"""

import itertools
from dataclasses import astuple, dataclass
from math import log

from benchmarks.miniature.decisions import JUDGES, Value, agreed, groups, lower, sentence, tally, value


@dataclass(frozen=True)
class Row:
    """A row of a study of compute. steps: of sampling, or of training. cost: Gflops."""

    model: str
    steps: int
    cost: float
    values: dict  # {judge: Value}


def sampling(results, spread):
    """Figure 10: do more sampling steps make up for a smaller model? Returns (Rows, sentences).

    A Row's cost is that of a sample. The small model with its best number of steps is compared with the large one's
    best among those that cost no more than the small one's most.
    """
    rows = [
        Row(f"{key[0]}/{key[1]}", key[5], same[0]["gflops"] * key[5], {j: value(same, j, spread) for j in JUDGES})
        for key, same in groups(results).items()
    ]
    rows.sort(key=lambda row: row.cost)
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
        shown.append(
            f"{large} with {rival.steps} steps ({rival.cost:.3g} Gflops) has {rival.values[j]}, {small} at "
            f"its best, with {best.steps} steps ({best.cost:.3g} Gflops), {best.values[j]} by {j}"
        )
    shown = "; ".join(shown)
    return rows, [
        sentence(
            agreed(decisions),
            f"more steps do not make up for a smaller model: {shown}",
            f"more steps make up for a smaller model: {shown}",
            shown,
        )
    ]


def at_compute(rows, compute):
    """Returns {judge: Value} at this training compute, on straight lines in logarithms between these Rows of one model;
    None outside of them."""
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a.cost <= compute <= b.cost]
    if not pairs:
        return None
    a, b = pairs[0]
    w = log(compute / a.cost) / log(b.cost / a.cost)
    return {
        j: Value(*(x ** (1 - w) * y**w for x, y in zip(astuple(a.values[j]), astuple(b.values[j])))) for j in JUDGES
    }


def training(results, spread):
    """Figure 9: does longer training make up for a smaller model? Returns (Rows, sentences).

    A Row's cost is Gflops x batch x steps x 3. The smaller of two neighbours in size, at its end, is compared with the
    larger one between its checkpoints, at equal compute. The claim is of models that were trained for long: nothing is
    decided while more than half of the smaller ones still improve.
    """
    of = {}
    for key, same in groups(results).items():
        cost = same[0]["gflops"] * same[0]["batch_size"] * key[3] * 3
        of.setdefault(key[:2], []).append(
            Row(f"{key[0]}/{key[1]}", key[3], cost, {j: value(same, j, spread) for j in JUDGES})
        )
    of = {model: sorted(rows, key=lambda row: row.steps) for model, rows in of.items()}
    sizes = sorted({size for size, _ in of}, key=lambda size: min(of[key][0].cost for key in of if key[0] == size))
    decisions, improving = [], []
    for patch in sorted({patch for _, patch in of}):
        for a, b in itertools.pairwise(sizes):
            *_, middle, small = of[a, patch]
            if large := at_compute(of[b, patch], small.cost):
                decisions.append({j: lower(large[j], small.values[j]) for j in JUDGES})
                improving.append(agreed(lower(small.values[j], middle.values[j]) for j in JUDGES) > 0)
    whole, counts = tally(
        decisions,
        "pairs of neighbours in size, of the same patch and at all of the smaller one's "
        "training compute (the larger one between two checkpoints), the larger one",
        "is better",
    )
    counts += (
        f". Of the smaller ones, {sum(improving)} of {len(improving)} still improved in the second half of "
        "their training"
    )
    if 2 * sum(improving) > len(improving):
        whole = 0
        counts += "; the paper's claim is of models that have been trained for long, which is not tested"
    return sorted(itertools.chain(*of.values()), key=lambda row: row.cost), [sentence(whole, counts, counts, counts)]

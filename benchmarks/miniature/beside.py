"""The section of report.md on two studies of other seeds: does it come out the same again?"""

from benchmarks.markdown import bullets, table
from benchmarks.miniature import findings
from benchmarks.miniature.decisions import EXPECTED, JUDGES, METRICS, outcome, seed_spread, whole


def beside(plan, study, other, there):
    """Returns the section: whether this study lands within the ranges of an earlier one, and has its outcomes.

    study, there: what results.json holds of this one and of the earlier one. other: the earlier one's plan.
    """
    results, earlier = study["results"], there["results"]
    spread, earlier_spread = (seed_spread(of.values()) for of in (results, earlier))
    text = [
        "## Beside an earlier run",
        f"The same study was made before with seeds from {other.seed} on, here with seeds from {plan.seed} on. Of "
        f"its values, {EXPECTED:.0%} of ours are expected in its ranges.",
    ]
    if study["real"] != there["real"]:
        rulers = [
            ", ".join(f"{j} {of['real']['judges'][j]['noise']['frechet']:.4g}" for j in JUDGES) for of in (there, study)
        ]
        text.append(
            "**The judges are not the same**, as numbers are rounded otherwise on another machine: there noise "
            f"has the distances {rulers[0]}, here {rulers[1]}."
        )
    rows = findings.within(earlier.values(), earlier_spread, results.values())
    if not rows:
        return [*text, "It has no results of what is here."]
    back = findings.within(results.values(), spread, earlier.values())
    text += [
        table(
            ["", *(f"{what}, {j}" for what in ("ours in its ranges", "its in ours") for j in JUDGES)],
            [
                ["distance" if m == "frechet" else m, *(_count(way, m, j) for way in (rows, back) for j in JUDGES)]
                for m in METRICS
            ],
        ),
        "These values are not independent: many are of the same runs.",
    ]
    if outside := [row for row in rows if row[-1] and row[1] == "frechet"]:
        text += [
            "Our distances outside of its ranges:",
            table(
                ["samples", "judge", "there", "mean here"],
                [[name, j, str(value), f"{mean:.3g}"] for name, _, j, value, mean, _ in outside],
            ),
        ]
    return text + _outcomes((plan, results, spread), (other, earlier, earlier_spread))


def _count(rows, metric, judge):
    """Returns how many of these rows of findings.within are within, as text."""
    outside = [row[-1] for row in rows if row[1] == metric and row[2] == judge]
    inside = outside.count(0)
    return f"{inside} of {len(outside)} ({inside / len(outside):.0%})"


def _outcomes(here, there):
    """Returns a table of both studies' correlations, and a list of the outcomes that differ.

    here, there: (plan, results, spread) of each.
    """
    both, correlations = [], []
    for name, functions in findings.OUTCOMES.items():
        found = [whole(results, plan.studies[name]) for plan, results, _ in (here, there)]
        for function in functions if all(found) else ():
            ours, earlier = (function(results, of[-1]) for results, of in zip(found, (here, there)))
            both += zip(ours[-1], earlier[-1])
            if function is findings.scaling:
                correlations += [
                    ["at the end", j, earlier[1][j][0].decimals(), ours[1][j][0].decimals()] for j in JUDGES
                ]
            if function is findings.stages:
                correlations += [
                    [f"step {step:,}", j, r_there[j].decimals(), r_here[j].decimals()]
                    for (step, r_here), (_, r_there) in zip(ours[0][:-1], earlier[0])
                    for j in JUDGES
                ]
    text = []
    if correlations:
        text.append(table(["correlation with log Gflops", "judge", "there", "here"], correlations))
    if both:
        outcomes = [tuple(map(outcome, pair)) for pair in both]
        same = sum(here == before for here, before in outcomes)
        opposite = sum(set(pair) == {"As in the paper", "Not as in the paper"} for pair in outcomes)
        undecided = sum(pair == ("Cannot be decided here",) * 2 for pair in outcomes)
        text.append(
            f"Of {len(both)} outcomes above, {same - undecided} are decided the same way there, {undecided} "
            f"undecided in both, {len(both) - same - opposite} in one of the two, and {opposite} the opposite."
        )
        text.append(bullets(f"There: {before} Here: {now}" for (now, before), (a, b) in zip(both, outcomes) if a != b))
    return text

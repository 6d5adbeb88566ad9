"""Targets, tables and the plot, made of what was timed. A part here is a record, a plain dict, of run.measure."""

import math
import statistics

from benchmarks.markdown import table
from benchmarks.speed.profile import KINDS
from dit_jax.runtime.plots import plots

GIB = 2**30
# The sides' labels, in the records and on the page.
JAX_SIDE, BARE, AGAIN, PYTORCH_SIDE = "dit_jax", "its steps alone", "its second start", "diffusers"
COMPILED_SIDE = "PyTorch, compiled"
SIDES = {"diffusers": PYTORCH_SIDE, "pytorch": COMPILED_SIDE}  # of --against

# (what, model, images a call, None: any): least speed as a multiple of PyTorch's.
SPEED = {
    ("train", "DiT-S/2", 8): 1.0,
    ("train", "DiT-B/4", 8): 1.0,
    ("train", "DiT-S/8", 32): 1.2,
    ("denoise", "DiT-S/2", None): 1.4,
    ("denoise", "DiT-XL/2", None): 1.4,
}
SHARE = {("train", "DiT-S/2", 8): 0.8, ("denoise", "DiT-S/2", None): 0.8, ("denoise", "DiT-XL/2", None): 0.8}
# Of GPUs, beside compiled PyTorch: {(what, model): (least images a call, least speed as a multiple of PyTorch's, least
# share of the data sheet's rate)}.
ON_GPU = {("train", "DiT-XL/2"): (32, 1.0, 0.45), ("denoise", "DiT-XL/2"): (1, 1.0, 0)}
OVERHEAD, FIRST_PICTURE, ROUNDS = 0.03, 60, 5  # FIRST_PICTURE: seconds

NOTES = """\
Each side is a process of its own, which waits while the other is timed; their rounds alternate. A time is the median
over rounds, with the lowest and the highest. *Matrix rate* is that of a large matrix product, which each side measures
with its own library after every round; *share* is of the faster one, and where a side's own is slower, of that as
well; recomputed arithmetic is not counted. *Memory* is the most that the process ever held, compilation and
initialisation included, its workers not; on an accelerator, the most that one device held. *diffusers* is PyTorch on
that package's DiT, made the same function: float32, eager, scaled dot product attention, fused AdamW, the EMA in one
call for all arrays, inference mode while denoising; timesteps and labels are embedded once for all blocks, as in the
paper, where that package embeds them in every block again. It has malloc as the system has it; ours has huge pages and
keeps what is freed, as all our commands on a CPU. Our training step also reckons the norms that are logged. A target
is judged by the median over rounds of the two sides' ratio, whose range stands beside it."""

COMPILED_NOTES = """\
*PyTorch, compiled* is a plain DiT of our own in PyTorch, the same function (tests compare them): scaled dot product
attention, `torch.compile` with its default settings over the loss or a whole denoising step, fused AdamW, the EMA in
one call for all arrays; on a GPU with bfloat16 under autocast, and for denoising with its weights in bfloat16 as ours
are. Both sides are on the device at once, neither reserves memory ahead. A call denoises several steps."""

PROFILED = """\
Where the time of one call goes, of its trace: each kind of operation, its share of the call, and the rate of its
arithmetic, recomputed products counted. Operations that ran side by side count each, so that a column can sum to more
than the call; *between them* is then negative. XLA runs some products in the background: such a one counts until the
next operation begins, and what it takes beyond that is not told apart from waiting."""


def median(side):
    """Returns a side's median time over rounds, in seconds."""
    return statistics.median(side["seconds"])


def share(part, label, of=None):
    """Returns a side's share of the attainable arithmetic rate, the median over rounds; None where no arithmetic was
    counted.

    Attainable is what the faster of the sides' matrix products reached in that round, because a library may stay far
    below the machine. of: "own" takes the side's own product in its place, "data_sheet" the data sheet's figure.
    """
    side = part["sides"][label]
    if not part["flop"] or (of == "data_sheet" and not side.get("data_sheet")):
        return None
    rates = {
        None: map(max, zip(*(other["rates"] for other in part["sides"].values()))),
        "own": side["rates"],
        "data_sheet": [side.get("data_sheet")] * len(side["seconds"]),
    }[of]
    return statistics.median(part["flop"] / s / r for s, r in zip(side["seconds"], rates))


def shares(part, label):
    """Returns a side's shares as text, for a cell of the table."""
    attained, own, data_sheet = (share(part, label, of) for of in (None, "own", "data_sheet"))
    if attained is None or own is None:
        return ""
    text = f"{attained:.0%}"
    if own > 1.1 * attained:
        text += f", {own:.0%} of its own"
    if data_sheet is not None:
        text += f", {data_sheet:.0%} of the data sheet's"
    return text


def ratio(part, label, to):
    """Returns how many times a side takes as long as the side `to`: (median, lowest, highest) over rounds."""
    found = [a / b for a, b in zip(part["sides"][label]["seconds"], part["sides"][to]["seconds"])]
    return statistics.median(found), min(found), max(found)


def targets(parts):
    """Returns the targets that these parts decide, [{target, measured, bound, met, shown}].

    met is None where rounds are too few. shown is the measured value as text.
    """
    found = []

    def judge(part, text, measured, bound, good, shown):
        met = good if min(len(side["seconds"]) for side in part["sides"].values()) >= ROUNDS else None
        found.append(
            {"target": f"{part['name']}: {text}", "measured": measured, "bound": bound, "met": met, "shown": shown}
        )

    def of(table, part):
        key = part["what"], part["model"]
        return table.get((*key, part["images"]), table.get((*key, None)))

    for part in parts:
        sides = part["sides"]
        if PYTORCH_SIDE in sides and (bound := of(SPEED, part)):
            times, low, high = ratio(part, PYTORCH_SIDE, JAX_SIDE)
            judge(
                part,
                f"at least {bound:g} times PyTorch's speed",
                times,
                bound,
                times >= bound,
                f"{times:.2f} times ({low:.2f} to {high:.2f})",
            )
        if PYTORCH_SIDE in sides and part["what"] != "scaling":
            memory = sides[JAX_SIDE]["memory"] / sides[PYTORCH_SIDE]["memory"]
            judge(part, "no more memory than PyTorch", memory, 1.0, memory <= 1, f"{memory:.2f} times")
        if PYTORCH_SIDE in sides and (bound := of(SHARE, part)):
            measured = share(part, JAX_SIDE)
            assert measured is not None
            judge(
                part, f"at least {bound:.0%} of the matrix rate", measured, bound, measured >= bound, f"{measured:.0%}"
            )
        if COMPILED_SIDE in sides and sides[JAX_SIDE].get("platform") == "gpu":
            least, speed, least_share = ON_GPU.get((part["what"], part["model"]), (math.inf, 0, 0))
            if part["images"] >= least:
                times, low, high = ratio(part, COMPILED_SIDE, JAX_SIDE)
                shown = f"{times:.2f} times ({low:.2f} to {high:.2f})"
                judge(part, f"at least {speed:g} times compiled PyTorch's speed", times, speed, times >= speed, shown)
            measured = share(part, JAX_SIDE, "data_sheet")
            if part["images"] >= least and least_share and measured is not None:
                text = f"at least {least_share:.0%} MFU"
                judge(part, text, measured, least_share, measured >= least_share, f"{measured:.0%}")
        if part["what"] == "start" and part["model"] == "DiT-XL/2":
            seconds = median(sides[JAX_SIDE])
            judge(
                part,
                f"the first picture in less than {FIRST_PICTURE} s",
                seconds,
                FIRST_PICTURE,
                seconds < FIRST_PICTURE,
                _times(sides[JAX_SIDE]),
            )
        if BARE in sides:
            over, low, high = (times - 1 for times in ratio(part, JAX_SIDE, BARE))
            judge(
                part,
                f"less than {OVERHEAD:.0%} beyond its steps alone",
                over,
                OVERHEAD,
                over < OVERHEAD,
                f"{over:+.1%} ({low:+.1%} to {high:+.1%})",
            )
    return found


def common(parts):
    """Returns the labels of the sides that all parts have."""
    return [label for label in parts[0]["sides"] if all(label in part["sides"] for part in parts)]


def _time(seconds):
    units = ("s", 1), ("ms", 1e3), ("µs", 1e6)
    fitting = (of for of in units if float(f"{abs(of[1] * seconds):.3g}") >= 1)  # as it is printed: not 1e+03 ms
    unit, scale = next(fitting, units[-1])
    return f"{scale * seconds:.3g} {unit}"


def _times(side):
    seconds = side["seconds"]
    return (
        f"{_time(median(side))} ({_time(min(seconds))} to {_time(max(seconds))})"
        if len(seconds) > 1
        else f"{_time(seconds[0])} (1 round)"
    )


def _count(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def results(parts):
    """Returns the tables: one of all timings, one of those of the plot."""
    rows = []
    for part in parts:
        for label, side in part["sides"].items() if part["what"] != "scaling" else ():
            rate = None if None in side["rates"] else statistics.median(side["rates"])
            rows.append(
                [
                    part["name"] if label == JAX_SIDE else "",
                    label,
                    _times(side),
                    "" if label == JAX_SIDE else f"{ratio(part, label, JAX_SIDE)[0]:.2f}",
                    _count(part["images"] / median(side)),
                    _count(rate / 1e9) if rate else "",
                    shares(part, label),
                    f"{side['memory'] / GIB:.2f}",
                    f"{side['compile']:.1f} s" if "compile" in side else "",
                ]
            )
    header = [
        "",
        "",
        "time (range)",
        "times dit_jax's",
        "images (rows) a second",
        "matrix rate, GFLOP/s",
        "share",
        "memory, GiB",
        "compiled in",
    ]
    growth = sorted((p for p in parts if p["what"] == "scaling"), key=lambda p: list(p["at"].values()))
    grown = [
        [*(str(v) for v in p["at"].values()), *(_times(p["sides"][label]) for label in common(growth))] for p in growth
    ]
    return "\n\n".join(
        [table(header, rows)] * bool(rows)
        + [
            table([f"training step of {p['model']}: batch", "tokens", "blocks", *common(growth)], grown)
            for p in growth[:1]
        ]
    )


def profiles(parts):
    """Returns the table of where the time of a call goes, a column for each part; "" where none was profiled."""
    found = [
        (part["name"], part["sides"][JAX_SIDE]["profile"]) for part in parts if part["sides"][JAX_SIDE].get("profile")
    ]
    if not found:
        return ""
    kinds = [kind for kind in KINDS if any(kind in p["kinds"] for _, p in found)]
    rows = []
    for kind in kinds:
        cells = []
        for _, p in found:
            seconds, flop = p["kinds"].get(kind, (0, 0))
            rate = f", {flop / seconds / 1e9:.0f} GFLOP/s" if flop else ""
            cells.append(f"{_time(seconds)}, {seconds / p['seconds']:.0%}{rate}" if seconds else "")
        rows.append([kind, *cells])
    rest = [p["seconds"] - sum(seconds for seconds, _ in p["kinds"].values()) for _, p in found]
    rows.append(["between them", *(f"{_time(s)}, {s / p['seconds']:.0%}" for s, (_, p) in zip(rest, found))])
    return table(["where the time goes", *(name for name, _ in found)], rows)


def phases(parts):
    """Returns the table of where the time of a start goes; "" where none was timed."""
    found = [
        (part["name"] if label == JAX_SIDE else "", label, side["phases"])
        for part in parts
        for label, side in part["sides"].items()
        if "phases" in side
    ]
    if not found:
        return ""
    return table(["", "", *found[0][2]], [[name, label, *map(_time, of.values())] for name, label, of in found])


def target_table(found):
    """Returns the table of what `targets` found."""
    met = {True: "met", False: "not met", None: f"too few rounds: {ROUNDS} are asked for"}
    return table(["target", "measured", ""], [[t["target"], t["shown"], met[t["met"]]] for t in found])


def page(parts, found, machine, plot):
    """Returns the text of benchmarks.md. found: of targets. plot: whether scaling.png is there."""
    dates, commands = sorted(part["date"] for part in parts), dict.fromkeys(part["command"] for part in parts)
    busy = max((part["idle"] for part in parts if part["idle"] is not None), default=None)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    notes = NOTES if busy is None else f"{NOTES} What waits took at most {busy:.1%} of a core while another was timed."
    if any(COMPILED_SIDE in part["sides"] for part in parts):
        notes += "\n\n" + COMPILED_NOTES
    sides = [part["sides"][JAX_SIDE] for part in parts]
    accelerators = ", ".join(
        dict.fromkeys(f"{s['devices']} x {s['device']}" for s in sides if s.get("platform", "cpu") != "cpu")
    )
    where = f"{accelerators} and " if accelerators else ""
    commits = ", ".join(dict.fromkeys(part["commit"] for part in parts if part.get("commit")))
    text = [
        "# Benchmarks",
        f"On {where}{machine['cores']} cores of {machine['cpu']} ({machine['system']}), {when}, {versions}"
        + (f", commit {commits}" if commits else "")
        + "; timed by",
        "\n".join(["```sh", *commands, "```"]),
        results(parts),
        notes,
    ]
    if found:
        text += [target_table(found)]
    if started := phases(parts):
        text += [
            "Where the time of the last start went (*start*: a command from its beginning to its end, which makes "
            "one picture's latent in 4 guided steps of weights on disk; the first one with nothing compiled):",
            started,
        ]
    if profiled := profiles(parts):
        text += [PROFILED, profiled]
    if plot:
        text += [
            "How a training step's time grows with the batch, the tokens of an image, and the depth:",
            "![scaling](scaling.png)",
        ]
    return "\n\n".join(text) + "\n"


def scaling_plot(parts, path):
    """Writes a plot with a panel each for batch, tokens and depth. The bars are the range over rounds."""
    base, model = parts[0]["base"], parts[0]["model"]
    with plots(path, 3, xscale="log", yscale="log", ylabel=f"seconds a training step, {model}") as panels:
        for axes, (key, label) in zip(panels, (("batch", "batch"), ("tokens", "tokens an image"), ("depth", "blocks"))):
            line = [p for p in parts if all(p["at"][k] == base[k] for k in base if k != key)]
            line.sort(key=lambda p: p["at"][key])
            if not line:  # what the panels share was removed
                continue
            x = [p["at"][key] for p in line]
            for name in common(parts):
                y = [median(p["sides"][name]) for p in line]
                ends = [
                    [m - min(p["sides"][name]["seconds"]) for m, p in zip(y, line)],
                    [max(p["sides"][name]["seconds"]) - m for m, p in zip(y, line)],
                ]
                axes.errorbar(x, y, yerr=ends, marker="o", capsize=3, label=name)
            first = median(line[0]["sides"][JAX_SIDE])
            axes.plot(x, [first * v / x[0] for v in x], color="grey", linestyle=":", label="in proportion")
            axes.set(xlabel=label, title=", ".join(f"{k} {v}" for k, v in base.items() if k != key))
            axes.set_xticks(x, map(str, x))
            axes.legend()

"""The lower bounds of a training step on TPU slices, as a table and as a picture: python -m benchmarks.bounds

    python -m benchmarks.bounds                       # all models on all slices: an hour and a half on 2 cores
    python -m benchmarks.bounds --only=v6e-16,v5e-16  # only what is missing of these

Compiles what benchmarks/bounds.json lacks, one program after the other, and adds it there. Then writes the table into
docs/preflight.md, and docs/pictures/bounds.png: DiT-XL/2 with XLA's attention and with the one that `auto` chooses.
After any end the same command resumes.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    flags.DEFINE_list("only", [], "compile only what is missing of these slices")
    cli.parse()  # above the imports that take time

import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from dit_jax.aot import report
from dit_jax.runtime import process
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import say

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURE = ROOT / "benchmarks/bounds.json", ROOT / "docs/preflight.md", ROOT / "docs/pictures/bounds.png"
BEGIN, END = "<!-- begin: python -m benchmarks.bounds -->\n", "<!-- end: python -m benchmarks.bounds -->\n"
ONE_CHIP = "v5e-1", "v6e-1"  # for the largest model alone, which needs its batch in parts there
COMPARED = "DiT-XL/2", "DiT-XL/2-512"
KEPT = (
    *("mesh", "scan", "remat", "accumulate", "attention", "fits", "hbm_peak_bytes", "hbm_capacity_bytes"),
    *("bytes_per_device", "hbm_bytes_by_kind", "bounds_s", "images_per_s_bound", "versions", "compile_seconds"),
)


def plan() -> list[tuple[str, str, str]]:
    """Returns (slice, model, attention) of each program: those of the picture first."""
    table = [(s, m, "auto") for s in report.TABLE_SLICES for m in report.TABLE_MODELS]
    before = [(s, m, "xla") for s in report.TABLE_SLICES for m in COMPARED]
    one_chip = [(s, "DiT-XL/2", "auto") for s in ONE_CHIP]
    return one_chip + [program for program in table if program[1] in COMPARED] + before + table


def compile_missing(results: dict[str, dict[str, Any]], slices: list[str]) -> None:
    """Adds to `results`, and to their file, what the plan has and they lack. slices: only of these, if any."""
    missing = [p for p in dict.fromkeys(plan()) if " ".join(p) not in results and (not slices or p[0] in slices)]
    for i, (topology, model, attention) in enumerate(missing, 1):
        say(f"{i} of {len(missing)}: {model} on {topology}, attention {attention}")
        found = report.estimate_paper(model, topology, attention=attention)
        results[f"{topology} {model} {attention}"] = {key: found[key] for key in KEPT if key in found}
        write_aside(str(RESULTS), (json.dumps(results, indent=1) + "\n").encode())


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown table of what was compiled with the attention that `auto` chooses."""
    columns = "slice", "model", *report.TRAIN_COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|" + len(columns) * "---|"]
    for s in (*ONE_CHIP, *report.TABLE_SLICES):
        rows = ((m, results.get(f"{s} {m} auto")) for m in report.TABLE_MODELS)
        lines += [f"| {s} | {m} | {report.train_row(row)} |" for m, row in rows if row]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, Any]]) -> bytes:
    """Returns a PNG: the bounds of a step of the compared models on each slice, before (XLA's attention) and now."""
    figure, axes = plt.subplots(len(COMPARED), 1, figsize=(7, 8), layout="constrained")
    colors = {"arithmetic": "C0", "memory": "C1", "interconnect": "C2"}
    for ax, model in zip(axes, COMPARED):
        slices = [s for s in report.TABLE_SLICES if f"{s} {model} auto" in results and f"{s} {model} xla" in results]
        for j, (kind, color) in enumerate(colors.items()):
            before, now = (
                [1e3 * results[f"{s} {model} {attention}"]["bounds_s"][kind] for s in slices]
                for attention in ("xla", "auto")
            )
            x = np.arange(len(slices)) + (j - 1) * 0.27
            ax.bar(x, before, 0.25, color="none", edgecolor=color, linestyle=":", linewidth=1.2)
            ax.bar(x, now, 0.25, color=color, label=kind)
        ax.set(yscale="log", ylabel="at least, ms a step", title=f"{model.removesuffix('-512')}, batch 256, "
               f"{512 if model.endswith('-512') else 256} px")  # fmt: skip
        ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        ax.set_xticks(np.arange(len(slices)), slices)
    axes[0].bar([0], [np.nan], color="none", edgecolor="black", linestyle=":", label="with XLA's attention")
    axes[0].legend(fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return file.getvalue()


def main():
    process.cpu_only()
    process.no_compilation_cache()
    results = json.loads(RESULTS.read_text())
    compile_missing(results, flags.FLAGS.only)
    head, rest = PAGE.read_text().split(BEGIN)
    write_aside(str(PAGE), (head + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1]).encode())
    write_aside(str(PICTURE), draw(results))
    say(f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    cli.run(main)

"""The lower bounds of a training step on TPU slices, as a table and as a picture: python -m benchmarks.bounds

    python -m benchmarks.bounds                       # all models on all slices: an hour and a half on 2 cores
    python -m benchmarks.bounds --only=v6e-16,v5e-16  # only what is missing of these; --only=none: nothing

Compiles what benchmarks/bounds.json lacks, one program after the other, and adds it there. Then writes the table into
docs/preflight.md, and docs/pictures/bounds.png: DiT-XL/2 with XLA's attention (before) and with what `auto` chooses.
After any end the same command resumes.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    flags.DEFINE_list("only", [], "compile only what is missing of these slices; none: only write the page again")
    cli.parse()  # above the imports that take time

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.aot import report
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.plots import plots
from dit_jax.runtime.progress import say

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURE = ROOT / "benchmarks/bounds.json", ROOT / "docs/preflight.md", ROOT / "docs/pictures/bounds.png"
TABLE = re.compile(r"^\| slice \| model \| data x fsdp x tensor \|.*\n(\|.*\n)*", re.M)  # in PAGE
ONE_CHIP = "v5e-1", "v6e-1"  # for the largest model alone, which needs its batch in parts there
COMPARED = {"DiT-XL/2": 256, "DiT-XL/2-512": 512}
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
    """Returns the Markdown table: with the attention that `auto` chooses, or XLA's where only that was compiled."""
    columns = "slice", "model", *report.TRAIN_COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|" + len(columns) * "---|"]
    for s in (*ONE_CHIP, *report.TABLE_SLICES):
        rows = ((m, results.get(f"{s} {m} auto") or results.get(f"{s} {m} xla")) for m in report.TABLE_MODELS)
        lines += [f"| {s} | {m} | {report.train_row(row)} |" for m, row in rows if row]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, Any]], path: str) -> None:
    """Draws the bounds of a step of the compared models on each slice: a bar each, and a line with XLA's attention."""
    with plots(path, len(COMPARED), ylabel="ms a step, at least", yscale="log") as panels:
        for panel, (model, pixels) in zip(panels, COMPARED.items()):
            slices = [s for s in report.TABLE_SLICES if {f"{s} {model} {a}" for a in ("auto", "xla")} <= results.keys()]
            for j, kind in enumerate(("arithmetic", "memory", "interconnect")):
                before, now = (
                    [1e3 * results[f"{s} {model} {attention}"]["bounds_s"][kind] for s in slices]
                    for attention in ("xla", "auto")
                )
                x = np.arange(len(slices)) + 0.27 * (j - 1)
                panel.bar(x, now, 0.25, label=kind)
                panel.hlines(before, x - 0.13, x + 0.13, "black", label="before" if j == 2 else None)
            panel.set(title=f"DiT-XL/2, batch 256, {pixels} px")
            panel.set_xticks(np.arange(len(slices)), slices)
        panels[0].legend(ncols=2)


def main():
    process.cpu_only()
    process.no_compilation_cache()
    for name in flags.FLAGS.only:
        if name not in (*ONE_CHIP, *report.TABLE_SLICES, "none"):
            raise UserError(f"--only={name}: must be of {', '.join((*ONE_CHIP, *report.TABLE_SLICES))}, or none")
    results = json.loads(RESULTS.read_text())
    compile_missing(results, flags.FLAGS.only)
    page = PAGE.read_text()
    assert TABLE.search(page), f"{PAGE} has no table to replace"
    write_aside(str(PAGE), TABLE.sub(lambda _: table(results), page).encode())
    draw(results, str(PICTURE))
    say(f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    cli.run(main)

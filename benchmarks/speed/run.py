"""Times parts and keeps their records."""

import json
import math
import os
import re
import sys
import time
from contextlib import ExitStack

from benchmarks.machine import commit, machine
from benchmarks.speed import WHAT, page
from benchmarks.speed.child import Child, ChildError
from benchmarks.speed.parts import PYTORCH
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import Progress, say


def measure(part, seconds):
    """Times a part and returns its record, plain values. Raises UserError.

    seconds: how long a timing is at least. The sides take turns, and each second round has them in reverse order.
    """
    sides, progress = {}, Progress(part.name, part.rounds * len(part.sides), "timings")
    progress.say(f"{part.name}: starts {' and '.join(part.sides)}")
    at_work, idle = 0.0, []
    with ExitStack() as stack:
        try:
            children = {}
            for label, (module, spec) in part.sides.items():
                children[label] = child = stack.enter_context(Child(module, spec, plain=module == PYTORCH))
                _check_comparable(part, label, child.info)
                sides[label] = {**child.info, "seconds": [], "rates": [], "calls": _calls(child, seconds, part.warm)}
            _check_same_place(sides)
            for i in range(part.rounds):
                for j, label in enumerate(list(children)[:: -1 if i % 2 else 1]):
                    side, others = sides[label], [child for name, child in children.items() if name != label]
                    before, start = [child.cpu_seconds() for child in others], time.perf_counter()
                    answer = children[label].ask(side["calls"])
                    at_work += time.perf_counter() - start
                    idle += zip(before, [child.cpu_seconds() for child in others])
                    side["seconds"].append(answer["seconds"])
                    side["rates"].append(answer["rate"])
                    side |= {key: answer[key] for key in ("memory", "value", "phases") if key in answer}
                    progress.update(i * len(children) + j + 1)
            if part.what in ("train", "denoise", "decode"):
                sides[page.JAX_SIDE]["profile"] = children[page.JAX_SIDE].profile()
        except ChildError as e:
            raise UserError(f"{part.name}: {e}") from None
        finally:
            progress.close()
    work = {key: sides[page.JAX_SIDE].pop(key, None) for key in ("images", "flop")}  # of a call, the same on all sides
    known = all(None not in pair for pair in idle)
    return {
        "name": part.name,
        "what": part.what,
        "model": part.model,
        **work,
        "sides": sides,
        "idle": sum(after - before for before, after in idle) / at_work if known else None,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        **part.about,
    }


def _check_comparable(part, label, info):
    """UserError where PyTorch is timed beside, and JAX runs on another device or in another type than it."""
    if (
        page.PYTORCH_SIDE in part.sides
        and label == page.JAX_SIDE
        and (info.get("platform", "cpu") != "cpu" or info.get("dtype", "float32") != "float32")
    ):
        raise UserError(
            f"--against=diffusers compares float32 on CPU, and here JAX runs {info['dtype']} on "
            f"{info['device']}: set JAX_PLATFORMS=cpu and --config.model.dtype=float32"
        )


def _check_same_place(sides):
    """UserError where compiled PyTorch and JAX run on different devices or in different types.

    Else PyTorch's record gets the rate of the data sheet that JAX's has.
    """
    jax_side, pytorch = sides[page.JAX_SIDE], sides.get(page.COMPILED_SIDE)
    if pytorch is None:
        return
    differ = [
        f"{key} {pytorch[key]}, JAX {jax_side[key]}" for key in ("platform", "dtype") if pytorch[key] != jax_side[key]
    ]
    if differ:
        raise UserError(
            f"--against=pytorch: PyTorch has {' and '.join(differ)}: install JAX and PyTorch for the same device "
            "(pip install -e '.[cuda]'), or set JAX_PLATFORMS=cpu, and leave model.dtype at auto"
        )
    devices = jax_side["devices"]
    if devices > 1:
        raise UserError(f"--against=pytorch: PyTorch has one device, and JAX {devices}: set CUDA_VISIBLE_DEVICES=0")
    pytorch["data_sheet"] = jax_side["data_sheet"]


def _calls(child, seconds, warm):
    """Returns how many calls a timing takes. A child that is not warmed up makes one, which takes long enough."""
    if not warm:
        return 1
    child.ask()
    return max(1, math.ceil(seconds / child.ask()["seconds"]))


class Report:
    """The folder of --out: the records in parts/, and the pages that are made of them.

    Raises UserError where a record is damaged or of another machine, or where there is a report without its records.
    """

    def __init__(self, out):
        self.out, self.folder, self.machine = out, os.path.join(out, "parts"), machine()
        before = self.records()
        if not before and os.path.exists(os.path.join(out, "report.json")):
            raise UserError(
                f"--out={out}: holds a report and not the parts that it was made of, so that a new one "
                "would not have them: use another --out"
            )
        self.scaling = {(r["model"], *r["base"].values()) for r in before if r["what"] == "scaling"}

    def records(self):
        """Returns the records in parts/, in the order of WHAT."""
        found = []
        for name in sorted(name for name in os.listdir(self.folder) if name.endswith(".json")):
            path = os.path.join(self.folder, name)
            try:
                with open(path) as f:
                    record = json.load(f)
                order = WHAT.index(record["what"])
                differ = [
                    f"{key} ({record['machine'][key]} there, {here} here)"
                    for key, here in self.machine.items()
                    if record["machine"][key] != here
                ]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: is no part of a report: remove it, and time that part again") from None
            if differ:
                raise UserError(f"{path}: was timed elsewhere: {', '.join(differ)}; use another --out")
            found.append((order, name, record))
        return [record for *_, record in sorted(found, key=lambda r: r[:2])]

    def check(self, parts):
        """UserError where scaling is to be timed of another config than the one in parts/, as the plot is of one."""
        if any(self.scaling - {(part.model, *part.about["base"].values())} for part in parts if part.what == "scaling"):
            raise UserError(
                f"--out={self.out}: its scaling is of another config, and the plot is of one: use another --out"
            )

    def add(self, record):
        """Writes a record into parts/. One of the same name is replaced."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", record["name"]) + ".json"
        write_aside(os.path.join(self.folder, name), (json.dumps(record, indent=1) + "\n").encode())

    def write(self, records):
        """Writes report.json, benchmarks.md and, where scaling was timed, scaling.png."""
        found, scaling = page.targets(records), [record for record in records if record["what"] == "scaling"]
        report = {"machine": self.machine, "parts": records, "targets": found}
        write_aside(os.path.join(self.out, "report.json"), (json.dumps(report, indent=1) + "\n").encode())
        if scaling:
            page.scaling_plot(scaling, os.path.join(self.out, "scaling.png"))
        write_aside(
            os.path.join(self.out, "benchmarks.md"), page.page(records, found, self.machine, bool(scaling)).encode()
        )
        say(f"{self.out}/benchmarks.md, report.json" + (" and scaling.png" if scaling else ""))


def carry_out(parts, seconds, report=None):
    """Times the parts, prints the tables, and writes the report where there is one.

    seconds: how long a timing is at least. report: a Report, or None. The tables are then of all its records.
    """
    if report:
        report.check(parts)
    records, here = [], machine()
    for part in parts:
        records.append(measure(part, seconds))
        if report:
            report.add(records[-1])
    if report:
        records = report.records()
        if not records:
            raise UserError(f"--out={report.out}: there are no parts to make a page of")
    say(f"\n{here['cores']} cores of {here['cpu']}\n\n{page.results(records)}")
    if found := page.targets(records):
        say(f"\n{page.target_table(found)}\n")
    for more in filter(None, (page.phases(records), page.profiles(records))):
        say(f"\n{more}\n")
    if report:
        report.write(records)

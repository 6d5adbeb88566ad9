"""FID, sFID, Inception Score, precision, recall and KID: python -m dit_jax.evaluate

    python -m dit_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE.pth
    python -m dit_jax.evaluate --workdir=runs/xl2 --cfg_scale=1.5 --reference=... --inception=...   # sampled on the way
    python -m dit_jax.evaluate --samples=runs/photos/run/out/png --reference=ref.npz --features=efflite0 --num=12

Samples are an .npz with `arr_0` (N, H, W, 3) uint8, a folder of PNGs, or come straight from the sampler (--workdir or
--weights). Prints a table, with the paper's numbers if the paper has this run, and writes --out, a JSON file that says
how the numbers were made. FID-50K takes exactly 50,000 samples; --num=N takes another number, --num=0 all.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

CFG_SCALE = 1.5  # by default, as in the tables of the paper

if __name__ == "__main__":
    cli.define_samples(num=50_000, classes="random", cfg_scale=CFG_SCALE)
    cli.define_features()
    cli.define_path(
        "samples", None, "an .npz of pictures (arr_0), or a folder of PNGs; instead of --workdir or --weights"
    )
    cli.define_path("reference", None, "the .npz to compare with, or a folder of PNGs")
    cli.define_path("out", None, "a JSON file for the numbers and how they were made")
    cli.parse()  # above the imports that take time

import json
import os
import platform
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy

from dit_jax import __version__
from dit_jax.evaluation import features, inception_score, paper, precision_recall, references, samples
from dit_jax.evaluation.compare import compare, display_names, json_keys
from dit_jax.evaluation.features import Features
from dit_jax.evaluation.measure import Measured, measure
from dit_jax.evaluation.references import MIN_PICTURES, Reference
from dit_jax.parallel import layout, sharding
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import read_json, write_aside
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress, say
from dit_jax.sampling.output import SHA256

EVALUATOR = "the paper's"  # its resize, scaling and features: evaluation/features.py


class Samples(NamedTuple):
    """Samples to be measured. shape: (H, W, 3) of each. manifest: what is known of how they were made."""

    count: int
    shape: tuple[int, ...]
    batches: Iterable[np.ndarray]
    manifest: dict[str, Any]


def _samples_from_file(path, num, kind):
    """Returns the samples in an .npz or a folder. num: how many there must be, 0 for any. kind: of the features."""
    source = samples.load(path)
    count = source.shape[0]
    if num and count != num:
        name = display_names(kind, num)["fid"]
        raise UserError(
            f"{path}: holds {count:,} pictures, and {name} takes {num:,}; sample the rest, or say --num={count} "
            f"(a number that cannot be compared with {name})"
        )
    manifest = read_json(os.path.join(os.path.dirname(os.path.abspath(path)), "manifest.json")) or {}
    manifest.pop(SHA256, None)  # it is of the file, not of the pictures
    # The manifest belongs to the files that dit_jax.sample wrote beside it, not to any other file.
    belongs = os.path.basename(os.path.abspath(path)) in ("samples.npz", "png") and manifest.get("num") == count
    return Samples(count, source.shape[1:], ahead(source.batches(256)), manifest if belongs else {})


def _samples_from_model(num):
    """Returns the samples that the flags ask for. They are made while they are measured."""
    made = cli.samples(CFG_SCALE)
    if made.model.latent:
        raise UserError(f"this is a model of latents ({made.model.shape[-1]} channels): name a decoder with --vae")
    return Samples(num, made.model.shape, made.batches(), made.manifest)


def table(
    values: dict[str, float | None], names: dict[str, str], expected: tuple[str, dict[str, float]] | None
) -> list[str]:
    """Returns lines of a metric's name, its value, and the paper's value if there is one.

    names: of the metrics to show. expected: of evaluation.paper.row.
    """
    where, paper_values = expected or ("", {})
    lines = [f"{'':22s} {'here':>12s}" + (f" {'paper, ' + where:>16s}" if paper_values else "")]
    for metric, name in names.items():
        value = "-" if values[metric] is None else f"{values[metric]:.4f}"
        paper_value = f" {paper_values[metric]:>16g}" if metric in paper_values else ""
        lines.append(f"{name:22s} {value:>12s}{paper_value}")
    return lines


def _check_flags(f):
    given = [flag for flag in ("samples", "workdir", "weights") if f[flag].value]
    if len(given) != 1:
        raise UserError("say --samples=FILE, --workdir=RUN or --weights=FILE, one of them")
    if not f.reference:
        raise UserError(
            "--reference is missing: name the .npz to compare with (the published one, or one that "
            "dit_jax.reference made), or a folder of PNGs"
        )
    if f.features == "inception" and not f.inception:
        raise UserError(
            "--inception is missing: FID needs the weights of InceptionV3, which no package carries: "
            f"{features.FETCH}; or say --features=efflite0 for FD-EffLite0, which is no FID"
        )
    if not f.samples and f.num < 1:
        raise UserError(f"--num={f.num}: say how many samples to make")


def main() -> None:
    f = flags.FLAGS
    _check_flags(f)
    process.one_step_at_a_time()
    folder = os.path.dirname(os.path.abspath(f.out or "report.json"))
    if f.out:
        cli.make_parent(f.out)
    process.keep_compiled(os.path.join(folder, "compiled"))
    # A bad file is reported before the network is loaded, and the model is loaded after the reference was checked.
    given = _samples_from_file(f.samples, f.num, f.features) if f.samples else None
    layout.check_memory({f"--num={f.num}": f.num * layout.FEATURE_BYTES}, jax.devices())
    network = features.load(sharding.make_mesh(), f.features, f.inception, f.features_batch_size)
    reference = references.load_reference(f.reference, network)
    given = given or _samples_from_model(f.num)
    if given.count < MIN_PICTURES:
        raise UserError(
            f"{given.count} samples: at least {MIN_PICTURES} are needed, and a distance means little below thousands"
        )
    references.check_size(reference, given.shape)
    references.measure_reference(network, reference)
    progress = Progress("features", given.count, "pictures")
    measured = measure(network, given.batches, on_count=progress.update)
    progress.close()
    values = compare(network, measured, reference)
    is_published = network.sha256 == features.INCEPTION_SHA256
    expected = paper.row(given.manifest, measured.shape[0]) if given.manifest and is_published else None
    say(f"{measured.count:,} samples of {f.samples or f.workdir or f.weights} against {reference.identity['file']}")
    say("\n".join(table(values, display_names(f.features, measured.count), expected)))
    if f.features == "inception" and not is_published:
        say(
            f"the weights are not the published file (sha256 {network.sha256[:16]}...): they are a copy in another "
            "format, or another network, and then the numbers are not comparable with any FID"
        )
    if reference.images is None:
        say("precision, recall and KID need the reference's pictures (arr_0), which it does not hold")
    if f.out and jax.process_index() == 0:
        report = _report(f, network, reference, measured, values, expected, given.manifest)
        write_aside(f.out, (json.dumps(report, indent=2) + "\n").encode())
        say(f"how they were made: {f.out}")


def _report(
    f: flags.FlagValues,
    network: Features,
    reference: Reference,
    measured: Measured,
    values: dict[str, float | None],
    expected: tuple[str, dict[str, float]] | None,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Returns the contents of --out."""
    return {
        "metrics": {key: values[metric] for metric, key in json_keys(f.features).items()},
        "paper": expected and {"where": expected[0], **expected[1]},
        "samples": {
            "count": measured.count,
            "size": list(measured.shape[:2]),
            "sha256": measured.sha256,
            "from": os.path.basename(os.path.abspath(f.samples)) if f.samples else "the sampler",
            "made": manifest or None,
        },
        "reference": reference.identity,
        "features": {"name": network.name, "sha256": network.sha256, "products": "float32, highest precision"},
        "choices": {
            "evaluator": EVALUATOR if f.features == "inception" else network.name,
            "split": inception_score.SPLIT,
            "neighbours": precision_recall.NEIGHBOURS,
            "kid": "all pairs",
        },
        "versions": {
            "dit_jax": __version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
    }


if __name__ == "__main__":
    cli.run(main)

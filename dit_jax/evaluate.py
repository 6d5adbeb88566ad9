"""FID, sFID, Inception Score, precision, recall and KID: python -m dit_jax.evaluate

    python -m dit_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE.pth
    python -m dit_jax.evaluate --workdir=runs/xl2 --cfg_scale=1.5 --reference=... --inception=...   # sampled on the way
    python -m dit_jax.evaluate --samples=runs/photos/run/out/png --reference=ref.npz --features=efflite0 --num=12

Samples are an .npz with `arr_0` (N, H, W, 3) uint8, a folder of PNGs, or come straight from the sampler (--workdir or
--weights). Prints a table, beside the paper's numbers where the paper has this run, and writes --out, a JSON file that
says how they came about. FID-50K takes exactly 50,000 samples: --num=N for another number, 0 for all that there are.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_samples(num=50_000, classes="random", cfg_scale=1.5)
    cli.define_features()
    cli.define_path("samples", None, "an .npz of pictures (arr_0), or a folder of PNGs; instead of a run or weights")
    cli.define_path("reference", None, "the .npz to compare with, or a folder of PNGs")
    cli.define_path("out", None, "a JSON file for the numbers and how they came about")
    cli.parse()  # above the imports that take time

import json
import os
import platform

import jax
import numpy as np
import scipy

from dit_jax import __version__
from dit_jax.evaluation import features, inception_score, measure, paper, precision_recall, references, samples
from dit_jax.parallel import layout, sharding
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import read_json, write_aside
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress, say
from dit_jax.sampling.output import SHA256

EVALUATOR = "the paper's"  # resize, scaling and features: see evaluation/features.py


def _file_samples(path, num, kind):
    """-> (a source of data.samples of `num` pictures, what is known of how they were made). kind: of the features."""
    source = samples.load(path)
    if num and source.shape[0] != num:
        name = measure.shown(kind, num)["fid"]
        raise UserError(f"{path}: holds {source.shape[0]:,} pictures, and {name} takes {num:,}; sample the rest, or "
                         f"say --num={source.shape[0]} (a number that cannot be compared with {name})")
    manifest = read_json(os.path.join(os.path.dirname(os.path.abspath(path)), "manifest.json")) or {}
    manifest.pop(SHA256, None)  # of the file, which says nothing of the pictures
    # A manifest is of what dit_jax.sample wrote beside it, not of another file.
    ours = os.path.basename(os.path.abspath(path)) in ("samples.npz", "png")
    return source, manifest if ours and manifest.get("num") == source.shape[0] else {}


def table(values, names, expected):
    """Lines: a metric's name, its value, and the paper's where it has one."""
    where, theirs = expected or ("", {})
    lines = [f"{'':22s} {'here':>12s}" + (f" {'paper, ' + where:>16s}" if theirs else "")]
    for metric, name in names.items():
        value = "-" if values[metric] is None else f"{values[metric]:.4f}"
        lines.append(f"{name:22s} {value:>12s}" + (f" {theirs[metric]:>16g}" if metric in theirs else ""))
    return lines


def main():
    f = flags.FLAGS
    given = [flag for flag in ("samples", "workdir", "weights") if f[flag].value]
    if len(given) != 1:
        raise UserError("say --samples=FILE, --workdir=RUN or --weights=FILE, one of them")
    if not f.reference:
        raise UserError("--reference is missing: name the .npz to compare with (the published one, or one that "
                        "dit_jax.reference made), or a folder of PNGs")
    if f.features == "inception" and not f.inception:
        raise UserError("--inception is missing: FID needs the weights of InceptionV3, which no package carries: "
                        f"{features.FETCH}; or say --features=efflite0 for FD-EffLite0, which is no FID")
    process.one_step_at_a_time()
    folder = os.path.dirname(os.path.abspath(f.out or "report.json"))
    if f.out:
        cli.make_way(f.out)
    process.keep_compiled(os.path.join(folder, "compiled"))
    if f.samples:
        source, manifest = _file_samples(f.samples, f.num, f.features)
    elif f.num < 1:
        raise UserError(f"--num={f.num}: from the sampler, say how many")
    layout.check_memory({f"--num={f.num}": f.num * layout.FEATURES}, jax.devices())
    network = features.load(sharding.make_mesh(), f.features, f.inception, f.features_batch_size)
    reference = references.load_reference(f.reference, network)
    if f.samples:
        total, batches, shape = source.shape[0], ahead(source.batches(256)), source.shape[1:]
    else:
        made = cli.samples()
        if made.latent:
            raise UserError(f"this is a model of latents ({made.shape[-1]} channels): name a decoder with --vae")
        total, manifest, batches, shape = f.num, made.manifest, made.batches(), made.shape
    if total < references.LEAST:
        raise UserError(f"{total} samples: at least {references.LEAST} are needed, and a distance means little below "
                        "thousands")
    references.check_size(reference, shape)
    measure.measure_reference(network, reference)
    progress = Progress("features", total, "pictures")
    measured = measure.measure(network, batches, on_count=progress.update)
    progress.close()
    values = measure.compare(network, measured, reference)
    names = measure.shown(f.features, measured.count)
    expected = None
    if manifest and network.sha256 == features.INCEPTION_SHA256:
        expected = paper.row(manifest, measured.shape[0])
    say(f"{measured.count:,} samples of {f.samples or f.workdir or f.weights} against {reference.identity['file']}")
    say("\n".join(table(values, names, expected)))
    if f.features == "inception" and network.sha256 != features.INCEPTION_SHA256:
        say(f"the weights are not the published file's (sha256 {network.sha256[:16]}...): a copy in another format, or "
            "another network, whose numbers are nobody's FID")
    if reference.images is None:
        say("precision, recall and KID need the reference's pictures (arr_0), which it does not hold")
    report = {
        "metrics": {key: values[metric] for metric, key in measure.keys(f.features).items()},
        "paper": expected and {"where": expected[0], **expected[1]},
        "samples": {"count": measured.count, "size": list(measured.shape[:2]), "sha256": measured.sha256,
                    "from": os.path.basename(os.path.abspath(f.samples)) if f.samples else "the sampler",
                    "made": manifest or None},
        "reference": reference.identity,
        "features": {"name": network.name, "sha256": network.sha256, "products": "float32, highest precision"},
        "choices": {"evaluator": EVALUATOR if f.features == "inception" else network.name,
                    "split": inception_score.SPLIT, "neighbours": precision_recall.NEIGHBOURS,
                    "kid": "all pairs"},
        "versions": {"dit_jax": __version__, "jax": jax.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__, "python": platform.python_version(),
                     "device": jax.devices()[0].device_kind}}
    if f.out and jax.process_index() == 0:
        write_aside(f.out, (json.dumps(report, indent=2) + "\n").encode())
        say(f"how they came about: {f.out}")


if __name__ == "__main__":
    cli.run(main)

"""How fast data come: python -m dit_jax.benchmark

    python -m dit_jax.benchmark                                     # on a latent cache and JPEGs that it makes itself
    python -m dit_jax.benchmark --cache=/data/imagenet-latents --pictures=/data/imagenet/train --out=report.json

Batches of 256 from a latent cache, and of pictures decoded and cropped to 256 px, as the trainer reads them; and beside
them, where PyTorch is installed, a DataLoader over one .npy a sample, as PyTorch ports of DiT keep their latents, and
over the same JPEGs. Each is timed in turn, `--rounds` times; medians and ranges are printed.
"""

import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, pictures, sharding
from dit_jax.config import UserError
from dit_jax.data import images, latents, pipeline
from dit_jax.data.pictures import Folder, Pictures
from dit_jax.example import photographs
from dit_jax.logging import Progress, say

BATCH, SIZE, SHAPE = 256, 256, (32, 32, 4)
PICTURE = (375, 500)  # height and width: about ImageNet's mean


def make_cache(path, count, shard_size=1024):
    """A latent cache of noise, of 256 px pictures."""
    os.makedirs(path)
    rng, shards = np.random.default_rng(0), -(-count // shard_size)
    entries = []
    for i in range(shards):
        n = min(shard_size, count - i * shard_size)
        writer = latents.ShardWriter(path, latents.shard_name(i, shards), "float16")
        writer.add(rng.standard_normal((n, 2, *SHAPE[:2], 2 * SHAPE[2]), np.float32), rng.integers(1000, size=n))
        entries.append(writer.close())
    latents.write_manifest(path, {
        "format": latents.FORMAT, "shards": entries, "count": count, "num_classes": 1000, "class_names": None,
        "size": SIZE, "shape": SHAPE, "dtype": "float16", "vae": {"name": "noise", "encoder": "", "scale": 0.18215},
        "skipped": []})


def make_pictures(path, count):
    """JPEG files of PICTURE: crops of real photographs."""
    rng, originals = np.random.default_rng(0), [Image.fromarray(a) for a in photographs().values()]
    for i in range(count):
        original = originals[i % len(originals)]
        scale = rng.uniform(0.6, 1)
        height, width = min((PICTURE[0], PICTURE[1]), original.size[::-1])
        box = rng.integers(original.width - int(width * scale) + 1), rng.integers(original.height - int(height * scale) + 1)
        crop = original.crop((*box, box[0] + int(width * scale), box[1] + int(height * scale))).resize(PICTURE[::-1])
        pictures.write_aside(os.path.join(path, str(i % 2), f"{i}.jpg"), pictures.encoded(crop, "jpeg", quality=90))


def ours(source, rows):
    """Seconds an example to have batches of `rows` examples on the devices: order, reading, placing."""
    mesh = sharding.make_mesh()
    steps = max(1, rows // BATCH)
    batches = pipeline.Batches(source, first_step=0, last_step=steps, seed=int(time.time()), flip=True, batch_size=BATCH,
                               sharding=sharding.batch_sharding(mesh), num_classes=1000)
    start = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(batches.get())
    seconds = time.perf_counter() - start
    batches.close()
    return seconds / (steps * BATCH)


class Npy:
    """Latents and labels in one .npy file each, a sample."""

    def __init__(self, path, count):
        self.path, self.count = path, count
        rng = np.random.default_rng(0)
        for kind in ("features", "labels"):
            os.makedirs(os.path.join(path, kind))
        for i in range(count):
            np.save(os.path.join(path, "features", f"{i}.npy"), rng.standard_normal((1, *SHAPE[::-1]), np.float32))
            np.save(os.path.join(path, "labels", f"{i}.npy"), rng.integers(1000, size=1))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        import torch
        return [torch.from_numpy(np.load(os.path.join(self.path, kind, f"{i}.npy"))) for kind in ("features", "labels")]


class Jpegs:
    """The pictures of a folder, decoded and cropped, as a PyTorch Dataset."""

    def __init__(self, raw):
        self.raw = raw

    def __len__(self):
        return len(self.raw)

    def __getitem__(self, i):
        _, data, label = self.raw[i]
        return images.center_crop(images.decode(data), SIZE).copy(), label


def torch_loader(dataset, workers):
    """Seconds an example of a second pass through a DataLoader with so many worker processes, which are running then."""
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True,
                        persistent_workers=bool(workers))
    for _ in loader if workers else ():
        pass
    start = time.perf_counter()
    for _ in loader:
        pass
    return (time.perf_counter() - start) / (len(loader) * BATCH)


def main():
    f = flags.FLAGS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    report = {}
    try:
        import torch
        torch.set_num_threads(1)
    except ImportError:
        torch = None
    with tempfile.TemporaryDirectory(dir=f.scratch) as scratch:
        cache, folder = f.cache, f.pictures
        if cache is None:
            cache = os.path.join(scratch, "cache")
            make_cache(cache, f.num_latents)
        if folder is None:
            folder = os.path.join(scratch, "pictures")
            make_pictures(folder, 4 * BATCH)
        try:
            cache, raw = latents.LatentCache(cache), Folder(folder)
        except ValueError as e:
            raise UserError(str(e)) from None
        if min(len(cache), len(raw)) < 2 * BATCH:
            raise UserError(f"--cache and --pictures need {2 * BATCH} examples at least, for two batches")
        rows = {"latents": f.num_latents, "JPEG": 4 * BATCH}
        runs = {("latents", "dit_jax"): lambda: ours(cache, rows["latents"]),
                ("JPEG", "dit_jax"): lambda: ours(Pictures(raw, SIZE), rows["JPEG"])}
        if torch is not None:
            npy = Npy(os.path.join(scratch, "npy"), f.num_latents)
            for workers in sorted({0, cores}):
                name = f"torch DataLoader, {workers} workers"
                runs["latents", f"{name}, a .npy a sample"] = lambda w=workers: torch_loader(npy, w)
                runs["JPEG", name] = lambda w=workers: torch_loader(Jpegs(raw), w)
        else:
            say("PyTorch is not installed: nothing to set beside (pip install -e '.[torch]')")
        seconds, progress = {key: [] for key in runs}, Progress("benchmark", f.rounds * len(runs), "timings")
        for i in range(f.rounds):
            for j, (key, run) in enumerate(runs.items()):
                seconds[key].append(run())
                progress.update(i * len(runs) + j + 1)
        progress.close()
    say(f"{cores} cores, {f.rounds} rounds; examples a second, median (lowest to highest)")
    for kind in rows:
        others = []
        for (of, name), values in seconds.items():
            if of == kind:
                rates = sorted(1 / v for v in values)
                median = statistics.median(rates)
                report.setdefault(kind, {})[name] = {"median": median, "lowest": rates[0], "highest": rates[-1]}
                others += [median] if name != "dit_jax" else []
                say(f"  {kind:8s} {name:48s} {median:10,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})")
        if others:
            report[kind]["ratio"] = report[kind]["dit_jax"]["median"] / max(others)
            say(f"  {kind:8s} {report[kind]['ratio']:.1f} times the better DataLoader")
    if f.out:
        pictures.write_aside(f.out, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    flags.DEFINE_string("cache", None, "a latent cache; by default one of noise is made, 256 px")
    flags.DEFINE_string("pictures", None, "a folder of class folders; by default crops of photographs are made")
    flags.DEFINE_integer("num_latents", 8192, "how many latents are made and read", lower_bound=2 * BATCH)
    flags.DEFINE_integer("rounds", 5, "timings of each", lower_bound=1)
    flags.DEFINE_string("scratch", None, "folder for what is made; by default the system's, for temporary files")
    flags.DEFINE_string("out", None, "a JSON file for the report")
    cli.run(main)

"""The child that times how fast data come.

The trainer's own reading gives batches of 256 from a latent cache, or of pictures decoded and cropped to 256 px. Beside
it stands a PyTorch DataLoader: over one .npy a sample, as PyTorch ports of DiT keep their latents, or over the same
JPEGs.
"""

import os
import time

import jax
import numpy as np
from PIL import Image

from benchmarks.speed.child import Timed, serve
from dit_jax import cli
from dit_jax.data import decode, latents, pipeline
from dit_jax.data.photographs import photographs
from dit_jax.data.pictures import Pictures
from dit_jax.data.records import Folder
from dit_jax.parallel import sharding
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.images import encoded

BATCH, SIZE, SHAPE = 256, 256, (32, 32, 4)
PICTURE = (375, 500)  # height and width: about ImageNet's mean


def make_cache(path, count, shard_size=1024):
    """Writes a latent cache of noise, as if of 256 px pictures."""
    os.makedirs(path)
    rng, shards = np.random.default_rng(0), -(-count // shard_size)
    entries = []
    for i in range(shards):
        n = min(shard_size, count - i * shard_size)
        writer = latents.ShardWriter(path, latents.shard_name(i, shards), "float16")
        writer.add(rng.standard_normal((n, 2, *SHAPE[:2], 2 * SHAPE[2]), np.float32), rng.integers(1000, size=n))
        entries.append(writer.close())
    latents.write_manifest(
        path,
        {
            "format": latents.FORMAT,
            "shards": entries,
            "count": count,
            "num_classes": 1000,
            "class_names": None,
            "size": SIZE,
            "shape": SHAPE,
            "dtype": "float16",
            "vae": {"name": "noise", "encoder": "", "scale": 0.18215},
            "skipped": [],
        },
    )


def make_pictures(path, count):
    """Writes JPEG files of the size PICTURE: crops of real photographs."""
    rng, originals = np.random.default_rng(0), [Image.fromarray(a) for a in photographs().values()]
    for i in range(count):
        original = originals[i % len(originals)]
        scale = rng.uniform(0.6, 1)
        height, width = min((PICTURE[0], PICTURE[1]), original.size[::-1])
        width, height = int(width * scale), int(height * scale)
        left, top = int(rng.integers(original.width - width + 1)), int(rng.integers(original.height - height + 1))
        crop = original.crop((left, top, left + width, top + height)).resize((PICTURE[1], PICTURE[0]))
        write_aside(os.path.join(path, str(i % 2), f"{i}.jpg"), encoded(crop, "jpeg", quality=90))


def jax_loader(source, rows):
    """Returns the seconds an example that it takes to have `rows` examples on the devices: order, reading, placing."""
    mesh = sharding.make_mesh()
    steps = max(1, rows // BATCH)
    batches = pipeline.Batches(
        source,
        first_step=0,
        last_step=steps,
        seed=int(time.time()),
        flip=True,
        batch_size=BATCH,
        sharding=sharding.batch_sharding(mesh),
    )
    start = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(batches.get())
    seconds = time.perf_counter() - start
    batches.close()
    return seconds / (steps * BATCH)


class Npy:
    """A PyTorch Dataset of latents and labels, each in a .npy file a sample."""

    def __init__(self, path):
        self.path, self.count = path, len(os.listdir(os.path.join(path, "labels")))

    @staticmethod
    def make(path, count, shape):
        """Writes `count` samples. shape: of a latent, as a cache has it, the channels last."""
        rng = np.random.default_rng(0)
        for kind in ("features", "labels"):
            os.makedirs(os.path.join(path, kind))
        for i in range(count):
            np.save(os.path.join(path, "features", f"{i}.npy"), rng.standard_normal((1, *shape[::-1]), np.float32))
            np.save(os.path.join(path, "labels", f"{i}.npy"), rng.integers(1000, size=1))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        import torch

        return [torch.from_numpy(np.load(os.path.join(self.path, kind, f"{i}.npy"))) for kind in ("features", "labels")]


class Jpegs:
    """A PyTorch Dataset of the pictures of a folder, decoded and cropped."""

    def __init__(self, raw):
        self.raw = raw

    def __len__(self):
        return len(self.raw)

    def __getitem__(self, i):
        _, data, label = self.raw[i]
        try:
            return decode.center_crop(decode.decode(data), SIZE).copy(), label
        except decode.BadImage:  # the next in its place, as we have it
            return self[(i + 1) % len(self)]


def torch_loader(dataset, rows, workers):
    """Returns the seconds an example of `rows` from a DataLoader with so many worker processes.

    Where there are workers the second pass is timed, in which they are running already.
    """
    from torch.utils.data import DataLoader, RandomSampler

    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=RandomSampler(dataset, num_samples=rows),
        num_workers=workers,
        drop_last=True,
        persistent_workers=bool(workers),
    )
    for _ in loader if workers else ():
        pass
    start = time.perf_counter()
    for _ in loader:
        pass
    return (time.perf_counter() - start) / (len(loader) * BATCH)


def make(spec):
    """Returns a Timed whose call reads examples.

    spec: kind, "latents" or "JPEG"; path, of a cache or a folder, or of the .npy files; workers, of the DataLoader,
    None where the trainer's own reading is timed; rows, how many examples a call reads.
    """
    kind, path, workers = spec["kind"], spec["path"], spec["workers"]
    if workers is None:
        source = latents.LatentCache(path) if kind == "latents" else Pictures(Folder(path), SIZE)
        return Timed(lambda: {"seconds": jax_loader(source, spec["rows"])}, {"images": 1})
    import torch

    torch.set_num_threads(1)
    dataset = Npy(path) if kind == "latents" else Jpegs(Folder(path))
    return Timed(lambda: {"seconds": torch_loader(dataset, spec["rows"], workers)}, {"images": 1})


if __name__ == "__main__":
    cli.parse()
    cli.run(lambda: serve(make))

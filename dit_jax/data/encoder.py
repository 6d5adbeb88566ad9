"""Making a latent cache: pictures through the VAE, over the devices and hosts, shard by shard."""

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from dit_jax.data import latents
from dit_jax.data.decode import BadImage
from dit_jax.data.latents import MANIFEST, SETTINGS, shard_name
from dit_jax.parallel import sharding
from dit_jax.runtime import files, hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import read_json, write_aside
from dit_jax.runtime.images import grid, png, to_uint8
from dit_jax.runtime.overlap import one_behind, read_ahead
from dit_jax.runtime.progress import Progress, say
from dit_jax.vae import autoencoder

PREVIEW = 4  # pictures


def settings_of(source, vae, *, vae_dtype, dtype, shard_size):
    """What the bytes of a cache follow from, as in its manifest."""
    side = source.size // vae.factor
    return {"format": latents.FORMAT, "source": source.identity, "pictures": len(source),
            "class_names": source.class_names and list(source.class_names), "num_classes": source.num_classes,
            "size": source.size, "shape": [side, side, vae.latent_channels], "dtype": dtype, "vae": vae.identity,
            "vae_dtype": vae_dtype, "shard_size": shard_size}


def check_same(out, there, settings):
    """UserError naming the settings in which the cache in `out` is another than `settings` would make."""
    def plain(fields):  # the same encoder may come from another file
        vae = fields["vae"] if isinstance(fields.get("vae"), dict) else {}
        return {key: fields.get(key) for key in settings} | {"vae": {key: vae.get(key) for key in ("encoder", "scale")}}
    there, here = plain(there), plain(settings)
    differ = [f"{key} ({str(there[key])[:80]} there, {str(here[key])[:80]} here)" for key in here
              if there[key] != here[key]]
    if differ:
        raise UserError(f"{out}: this cache was made or begun with other settings: {', '.join(differ)}; use the same, "
                        "or another --out")


def record_file(shard):
    return shard.replace(".array_record", ".json")


def read_record(path):
    """The record in the file beside a shard, or None where a byte of it has changed."""
    fields = read_json(path) or {}
    record = fields.get("record")
    if latents.seal({"record": record}) != fields or not isinstance(record, dict):
        return None
    return record if {"file", "count", "bytes", "sha256", "skipped"} <= record.keys() else None


def scan_cache(out, settings):
    """What `out` holds of this cache -> (its manifest or None, {shard: record} of the whole ones, whether anything is
    left to do where all are). A record is a shard's entry in the manifest with `skipped`, the pictures left out."""
    there, names = latents.sizes(out), shard_names(settings)
    foreign = [name for name in there if re.fullmatch(r"latents-\d+-of-\d+\.array_record", name) and name not in names]
    manifest = latents.read_manifest(out) if MANIFEST in there else None
    begun = manifest or (read_json(os.path.join(out, SETTINGS)) if SETTINGS in there else None)
    if begun is not None:
        check_same(out, begun, settings)
    elif SETTINGS in there:
        raise UserError(f"{os.path.join(out, SETTINGS)}: is damaged, so that nobody can tell how the shards were made; "
                        "remove it to begin again, or use another --out")
    if foreign:
        raise UserError(f"{os.path.join(out, sorted(foreign)[0])}: a shard of another cache: remove it, or use another "
                        "--out")
    if begun is None:
        for name in there.keys() & set(map(record_file, names)):  # of a cache whose settings were removed
            os.remove(os.path.join(out, name))
        write_aside(os.path.join(out, SETTINGS), latents.to_bytes(settings))
        return None, {}, True
    records = {}
    for i, name in enumerate(names):
        record = read_record(os.path.join(out, record_file(name))) if record_file(name) in there else None
        if record is None and manifest:
            record = manifest["shards"][i] | {"skipped": [s for s in manifest["skipped"]
                                                          if s["index"] // settings["shard_size"] == i]}
        if record is not None and latents.size_problem(record, there) is None:
            records[i] = record
    return manifest, records, manifest is None or bool(leftover_files(there, names))


def shard_names(settings):
    count = -(-settings["pictures"] // settings["shard_size"])
    return [shard_name(i, count) for i in range(count)]


def leftover_files(there, names):
    """The files that a finished cache does not have."""
    mine = {SETTINGS, *map(record_file, names)}
    return [name for name in there if name in mine or name.endswith(".part") and (
        name.removesuffix(".part") in {MANIFEST, *mine, *names})]


def preview(out, source, vae):
    """A picture of some of the data set's pictures, and below each what the VAE makes of its mean in the cache."""
    cache = latents.LatentCache(out)
    chosen = np.linspace(0, len(cache) - 1, min(PREVIEW, len(cache))).astype(int)
    kept = np.delete(np.arange(len(source)), [s["index"] for s in cache.manifest["skipped"]])
    originals = np.stack([source.read(int(i))[0] for i in kept[chosen]])
    means = cache.examples(chosen, np.zeros(len(chosen), bool))["x"][..., : vae.latent_channels]
    again = to_uint8(vae.decoder(None, source.size)(means.astype(np.float32) * cache.scale))
    decibels = 10 * np.log10(255**2 / max(np.square(originals.astype(np.float32) - again).mean(), 1e-9))
    write_aside(os.path.join(out, "preview.png"), png(grid(np.concatenate([originals, again]), len(chosen))))
    say(f"preview.png: {len(chosen)} of the pictures, and what the VAE makes of their latents ({decibels:.1f} dB)")


def finish(out, settings, before, records, source, vae):
    """The manifest, of what all hosts made; then what was only needed on the way goes."""
    names = shard_names(settings)
    shards = [{key: value for key, value in records[i].items() if key != "skipped"} for i in range(len(names))]
    begun = before or read_json(os.path.join(out, SETTINGS))
    fields = {key: begun[key] for key in settings} | {
        "count": sum(shard["count"] for shard in shards), "shards": shards,
        "skipped": [s for i in range(len(names)) for s in records[i]["skipped"]]}
    if not fields["count"]:
        first = fields["skipped"][0]
        raise UserError(f"none of the {settings['pictures']} pictures can be used, e.g. {first['name']}: "
                        f"{first['reason']}")
    latents.write_manifest(out, fields)
    say("all shards are whole; a few pictures are decoded again, to be looked at")
    preview(out, source, vae)
    for name in leftover_files(latents.sizes(out), names):
        os.remove(os.path.join(out, name))
    if before and before["shards"] != shards:
        say("what was made again is not byte for byte what it was (another kind of device, or other versions): the "
            "cache has another identity, and a run that was trained on it will not go on with it")
    return fields


class Encoder:
    """Pictures -> posteriors, over this host's devices. Each runs one and the same program on `vae`'s fixed number of
    pictures, so that the bytes do not depend on how many devices there are."""

    def __init__(self, vae, size):
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.run = sharding.over_devices(vae.posteriors, mesh)
        self.params = jax.device_put(vae.only(autoencoder.ENCODING), NamedSharding(mesh, P()))
        self.split = NamedSharding(mesh, P("data"))
        self.batch_size = autoencoder.batch_size(size) * mesh.size

    def __call__(self, images):
        """uint8 (n, S, S, 3), n up to batch_size -> a jax array of at least n rows (2, h, w, 2C); rows from n on are of
        no picture."""
        images = np.concatenate([images, np.zeros((self.batch_size - len(images), *images.shape[1:]), np.uint8)])
        return self.run(self.params, jax.device_put(images, self.split))


@dataclass
class Batch:
    """Pictures of one shard that are encoded together."""
    shard: int
    images: list = field(default_factory=list)  # uint8 (S, S, 3)
    labels: list = field(default_factory=list)
    indices: list = field(default_factory=list)  # into the source
    skipped: list = field(default_factory=list)  # for the manifest, seen since the batch before
    last: bool = False  # of its shard


def batches(todo, source, shard_size, batch_size, left):
    """The Batches of the shards `todo`, read ahead. The last one of a shard may be short, or empty. left: how many
    pictures may still be skipped."""
    ranges = {shard: range(shard * shard_size, min((shard + 1) * shard_size, len(source))) for shard in todo}
    batch = None

    def attempt(index):
        try:
            return source.read(index)
        except BadImage as e:
            return e

    for index, example in read_ahead(attempt, (i for shard in todo for i in ranges[shard]), 2 * batch_size):
        batch = batch or Batch(index // shard_size)
        if isinstance(example, BadImage):
            batch.skipped.append({"index": index, "name": example.name, "reason": example.reason})
            if left <= 0:
                raise UserError(f"more than --max_skipped={source.max_skipped} pictures cannot be used; the last: "
                                f"{example}")
            left -= 1
            print(f"skipped: {example}", file=sys.stderr, flush=True)
        else:
            image, label = example
            if not 0 <= label < source.num_classes:
                raise UserError(f"{name_of(source, index)}: its label is {label}, and there are {source.num_classes} "
                                "classes: labels run from 0 (a split without labels has -1)")
            batch.images.append(image)
            batch.labels.append(label)
            batch.indices.append(index)
        batch.last = index == ranges[batch.shard][-1]
        if batch.last or len(batch.images) == batch_size:
            yield batch
            batch = None


def name_of(source, index):
    return source.raw[index][0]


def to_dtype(posteriors, dtype, source, indices):
    """In the cache's type. UserError naming the picture whose latent it does not hold."""
    with np.errstate(over="ignore"):
        posteriors = posteriors.astype(dtype)
    finite = np.isfinite(posteriors).all((1, 2, 3, 4))
    if not finite.all():
        raise UserError(f"{name_of(source, indices[int(np.argmin(finite))])}: its latent is not finite in {dtype}: "
                        "--dtype=float32 and --vae_dtype=float32 hold more; or look at the VAE's weights")
    return posteriors


def encode_shards(todo, source, encoder, settings, out, left, progress):
    """Writes the shards `todo`, and beside each, once it is whole, its record -> {shard: record}."""
    names, made, done = shard_names(settings), {}, 0
    writer, skipped = None, []

    def run(batch):
        return batch, encoder(np.stack(batch.images)) if batch.images else None

    for batch, posteriors in one_behind(run, batches(todo, source, settings["shard_size"], encoder.batch_size, left)):
        writer = writer or latents.ShardWriter(out, names[batch.shard], settings["dtype"])
        if batch.images:
            posteriors = np.asarray(posteriors)[: len(batch.images)]
            writer.add(to_dtype(posteriors, settings["dtype"], source, batch.indices), batch.labels)
        skipped += batch.skipped
        if batch.last:
            made[batch.shard] = writer.close() | {"skipped": skipped}
            write_aside(os.path.join(out, record_file(names[batch.shard])),
                        latents.to_bytes(latents.seal({"record": made[batch.shard]})))
            writer, skipped = None, []
        done += len(batch.images) + len(batch.skipped)
        progress.update(done)
    return made


def verify(out):
    """Whether every byte of the cache is what was written. What is wrong is said, a line a shard; -> exit status."""
    manifest = latents.read_manifest(out)
    there, mine = latents.sizes(out), range(len(manifest["shards"]))[jax.process_index()::jax.process_count()]
    progress, found = Progress("verify", len(mine), "shards"), []
    progress.update(0)
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda i: latents.check_shard(out, manifest, i, there), mine)
        for done, (i, problem) in enumerate(zip(mine, problems), 1):
            if problem:
                found.append((i, problem))
            progress.update(done)
    progress.close()
    found = sorted(tuple(pair) for part in hosts.share(found) for pair in part)
    if not found:
        say(f"{out}: all {len(manifest['shards'])} shards are what was written: {describe(manifest)}")
        return 0
    if jax.process_index() == 0:
        for i, problem in found:
            print(f"{os.path.join(out, manifest['shards'][i]['file'])}: {problem}", file=sys.stderr)
        print(f"error: {out}: {len(found)} of {len(manifest['shards'])} shards are damaged or missing: remove them, "
              "and the command that made the cache makes just these again", file=sys.stderr, flush=True)
    return 1


def describe(manifest):
    total = sum(shard["bytes"] for shard in manifest["shards"])
    return (f"{manifest['count']:,d} pictures of {manifest['size']} px and their mirror images, "
            f"{len(manifest['shards'])} shard(s), {total / 1e9:.3g} GB, {len(manifest['skipped'])} skipped")


def make(out, source, vae, *, vae_dtype, dtype, shard_size, max_skipped):
    """Makes the cache in the folder `out`, or what is left of it to be made. Every host calls it.

    source: data.pictures.Pictures; vae: vae.autoencoder.Autoencoder; the rest are the flags of dit_jax.encode. Raises
    UserError, OSError.
    """
    settings = settings_of(source, vae, vae_dtype=vae_dtype, dtype=dtype, shard_size=shard_size)
    check_same(f"the first host's {out}", hosts.share(settings)[0], settings)

    # The first process looks what is there; each then makes every n-th of the shards that are not.
    main_process = jax.process_index() == 0
    manifest, records, unfinished = scan_cache(out, settings) if main_process else (None, {}, None)
    skipped = sum(len(record["skipped"]) for record in records.values())
    done, skipped, unfinished = hosts.share((sorted(records), skipped, unfinished))[0]
    if not any(os.path.exists(os.path.join(out, name)) for name in (MANIFEST, SETTINGS)):
        raise UserError(f"--out={out}: does not hold what the first host wrote there: name a folder that all see")
    todo = sorted(set(range(len(shard_names(settings)))) - set(done))
    mine = todo[jax.process_index()::jax.process_count()]
    if not todo and not unfinished:
        if main_process:
            say(f"{out}: finished already: {describe(manifest)}")
        return
    if done:
        say(f"goes on: {len(done)} of {len(done) + len(todo)} shards are there")

    start, made = time.perf_counter(), {}
    pictures_of = {i: min(shard_size, len(source) - i * shard_size) for i in todo}
    if main_process:
        record = latents.record_length(settings["shape"], settings["dtype"])
        files.check_room(out, 2 * record * sum(pictures_of.values()), f"--out={out}")
    if mine:
        among = f" (host 1 of {jax.process_count()})" if jax.process_count() > 1 else ""
        progress = Progress(f"encode{among}", sum(map(pictures_of.get, mine)), "pictures")
        made = encode_shards(mine, source, Encoder(vae, source.size), settings, out, max_skipped - skipped, progress)
        progress.close()
    made = [pair for part in hosts.share(sorted(made.items())) for pair in part]
    rate = sum(pictures_of.values()) / (time.perf_counter() - start)
    if main_process:
        records |= dict(made)
        skipped = [s for _, record in sorted(records.items()) for s in record["skipped"]]
        if len(skipped) > max_skipped:
            raise UserError(f"{len(skipped)} pictures cannot be used, more than --max_skipped={max_skipped}; the "
                            f"last: {skipped[-1]['name']}: {skipped[-1]['reason']}")
        manifest = finish(out, settings, manifest, records, source, vae)
        say(f"{out}: {describe(manifest)}; {rate:.3g} pictures/s")

"""Encodes pictures to a latent cache, over all devices and hosts, shard by shard."""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Float, UInt8

from dit_jax.data import latents
from dit_jax.data.decode import BadImage
from dit_jax.data.latents import MANIFEST, SETTINGS, shard_name
from dit_jax.data.pictures import Pictures
from dit_jax.parallel import sharding
from dit_jax.runtime import files, hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import read_json, write_aside
from dit_jax.runtime.images import grid, png, to_uint8
from dit_jax.runtime.overlap import one_behind, read_ahead
from dit_jax.runtime.progress import Progress, say, waiting
from dit_jax.vae.autoencoder import ENCODING, Autoencoder, batch_size

Fields = dict[str, Any]  # of a JSON file


def settings_of(source: Pictures, vae: Autoencoder, *, vae_dtype: str, dtype: str, shard_size: int) -> Fields:
    """Returns all that determines the bytes of a cache, as in its manifest."""
    side = source.size // vae.factor
    shape = [side, side, vae.latent_channels]
    classes = {"class_names": source.class_names and list(source.class_names), "num_classes": source.num_classes}
    data = {"source": source.identity, "pictures": len(source), "size": source.size, **classes}
    encoding = {"vae": vae.identity, "vae_dtype": vae_dtype, "dtype": dtype, "shape": shape, "shard_size": shard_size}
    return {"format": latents.FORMAT, **data, **encoding}


def check_same(out: str, found: Fields, settings: Fields) -> None:
    """Raises UserError naming the settings in which the cache in `out` differs from what `settings` would make."""

    def comparable(fields):
        vae = fields["vae"] if isinstance(fields.get("vae"), dict) else {}
        # The name and the file's hash are left out: the same encoder may come from another file.
        return {key: fields.get(key) for key in settings} | {"vae": {key: vae.get(key) for key in ("encoder", "scale")}}

    there, here = comparable(found), comparable(settings)
    if differ := [key for key in here if there[key] != here[key]]:
        what = ", ".join(f"{key} ({str(there[key])[:80]} there, {str(here[key])[:80]} here)" for key in differ)
        raise UserError(
            f"{out}: this cache was made or begun with other settings: {what}; use the same, or another --out"
        )


def record_file(shard: str) -> str:
    """Returns the name of the file beside a shard, which holds its record during encoding."""
    return shard.replace(".array_record", ".json")


def read_record(path: str) -> Fields | None:
    """Returns the record in the file beside a shard, or None if the file is missing or a byte of it has changed."""
    fields = read_json(path) or {}
    record = fields.get("record")
    if latents.seal({"record": record}) != fields or not isinstance(record, dict):
        return None
    return record if {"file", "count", "bytes", "sha256", "skipped"} <= record.keys() else None


def scan_cache(out: str, settings: Fields) -> tuple[Fields | None, dict[int, Fields], bool]:
    """Returns (manifest or None, {shard: record} of the complete shards, whether the cache is unfinished).

    A record is the shard's entry in the manifest and `skipped`, the pictures left out of it. An empty `out` gets its
    settings.json. Raises UserError if `out` holds a cache of other settings, or shards that are not of this cache.
    """
    there, names = latents.sizes(out), shard_names(settings)
    manifest = latents.read_manifest(out) if MANIFEST in there else None
    begun = manifest or (read_json(os.path.join(out, SETTINGS)) if SETTINGS in there else None)
    if begun is not None:
        check_same(out, begun, settings)
    elif SETTINGS in there:
        file, advice = os.path.join(out, SETTINGS), "remove it to begin again, or use another --out"
        raise UserError(f"{file}: is damaged, so the settings of its shards are unknown: {advice}")
    shards = {name for name in there if re.fullmatch(r"latents-\d+-of-\d+\.array_record", name)}
    if foreign := sorted(shards - set(names)):
        file = os.path.join(out, foreign[0])
        raise UserError(f"{file}: a shard of another cache: remove it, or use another --out")
    if begun is None:
        for name in there.keys() & set(map(record_file, names)):  # of a cache whose settings were removed
            os.remove(os.path.join(out, name))
        write_aside(os.path.join(out, SETTINGS), latents.to_bytes(settings))
        return None, {}, True
    records = {}
    for i, name in enumerate(names):
        record = read_record(os.path.join(out, record_file(name))) if record_file(name) in there else None
        if record is None and manifest:
            skipped = [s for s in manifest["skipped"] if s["index"] // settings["shard_size"] == i]
            record = manifest["shards"][i] | {"skipped": skipped}
        if record is not None and latents.size_problem(record, there) is None:
            records[i] = record
    return manifest, records, manifest is None or bool(leftover_files(there, names))


def shard_names(settings: Fields) -> list[str]:
    count = -(-settings["pictures"] // settings["shard_size"])
    return [shard_name(i, count) for i in range(count)]


def leftover_files(there: Iterable[str], names: Sequence[str]) -> list[str]:
    """Returns the files among `there` that a finished cache of the shards `names` does not have."""
    temporary = {SETTINGS, *map(record_file, names)}
    parts = {f"{name}.part" for name in (MANIFEST, *temporary, *names)}
    return [name for name in there if name in temporary | parts]


@waiting("writing preview.png")
def preview(out: str, source: Pictures, vae: Autoencoder) -> None:
    """Writes preview.png: some pictures, and below each what the VAE decodes from its mean in the cache."""
    cache = latents.LatentCache(out)
    chosen = np.linspace(0, len(cache) - 1, min(4, len(cache))).astype(int)
    kept = np.delete(np.arange(len(source)), [s["index"] for s in cache.manifest["skipped"]])
    originals = np.stack([source.read(int(i))[0] for i in kept[chosen]])
    means = cache.examples(chosen, np.zeros(len(chosen), bool))["x"][..., : vae.latent_channels]
    decoded = to_uint8(vae.decoder(None, source.size)(means.astype(np.float32) * cache.scale))
    decibels = 10 * np.log10(255**2 / max(np.square(originals.astype(np.float32) - decoded).mean(), 1e-9))
    write_aside(os.path.join(out, "preview.png"), png(grid(np.concatenate([originals, decoded]), len(chosen))))
    say(f"preview.png: {len(chosen)} of the pictures, and what the VAE makes of their latents ({decibels:.1f} dB)")


def finish(
    out: str, settings: Fields, before: Fields | None, records: dict[int, Fields], source: Pictures, vae: Autoencoder
) -> Fields:
    """Writes the manifest and the preview, and removes the files of the encoding. Returns the manifest's fields.

    before: the manifest that `out` had when the encoding began. records: of all shards, from all hosts.
    """
    names = shard_names(settings)
    shards = [{key: value for key, value in records[i].items() if key != "skipped"} for i in range(len(names))]
    begun = before or read_json(os.path.join(out, SETTINGS)) or settings
    fields = {key: begun[key] for key in settings} | {
        "count": sum(shard["count"] for shard in shards),
        "shards": shards,
        "skipped": [s for i in range(len(names)) for s in records[i]["skipped"]],
    }
    if not fields["count"]:
        example = "{name}: {reason}".format(**fields["skipped"][0])
        raise UserError(f"none of the {settings['pictures']} pictures can be used, e.g. {example}")
    latents.write_manifest(out, fields)
    say("all shards are complete; writing preview.png")
    preview(out, source, vae)
    for name in leftover_files(latents.sizes(out), names):
        os.remove(os.path.join(out, name))
    if before and before["shards"] != shards:
        say(
            "the re-encoded shards differ from the originals (another device or other versions): runs trained on the "
            "old cache cannot resume with this one"
        )
    return fields


class Encoder:
    """The VAE's encoder over this host's devices. Every device runs one program on a fixed number of pictures, so that
    the bytes of the posteriors do not depend on the number of devices."""

    def __init__(self, vae: Autoencoder, size: int):
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.run = sharding.over_devices(vae.posteriors, mesh)
        self.params = jax.device_put(vae.only(ENCODING), NamedSharding(mesh, P()))
        self.split = NamedSharding(mesh, P("data"))
        self.batch_size = batch_size(size) * mesh.size

    def __call__(self, images: UInt8[np.ndarray, "n s s 3"]) -> Float[jax.Array, "b 2 h w c"]:
        """Returns the posteriors of up to `batch_size` pictures, and rows of no picture from n on."""
        padding = np.zeros((self.batch_size - len(images), *images.shape[1:]), np.uint8)
        return self.run(self.params, jax.device_put(np.concatenate([images, padding]), self.split))


@dataclass
class Batch:
    """Pictures of one shard that are encoded together."""

    shard: int
    images: list[np.ndarray] = field(default_factory=list)  # uint8 (S, S, 3) each
    labels: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # into the source
    skipped: list[Fields] = field(default_factory=list)  # for the manifest: the pictures left out since the last batch
    last: bool = False  # of its shard


def batches(todo: Sequence[int], source: Pictures, shard_size: int, batch_size: int, left: int) -> Iterator[Batch]:
    """Yields the batches of the shards `todo`, read ahead. The last batch of a shard may be short or empty.

    left: how many pictures may still be skipped. Raises UserError if there are more, or if a label is not a class.
    """
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
                raise UserError(
                    f"more than --max_skipped={source.max_skipped} pictures cannot be used; the last: {example}"
                )
            left -= 1
            print(f"skipped: {example}", file=sys.stderr, flush=True)
        else:
            image, label = example
            if not 0 <= label < source.num_classes:
                problem = f"its label is {label}, and there are {source.num_classes} classes"
                advice = "labels run from 0 (a split without labels has -1)"
                raise UserError(f"{source.raw[index][0]}: {problem}: {advice}")
            batch.images.append(image)
            batch.labels.append(label)
            batch.indices.append(index)
        batch.last = index == ranges[batch.shard][-1]
        if batch.last or len(batch.images) == batch_size:
            yield batch
            batch = None


def to_dtype(
    posteriors: Float[np.ndarray, "n 2 h w c"], dtype: str, source: Pictures, indices: Sequence[int]
) -> np.ndarray:
    """Returns the posteriors in the cache's dtype. Raises UserError naming the first picture that overflows it."""
    with np.errstate(over="ignore"):
        posteriors = posteriors.astype(dtype)
    finite = np.isfinite(posteriors).all((1, 2, 3, 4))
    if not finite.all():
        name = source.raw[indices[int(np.argmin(finite))]][0]
        advice = "--dtype=float32 and --vae_dtype=float32 hold more; or look at the VAE's weights"
        raise UserError(f"{name}: its latent is not finite in {dtype}: {advice}")
    return posteriors


def encode_shards(
    todo: list[int], source: Pictures, encoder: Encoder, settings: Fields, out: str, left: int, progress: Progress
) -> dict[int, Fields]:
    """Writes the shards `todo`, and the record file of each once it is complete. Returns {shard: record}."""
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
            sealed = latents.seal({"record": made[batch.shard]})
            write_aside(os.path.join(out, record_file(names[batch.shard])), latents.to_bytes(sealed))
            writer, skipped = None, []
        done += len(batch.images) + len(batch.skipped)
        progress.update(done)
    return made


def verify(out: str) -> int:
    """Reads every byte of the cache. Prints a line for each shard that is not as written. Returns the exit status."""
    manifest = latents.read_manifest(out)
    there, mine = latents.sizes(out), range(len(manifest["shards"]))[jax.process_index() :: jax.process_count()]
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
        summary = f"{len(found)} of {len(manifest['shards'])} shards are damaged or missing"
        advice = "remove them, and the command that made the cache makes just these again"
        print(f"error: {out}: {summary}: {advice}", file=sys.stderr, flush=True)
    return 1


def describe(manifest: Fields) -> str:
    total = sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{manifest['count']:,d} pictures of {manifest['size']} px and their mirror images, "
        f"{len(manifest['shards'])} shard(s), {total / 1e9:.3g} GB, {len(manifest['skipped'])} skipped"
    )


def make(
    out: str, source: Pictures, vae: Autoencoder, *, vae_dtype: str, dtype: str, shard_size: int, max_skipped: int
) -> None:
    """Makes the cache in directory `out`, or the shards that it lacks. Every host must call it.

    The keyword arguments are the flags of dit_jax.encode. Raises UserError and OSError.
    """
    settings = settings_of(source, vae, vae_dtype=vae_dtype, dtype=dtype, shard_size=shard_size)
    check_same(f"the first host's {out}", hosts.share(settings)[0], settings)

    # The first process scans the directory; of n processes each then makes every n-th missing shard.
    main_process = jax.process_index() == 0
    manifest, records, unfinished = scan_cache(out, settings) if main_process else (None, {}, None)
    skipped = sum(len(record["skipped"]) for record in records.values())
    done, skipped, unfinished = hosts.share((sorted(records), skipped, unfinished))[0]
    if not any(os.path.exists(os.path.join(out, name)) for name in (MANIFEST, SETTINGS)):
        raise UserError(f"--out={out}: does not hold what the first host wrote there: name a folder that all see")
    todo = sorted(set(range(len(shard_names(settings)))) - set(done))
    mine = todo[jax.process_index() :: jax.process_count()]
    if not todo and not unfinished:
        if manifest:
            say(f"{out}: finished already: {describe(manifest)}")
        return
    if done:
        say(f"resuming: {len(done)} of {len(done) + len(todo)} shards are complete")

    start, made = time.perf_counter(), {}
    pictures_of = {i: min(shard_size, len(source) - i * shard_size) for i in todo}
    if main_process:
        record = latents.record_length(settings["shape"], settings["dtype"])
        files.check_room(out, 2 * record * sum(pictures_of.values()), f"--out={out}")
    if mine:
        among = f" (host 1 of {jax.process_count()})" if jax.process_count() > 1 else ""
        progress = Progress(f"encode{among}", sum(pictures_of[i] for i in mine), "pictures")
        made = encode_shards(mine, source, Encoder(vae, source.size), settings, out, max_skipped - skipped, progress)
        progress.close()
    made = [pair for part in hosts.share(sorted(made.items())) for pair in part]
    rate = sum(pictures_of.values()) / (time.perf_counter() - start)
    if main_process:
        records |= dict(made)
        skipped = [s for _, record in sorted(records.items()) for s in record["skipped"]]
        if len(skipped) > max_skipped:
            problem = f"{len(skipped)} pictures cannot be used, more than --max_skipped={max_skipped}"
            raise UserError(f"{problem}; the last: {skipped[-1]['name']}: {skipped[-1]['reason']}")
        manifest = finish(out, settings, manifest, records, source, vae)
        say(f"{out}: {describe(manifest)}; {rate:.3g} pictures/s")

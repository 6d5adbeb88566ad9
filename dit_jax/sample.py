"""Samples from a run, or from weights: python -m dit_jax.sample

    python -m dit_jax.sample --workdir=runs/digits --classes=3,7 --num=16
    python -m dit_jax.sample --weights=DiT-XL-2-256x256.pt --out=out --num=50000 --cfg_scale=1.5 --classes=random

Writes into --out: samples.npz with `arr_0` (N, H, W, 3) uint8, as the paper's evaluator reads it, grid.png of the
first images, single pictures with --png, and manifest.json, which says how they were made. The same command again
goes on where it stopped. The samples of a model of latents are decoded by the VAE of --vae, or else of the run's
config; with none samples.npz holds `latents` (N, H, W, C) float32.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_samples(num=16, classes="balanced", cfg_scale=4.0)
    cli.define_path("out", None, "folder to write to; by default WORKDIR/out")
    flags.DEFINE_bool("png", False, "also single pictures")
    cli.parse()  # above the imports that take time

import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile

import jax
import numpy as np

from dit_jax import autoencoder, config as configs, convert, hosts, layout, pictures, sharding
from dit_jax.config import UserError
from dit_jax.generate import Generator
from dit_jax.logging import Progress, say
from dit_jax.models import dit
from dit_jax.profiling import keep_compiled
from dit_jax.runtime import files
from dit_jax.runtime.files import write_aside

GRID_IMAGES = 100
MODEL = ("patch_size", "depth", "hidden_size", "num_heads", "block", "input_size", "in_channels", "num_classes")


def load_run(workdir, step, which, mesh):
    """The weights of a run -> (arguments of DiT, params, their shardings, settings for the manifest, the VAE's path)."""
    from dit_jax.checkpoint import Checkpoints  # orbax takes its time, and --weights does without

    checkpoints = Checkpoints(workdir, read_only=True)
    meta = checkpoints.latest_meta(step)
    config = meta["config"]
    args = configs.dit_args(layout.settle(config, jax.devices()))
    try:
        layout.check_memory(layout.least_memory(args), jax.devices())
    except ValueError as e:
        raise UserError(f"{workdir}: {e}") from None
    shapes = dit.abstract(**args)[1]
    shardings = sharding.state_shardings(shapes, mesh)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    item = {"ema": "ema", "raw": "params"}[which]
    step, params = checkpoints.restore_params(step, item, target)
    return args, params, shardings, {
        "workdir": os.path.abspath(workdir), "step": step, "which": which, "fingerprint": meta["fingerprints"][item],
        "data": meta["data"], "batch_size": config["batch_size"], "init": meta.get("init"),
        "timesteps": config["diffusion"]["timesteps"]}, config.get("vae", {}).get("path", "")


def load_weights(path, which, num_heads, num_classes, mesh):
    """The weights of a .pt or .npz file, likewise. The geometry is read off their shapes."""
    flat = convert.read_weights(path, which)
    args = convert.infer_args(flat, num_heads, num_classes) | {
        "block": "adaln_zero", "dtype": layout.compute_dtype(jax.devices())}
    sha256 = hashlib.sha256()
    params = convert.from_published(flat, args, sha256)
    shardings = sharding.state_shardings(params, mesh)
    return args, jax.device_put(params, shardings), shardings, {
        "weights": os.path.basename(path), "sha256": sha256.hexdigest(), "which": which, "timesteps": 1000}, ""


def choose_labels(classes, num, num_classes, seed):
    """The label of each index: a list of classes in turn, "balanced" (all in turn) or "random" (uniform).
    Where there are no classes all labels are 0."""
    if not num_classes:
        if classes not in ("balanced", "random"):
            raise UserError(f"--classes={classes}: this model has no classes (it is unconditional); leave it out")
        return np.zeros(num, int)
    if classes == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num)
    try:
        classes = np.arange(num_classes) if classes == "balanced" else np.array([int(c) for c in classes.split(",")])
    except ValueError:
        raise UserError(f"--classes={classes}: 'balanced', 'random' or numbers as in 3,7") from None
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"--classes: {classes[(classes < 0) | (classes >= num_classes)][0]} is no class of this model, "
                        f"which has 0 to {num_classes - 1}")
    return classes[np.arange(num) % len(classes)]


class Parts:
    """The images made so far, in OUT/parts, consecutive from 0. A file START-COUNT-HASH.npy says by its name which images it
    holds, and by a hash of these two, of the settings and of its bytes, that it is what was written. What is not is set
    aside, and said.

    out: the folder; settings: text that says all that the images depend on; shape (N, H, W, C) and dtype of all of them.
    Attributes: files, done (images).
    """

    def __init__(self, out, settings, shape, dtype):
        self.folder, self.files, self.done = os.path.join(out, "parts"), [], 0
        self.settings, self.shape, self.dtype = settings, shape, np.dtype(dtype)
        os.makedirs(self.folder, exist_ok=True)
        for name in sorted(os.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if name.endswith(".part") and os.path.isfile(path):  # cut short by a kill
                os.remove(path)
            elif not self._take(path):
                set_aside(out, path, "is no part of these samples, is damaged, or comes after one that is")

    def _take(self, path):
        """Whether the file is the next part."""
        fields = re.fullmatch(r"(\d{12})-(\d+)-[0-9a-f]{16}\.npy", os.path.basename(path))
        if not fields or int(fields[1]) != self.done or not os.path.isfile(path):
            return False
        if os.path.getsize(path) > 2 * self.dtype.itemsize * math.prod(self.shape):
            return False
        with open(path, "rb") as f:
            data = f.read()
        if path != self._path(int(fields[2]), data):
            return False
        self._add(path, int(fields[2]))
        return True

    def _path(self, count, data):
        digest = hashlib.sha256(f"{self.done} {count} {self.settings}".encode() + data).hexdigest()[:16]
        return os.path.join(self.folder, f"{self.done:012d}-{count}-{digest}.npy")

    def _add(self, path, count):
        self.files.append(path)
        self.done += count

    def append(self, images):
        data = io.BytesIO()
        np.save(data, images)
        path = self._path(len(images), data.getvalue())
        write_aside(path, data.getvalue())
        self._add(path, len(images))

    def write_npz(self, path, key):
        """All parts as one array of an .npz, streamed: 50,000 pictures need not fit in memory."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        with files.writing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for file in self.files:
                    f.write(np.ascontiguousarray(np.load(file)).tobytes())

    def remove(self):
        shutil.rmtree(self.folder)


def set_aside(out, path, why):
    """Moves a file to OUT/damaged, and says so."""
    damaged = os.path.join(out, "damaged")
    os.makedirs(damaged, exist_ok=True)
    os.replace(path, os.path.join(damaged, os.path.basename(path)))
    say(f"{path}: {why}: moved to {damaged}, and made again")


SHA256 = "samples_sha256"  # in a manifest: of samples.npz, once it is there


def write_manifest(path, manifest):
    write_aside(path, (json.dumps(manifest, indent=2) + "\n").encode())


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def same_manifest(path, manifest):
    """(whether `path` holds this manifest, the sha256 of the samples or None). UserError naming the settings where it holds
    another."""
    if not os.path.exists(path):
        return False, None
    there = files.read_json(path)
    if there is None:
        raise UserError(f"{path}: is damaged, so that nobody can tell how what is here was made; use another --out")
    digest = there.pop(SHA256, None)
    differ = [f"{key} ({there.get(key)!r} there, {manifest.get(key)!r} here)" for key in {**there, **manifest}
              if there.get(key) != manifest.get(key)]
    if differ:
        raise UserError(f"{path}: what is here was made with other settings: {', '.join(differ)}; use another --out")
    return True, digest


def is_whole(path, key, shape, dtype, digest):
    """Whether `path` is an .npz with this array under `key`, every byte as it was written. digest: its sha256, or None, which
    older manifests have."""
    try:
        if digest and sha256_of(path) != digest:
            return False
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as f:
            np.lib.format.read_magic(f)
            header = np.lib.format.read_array_header_1_0(f)
            size = f.tell() + math.prod(shape) * np.dtype(dtype).itemsize
            if header != (shape, False, dtype) or archive.getinfo(f"{key}.npy").file_size != size:
                return False
            while f.read(2**20):  # to its end, where zipfile compares the checksum
                pass
        return True
    except Exception:  # parsers raise nearly everything on damaged files
        return False


def write_single(out, start, images):
    for i, image in enumerate(images, start):
        write_aside(os.path.join(out, "png", f"{i:06d}.png"), pictures.png(image))


def write_pictures(out, arrays, labels, single):
    """grid.png of the first images, a column a class where there are a few, and with `single` each one."""
    first, start = [], 0
    for images in arrays:
        if single:
            write_single(out, start, images)
        if start < GRID_IMAGES:
            first.append(images)
        start += len(images)
    first = np.concatenate(first)[:GRID_IMAGES]
    classes = len(set(labels.tolist()))
    columns = min(classes if classes > 1 else math.isqrt(len(first)), 10)
    write_aside(os.path.join(out, "grid.png"), pictures.png(pictures.grid(
        first if first.dtype == np.uint8 else pictures.to_uint8(first), columns)))


class Sampler:
    """What the flags of cli.define_samples ask for.

    Attributes: args (of DiT), labels (num,), latent (whether images are latents, there being no decoder), size (of an
    image), manifest (all that the images depend on). make(part) -> images of these indices, uint8 pictures or float32
    latents; on several hosts all make the same. Raises UserError.
    """

    def __init__(self):
        f = flags.FLAGS
        if (f.workdir is None) == (f.weights is None):
            raise UserError("say --workdir=RUN or --weights=FILE, one of them")
        if f.workdir is not None and not f.workdir.strip():
            raise UserError("--workdir is empty: name a run's folder")
        if f.weights and f.step is not None:
            raise UserError("--step is of a run's checkpoints: it goes with --workdir")
        for flag in ("num", "batch_size"):
            if not 1 <= f[flag].value <= 2**32:  # the noise of an image is drawn from its index, a uint32
                raise UserError(f"--{flag}={f[flag].value}: must be at least 1, and 2**32 at most")
        try:
            mesh = sharding.make_mesh(data=-1, fsdp=f.fsdp, tensor=f.tensor)
            if f.workdir is not None:
                args, params, shardings, source, vae_path = load_run(f.workdir, f.step, f.which, mesh)
            else:
                args, params, shardings, source, vae_path = load_weights(f.weights, f.which, f.num_heads, f.num_classes,
                                                                         mesh)
            at_once = {f"--batch_size={f.batch_size}": min(f.batch_size, f.num)}
            layout.check_memory(layout.least_memory(args, pictures=at_once) | {f"--num={f.num}": 40 * f.num}, jax.devices())
            vae_path = vae_path if f.vae is None else f.vae
            vae = autoencoder.load(vae_path) if vae_path else None
            if vae and vae.latent_channels != args["in_channels"]:
                raise UserError(f"--vae={vae_path}: decodes {vae.latent_channels} channels, and the model makes "
                                f"{args['in_channels']}")
            self.decode = vae and vae.decoder(mesh, args["input_size"] * vae.factor)
            self.size = args["input_size"] * (vae.factor if vae else 1)
            self.latent = not vae and not pictures.is_picture(args["in_channels"])
            self.labels = choose_labels(f.classes, f.num, args["num_classes"], f.seed)
            self.generator = Generator(
                args, mesh, shardings, timesteps=source["timesteps"], steps=f.steps, sampler=f.sampler,
                eta=f.eta, cfg_scale=f.cfg_scale, cfg_channels=f.cfg_channels or None, seed=f.seed,
                batch_size=min(f.batch_size, f.num), on_step=lambda step: self.on_step(step))
        except ValueError as e:
            raise UserError(str(e)) from None
        self.args, self.params, self.mesh, self.on_step = args, params, mesh, lambda step: None
        self.manifest = source | {
            "num": f.num, "classes": f.classes if args["num_classes"] else None, "seed": f.seed, "sampler": f.sampler,
            "steps": f.steps, "eta": f.eta, "cfg_scale": f.cfg_scale, "cfg_channels": f.cfg_channels,
            "dtype": args["dtype"].name, "vae": vae and vae.identity, "model": {key: args[key] for key in MODEL}}

    def make(self, part):
        images = self.generator(self.params, self.labels[part], part)
        if not np.isfinite(images).all():
            raise UserError(f"image {part[0] + int(np.argmin(np.isfinite(images).all((1, 2, 3))))} is not finite: "
                            "lower --cfg_scale, or look at the weights")
        images = self.decode(images) if self.decode else images
        if self.decode and not np.isfinite(images).all():
            raise UserError("the decoder makes pictures that are not finite: look at --vae")
        return images if self.latent else pictures.to_uint8(images)

    def batches(self, start=0):
        """The images from `start` on, a batch at a time, with progress."""
        num, size, steps = len(self.labels), self.generator.batch_size, len(self.generator.schedule)
        starts = range(start, num, size)
        progress = Progress("sample", len(starts) * steps, "steps")
        for n, first in enumerate(starts):
            self.on_step = lambda step: progress.update(n * steps + step)
            yield self.make(np.arange(first, min(first + size, num)))
        progress.close()


def main():
    f = flags.FLAGS
    out = f.out or (f.workdir and os.path.join(f.workdir, "out"))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if f.weights and not out:
        raise UserError("--out is missing: name a folder for the samples")
    if out:
        keep_compiled(os.path.join(out, "compiled"))
    sampler = Sampler()
    if sampler.latent and f.png:
        raise UserError(f"--png: this is a model of latents ({sampler.args['in_channels']} channels): name a decoder "
                        "with --vae")
    cli.make_workdir(out, "out", files_in=("samples.npz", "manifest.json", "grid.png"),
                     folders_in=("parts", "damaged", *["png"] * f.png))
    with files.hold(out, "out"):
        make(sampler, out, f.png)


def make(sampler, out, single):
    """The samples in a folder that is held, or what is left of them to be made. single: pictures as well."""
    labels, latent, manifest, num = sampler.labels, sampler.latent, sampler.manifest, len(sampler.labels)
    manifest_path, npz = os.path.join(out, "manifest.json"), os.path.join(out, "samples.npz")
    key = "latents" if latent else "arr_0"
    # The first process alone writes, and looks where to go on; all make the same images.
    main_process = jax.process_index() == 0
    finished, parts = False, None
    if main_process:
        known, digest = same_manifest(manifest_path, manifest)
        shape, dtype = (num, sampler.size, sampler.size, sampler.args["in_channels"] if latent else 3), (
            np.float32 if latent else np.uint8)
        whole = known and is_whole(npz, key, shape, dtype, digest)
        finished = whole and not (digest is None and os.path.isdir(os.path.join(out, "parts")))  # killed just before its end
        if os.path.exists(npz) and not whole:
            set_aside(out, npz, "is not what was written" if known else "is of unknown origin, there being no manifest")
    if main_process and not finished:
        parts = Parts(out, json.dumps(manifest), shape, dtype)
        files.check_room(out, (2 * num - parts.done) * math.prod(shape[1:]) * np.dtype(dtype).itemsize, f"--num={num}")
        write_manifest(manifest_path, manifest)
    finished, done = hosts.share((finished, parts.done if parts else 0))[0]
    if not finished:
        if done:
            say(f"goes on from image {done} of {num}")
        for images in sampler.batches(done):
            if main_process:
                parts.append(images)
        if main_process:
            write_pictures(out, map(np.load, parts.files), labels, single)
            parts.write_npz(npz, key)
            write_manifest(manifest_path, manifest | {SHA256: sha256_of(npz)})
            parts.remove()
    elif main_process:
        if single or not os.path.exists(os.path.join(out, "grid.png")):
            with np.load(npz) as file:
                write_pictures(out, [file[key]], labels, single)
        shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)  # of a command that was killed just before its end
    say(f"{num} {'latents' if latent else 'images'}: {npz} and grid.png" + (" and png/" if single else ""))


if __name__ == "__main__":
    cli.run(main)

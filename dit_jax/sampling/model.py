"""A trained network that is ready to sample, and the samples that are asked of it."""

from dataclasses import asdict, dataclass

import jax
import numpy as np

from dit_jax.parallel import layout, sharding
from dit_jax.runtime import images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import Progress
from dit_jax.sampling.generator import Generator

MODEL = ("patch_size", "depth", "hidden_size", "num_heads", "block", "input_size", "in_channels", "num_classes")


@dataclass(frozen=True)
class Settings:
    """How samples are made, as the flags of dit_jax.sample say it. cfg_channels 0: all."""
    seed: int = 0
    sampler: str = "ddpm"
    steps: str = "250"
    eta: float = 0.0
    cfg_scale: float = 4.0
    cfg_channels: int = 3


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


class Samples:
    """`num` samples of a network.

    loaded: weights.load.Loaded, on `mesh`. vae: vae.autoencoder.Autoencoder that decodes latents, or None. classes: of
    choose_labels. batch_size: images that go through the network at once, over all devices.
    Attributes: labels (num,); latent (whether the samples are latents, there being no decoder); shape of one: (H, W, 3)
    of uint8 pictures, or (H, W, C) of float32 latents; manifest (all that they depend on). Raises UserError.
    """

    def __init__(self, loaded, mesh, vae, *, num, classes, settings, batch_size=32):
        args = loaded.args
        for name, count in (("num", num), ("batch_size", batch_size)):
            if not 1 <= count <= 2**32:  # the noise of an image is drawn from its index, a uint32
                raise UserError(f"--{name}={count}: must be at least 1, and 2**32 at most")
        at_once = {f"--batch_size={batch_size}": min(batch_size, num)}
        layout.check_memory(layout.least_memory(args, pictures=at_once) | {f"--num={num}": 40 * num}, jax.devices())
        if vae and vae.latent_channels != args["in_channels"]:
            raise UserError(f"--vae={vae.identity['name']}: decodes {vae.latent_channels} channels, and the model makes "
                            f"{args['in_channels']}")
        size = args["input_size"] * (vae.factor if vae else 1)
        self.latent = not vae and not pictures.is_picture(args["in_channels"])
        self.shape = size, size, args["in_channels"] if self.latent else 3
        self.labels = choose_labels(classes, num, args["num_classes"], settings.seed)
        self.params, self.decode, self.on_step = loaded.params, vae and vae.decoder(mesh, size), lambda step: None
        self.generator = Generator(
            args, mesh, sharding.shardings_of(loaded.params), timesteps=loaded.timesteps, batch_size=min(batch_size, num),
            **asdict(settings) | {"cfg_channels": settings.cfg_channels or None}, on_step=lambda step: self.on_step(step))
        self.manifest = loaded.origin | {
            "num": num, "classes": classes if args["num_classes"] else None, **asdict(settings),
            "dtype": args["dtype"].name, "vae": vae and vae.identity, "model": {key: args[key] for key in MODEL}}

    def make(self, part):
        """The samples of these indices, the same on every host. part: (n,) int, in 0 to num - 1."""
        images = self.generator(self.params, self.labels[part], part)
        if not np.isfinite(images).all():
            raise UserError(f"image {part[0] + int(np.argmin(np.isfinite(images).all((1, 2, 3))))} is not finite: "
                            "lower --cfg_scale, or look at the weights")
        images = self.decode(images) if self.decode else images
        if self.decode and not np.isfinite(images).all():
            raise UserError("the decoder makes pictures that are not finite: look at --vae")
        return images if self.latent else pictures.to_uint8(images)

    def batches(self, start=0):
        """The samples from index `start` on, a batch at a time, with progress."""
        num, size, steps = len(self.labels), self.generator.batch_size, len(self.generator.schedule)
        starts = range(start, num, size)
        progress = Progress("sample", len(starts) * steps, "steps")
        for n, first in enumerate(starts):
            self.on_step = lambda step: progress.update(n * steps + step)
            yield self.make(np.arange(first, min(first + size, num)))
        progress.close()

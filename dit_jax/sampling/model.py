"""A trained network that is ready to sample."""

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from dit_jax.diffusion import catalog
from dit_jax.diffusion.objectives import Objective
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime import images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import Progress
from dit_jax.sampling.generator import Generator, Guide, Settings, check, is_whole, whole_weights_fit
from dit_jax.vae.autoencoder import Autoencoder
from dit_jax.weights.load import Loaded

GENERATORS = 16  # that a Model keeps; one of a small network takes 10 MB on CPU
# The arguments of models.dit.DiT that go into a manifest.
MANIFEST_ARGS = ("patch_size", "depth", "hidden_size", "num_heads", "block", "input_size", "in_channels", "num_classes")


def choose_labels(
    classes: str | Sequence[int | str],
    num: int,
    num_classes: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> Int[np.ndarray, " num"]:
    """The label of each of `num` samples; all 0 if the model has no classes. Raises UserError.

    classes: "balanced" (all in turn), "random" (uniform, from `seed`), or numbers or names that are taken in turn: a
    list, or a string with commas.
    """
    if classes is None:
        raise UserError("--classes=None: must be 'balanced', 'random', or a list of classes")
    if not num_classes:
        if not isinstance(classes, str) or classes not in ("balanced", "random"):
            raise UserError(f"--classes={classes}: this model has no classes (it is unconditional); leave it out")
        return np.zeros(num, int)
    if isinstance(classes, str) and classes == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num)
    if isinstance(classes, str) and classes == "balanced":
        return np.arange(num) % num_classes
    wanted = classes.split(",") if isinstance(classes, str) else list(np.atleast_1d(np.asarray(classes, object)))
    if not wanted:
        raise UserError("--classes is empty: 'balanced', 'random' or numbers as in 3,7")
    labels = np.array([_label(name, num_classes, class_names) for name in wanted])
    return labels[np.arange(num) % len(labels)]


def _label(name, num_classes, class_names):
    try:
        label = int(name) if isinstance(name, str) else operator.index(name)
    except (ValueError, TypeError):
        label = None
    if label is not None and 0 <= label < num_classes:
        return label
    for named, synonyms in enumerate(class_names or ()):  # ImageNet's names are lists: "tench, Tinca tinca"
        if isinstance(name, str) and name.strip() in (synonyms, *map(str.strip, synonyms.split(","))):
            return named  # also a number that is none of a class: a folder may be called 2024
    if label is not None:
        raise UserError(f"--classes: {label} is no class of this model, which has 0 to {num_classes - 1}")
    few = class_names and len(class_names) <= 20
    names = f", or names as in {', '.join(class_names if few else class_names[:3])}" if class_names else ""
    raise UserError(f"--classes={name}: 'balanced', 'random' or numbers as in 3,7{names}")


class Model:
    """A network with its weights, and the VAE that decodes its latents.

    model(x, t, y) is the network. model.sample(...) makes images. Raises UserError if the VAE does not fit the network.

    Attributes:
      args: of models.dit.DiT.
      params: nested dict of jax.Array.
      config: the resolved config of its run, or None.
      class_names: a list, or None.
      objective: of diffusion.objectives: what the network predicts.
      guide: a second network that guides (autoguidance), or None.
      vae: vae.autoencoder.Autoencoder, or None.
      latent: whether samples are latents, because there is no VAE to decode them.
      shape: of a sample, (H, W, 3) of a picture or (H, W, C) of a latent.
      origin: where the weights come from, for manifests.
    """

    def __init__(
        self,
        loaded: Loaded,
        mesh: jax.sharding.Mesh,
        vae: Autoencoder | None = None,
        guide: Loaded | None = None,
    ):
        args = loaded.args
        if vae and vae.latent_channels != args["in_channels"]:
            raise UserError(
                f"--vae={vae.identity['name']}: decodes {vae.latent_channels} channels, and the model makes "
                f"{args['in_channels']}"
            )
        size = args["input_size"] * (vae.factor if vae else 1)
        self.args, self.params, self.config, self.origin = args, loaded.params, loaded.config, loaded.origin
        self.class_names, self.objective, self.mesh, self.vae = loaded.class_names, loaded.objective, mesh, vae
        self.guide = guide and Guide(guide.args, guide.params)
        if guide:
            _check_guide(guide, loaded)
            self.origin = self.origin | {"guide": guide.origin}
        self.latent = not vae and not pictures.is_picture(args["in_channels"])
        self.shape = size, size, args["in_channels"] if self.latent else 3
        self._decoder = vae and vae.decoder(mesh, size)
        # For calls, which may be under any transformation and on any devices. A kernel needs to know the mesh.
        self._graphdef = dit.abstract(**args | {"attention": "xla"})[0]
        self._generators: list[Generator] = []

    def __call__(
        self, x: Float[Array, "b h w c"], t: Shaped[Array, " b"], y: Int[Array, " b"], *h: Float[Array, " b"]
    ) -> Float[Array, "b h w out"]:
        """The network's output at x_t, as its objective says: for the paper's the noise, then the interpolated
        variance.

        t: integer timesteps, or times in [0, 1] of a flow. h: the interval of MeanFlow, for its networks only.
        """
        return self.apply(self.params, x, t, y, *h)

    def apply(
        self,
        params: Any,
        x: Float[Array, "b h w c"],
        t: Shaped[Array, " b"],
        y: Int[Array, " b"],
        *h: Float[Array, " b"],
    ) -> Float[Array, "b h w out"]:
        """The network's output with other parameters. A pure function, for jax.jit, jax.grad and jax.jvp.

        Raises UserError if there is not one t, y and h for each image.
        """
        for name, value in (("t", t), ("y", y), *(("h", value) for value in h)):
            if np.shape(value) != np.shape(x)[:1]:
                raise UserError(f"{name}: {np.shape(value)}: must be {np.shape(x)[:1]}, one for each image of x")
        return nnx.merge(self._graphdef, params)(x, t, y, *h)

    def generator(self, settings: Settings, batch_size: int) -> Generator:
        """A Generator for these settings and at least `batch_size` images at once.

        An existing one is used again. The GENERATORS that were used last are kept, with what they have compiled.
        """
        for generator in self._generators:
            if generator.settings.compiled == settings.compiled and generator.batch_size >= batch_size:
                self._generators.remove(generator)
                self._generators.append(generator)
                return generator
        # A mesh that splits the weights or the layers was asked for.
        split = self.mesh.shape["fsdp"] > 1 or self.mesh.shape["tensor"] > 1
        held = sharding.bytes_on_a_device((self.params, self.guide and self.guide.params))
        generator = Generator(
            self.args,
            self.mesh,
            sharding.shardings_of(self.params),
            objective=self.objective,
            settings=settings,
            batch_size=batch_size,
            guide=self.guide,
            whole=not split and whole_weights_fit(self.args, self.mesh, batch_size, held, self.guide),
        )
        self._generators = [*self._generators[1 - GENERATORS :], generator]
        return generator

    @property
    def waited(self) -> float:
        """The seconds in which the devices had nothing to do while the host worked on a batch, at most."""
        return sum(generator.waited for generator in self._generators)

    def decode(self, images: Float[np.ndarray, "n h w c"], first: int = 0) -> np.ndarray:
        """Turns the network's images into samples: uint8 pictures, decoded if there is a VAE, or float32 latents.

        first: index of the first image, for messages. Raises UserError if an image is not finite.
        """
        _check_finite(images, first)
        return self._finish(images, self._decoder(images) if self._decoder else None)

    def _finish(self, images, decoded):
        """The samples of finite images, and of the same decoded if there is a VAE."""
        if decoded is not None and not np.isfinite(decoded).all():
            raise UserError("the decoder makes pictures that are not finite: look at --vae")
        images = images if decoded is None else decoded
        return images if self.latent else pictures.to_uint8(images)

    def batches(
        self,
        labels: Int[np.ndarray, " n"],
        settings: Settings,
        batch_size: int,
        *,
        start: int = 0,
        latents: bool = False,
        progress: bool | Callable[[int], None] = True,
        shown: Container[int] = (),
    ) -> Iterator[np.ndarray]:
        """Yields the samples of `labels` from index `start` on, a batch at a time. latents: yield them not decoded.

        progress: whether to show a bar; or a function that is called with the number of finished steps, after each.
        shown: as in Generator.batches.
        """
        generator = self.generator(settings, min(batch_size, len(labels)))
        size, steps = generator.batch_size, len(generator.sampler)
        bar = Progress("sample", -(-(len(labels) - start) // size) * steps, "steps") if progress is True else None
        generator.on_step = progress if callable(progress) else lambda step: bar.update(step) if bar else None
        indices, decode = np.arange(start, len(labels)), self._decoder.parts if self._decoder and not latents else None
        for images, decoded in generator.batches(self.params, labels[start:], indices, settings, decode, shown):
            if latents:
                yield images
                continue
            _check_finite(images, start)
            yield self._finish(images, decoded)
            start += 0 if shown else len(images)
        if bar:
            bar.close()

    def sample(
        self,
        classes: str | Sequence[int | str] = "balanced",
        num: int = 16,
        *,
        cfg_scale: float | None = None,
        steps: int | str | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        cfg_channels: int = 3,
        cfg_interval: str | tuple[float, float] = "",
        seed: int = 0,
        batch_size: int = 32,
        latents: bool = False,
        progress: bool = True,
    ) -> np.ndarray:
        """Makes `num` samples: uint8 pictures (num, H, W, 3), or float32 latents (num, h, w, C).

        `python -m dit_jax.sample` makes the same pictures with flags of these names. A picture depends only on (seed,
        its index). The first call compiles. A later call does not if it changes only the classes, the seed, the
        guidance scale (other than between 1 and not 1), or the number to a smaller one. A number above the first
        call's compiles again, up to batch_size; larger numbers are made in batches of that size.

        Args:
          classes: "balanced" (all in turn), "random", or a list of numbers or class names that are taken in turn.
          cfg_scale: scale of classifier-free guidance; 1 is none. By default 4; 1 for a MeanFlow network.
          cfg_channels: guides only the first channels; 0 guides all.
          cfg_interval: (low, high), the times of the network between which a step is guided; by default all.
          steps: evaluations of the network, by default 250, or 1 of a MeanFlow network; for ddpm and ddim also "a,b,c"
            or "ddimN".
          sampler: a name of diffusion.catalog.SAMPLERS with its options, as in "unipc" or "edm:churn=20". By default
            "ddpm", "heun" for flow matching ("dpmpp_2m" of a network that predicts the data), "meanflow" for MeanFlow.
          eta: noise of ddim; 0 is deterministic, 1 as noisy as ddpm.
          batch_size: images that go through the network at once, over all devices.
          latents: whether to return latents without decoding them.
          progress: whether to show a bar.
        Raises: UserError naming the argument.
        """
        labels, settings = self.request(
            classes, num, batch_size, seed, sampler, steps, cfg_scale, cfg_interval, eta, cfg_channels
        )
        return np.concatenate(list(self.batches(labels, settings, batch_size, latents=latents, progress=progress)))

    def watch(
        self,
        classes: str | Sequence[int | str] = "balanced",
        num: int = 4,
        *,
        moments: int = 8,
        cfg_scale: float | None = None,
        steps: int | str | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        cfg_channels: int = 3,
        cfg_interval: str | tuple[float, float] = "",
        seed: int = 0,
        progress: bool | Callable[[int], None] = True,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (evaluations so far, the samples as they are then): from noise, at 0, to those that `sample` makes.

        moments: how often, with the noise and the end, at equal distances; fewer if the sampler has fewer evaluations.
        progress: whether to show a bar; or a function that is called with the number of finished evaluations, after
        each. An exception that it raises ends the sampling.
        The other arguments, and the arrays, are those of `sample`; all samples are made at once. Raises UserError.
        """
        labels, settings = self.request(
            classes, num, num, seed, sampler, steps, cfg_scale, cfg_interval, eta, cfg_channels
        )
        if not is_whole(moments) or moments < 2:
            raise UserError(f"moments={moments!r}: must be a whole number of at least 2")
        return self._moments(labels, settings, moments, progress)

    def _moments(self, labels, settings, moments, progress: bool | Callable[[int], None] = True):
        """As `watch`, of the first samples of these labels."""
        evaluations = len(self.generator(settings, len(labels)).sampler)
        done = np.linspace(0, evaluations, min(moments, evaluations + 1)).round().astype(int).tolist()
        return zip(done, self.batches(labels, settings, len(labels), progress=progress, shown=done))

    def request(
        self,
        classes: str | Sequence[int | str],
        num: int,
        batch_size: int,
        seed: int,
        sampler: str | None,
        steps: int | str | None,
        cfg_scale: float | None,
        cfg_interval: str | tuple[float, float],
        eta: float = 0.0,
        cfg_channels: int = 3,
    ) -> tuple[Int[np.ndarray, " num"], Settings]:
        """The labels and the Settings that the arguments of `sample` ask for. Raises UserError naming the argument."""
        if isinstance(cfg_interval, (tuple, list)):
            cfg_interval = ",".join(map(str, cfg_interval))
        settings = settings_of(self.objective, seed, sampler, steps, eta, cfg_scale, cfg_channels, cfg_interval)
        check(settings, self.args, self.objective, bool(self.guide))
        check_batch(self.args, num, batch_size)
        labels = choose_labels(classes, num, self.args["num_classes"], seed, self.class_names)
        return labels, settings


def _check_finite(images, first):
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
        raise UserError(
            f"image {first + int(np.argmin(finite))} is not finite: lower --cfg_scale, or look at the weights"
        )


def settings_of(
    objective: Objective,
    seed: int,
    sampler: str | None,
    steps: int | str | None,
    eta: float,
    cfg_scale: float | None,
    cfg_channels: int,
    cfg_interval: str,
) -> Settings:
    """The Settings in which what is None has the default of the objective."""
    default_sampler, default_steps = catalog.default(objective)
    sampler = default_sampler if sampler is None else sampler
    if cfg_scale is None:
        cfg_scale = 1.0 if objective.name == "meanflow" else 4.0
    return Settings(
        seed, sampler, default_steps if steps is None else str(steps), eta, cfg_scale, cfg_channels, cfg_interval
    )


def _check_guide(guide, loaded):
    for field in ("input_size", "in_channels", "num_classes"):
        if guide.args[field] != loaded.args[field]:
            raise UserError(
                f"--guide: its {field} is {guide.args[field]}, and the guided network's {loaded.args[field]}; they "
                "must be the same"
            )
    first, second = (_meaning(network.objective) for network in (loaded, guide))
    if first != second:
        raise UserError(f"--guide: its network is of {second}, and the one that it guides of {first}")


def _meaning(objective):
    """What tells how to read the output, in words."""
    of = (getattr(objective, name, None) for name in ("name", "path", "prediction", "timesteps"))
    return " ".join(str(value) for value in of if value is not None)


@dataclass(frozen=True)
class Samples:
    """The samples that a command is asked for. labels: what choose_labels made of `classes`."""

    model: Model
    settings: Settings
    classes: str
    labels: Int[np.ndarray, " num"]
    batch_size: int

    @property
    def manifest(self) -> dict[str, Any]:
        """Everything that the samples depend on, as plain values."""
        args, vae = self.model.args, self.model.vae
        return self.model.origin | {
            "num": len(self.labels),
            "classes": self.classes if args["num_classes"] else None,
            **_described(self.settings),
            "dtype": args["dtype"].name,
            "vae": vae and vae.identity,
            "model": {key: args[key] for key in MANIFEST_ARGS},
        }

    def batches(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yields the samples from index `start` on, a batch at a time, and shows progress."""
        return self.model.batches(self.labels, self.settings, self.batch_size, start=start)

    @property
    def texts(self) -> list[str | int] | None:
        """The name of each sample's class, or its number; None if there are no classes."""
        return pictures.class_labels(self.labels, self.model.class_names) if self.model.args["num_classes"] else None

    def moments(self, num: int, moments: int) -> list[np.ndarray]:
        """The first `num` samples as they form, at so many moments from the noise to the end."""
        return [images for _, images in self.model._moments(self.labels[:num], self.settings, moments)]


def _described(settings):
    """The settings for a manifest. Without an interval there is no field for it, as in manifests of before."""
    return {key: value for key, value in asdict(settings).items() if key != "cfg_interval" or value}


def check_batch(args: dict[str, Any], num: int, batch_size: int) -> None:
    """Raises UserError if so many samples cannot be made, or not in this machine's memory."""
    for name, count in (("num", num), ("batch_size", batch_size)):
        if not is_whole(count) or not 1 <= count <= 2**32:  # the noise of an image is drawn from its index, a uint32
            raise UserError(f"--{name}={count}: must be a whole number of at least 1, and 2**32 at most")
    needs = layout.least_memory(args, pictures={f"--batch_size={batch_size}": min(batch_size, num)})
    layout.check_memory(needs | {f"--num={num}": 40 * num}, jax.devices())

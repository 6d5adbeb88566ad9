"""FID on few samples while a run trains (config.eval)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from dit_jax.evaluation import features, references
from dit_jax.evaluation.compare import compare, display_names, json_keys
from dit_jax.evaluation.measure import measure
from dit_jax.runtime.images import to_uint8
from dit_jax.runtime.progress import Progress


class Generator(Protocol):
    """What is used of sampling.generator.Generator."""

    batch_size: int
    num_classes: int

    def batches(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        indices: Int[np.ndarray, " n"],
        *,
        decode: Callable[[jax.Array], Iterable[jax.Array]] | None,
    ) -> Iterator[tuple[Float[np.ndarray, "m h w c"], Float[np.ndarray, "m H W c"] | None]]: ...


class PeriodicEvaluation:
    """evaluation(ema) -> ({"fid_5000": value, ...}, a line for the log), the same on every host.

    The samples are those of `dit_jax.evaluate --classes=balanced` with the same settings: all classes in turn, from the
    same noise each time. Samples that are not finite are not measured, and the line says so. Metrics in other features
    than Inception's have names of their own, as in "fd_efflite0_5000". The reference's pictures are measured at once,
    so that errors in them are reported before the run.

    Args:
      decode: from latents to pictures, as vae.autoencoder.Decoder.parts; or None.
      size: of the pictures.
      num: of the samples.
      kind, inception: as in features.load.
      reference: path, as in references.load_reference.
    Raises: UserError.
    """

    def __init__(
        self,
        mesh: Mesh,
        generator: Generator,
        decode: Callable[[jax.Array], Iterable[jax.Array]] | None,
        size: int,
        num: int,
        kind: str,
        inception: str | None,
        reference: str,
    ):
        self.generator, self.decode, self.num, self.kind = generator, decode, num, kind
        self.labels = np.arange(num) % max(1, generator.num_classes)
        self.network = features.load(mesh, kind, inception, min(32, -(-num // mesh.size)))
        self.reference = references.load_reference(reference, self.network)
        references.check_size(self.reference, (size, size, 3))
        references.measure_reference(self.network, self.reference)

    def samples(self, ema: Any, progress: Progress) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields the samples a batch at a time. Raises FloatingPointError if one is not finite."""
        done = 0
        for images, decoded in self.generator.batches(ema, self.labels, np.arange(self.num), decode=self.decode):
            images = images if decoded is None else decoded
            if not np.isfinite(images).all():
                raise FloatingPointError
            done += len(images)
            progress.update(done)
            yield to_uint8(images)

    def __call__(self, ema: Any) -> tuple[dict[str, float], str]:
        progress = Progress("eval", self.num, "pictures")
        try:
            measured = measure(self.network, self.samples(ema, progress))
        except FloatingPointError:
            return {}, "the samples are not finite: not measured"
        finally:
            progress.close()
        values = compare(self.network, measured, self.reference)
        values = {metric: value for metric, value in values.items() if value is not None}
        keys, names = json_keys(self.kind), display_names(self.kind, self.num)
        return (
            {f"{keys[metric]}_{self.num}": value for metric, value in values.items()},
            "  ".join(f"{names[metric]} {value:.4g}" for metric, value in values.items()),
        )

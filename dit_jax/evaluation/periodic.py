"""FID on few samples while a run trains (config.eval)."""

import numpy as np

from dit_jax.evaluation import features, measure, references
from dit_jax.runtime import images as pictures
from dit_jax.runtime.progress import Progress


class PeriodicEvaluation:
    """evaluation(ema) -> ({"fid_5000": value, ...}, a line for the reader), the same on every host.

    The samples are those of `dit_jax.evaluate --classes=balanced` with the same settings: all classes in turn, each
    time of the same noise. Where they are not finite nothing is measured, and the line says so. What is not
    Inception's is called by its own name, as in "fd_efflite0_5000".

    generator: of sampling.generator.Generator. decode: None, or from latents to pictures. size: of the pictures. num: samples.
    kind, inception: as of features.load. reference: a path, as of references.load_reference; its pictures are measured
    at once, so that what is wrong with them is said before the run. Raises ValueError.
    """

    def __init__(self, mesh, generator, decode, size, num, kind, inception, reference):
        self.generator, self.decode, self.num, self.kind = generator, decode, num, kind
        self.labels = np.arange(num) % max(1, generator.num_classes)
        self.network = features.load(mesh, kind, inception, min(32, -(-num // mesh.size)))
        self.reference = references.load_reference(reference, self.network)
        references.check_size(self.reference, (size, size, 3))
        measure.measure_reference(self.network, self.reference)

    def samples(self, ema, progress):
        for start in range(0, self.num, self.generator.batch_size):
            part = np.arange(start, min(start + self.generator.batch_size, self.num))
            images = self.generator(ema, self.labels[part], part)
            images = self.decode(images) if self.decode else images
            if not np.isfinite(images).all():
                raise FloatingPointError
            progress.update(part[-1] + 1)
            yield pictures.to_uint8(images)

    def __call__(self, ema):
        progress = Progress("eval", self.num, "pictures")
        try:
            measured = measure.measure(self.network, self.samples(ema, progress))
        except FloatingPointError:
            return {}, "the samples are not finite: not measured"
        finally:
            progress.close()
        values = {metric: value for metric, value in measure.compare(self.network, measured, self.reference).items()
                  if value is not None}
        keys, shown = measure.keys(self.kind), measure.shown(self.kind, self.num)
        return ({f"{keys[metric]}_{self.num}": value for metric, value in values.items()},
                "  ".join(f"{shown[metric]} {value:.4g}" for metric, value in values.items()))

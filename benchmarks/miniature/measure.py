"""What two judges of different kinds say of samples. Both are fitted on real training pictures alone."""

import os

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.miniature.strokes import Strokes
from dit_jax.data import sources
from dit_jax.evaluation.classifier import Classifier
from dit_jax.evaluation.frechet import frechet_distance, statistics
from dit_jax.evaluation.precision_recall import precision_recall
from dit_jax.runtime.images import to_uint8

CLASSES = 10


def _pictures(images):
    """Returns grey pictures (N, H, W, 3) uint8 as (N, H, W, 1) float32 in [-1, 1]."""
    return images[..., :1] / np.float32(127.5) - 1


class Judges:
    """Two judges of the digits of `size` pixels. samples: pictures in a set. Raises UserError where the data are not
    there.

    They work in one thread. How many threads share a product changes its last digits, and with them what the perceptron
    becomes: its distances differ by up to 4 %.
    """

    @threadpool_limits.wrap(limits=1)
    def __init__(self, size, samples):
        train, held_out = sources.mnist(size)
        # As the samples are: rounded to bytes.
        self.train, self.held_out = ((_pictures(to_uint8(part.x)), part.y) for part in (train, held_out))
        self.samples = samples
        self.judges = {"network": Classifier(*self.train), "strokes": Strokes(*self.train)}
        self.features = {name: judge.features(self.held_out[0]) for name, judge in self.judges.items()}

    def _set(self, name, images, labels):
        """Returns {metric: value}, what a judge says of one set."""
        judge, reference = self.judges[name], self.features[name]
        features = judge.features(images)
        precision, recall = precision_recall(features, reference)
        return {
            "frechet": frechet_distance(*statistics(features), *statistics(reference)),
            "precision": precision,
            "recall": recall,
            "recognised": float(np.mean(judge.recognise(images) == labels)),
        }

    @threadpool_limits.wrap(limits=1)
    def real(self):
        """Returns how many pictures there are, and of each judge its accuracy on held-out ones, and its values of a set
        of training pictures and of a set of noise."""
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(self.train[0]), min(self.samples, len(self.train[0])), replace=False)
        noise = rng.uniform(-1, 1, (self.samples, *self.train[0].shape[1:])).astype(np.float32)
        found = {
            name: {
                "accuracy": float(np.mean(judge.recognise(self.held_out[0]) == self.held_out[1])),
                "training": self._set(name, self.train[0][chosen], self.train[1][chosen]),
                "noise": self._set(name, noise, np.arange(self.samples) % CLASSES),
            }
            for name, judge in self.judges.items()
        }
        return {"train": len(self.train[0]), "held_out": len(self.held_out[0]), "judges": found}

    @threadpool_limits.wrap(limits=1)
    def judge(self, images):
        """Returns {judge: {metric: value}} of one set of pictures (N, H, W, 3) uint8, all classes in turn."""
        images, labels = _pictures(images), np.arange(self.samples) % CLASSES
        return {name: self._set(name, images, labels) for name in self.judges}

    def measure(self, folder, sets):
        """Returns {judge: {metric: [a value for each set]}} of the samples.npz in `folder`, all classes in turn."""
        with np.load(os.path.join(folder, "samples.npz")) as f:
            found = [self.judge(part) for part in np.split(f["arr_0"], sets)]
        return {
            name: {metric: [of[name][metric] for of in found] for metric in values} for name, values in found[0].items()
        }

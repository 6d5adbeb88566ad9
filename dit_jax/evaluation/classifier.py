"""The quality of small pictures, measured by a classifier that is fitted only on the real training pictures.

A network trained on ImageNet is of no use for digits of 8 x 8 pixels. The classifier is scikit-learn's two-layer
perceptron. Its accuracy on the held-out pictures is reported too. Its last hidden layer gives the features of the
Fréchet distance, which is therefore not FID and is not called so.
"""

import warnings

import numpy as np
from jaxtyping import Float, Int

from dit_jax.evaluation.frechet import frechet_distance, statistics

Images = Float[np.ndarray, "n h w c"]
Labels = Int[np.ndarray, " n"]


def _shifted(images):
    """Returns the pictures and their copies shifted by one pixel in four directions, edges repeated: (5N, H, W, C)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    h, w = images.shape[1:3]
    shifts = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    return np.concatenate([padded[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w] for dy, dx in shifts])


class Classifier:
    """A perceptron fitted on images in [-1, 1] and their labels."""

    def __init__(self, images: Images, labels: Labels, seed: int = 0):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        # A shift preserves the label if it is at most a tenth of the width or so: not for the 8 x 8 digits.
        if images.shape[1] >= 16:
            images, labels = _shifted(images), np.tile(labels, 5)
        self.network = MLPClassifier((256, 64), max_iter=40, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # On Ctrl-C, fit() ends early with only a warning, and the run would go on with a poor classifier.
            warnings.filterwarnings("error", "Training interrupted", UserWarning)
            try:
                self.network.fit(images.reshape(len(images), -1), labels)
            except UserWarning:
                raise KeyboardInterrupt from None

    def recognise(self, images: Images) -> Labels:
        """Returns the predicted labels."""
        return np.asarray(self.network.predict(images.reshape(len(images), -1)))

    def features(self, images: Images) -> Float[np.ndarray, "n 64"]:
        """Returns the last hidden layer."""
        x = images.reshape(len(images), -1)
        for weights, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1]):
            x = np.maximum(x @ weights + bias, 0)
        return x


def report(
    train: tuple[Images, Labels], held_out: tuple[Images, Labels], samples: Images, labels: Labels
) -> dict[str, float | int]:
    """Returns the contents of report.json: how good `samples` are, which were made for `labels`.

    train, held_out: images and labels of real pictures. The Fréchet distances of real training pictures (the floor) and
    of noise are measured on as many pictures as there are samples, at most as many as there are training pictures.
    """
    classifier = Classifier(*train)
    rng = np.random.default_rng(0)
    n = min(len(samples), len(train[0]))
    real = statistics(classifier.features(held_out[0]))

    def distance(images):
        return frechet_distance(*statistics(classifier.features(images)), *real)

    samples = np.clip(samples, -1, 1)
    return {
        "judge_accuracy": float(np.mean(classifier.recognise(held_out[0]) == held_out[1])),
        "recognised": float(np.mean(classifier.recognise(samples) == labels)),
        "frechet": distance(samples),
        "frechet_floor": distance(train[0][rng.choice(len(train[0]), n, replace=False)]),
        "frechet_noise": distance(rng.uniform(-1, 1, (n, *samples.shape[1:])).astype(np.float32)),
        "samples": len(samples),
        "held_out": len(held_out[0]),
    }

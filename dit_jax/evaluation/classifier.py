"""How good small pictures are, by classifiers fitted on the real training pictures alone.

No network that was trained on ImageNet can see digits of 8 x 8. The judge is scikit-learn's two-layer perceptron,
itself scored on the held-out pictures; its last hidden layer gives the features of the Fréchet distance, which is
therefore no FID and is not called so.
"""

import warnings

import numpy as np

from dit_jax.evaluation.frechet import frechet_distance, statistics


def _shifted(images):
    """Each (H, W, C) picture as it is and moved by one pixel in four directions, the border repeated: (5N, H, W, C)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    h, w = images.shape[1:3]
    return np.concatenate([padded[:, 1 + dy: 1 + dy + h, 1 + dx: 1 + dx + w]
                           for dy, dx in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))])


class Judge:
    """Fitted on images (N, H, W, C) in [-1, 1] and labels (N,)."""

    def __init__(self, images, labels, seed=0):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        # Shifts are label-preserving down to a tenth of the width or so: not for the 8 x 8 digits.
        if images.shape[1] >= 16:
            images, labels = _shifted(images), np.tile(labels, 5)
        self.network = MLPClassifier((256, 64), max_iter=40, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # At Ctrl-C, fit ends early and warns: a judge that knows less would go on.
            warnings.filterwarnings("error", "Training interrupted", UserWarning)
            try:
                self.network.fit(images.reshape(len(images), -1), labels)
            except UserWarning:
                raise KeyboardInterrupt from None

    def recognise(self, images):
        return self.network.predict(images.reshape(len(images), -1))

    def features(self, images):
        """The last hidden layer, (N, 64)."""
        x = images.reshape(len(images), -1)
        for weights, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1]):
            x = np.maximum(x @ weights + bias, 0)
        return x


def report(train, held_out, samples, labels):
    """train, held_out: (images, labels) of real pictures; samples (N, H, W, C) made for `labels` (N,).

    The floor and the noise are measured on as many pictures as the samples are, as far as there are so many.
    """
    judge = Judge(*train)
    rng = np.random.default_rng(0)
    n = min(len(samples), len(train[0]))
    real = statistics(judge.features(held_out[0]))

    def distance(images):
        return frechet_distance(*statistics(judge.features(images)), *real)

    samples = np.clip(samples, -1, 1)
    return {
        "judge_accuracy": float(np.mean(judge.recognise(held_out[0]) == held_out[1])),
        "recognised": float(np.mean(judge.recognise(samples) == labels)),
        "frechet": distance(samples),
        "frechet_floor": distance(train[0][rng.choice(len(train[0]), n, replace=False)]),
        "frechet_noise": distance(rng.uniform(-1, 1, (n, *samples.shape[1:])).astype(np.float32)),
        "samples": len(samples),
        "held_out": len(held_out[0]),
    }

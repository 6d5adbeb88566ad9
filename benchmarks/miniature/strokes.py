"""A judge that knows pictures by their strokes."""

import numpy as np


class Strokes:
    """A judge of another kind, in whose features nothing is learned of the classes: gradients by orientation, summed
    over 4 x 4 cells, and of these the principal components; it recognises by the nearest neighbours among them.

    Fitted on images (N, H, W, C) in [-1, 1], H and W multiples of 4, and labels (N,)."""

    ORIENTATIONS, COMPONENTS = 8, 32

    def __init__(self, images, labels):
        from sklearn.decomposition import PCA
        from sklearn.neighbors import KNeighborsClassifier

        gradients = self._gradients(images)
        self.components = PCA(self.COMPONENTS, svd_solver="full").fit(gradients)
        self.neighbours = KNeighborsClassifier(5).fit(self.components.transform(gradients), labels)

    def _gradients(self, images):
        """(N, 4 * 4 * ORIENTATIONS): each pixel's gradient is shared by the two orientations next to its own."""
        dy, dx = np.gradient(images.mean(-1), axis=(1, 2))
        size, place = np.hypot(dy, dx), np.arctan2(dy, dx) % np.pi * (self.ORIENTATIONS / np.pi)
        n, h, w = size.shape
        sums = []
        for orientation in range(self.ORIENTATIONS):
            away = np.abs(place - orientation)
            share = np.maximum(0, 1 - np.minimum(away, self.ORIENTATIONS - away))
            sums.append((size * share).reshape(n, 4, h // 4, 4, w // 4).sum((2, 4)))
        return np.stack(sums, -1).reshape(n, -1)

    def recognise(self, images):
        return self.neighbours.predict(self.features(images))

    def features(self, images):
        """(N, COMPONENTS)"""
        return self.components.transform(self._gradients(images))



"""InceptionV3 of 2015, the network of FID, sFID and the inception score.

Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision (arXiv 1512.00567), in the variant of
TensorFlow's graph `inception-2015-12-05`, which the paper's evaluator runs: average pools do not count their padding,
the last block takes the maximum in its pool, and there are 1008 classes. Modules have the names of the published
PyTorch files, so that a parameter's path is its published name (see dit_jax/evaluation/features.py).

Shapes: N images, H and W height and width, C channels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

SIZE = 299  # pixels a side, as the network was trained
SPATIAL = 7  # channels of the spatial features: 17 x 17 x 7 = 2023
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU multiplies float32 in one pass of bfloat16 by default

# A branch is a list of steps. A step is a pool, by its key in POOLS; or a convolution, (channels, kernel[, stride]),
# padded to keep the size at stride 1 and not padded at stride 2; or FORK, two convolutions side by side.
Conv2d = tuple[Any, ...]
Branch = Sequence[str | Conv2d | list[Conv2d]]
FORK: list[Conv2d] = [(384, (1, 3)), (384, (3, 1))]


def mixed_a(pool: int) -> dict[str, Branch]:
    """The branches of a block on 35 x 35 maps."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": ["average", (pool, 1)],
    }


def mixed_c(c: int) -> dict[str, Branch]:
    """The branches of a block on 17 x 17 maps (figure 6)."""
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        "branch_pool": ["average", (192, 1)],
    }


def mixed_e(pool: str) -> dict[str, Branch]:
    """The branches of a block on 8 x 8 maps (figure 7)."""
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), FORK],
        "branch3x3dbl": [(448, 1), (384, 3), FORK],
        "branch_pool": [pool, (192, 1)],
    }


STEM = {  # name: (input channels, output channels, kernel, stride, padding)
    "Conv2d_1a_3x3": (3, 32, 3, 2, "VALID"),
    "Conv2d_2a_3x3": (32, 32, 3, 1, "VALID"),
    "Conv2d_2b_3x3": (32, 64, 3, 1, "SAME"),
    "Conv2d_3b_1x1": (64, 80, 1, 1, "VALID"),
    "Conv2d_4a_3x3": (80, 192, 3, 1, "VALID"),
}
MIXED: dict[str, dict[str, Branch]] = {  # the outputs of the branches are concatenated in this order
    "Mixed_5b": mixed_a(32),
    "Mixed_5c": mixed_a(64),
    "Mixed_5d": mixed_a(64),
    "Mixed_6a": {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": ["halve"]},
    "Mixed_6b": mixed_c(128),
    "Mixed_6c": mixed_c(160),
    "Mixed_6d": mixed_c(160),
    "Mixed_6e": mixed_c(192),
    "Mixed_7a": {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        "pool": ["halve"],
    },
    "Mixed_7b": mixed_e("average"),
    "Mixed_7c": mixed_e("maximum"),
}
POOLS = {
    "average": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "maximum": lambda x: nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
    "halve": lambda x: nnx.max_pool(x, (3, 3), (2, 2), "VALID"),
}


def interpolation_matrix(size: int, target: int = SIZE) -> Float[np.ndarray, "target size"]:
    """Returns the matrix that resizes one axis as TensorFlow 1 does, float32.

    Output i is interpolated linearly at position i * size / target, which is computed in float32: without an offset of
    half a pixel, without antialiasing. The upper neighbour is at most the last pixel.
    """
    position = np.arange(target, dtype=np.float32) * np.float32(size / target)
    lower = position.astype(np.int64)
    weight = position - lower.astype(np.float32)
    matrix = np.zeros((target, size), np.float32)
    np.add.at(matrix, (np.arange(target), lower), 1 - weight)
    np.add.at(matrix, (np.arange(target), np.minimum(lower + 1, size - 1)), weight)
    return matrix


def resize(images: Float[Array, "n h w c"], precision: jax.lax.Precision = HIGHEST) -> Float[Array, "n 299 299 c"]:
    """Returns float32 images resized to SIZE x SIZE.

    Each of the two matrix products sums two numbers that are not zero, so that it is as exact as a gather. Gathers are
    slow on a TPU.
    """
    rows, columns = interpolation_matrix(images.shape[1]), interpolation_matrix(images.shape[2])
    images = jnp.einsum("ah,nhwc->nawc", rows, images, precision=precision)
    return jnp.einsum("bw,nawc->nabc", columns, images, precision=precision)


class Conv(nnx.Module):
    """Convolution without bias, batch norm with the moments of the file, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int,
        padding: str,
        precision: jax.lax.Precision,
        rngs: nnx.Rngs,
    ):
        size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.conv = nnx.Conv(
            inputs, outputs, size, stride, padding=padding, use_bias=False, precision=precision, rngs=rngs
        )
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        return jax.nn.relu(self.bn(self.conv(x)))


def named_steps(branch: str, steps: Branch) -> list[str | list[tuple[str, Conv2d]]]:
    """Returns the steps with the published names of their convolutions: pools, and lists of (name, convolution).

    The only convolution of a branch has the name of the branch. Of several, the second is BRANCH_2; the two of a fork
    in its place are BRANCH_2a and BRANCH_2b.
    """
    several = sum(not isinstance(step, str) for step in steps) > 1
    result, number = [], 0
    for step in steps:
        if isinstance(step, str):
            result.append(step)
            continue
        number += 1
        name = f"{branch}_{number}" if several else branch
        result.append(list(zip((f"{name}a", f"{name}b"), step)) if isinstance(step, list) else [(name, step)])
    return result


class Mixed(nnx.Module):
    """Branches side by side, a value of MIXED. Attribute outputs: the channels of all branches together."""

    def __init__(self, inputs: int, branches: dict[str, Branch], precision: jax.lax.Precision, rngs: nnx.Rngs):
        self.outputs, order = 0, []
        for branch, steps in branches.items():
            channels, names = inputs, []
            for step in named_steps(branch, steps):
                if isinstance(step, str):
                    names.append(step)
                    continue
                for name, (outputs, kernel, *stride) in step:
                    stride, padding = (stride[0], "VALID") if stride else (1, "SAME")
                    setattr(self, name, Conv(channels, outputs, kernel, stride, padding, precision, rngs))
                names.append(tuple(name for name, _ in step))
                channels = sum(conv[0] for _, conv in step)
            order.append(tuple(names))
            self.outputs += channels
        self.order = tuple(order)  # of each branch: keys of POOLS, and tuples of names of convolutions

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        results = []
        for steps in self.order:
            y = x
            for step in steps:
                if isinstance(step, str):
                    y = POOLS[step](y)
                else:
                    y = jnp.concatenate([getattr(self, name)(y) for name in step], axis=-1)
            results.append(y)
        return jnp.concatenate(results, axis=-1)


class Inception(nnx.Module):
    """The whole network, in float32.

    precision: of the products, including those of the resize.
    """

    def __init__(self, *, precision: jax.lax.Precision = HIGHEST, rngs: nnx.Rngs):
        self.precision = precision
        for name, conv in STEM.items():
            setattr(self, name, Conv(*conv, precision, rngs))
        channels = 192
        for name, branches in MIXED.items():
            block = Mixed(channels, branches, precision, rngs)
            setattr(self, name, block)
            channels = block.outputs
        self.fc = nnx.Linear(channels, 1008, precision=precision, rngs=rngs)

    def __call__(
        self, images: UInt8[Array, "n h w 3"] | Float[Array, "n h w 3"]
    ) -> tuple[Float[Array, "n 2048"], Float[Array, "n 2023"], Float[Array, "n 1008"]]:
        """Images of any size, 0..255 -> (pool, spatial, logits), float32.

        pool: the global average pool. spatial: the first 7 channels of Mixed_6d's 1 x 1 convolution before its batch
        norm, in the order H, W, C. logits: without the bias, as the evaluator takes them.
        """
        x = (resize(images.astype(jnp.float32), self.precision) - 128) / 128
        for name in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = POOLS["halve"](x)
        for name in MIXED:
            block = getattr(self, name)
            if name == "Mixed_6d":
                spatial = block.branch1x1.conv(x)[..., :SPATIAL].reshape(len(x), -1)
            x = block(x)
        pool = x.mean((1, 2))
        return pool, spatial, jnp.dot(pool, self.fc.kernel[...], precision=self.precision)


@functools.lru_cache
def abstract(**args: Any) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, params) of Inception(**args) with jax.ShapeDtypeStructs for arrays: allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Inception(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)

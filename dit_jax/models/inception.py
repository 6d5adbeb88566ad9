"""InceptionV3 of 2015, the network of FID, sFID and the inception score.

Szegedy et al., Rethinking the Inception Architecture for Computer Vision (arXiv 1512.00567), in the variant of
TensorFlow's graph `inception-2015-12-05`, which the paper's evaluator runs: average pools do not count their padding,
the last block pools by the maximum, and there are 1008 classes. Modules are named as in the published PyTorch files, so
that a parameter's path is its published name (see dit_jax/metrics/features.py). Shapes below: N images, H, W height and
width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIZE = 299  # pixels a side, as the network was trained
SPATIAL = 7  # channels of the spatial features: 17 x 17 x 7 = 2023
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU multiplies float32 in one pass of bfloat16 unless asked for more

# A convolution is (channels, kernel[, stride]): padded to keep the size at stride 1, not at all at stride 2. Those of a
# branch follow each other; a set of two, side by side, in FORK.
FORK = [(384, (1, 3)), (384, (3, 1))]


def mixed_a(pool):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": ["average", (pool, 1)]}


def mixed_c(c):
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            "branch_pool": ["average", (192, 1)]}


def mixed_e(pool):
    return {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), FORK], "branch3x3dbl": [(448, 1), (384, 3), FORK],
            "branch_pool": [pool, (192, 1)]}


STEM = {  # name: input and output channels, kernel, stride, padding
    "Conv2d_1a_3x3": (3, 32, 3, 2, "VALID"), "Conv2d_2a_3x3": (32, 32, 3, 1, "VALID"),
    "Conv2d_2b_3x3": (32, 64, 3, 1, "SAME"), "Conv2d_3b_1x1": (64, 80, 1, 1, "VALID"),
    "Conv2d_4a_3x3": (80, 192, 3, 1, "VALID")}
MIXED = {  # name: its branches, whose outputs are stacked along the channels in this order
    "Mixed_5b": mixed_a(32), "Mixed_5c": mixed_a(64), "Mixed_5d": mixed_a(64),
    "Mixed_6a": {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": ["halve"]},
    "Mixed_6b": mixed_c(128), "Mixed_6c": mixed_c(160), "Mixed_6d": mixed_c(160), "Mixed_6e": mixed_c(192),
    "Mixed_7a": {"branch3x3": [(192, 1), (320, 3, 2)],
                 "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "pool": ["halve"]},
    "Mixed_7b": mixed_e("average"), "Mixed_7c": mixed_e("maximum")}
POOLS = {
    "average": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "maximum": lambda x: nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
    "halve": lambda x: nnx.max_pool(x, (3, 3), (2, 2), "VALID")}


def interpolation(size, target=SIZE):
    """The matrix (target, size), float32, that resizes one axis as TensorFlow 1 does: bilinear, output i from the
    source position i * size / target in float32 (no half pixel, no antialiasing), the upper neighbour no further than
    the last pixel."""
    position = np.arange(target, dtype=np.float32) * np.float32(size / target)
    lower = position.astype(np.int64)
    weight = position - lower.astype(np.float32)
    matrix = np.zeros((target, size), np.float32)
    np.add.at(matrix, (np.arange(target), lower), 1 - weight)
    np.add.at(matrix, (np.arange(target), np.minimum(lower + 1, size - 1)), weight)
    return matrix


def resize(images, precision=HIGHEST):
    """images (N, H, W, C) float32 -> (N, 299, 299, C). Two matrix products: each sums two numbers that are not zero, so
    that it is as exact as a gather, which a TPU is slow at."""
    rows, columns = interpolation(images.shape[1]), interpolation(images.shape[2])
    images = jnp.einsum("ah,nhwc->nawc", rows, images, precision=precision)
    return jnp.einsum("bw,nawc->nabc", columns, images, precision=precision)


class Conv(nnx.Module):
    """Convolution without bias, batch norm with the moments of the file, ReLU."""

    def __init__(self, inputs, outputs, kernel, stride, padding, precision, rngs):
        size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.conv = nnx.Conv(inputs, outputs, size, stride, padding=padding, use_bias=False, precision=precision,
                             rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.conv(x)))


def named(branch, steps):
    """The steps of a branch with names -> [a key of POOLS, or [(name, convolution), ...], those side by side]. The only
    convolution has the branch's name; of several, the second is NAME_2, and in its place a fork NAME_2a and NAME_2b."""
    convs = [step for step in steps if not isinstance(step, str)]
    result = [step for step in steps if isinstance(step, str)]  # a pool comes first
    for i, step in enumerate(convs, 1):
        name = branch if len(convs) == 1 else f"{branch}_{i}"
        result.append([(name + end, conv) for end, conv in zip("ab", FORK)] if step is FORK else [(name, step)])
    return result


class Mixed(nnx.Module):
    """Branches side by side, a value of MIXED. outputs: the channels of all."""

    def __init__(self, inputs, branches, precision, rngs):
        self.outputs, order = 0, []
        for branch, steps in branches.items():
            channels, steps = inputs, named(branch, steps)
            for step in steps:
                if not isinstance(step, str):
                    for name, (outputs, kernel, *stride) in step:
                        how = (stride[0], "VALID") if stride else (1, "SAME")
                        setattr(self, name, Conv(channels, outputs, kernel, *how, precision, rngs))
                    channels = sum(conv[0] for _, conv in step)
            order.append(tuple(step if isinstance(step, str) else tuple(name for name, _ in step) for step in steps))
            self.outputs += channels
        self.order = tuple(order)  # a branch: keys of POOLS, and tuples of convolutions' names

    def __call__(self, x):
        results = []
        for steps in self.order:
            y = x
            for step in steps:
                y = POOLS[step](y) if isinstance(step, str) else jnp.concatenate(
                    [getattr(self, name)(y) for name in step], axis=-1)
            results.append(y)
        return jnp.concatenate(results, axis=-1)


class Inception(nnx.Module):
    """Args: precision: of the products, also of the resize. All is float32."""

    def __init__(self, *, precision=HIGHEST, rngs):
        self.precision = precision
        for name, conv in STEM.items():
            setattr(self, name, Conv(*conv, precision, rngs))
        channels = 192
        for name, branches in MIXED.items():
            block = Mixed(channels, branches, precision, rngs)
            setattr(self, name, block)
            channels = block.outputs
        self.fc = nnx.Linear(channels, 1008, precision=precision, rngs=rngs)

    def __call__(self, images):
        """images (N, H, W, 3), uint8 or float 0..255, of any size -> float32 each: pool3 (N, 2048); spatial (N, 2023),
        the first 7 channels of Mixed_6d's 1x1 convolution before its batch norm, in the order H, W, C; logits
        (N, 1008), without the bias, as the evaluator takes them."""
        x = (resize(images.astype(jnp.float32), self.precision) - 128) / 128
        for name in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = POOLS["halve"](x)
        for name in MIXED:
            if name == "Mixed_6d":
                spatial = self.Mixed_6d.branch1x1.conv(x)[..., :SPATIAL].reshape(len(x), -1)
            x = getattr(self, name)(x)
        pool = x.mean((1, 2))
        return pool, spatial, jnp.dot(pool, self.fc.kernel[...], precision=self.precision)


@functools.lru_cache
def abstract(**args):
    """(graphdef, params) of Inception(**args) with shapes in place of arrays: nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Inception(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)

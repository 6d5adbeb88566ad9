"""DiT with adaLN-Zero blocks in plain PyTorch, the baseline of --against=pytorch. Nothing of JAX is imported here.

It is written as one writes it for speed: one product for q, k and v, scaled dot product attention, no reshape that is
not needed, and nothing that torch.compile cannot see through. Its arrays have the published names and shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def regression(dim: int, parts: int) -> nn.Sequential:
    """From the condition (B, D) to `parts` vectors of width D."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = Attention(dim, num_heads), Mlp(dim), regression(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(dim, out_dim), regression(dim, 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    """model(x, t, y) of images (B, C, H, W), timesteps and labels (B,) returns (B, 2C, H, W).

    The arguments are those of dit_jax's DiT. The position embedding is zero until it is loaded.
    """

    pos_embed: Tensor
    frequencies: Tensor

    def __init__(self, *, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, **_):
        super().__init__()
        p, d, self.grid = patch_size, hidden_size, input_size // patch_size
        self.patch_size = p
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, d, p, stride=p)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, d)})
        self.register_buffer("pos_embed", torch.zeros(1, self.grid**2, d))
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.blocks = nn.ModuleList(Block(d, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(d, 2 * in_channels * p**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * self.frequencies
        t = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        c = t + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, N, p p 2C)
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

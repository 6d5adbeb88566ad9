"""The paper's DiT-XL/2 with cross-attention blocks (table 4)."""

from dit_jax.config import paper


def get_config():
    c = paper("DiT-XL/2")
    c.model.block = "cross_attention"
    return c

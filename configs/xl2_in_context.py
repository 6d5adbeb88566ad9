"""The paper's DiT-XL/2 with in-context blocks (table 4)."""

from dit_jax.config import paper


def get_config():
    c = paper("DiT-XL/2")
    c.model.block = "in_context"
    return c

"""The paper's DiT-S/8: 400 K steps (table 4)."""

from dit_jax.config import paper


def get_config():
    return paper("DiT-S/8")

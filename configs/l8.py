"""The paper's DiT-L/8: 400 K steps (table 4)."""

from dit_jax.config import paper


def get_config():
    return paper("DiT-L/8")

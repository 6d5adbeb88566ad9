"""The paper's DiT-S/4: 400 K steps (table 4)."""

from dit_jax.config import paper


def get_config():
    return paper("DiT-S/4")

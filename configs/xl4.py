"""The paper's DiT-XL/4: 400 K steps (table 4)."""

from dit_jax.config import paper


def get_config():
    return paper("DiT-XL/4")

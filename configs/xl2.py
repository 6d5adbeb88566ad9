"""The paper's DiT-XL/2: 7 M steps (section 5); after 400 K it is the model of table 4."""

from dit_jax.config import paper


def get_config():
    c = paper("DiT-XL/2")
    c.steps = 7_000_000
    return c

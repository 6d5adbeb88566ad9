"""The paper's DiT-XL/2 at 512 px (section 5): 3 M steps."""

from dit_jax.config import paper


def get_config():
    c = paper("DiT-XL/2")
    c.model.input_size = 64
    c.steps = 3_000_000
    return c

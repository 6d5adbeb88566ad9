"""SiT (arXiv 2401.08740), flow matching on the paper's networks: --config=configs/sit.py:B/2

A size and patch of the paper, by default XL/2. The recipe is the paper's with another objective: velocity on the linear
path, 400 K steps (SiT's table 1). The head keeps the channels of the variance, which the published networks have and do
not use.
"""

from dit_jax.config import paper


def get_config(model="XL/2"):
    try:
        c = paper(f"DiT-{model}")
        from dit_jax.models.dit import model_args

        model_args(c.model.name)
    except ValueError:
        raise ValueError(f"configs/sit.py:{model}: a size and patch of the paper, as in B/2 or XL/2") from None
    c.objective = "flow"
    c.model.learn_sigma = True
    c.sample.update(sampler="sde_euler", steps="250")  # SiT's SDE, with w = sigma
    return c

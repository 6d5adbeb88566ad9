"""MeanFlow (arXiv 2505.13447) on the paper's networks: --config=configs/meanflow.py:B/4 or :XL/2

B/4 is its ablation model (table 1): 80 epochs, without guidance. The others have 240 epochs (table 2) and guidance that
is trained in: an effective scale of 2 for B/2, and 2.5 for L/2 and XL/2, up to a time.
"""

from dit_jax.config import paper

# omega, kappa and t_end of the guidance. The effective scale is omega / (1 - kappa).
GUIDANCE = {"B/4": (1.0, 0.0, 1.0), "B/2": (1.0, 0.5, 1.0), "L/2": (0.2, 0.92, 0.8), "XL/2": (0.2, 0.92, 0.75)}


def get_config(model="XL/2"):
    if model not in GUIDANCE:
        raise ValueError(f"configs/meanflow.py:{model}: one of {', '.join(GUIDANCE)}")
    c = paper(f"DiT-{model}")
    c.objective = "meanflow"
    c.steps = 400_000 if model == "B/4" else 1_200_000
    c.optimizer.b2 = 0.95
    omega, kappa, t_end = GUIDANCE[model]
    c.meanflow.update(omega=omega, kappa=kappa, t_end=t_end)
    c.sample.update(sampler="meanflow", steps="1", cfg_scale=1.0)
    return c

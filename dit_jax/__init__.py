"""Scalable Diffusion Models with Transformers (DiT, arXiv 2212.09748) in JAX and Flax NNX.

    import dit_jax

    model = dit_jax.load("runs/digits")  # or a weights file, a diffusers folder or a published name
    images = model.sample(classes=[3, 7], num=16, cfg_scale=2.0, steps=50, sampler="ddim")  # uint8 (16, H, W, 3)
    dit_jax.grid(images)  # a PIL picture

The public API is load, fit (trains in this process), grid, paper_config (the paper's config), Model and UserError. The
subpackages (dit_jax.models, dit_jax.diffusion, ...) are there to build on: see examples/.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_jax.api import Model, UserError, fit, grid, load, paper_config

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "fit", "grid", "load", "paper_config"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Imported on first use, so that a command's --help does not wait for JAX.
    if name in __all__:
        return getattr(importlib.import_module("dit_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

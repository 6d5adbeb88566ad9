"""Scalable Diffusion Models with Transformers (DiT, arXiv 2212.09748) in JAX and Flax NNX."""

__version__ = "0.1.0"

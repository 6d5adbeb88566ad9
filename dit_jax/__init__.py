"""Scalable Diffusion Models with Transformers (DiT, arXiv 2212.09748) in JAX and Flax NNX."""

import os
import sys

if sys.argv[0] == "-m":  # one of our commands: its errors are one line, without XLA's own report of a lost host
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"

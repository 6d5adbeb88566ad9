"""The command python -m dit_jax.reproduce has moved to python -m benchmarks.miniature."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: python -m dit_jax.reproduce is now python -m benchmarks.miniature, run from a checkout of the project"
    )

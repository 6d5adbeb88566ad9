"""The command python -m dit_jax.benchmark has moved to python -m benchmarks.speed."""

import sys

if __name__ == "__main__":
    sys.exit("error: python -m dit_jax.benchmark is now python -m benchmarks.speed, run from a checkout of the project")

"""Prints the paper's tables 1 and 4 and its 512 px model beside our counts: python -m dit_jax.flops"""

from dit_jax import cli

if __name__ == "__main__":
    cli.parse()  # above the imports that take time

from dit_jax.models.flops import PAPER, macs, num_params, paper_gflops, paper_models


def main() -> None:
    print(
        f"{'model':25s} {'Gflops':>7s} {'paper':>7s}   {'parameters':>12s} {'trained, M':>10s} {'paper':>6s}   "
        "exact multiply-adds"
    )
    for name, args in paper_models().items():
        gflops, millions = PAPER[name]
        params, trained = num_params(**args)
        print(
            f"{name:25s} {paper_gflops(**args):7.2f} {gflops:>7s}   {params:12,d} {trained / 1e6:10.0f} "
            f"{millions:6d}   {macs(**args):,d}"
        )


if __name__ == "__main__":
    cli.run(main)

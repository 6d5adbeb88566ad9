"""The paper's results as commands: python -m dit_jax.paper

Prints every row of DiT in tables 2 to 5 of arXiv 2212.09748v2 with the commands that reproduce it, and whether they
were run; then those of SiT and of MeanFlow.
"""

from dit_jax import cli

if __name__ == "__main__":
    cli.parse()  # above the imports that take time

from dit_jax.evaluation.features import FETCH
from dit_jax.evaluation.paper import (
    CONFIG,
    DECODERS,
    EMA,
    FULL_STEPS,
    GUIDED,
    LATER,
    MSE,
    NO_GUIDANCE,
    ORIGINAL,
    ORIGINAL_SHA256,
    REFERENCE,
    WEIGHTS,
)


def _evaluate(source, size, scale, vae=EMA):
    return (
        f"python -m dit_jax.evaluate {source} --vae={vae} --cfg_scale={scale} --reference={REFERENCE[size]} "
        "--inception=pt_inception-2015-12-05-6726825d.pth"
    )


def _train(config, steps):
    size = 512 if config.endswith("512") else 256
    return _train_run(f"{config}.py", f"runs/{config}", steps, size)


def _train_run(config, workdir, steps, size):
    return (
        f"python -m dit_jax.train --config=configs/{config} --workdir={workdir} --config.steps={steps} "
        f"--config.data.path=/data/imagenet-latents-{size}"
    )


def _later():
    """Lines: the results of later papers, each a recipe of configs/."""
    for paper, (vae, rows) in LATER.items():
        yield from ("", f"{paper}: FID-50K, 256 px")
        for config, steps, flags, value in rows:
            workdir = "runs/" + config.replace(".py", "").replace(":", "_").replace("/", "").lower()
            evaluate = _evaluate(f"--workdir={workdir} --step={steps}", 256, 0, vae).replace("--cfg_scale=0", flags)
            yield from (
                f"  {config} after {steps:,} steps, {flags}: {value}   [not run]",
                f"    {_train_run(config, workdir, steps, 256)}",
                f"    {evaluate}",
            )


def listing() -> list[str]:
    """Returns lines: each row of the tables and its commands."""
    encode = (
        "python -m dit_jax.encode --source=tfds --name=imagenet2012 --path=/data/tfds "
        f"--vae={EMA} --size={{0}} --out=/data/imagenet-latents-{{0}}"
    )
    lines = [
        "None of these was run by us: they need ImageNet, Inception's weights and an accelerator. Rows of one",
        "config are one run, which is resumed for more steps, in the order of this list.",
        "",
        "Files, once (the published weights are CC-BY-NC):",
    ]
    lines += [
        f"  {url}"
        for size in (256, 512)
        for url in (
            f"https://dl.fbaipublicfiles.com/DiT/models/{WEIGHTS[size]}",
            f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{size}/{REFERENCE[size]}",
        )
    ]
    lines += [
        f"  Inception's weights: {FETCH}",
        "",
        "Data, once (256 and 512 px; the three decoders have the same encoder):",
        "  python -m dit_jax.prepare --tars=DOWNLOADS --path=/data/tfds",
    ]
    lines += [f"  {encode.format(size)}" for size in (256, 512)]
    lines += ["", "Table 4: no guidance (FID)"]
    for (config, steps), value in sorted(NO_GUIDANCE.items(), key=lambda row: row[0][1]):
        size = 512 if config.endswith("512") else 256
        lines += [
            f"  {config} after {steps:,} steps: {value}   [not run]",
            f"    {_train(config, steps)}",
            f"    {_evaluate(f'--workdir=runs/{config} --step={steps}', size, 1, MSE)}",
        ]
        if config == CONFIG[size] and steps == FULL_STEPS[size]:
            lines.append(f"    published weights: {_evaluate(f'--weights={WEIGHTS[size]}', size, 1, MSE)}")
    header = "FID sFID IS precision recall"
    for table, size in ((2, 256), (3, 512)):
        config = CONFIG[size]
        lines += ["", f"Table {table}: DiT-XL/2, {size} px ({header})"]
        for (pixels, scale), values in GUIDED.items():
            if pixels == size:
                lines += [
                    f"  guidance {scale}: {' '.join(map(str, values))}   [not run]",
                    f"    published weights: {_evaluate(f'--weights={WEIGHTS[size]}', size, scale)}",
                    f"    from scratch:      {_train(config, FULL_STEPS[size])}",
                    f"                       {_evaluate(f'--workdir=runs/{config}', size, scale)}",
                ]
    lines += [
        "",
        f"Table 5: decoders, DiT-XL/2, 256 px, guidance 1.5 ({header}); the original decoder is",
        f"vae/diffusion_pytorch_model.bin of Stable Diffusion 1.5, sha256 {ORIGINAL_SHA256}",
    ]
    for vae, values in DECODERS.items():
        path = "stable-diffusion-v1-5/vae/diffusion_pytorch_model.bin" if vae == ORIGINAL else vae
        lines += [
            f"  {vae}: {' '.join(map(str, values))}   [not run]",
            f"    {_evaluate(f'--weights={WEIGHTS[256]}', 256, 1.5, path)}",
        ]
    return [*lines, *_later()]


def main() -> None:
    print("\n".join(listing()))


if __name__ == "__main__":
    cli.run(main)

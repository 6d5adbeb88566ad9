"""The paper's results as commands: python -m dit_jax.paper

Prints every row of tables 2 to 5 of arXiv 2212.09748v2 with the commands that reproduce it, and whether they were run.
"""

from dit_jax import cli

if __name__ == "__main__":
    cli.parse()  # above the imports that take time

from dit_jax.models.dit import MODELS

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
FULL_STEPS = {256: 7_000_000, 512: 3_000_000}
GUIDED = {  # tables 2 and 3: {(pixels, guidance): METRICS}, DiT-XL/2 after FULL_STEPS
    (256, 1.0): (9.62, 6.85, 121.50, 0.67, 0.67), (256, 1.25): (3.22, 5.28, 201.77, 0.76, 0.62),
    (256, 1.5): (2.27, 4.60, 278.24, 0.83, 0.57),
    (512, 1.0): (12.03, 7.12, 105.25, 0.75, 0.64), (512, 1.25): (4.64, 5.77, 174.77, 0.81, 0.57),
    (512, 1.5): (3.04, 5.02, 240.82, 0.84, 0.54)}
AT_400K = {  # table 4: {config: FID-50K after 400 K steps, no guidance}
    "s8": 153.60, "s4": 100.41, "s2": 68.40, "b8": 122.74, "b4": 68.38, "b2": 43.47, "l8": 118.87, "l4": 45.64,
    "l2": 23.33, "xl8": 106.41, "xl4": 43.01, "xl2": 19.47, "xl2_in_context": 35.24, "xl2_cross_attention": 26.14,
    "xl2_adaln": 25.21}
DECODERS = {  # table 5: {decoder of DiT-XL/2, 256 px, guidance 1.5: METRICS}
    "original": (2.46, 5.18, 271.56, 0.82, 0.57), "stabilityai/sd-vae-ft-mse": (2.30, 4.73, 276.09, 0.83, 0.57),
    "stabilityai/sd-vae-ft-ema": (2.27, 4.60, 278.24, 0.83, 0.57)}
REFERENCE = {size: f"VIRTUAL_imagenet{size}{'_labeled' if size == 256 else ''}.npz" for size in (256, 512)}
WEIGHTS = {size: f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}


def _name(args):
    fields = ("patch_size", "depth", "hidden_size", "num_heads")
    return next((name for name, model in MODELS.items() if all(model[f] == args[f] for f in fields)), None)


def row(manifest, args, size):
    """The paper's values of a run of which `manifest` says how its samples were made -> (where, {metric: value}), or None
    where the paper has no such run. args: of DiT. size: of the samples in pixels."""
    vae = (manifest.get("vae") or {}).get("name")
    usual = (manifest["num"] == 50_000 and manifest["sampler"] == "ddpm" and manifest["steps"] == "250"
             and manifest["which"] == "ema" and args["num_classes"] == 1000 and args["in_channels"] == 4
             and manifest["classes"] in ("random", "balanced"))
    name, scale = _name(args), float(manifest["cfg_scale"])
    if not usual or name is None or (scale != 1 and manifest["cfg_channels"] != 3):
        return None
    whole = manifest.get("step") == FULL_STEPS.get(size) or manifest.get("weights") == WEIGHTS.get(size)
    if name == "DiT-XL/2" and args["block"] == "adaln_zero" and whole and vae in DECODERS:
        if vae == "stabilityai/sd-vae-ft-ema" and (size, scale) in GUIDED:
            return f"table {2 if size == 256 else 3}", dict(zip(METRICS, GUIDED[size, scale]))
        if (size, scale) == (256, 1.5):
            return "table 5", dict(zip(METRICS, DECODERS[vae]))
    block = "" if args["block"] == "adaln_zero" else f"_{args['block']}"
    config = name.removeprefix("DiT-").replace("/", "").lower() + block
    if (size, scale, manifest.get("step"), vae) == (256, 1, 400_000, "stabilityai/sd-vae-ft-ema") and config in AT_400K:
        return "table 4", {"fid": AT_400K[config]}
    return None


def _evaluate(source, size, scale, vae="stabilityai/sd-vae-ft-ema"):
    return (f"python -m dit_jax.evaluate {source} --vae={vae} --cfg_scale={scale} --reference={REFERENCE[size]} "
            "--inception=pt_inception-2015-12-05-6726825d.pth")


def _train(config, steps):
    size = 512 if config.endswith("512") else 256
    return (f"python -m dit_jax.train --config=configs/{config}.py --workdir=runs/{config} --config.steps={steps} "
            f"--config.data.path=/data/imagenet-latents-{size}")


def listing():
    """Lines: each row of the tables and its commands."""
    encode = ("python -m dit_jax.encode --source=tfds --name=imagenet2012 --path=/data/tfds "
              "--vae=stabilityai/sd-vae-ft-ema --size={0} --out=/data/imagenet-latents-{0}")
    lines = ["None of these was run by us: they take ImageNet, Inception's weights and an accelerator.", "",
             "Data, once (256 and 512 px):", "  python -m dit_jax.prepare --tars=DOWNLOADS --path=/data/tfds"]
    lines += [f"  {encode.format(size)}" for size in (256, 512)]
    header = "FID sFID IS precision recall"
    for table, size in ((2, 256), (3, 512)):
        config = "xl2" if size == 256 else "xl2_512"
        lines += ["", f"Table {table}: DiT-XL/2, {size} px ({header})"]
        for (pixels, scale), values in GUIDED.items():
            if pixels == size:
                lines += [f"  guidance {scale}: {' '.join(map(str, values))}   [not run]",
                          f"    published weights: {_evaluate(f'--weights={WEIGHTS[size]}', size, scale)}",
                          f"    from scratch:      {_train(config, FULL_STEPS[size])}",
                          f"                       {_evaluate(f'--workdir=runs/{config}', size, scale)}"]
    lines += ["", "Table 4: 400 K steps, 256 px, no guidance (FID)"]
    for config, value in AT_400K.items():
        lines += [f"  {config}: {value}   [not run]", f"    {_train(config, 400_000)}",
                  f"    {_evaluate(f'--workdir=runs/{config}', 256, 1)}"]
    lines += ["", f"Table 5: decoders, DiT-XL/2, 256 px, guidance 1.5 ({header})"]
    for vae, values in DECODERS.items():
        where = "VAE_OF_STABLE_DIFFUSION_1" if vae == "original" else vae
        lines += [f"  {vae}: {' '.join(map(str, values))}   [not run]",
                  f"    {_evaluate(f'--weights={WEIGHTS[256]}', 256, 1.5, where)}"]
    return lines


def main():
    print("\n".join(listing()))


if __name__ == "__main__":
    cli.run(main)

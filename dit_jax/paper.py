"""The paper's results as commands: python -m dit_jax.paper

Prints every row of DiT in tables 2 to 5 of arXiv 2212.09748v2 with the commands that reproduce it, and whether they were
run.
"""

from dit_jax import cli

if __name__ == "__main__":
    cli.parse()  # above the imports that take time

from dit_jax.autoencoder import HUB
from dit_jax.metrics.features import FETCH
from dit_jax.models.dit import MODELS

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
FULL_STEPS = {256: 7_000_000, 512: 3_000_000}
GUIDED = {  # tables 2 and 3: {(pixels, guidance): METRICS}, DiT-XL/2 after FULL_STEPS
    (256, 1.0): (9.62, 6.85, 121.50, 0.67, 0.67), (256, 1.25): (3.22, 5.28, 201.77, 0.76, 0.62),
    (256, 1.5): (2.27, 4.60, 278.24, 0.83, 0.57),
    (512, 1.0): (12.03, 7.12, 105.25, 0.75, 0.64), (512, 1.25): (4.64, 5.77, 174.77, 0.81, 0.57),
    (512, 1.5): (3.04, 5.02, 240.82, 0.84, 0.54)}
NO_GUIDANCE = {  # table 4: {(config, steps): FID-50K}, with the ft-MSE decoder
    ("s8", 400_000): 153.60, ("s4", 400_000): 100.41, ("s2", 400_000): 68.40, ("b8", 400_000): 122.74,
    ("b4", 400_000): 68.38, ("b2", 400_000): 43.47, ("l8", 400_000): 118.87, ("l4", 400_000): 45.64,
    ("l2", 400_000): 23.33, ("xl8", 400_000): 106.41, ("xl4", 400_000): 43.01, ("xl2", 400_000): 19.47,
    ("xl2_in_context", 400_000): 35.24, ("xl2_cross_attention", 400_000): 26.14, ("xl2_adaln", 400_000): 25.21,
    ("xl2", 2_352_000): 10.67, ("xl2", 7_000_000): 9.62, ("xl2_512", 1_301_000): 13.78, ("xl2_512", 3_000_000): 11.93}
SAMPLING_COMPUTE = (("L/2", 1000, 80.7, 25.9), ("XL/2", 128, 15.2, 23.7))  # figure 10: model, steps, Tflops, FID-10K
ORIGINAL, MSE, EMA = "original", "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"
DECODERS = {  # table 5: {decoder of DiT-XL/2, 256 px, guidance 1.5: METRICS}
    ORIGINAL: (2.46, 5.18, 271.56, 0.82, 0.57), MSE: (2.30, 4.73, 276.09, 0.83, 0.57),
    EMA: (2.27, 4.60, 278.24, 0.83, 0.57)}
# The original decoder: vae/diffusion_pytorch_model.bin of Stable Diffusion 1.5.
ORIGINAL_SHA256 = "1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5"
DECODER_FILES = {sha256: name for name, (_, sha256) in HUB.items()} | {ORIGINAL_SHA256: ORIGINAL}
REFERENCE = {size: f"VIRTUAL_imagenet{size}{'_labeled' if size == 256 else ''}.npz" for size in (256, 512)}
WEIGHTS = {size: f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}
CONFIG = {256: "xl2", 512: "xl2_512"}  # that the weights are of


def _config(model):
    """The file of configs/ that a manifest's `model` is of, or None."""
    fields = ("patch_size", "depth", "hidden_size", "num_heads")
    name = next((name for name, args in MODELS.items() if all(model.get(f) == args[f] for f in fields)), None)
    latents = {32: "", 64: "_512"}.get(model.get("input_size"))
    if name is None or latents is None or (model.get("num_classes"), model.get("in_channels")) != (1000, 4):
        return None
    block = "" if model["block"] == "adaln_zero" else f"_{model['block']}"
    return name.removeprefix("DiT-").replace("/", "").lower() + block + latents


def row(manifest, size):
    """The paper's values of a run of which `manifest` (dit_jax.sample's) says how its samples were made -> (where,
    {metric: value}), or None where the paper has no such run. size: of the samples in pixels."""
    usual = {"num": 50_000, "sampler": "ddpm", "steps": "250", "which": "ema"}
    vae, config, scale = manifest.get("vae") or {}, _config(manifest.get("model") or {}), manifest.get("cfg_scale")
    decoder = DECODER_FILES.get(vae.get("sha256"))
    if config is None or any(manifest.get(key) != value for key, value in usual.items()):
        return None
    if manifest.get("classes") not in ("random", "balanced") or (scale != 1 and manifest.get("cfg_channels") != 3):
        return None
    published = manifest.get("weights") == WEIGHTS.get(size) and config == CONFIG.get(size)
    if not published and (manifest.get("batch_size") != 256 or manifest.get("init")):
        return None  # not the paper's recipe
    step = FULL_STEPS[size] if published else manifest.get("step")
    whole = config == CONFIG.get(size) and step == FULL_STEPS[size]
    if whole and decoder == EMA and (size, scale) in GUIDED:
        return f"table {2 if size == 256 else 3}", dict(zip(METRICS, GUIDED[size, scale]))
    if whole and decoder in DECODERS and (size, scale) == (256, 1.5):
        return "table 5", dict(zip(METRICS, DECODERS[decoder]))
    if scale == 1 and decoder == MSE and (config, step) in NO_GUIDANCE:
        return "table 4", {"fid": NO_GUIDANCE[config, step]}
    return None


def _evaluate(source, size, scale, vae=EMA):
    return (f"python -m dit_jax.evaluate {source} --vae={vae} --cfg_scale={scale} --reference={REFERENCE[size]} "
            "--inception=pt_inception-2015-12-05-6726825d.pth")


def _train(config, steps):
    size = 512 if config.endswith("512") else 256
    return (f"python -m dit_jax.train --config=configs/{config}.py --workdir=runs/{config} --config.steps={steps} "
            f"--config.data.path=/data/imagenet-latents-{size}")


def listing():
    """Lines: each row of the tables and its commands."""
    encode = ("python -m dit_jax.encode --source=tfds --name=imagenet2012 --path=/data/tfds "
              f"--vae={EMA} --size={{0}} --out=/data/imagenet-latents-{{0}}")
    lines = ["None of these was run by us: they take ImageNet, Inception's weights and an accelerator. Rows of one",
             "config are one run, trained on to more steps: in the order in which they stand here.", "",
             "Files, once (the published weights are CC-BY-NC):"]
    lines += [f"  {url}" for size in (256, 512) for url in (
        f"https://dl.fbaipublicfiles.com/DiT/models/{WEIGHTS[size]}",
        f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{size}/{REFERENCE[size]}")]
    lines += [f"  Inception's weights: {FETCH}", "",
              "Data, once (256 and 512 px; the three decoders share their encoder):",
              "  python -m dit_jax.prepare --tars=DOWNLOADS --path=/data/tfds"]
    lines += [f"  {encode.format(size)}" for size in (256, 512)]
    lines += ["", "Table 4: no guidance (FID)"]
    for (config, steps), value in sorted(NO_GUIDANCE.items(), key=lambda row: row[0][1]):
        size = 512 if config.endswith("512") else 256
        lines += [f"  {config} after {steps:,} steps: {value}   [not run]", f"    {_train(config, steps)}",
                  f"    {_evaluate(f'--workdir=runs/{config} --step={steps}', size, 1, MSE)}"]
        if config == CONFIG[size] and steps == FULL_STEPS[size]:
            lines.append(f"    published weights: {_evaluate(f'--weights={WEIGHTS[size]}', size, 1, MSE)}")
    header = "FID sFID IS precision recall"
    for table, size in ((2, 256), (3, 512)):
        config = CONFIG[size]
        lines += ["", f"Table {table}: DiT-XL/2, {size} px ({header})"]
        for (pixels, scale), values in GUIDED.items():
            if pixels == size:
                lines += [f"  guidance {scale}: {' '.join(map(str, values))}   [not run]",
                          f"    published weights: {_evaluate(f'--weights={WEIGHTS[size]}', size, scale)}",
                          f"    from scratch:      {_train(config, FULL_STEPS[size])}",
                          f"                       {_evaluate(f'--workdir=runs/{config}', size, scale)}"]
    lines += ["", f"Table 5: decoders, DiT-XL/2, 256 px, guidance 1.5 ({header}); the original one is",
              f"vae/diffusion_pytorch_model.bin of Stable Diffusion 1.5, sha256 {ORIGINAL_SHA256}"]
    for vae, values in DECODERS.items():
        where = "stable-diffusion-v1-5/vae/diffusion_pytorch_model.bin" if vae == ORIGINAL else vae
        lines += [f"  {vae}: {' '.join(map(str, values))}   [not run]",
                  f"    {_evaluate(f'--weights={WEIGHTS[256]}', 256, 1.5, where)}"]
    return lines


def main():
    print("\n".join(listing()))


if __name__ == "__main__":
    cli.run(main)

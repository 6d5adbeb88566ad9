"""The paper's results (tables 2 to 5, figure 10), and which of them a set of samples is comparable with."""

from typing import Any

from dit_jax.models.dit import MODELS
from dit_jax.vae.files import HUB

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
FULL_STEPS = {256: 7_000_000, 512: 3_000_000}
GUIDED = {  # tables 2 and 3: {(pixels, guidance): METRICS}, DiT-XL/2 after FULL_STEPS
    (256, 1.0): (9.62, 6.85, 121.50, 0.67, 0.67),
    (256, 1.25): (3.22, 5.28, 201.77, 0.76, 0.62),
    (256, 1.5): (2.27, 4.60, 278.24, 0.83, 0.57),
    (512, 1.0): (12.03, 7.12, 105.25, 0.75, 0.64),
    (512, 1.25): (4.64, 5.77, 174.77, 0.81, 0.57),
    (512, 1.5): (3.04, 5.02, 240.82, 0.84, 0.54),
}
NO_GUIDANCE = {  # table 4: {(config, steps): FID-50K}, with the ft-MSE decoder
    ("s8", 400_000): 153.60,
    ("s4", 400_000): 100.41,
    ("s2", 400_000): 68.40,
    ("b8", 400_000): 122.74,
    ("b4", 400_000): 68.38,
    ("b2", 400_000): 43.47,
    ("l8", 400_000): 118.87,
    ("l4", 400_000): 45.64,
    ("l2", 400_000): 23.33,
    ("xl8", 400_000): 106.41,
    ("xl4", 400_000): 43.01,
    ("xl2", 400_000): 19.47,
    ("xl2_in_context", 400_000): 35.24,
    ("xl2_cross_attention", 400_000): 26.14,
    ("xl2_adaln", 400_000): 25.21,
    ("xl2", 2_352_000): 10.67,
    ("xl2", 7_000_000): 9.62,
    ("xl2_512", 1_301_000): 13.78,
    ("xl2_512", 3_000_000): 11.93,
}
SAMPLING_COMPUTE = (("L/2", 1000, 80.7, 25.9), ("XL/2", 128, 15.2, 23.7))  # figure 10: model, steps, Tflops, FID-10K
ORIGINAL, MSE, EMA = "original", "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"
DECODERS = {  # table 5: {decoder of DiT-XL/2, 256 px, guidance 1.5: METRICS}
    ORIGINAL: (2.46, 5.18, 271.56, 0.82, 0.57),
    MSE: (2.30, 4.73, 276.09, 0.83, 0.57),
    EMA: (2.27, 4.60, 278.24, 0.83, 0.57),
}
# The original decoder: vae/diffusion_pytorch_model.bin of Stable Diffusion 1.5.
ORIGINAL_SHA256 = "1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5"
DECODER_FILES = {sha256: name for name, (_, sha256) in HUB.items()} | {ORIGINAL_SHA256: ORIGINAL}
REFERENCE = {size: f"VIRTUAL_imagenet{size}{'_labeled' if size == 256 else ''}.npz" for size in (256, 512)}
WEIGHTS = {size: f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}
CONFIG = {256: "xl2", 512: "xl2_512"}  # of the published weights


# Later papers on the paper's networks, 256 px: {paper: (decoder, [(config, steps, flags of the samples,
# FID-50K)])}. From SiT's tables 1 and 7 (sampled with its SDE), and MeanFlow's tables 1 and 2.
SIT_SDE = "--sampler=sde_euler --steps=250"
LATER = {
    "SiT, flow matching (arXiv 2401.08740)": (
        EMA,
        [
            ("sit.py:S/2", 400_000, f"{SIT_SDE} --cfg_scale=1", 57.6),
            ("sit.py:B/2", 400_000, f"{SIT_SDE} --cfg_scale=1", 33.0),
            ("sit.py:L/2", 400_000, f"{SIT_SDE} --cfg_scale=1", 18.8),
            ("sit.py:XL/2", 400_000, f"{SIT_SDE} --cfg_scale=1", 17.2),
            ("sit_xl2.py", 7_000_000, f"{SIT_SDE} --cfg_scale=1", 8.3),
            ("sit_xl2.py", 7_000_000, f"{SIT_SDE} --cfg_scale=1.5", 2.06),
        ],
    ),
    "MeanFlow, one and two steps (arXiv 2505.13447)": (
        MSE,
        [
            ("meanflow.py:B/4", 400_000, "--cfg_scale=1", 61.06),
            ("meanflow.py:B/2", 1_200_000, "--cfg_scale=1", 6.17),
            ("meanflow.py:L/2", 1_200_000, "--cfg_scale=1", 3.84),
            ("meanflow.py:XL/2", 1_200_000, "--cfg_scale=1", 3.43),
            ("meanflow.py:XL/2", 1_200_000, "--cfg_scale=1 --steps=2", 2.93),
        ],
    ),
}


def _config(model):
    """Returns the name in configs/ of a manifest's `model`, or None if it is none of the paper's."""
    fields = ("patch_size", "depth", "hidden_size", "num_heads")
    name = next((name for name, args in MODELS.items() if all(model.get(f) == args[f] for f in fields)), None)
    suffix = {32: "", 64: "_512"}.get(model.get("input_size"))
    if name is None or suffix is None or (model.get("num_classes"), model.get("in_channels")) != (1000, 4):
        return None
    block = "" if model["block"] == "adaln_zero" else f"_{model['block']}"
    return name.removeprefix("DiT-").replace("/", "").lower() + block + suffix


def row(manifest: dict[str, Any], size: int) -> tuple[str, dict[str, float]] | None:
    """Returns (table, {metric: value}) of the paper's run that samples are comparable with, or None if there is none.

    manifest: dit_jax.sample's, which says how the samples were made. size: of the samples in pixels.
    """
    required = {"num": 50_000, "sampler": "ddpm", "steps": "250", "which": "ema"}
    config = _config(manifest.get("model") or {})
    scale: Any = manifest.get("cfg_scale")
    vae: dict[str, Any] = manifest.get("vae") or {}
    decoder = DECODER_FILES.get(vae.get("sha256", ""))
    if config is None or any(manifest.get(key) != value for key, value in required.items()):
        return None
    if any(manifest.get(key) for key in ("objective", "cfg_interval", "guide", "min_snr")):
        return None  # no method of the paper
    if manifest.get("classes") not in ("random", "balanced") or (scale != 1 and manifest.get("cfg_channels") != 3):
        return None
    published = manifest.get("weights") == WEIGHTS.get(size) and config == CONFIG.get(size)
    if not published and (manifest.get("batch_size") != 256 or manifest.get("init")):
        return None  # not the paper's recipe
    step: Any = FULL_STEPS[size] if published else manifest.get("step")
    fully_trained = config == CONFIG.get(size) and step == FULL_STEPS[size]
    if fully_trained and decoder == EMA and (size, scale) in GUIDED:
        return f"table {2 if size == 256 else 3}", dict(zip(METRICS, GUIDED[size, scale]))
    if fully_trained and decoder in DECODERS and (size, scale) == (256, 1.5):
        return "table 5", dict(zip(METRICS, DECODERS[decoder]))
    if scale == 1 and decoder == MSE and (config, step) in NO_GUIDANCE:
        return "table 4", {"fid": NO_GUIDANCE[config, step]}
    return None

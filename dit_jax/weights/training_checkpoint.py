"""The training checkpoints that DiT's and SiT's train.py write: {model, ema, opt, args}. Needs PyTorch.

weights.files.read reads the weights of one. This module writes one: `model` and `ema` are the state dicts of the raw
and the EMA weights, `opt` is that of torch.optim.AdamW over model.parameters(), `args` is the command line.
"""

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from dit_jax.diffusion.objectives import Flow, MeanFlow, Objective
from dit_jax.models.dit import MODELS
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import writing
from dit_jax.weights import files

Flat = Mapping[str, Float[np.ndarray, "..."]]  # published name -> float32 array, in the published order
PATH_TYPES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
VAE_FACTOR = 8  # their networks take latents of image_size / 8


def command_line(config: dict[str, Any], args: Mapping[str, Any], objective: Objective) -> argparse.Namespace:
    """The flags of DiT's or SiT's train.py for a run. What a config does not know has the default of their flag.

    config: resolved. args: of models.dit.DiT. model is None for a network that is none of the paper's, and data_path is
    empty unless the run reads a folder of pictures. Raises UserError for what they do not know.
    """
    if isinstance(objective, MeanFlow):
        raise UserError("objective=meanflow: DiT's and SiT's train.py do not know it: leave --training out")
    if objective.prediction == "x_0":
        raise UserError("flow.prediction=x_0: SiT's train.py does not know it: leave --training out")
    if (name := config["optimizer"].get("name", "adamw")) != "adamw":
        raise UserError(f"optimizer.name={name}: DiT's and SiT's train.py know AdamW only: leave --training out")
    sizes = {name: size for name, size in MODELS.items() if all(args[field] == size[field] for field in size)}
    name, data, vae = next(iter(sizes), None), config["data"], config.get("vae", {}).get("path", "")
    line = dict(
        data_path=data["path"] if data["source"] == "folder" else "",
        results_dir="results",
        model=name,
        image_size=VAE_FACTOR * args["input_size"],
        num_classes=args["num_classes"],
        epochs=1400,
        global_batch_size=config["batch_size"],
        global_seed=config["seed"],
        vae="mse" if vae.rstrip("/").endswith("-mse") else "ema",
        num_workers=4,
        log_every=config["log_every"],
        ckpt_every=config["checkpoint"]["every"],
    )
    if isinstance(objective, Flow):
        line |= dict(
            model=name and name.replace("DiT", "SiT"),
            sample_every=config["sample"]["every"],
            cfg_scale=config["sample"]["cfg_scale"],
            wandb=False,
            ckpt=None,
            path_type=PATH_TYPES[objective.path],
            prediction=objective.prediction,
            loss_weight=None if objective.weight == "none" else objective.weight,
            sample_eps=objective.sample_eps,
            train_eps=objective.train_eps,
        )
    return argparse.Namespace(**line)


def write(
    path: str,
    *,
    raw: Flat,
    ema: Flat,
    mean: Flat,
    square: Flat,
    updates: int,
    optimizer: Mapping[str, float],
    line: argparse.Namespace,
) -> None:
    """Writes a training checkpoint. No incomplete file is left at `path`.

    The position embedding is the one parameter without a gradient: AdamW counts it and keeps no moments of it.

    Args:
      raw, ema: the weights.
      mean, square: AdamW's moments, exp_avg and exp_avg_sq, under the same names.
      updates: how many were made.
      optimizer: config.optimizer.
      line: of command_line.
    Raises: UserError, OSError.
    """
    torch = files.import_torch(path)
    model, average, exp_avg, exp_avg_sq = (
        OrderedDict((name, torch.from_numpy(np.require(a, requirements="W"))) for name, a in flat.items())
        for flat in (raw, ema, mean, square)
    )
    parameters = {name: torch.nn.Parameter(a, requires_grad=name != "pos_embed") for name, a in model.items()}
    adamw = torch.optim.AdamW(
        list(parameters.values()),
        lr=optimizer["learning_rate"],
        betas=(optimizer["b1"], optimizer["b2"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
    )
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            moments = {"exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
            adamw.state[parameter] = {"step": torch.tensor(float(updates)), **moments}
    with writing(path) as f:
        torch.save({"model": model, "ema": average, "opt": adamw.state_dict(), "args": line}, f)

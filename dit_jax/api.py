"""The functions of the public Python API. dit_jax/__init__.py offers them as dit_jax.load and so on."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import config as configs
from dit_jax.diffusion.objectives import Objective
from dit_jax.parallel import sharding
from dit_jax.runtime import files, images as pictures, process
from dit_jax.runtime.errors import UserError
from dit_jax.sampling.generator import is_whole
from dit_jax.sampling.model import Model
from dit_jax.train import train
from dit_jax.vae.files import load as load_vae
from dit_jax.weights import load as weights

__all__ = ["Model", "UserError", "fit", "grid", "load", "paper_config"]

paper_config = configs.paper


def load(
    where: str | os.PathLike,
    *,
    vae: str | os.PathLike | None = None,
    which: str = "ema",
    step: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    objective: str | Objective | None = None,
    guide: str | os.PathLike | None = None,
    guide_step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Loads the Model of a run's directory, a weights file, a diffusers folder, or a published name.

    Args:
      where: a run's directory; a .pt, .npz or .safetensors file of the published names; a diffusers folder; or
        DiT-XL/2-256, DiT-XL/2-512 (the authors' files), facebook/DiT-XL-2-256, facebook/DiT-XL-2-512 (on the hub),
        SiT-XL/2-256 (a file that you have fetched).
      vae: the VAE that decodes latents: a file, a folder, or a published name such as stabilityai/sd-vae-ft-ema. None
        takes the VAE of the run or of the weights. "" takes none: samples are latents.
      which: "ema" or "raw" weights, or an average of a run, as in "std0.1".
      step: which checkpoint of a run; None for the newest.
      num_heads: for a file with a width that is not in the paper.
      num_classes: for a file without a null class.
      objective: what a weights file was trained for: "ddpm", "flow" (or as in "flow:path=gvp,prediction=noise"),
        "meanflow", or an object of diffusion.objectives. None is "meanflow" for a network with a second time, else
        "ddpm".
      guide: the directory of a run whose network guides this one (autoguidance), in the place of the null class.
      guide_step: which checkpoint of `guide`; None for the newest.
      mesh: from dit_jax.parallel.sharding.make_mesh; None for all devices, with the batch split over them.
    Raises: UserError. Its text is one line that says what is wrong and what to do.
    """
    if mesh is None:
        mesh = sharding.make_mesh()
    elif not isinstance(mesh, jax.sharding.Mesh) or set(mesh.axis_names) != {"data", "fsdp", "tensor"}:
        raise UserError(f"mesh: a {type(mesh).__name__}: must be one of dit_jax.parallel.sharding.make_mesh")
    loaded = weights.load(
        _path("where", where),
        mesh,
        which=which,
        step=step,
        num_heads=num_heads,
        num_classes=num_classes,
        objective=objective,
    )
    vae = loaded.vae if vae is None else _path("vae", vae) if vae else ""
    if guide is None and guide_step is not None:
        raise UserError("guide_step names a checkpoint of guide: name that run as well")
    second = None if guide is None else weights.load_guide(_path("guide", guide), mesh, which, guide_step)
    return Model(loaded, mesh, load_vae(vae) if vae else None, second)


def _path(name, value):
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"{name}={value!r}: must be text or a path")
    try:
        path = files.user_path(os.fspath(value))
    except (TypeError, ValueError) as e:
        raise UserError(f"{name}={value!r}: {e}") from None
    if not path:
        raise UserError(f"{name} is empty: name a file or folder")
    return path


def fit(
    config: ConfigDict,
    workdir: str | os.PathLike,
    data: tuple[Shaped[np.ndarray, "n h w c"], Int[np.ndarray, " n"]] | None = None,
    *,
    on_log: Callable[[list[dict[str, Any]]], object] | None = None,
) -> Model:
    """Trains a run, or resumes it from its newest checkpoint. Returns the Model of its EMA weights.

    Args:
      config: from dit_jax.paper_config() or a file of configs/, with fields changed.
      workdir: run directory; created, or resumed if it exists.
      data: None for the source that config.data names; or (images, labels), and then config.data.source is ignored.
        Images are uint8 pictures, or float32 that is used as it is: pictures in [-1, 1], or scaled latents.
      on_log: called every config.log_every steps with all records so far, those of metrics.jsonl: {"step": 100,
        "loss": 0.4, ...}. What it raises ends the run, which the same call resumes.
    Raises: UserError. After a KeyboardInterrupt the same call resumes from the last checkpoint.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"config: a {type(config).__name__}: must be a ConfigDict, as dit_jax.paper_config() makes one")
    resolved, workdir = configs.resolve(config), _path("workdir", workdir)
    arrays = None
    if data is not None:
        resolved["data"]["source"] = "arrays"
        arrays = _arrays(data)
    try:
        os.makedirs(workdir, exist_ok=True)
        files.probe(workdir)
    except OSError as e:
        raise UserError(f"workdir={workdir}: cannot be written ({e.strerror}): name another") from None
    with files.hold(workdir, "workdir"), contextlib.ExitStack() as closing:
        if jax.default_backend() == "cpu" and len(jax.devices()) > 1:
            closing.callback(process.one_step_at_a_time())
        train(resolved, workdir, closing, data=arrays, on_log=on_log)
    return load(workdir)


def _arrays(data):
    try:
        images, labels = map(np.asarray, data)
    except (TypeError, ValueError):
        raise UserError("data: must be (images, labels), two arrays") from None
    # The bytes of the labels go into the identity of the data.
    return images, labels.astype(np.int64) if labels.dtype.kind in "iu" else labels


def grid(
    images: Shaped[np.ndarray, "n h w c"], columns: int | None = None, labels: Sequence[str | int] | None = None
) -> Image.Image:
    """Arranges pictures or latents of Model.sample in rows. Those smaller than 96 pixels are enlarged.

    columns: by default about as many as rows. labels: a name or number for each image, which stands above a column or
    left of a row that it is the same for, else below the image; of "tench, Tinca tinca" it is the first name. By
    default none. Raises UserError naming the argument.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not images.size or images.dtype == np.uint8 and not pictures.is_picture(images.shape[-1]):
        raise UserError(f"images: {images.dtype} {images.shape}: must be (N, H, W, C), as Model.sample makes them")
    if columns is None:
        columns = int(np.ceil(np.sqrt(len(images))))
    elif not is_whole(columns) or columns < 1:
        raise UserError(f"columns={columns!r}: must be a whole number of at least 1")
    if labels is not None and (isinstance(labels, str) or np.shape(labels) != (len(images),)):
        raise UserError(f"labels: must be a list with a name or number for each of the {len(images)} images")
    images = images if images.dtype == np.uint8 else pictures.to_uint8(images)
    return Image.fromarray(pictures.grid(images, columns, labels))

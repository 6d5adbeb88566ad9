"""The functions of the public Python API. dit_jax/__init__.py offers them as dit_jax.load and so on."""

import contextlib
import os

import jax
import numpy as np
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import config as configs
from dit_jax.parallel import sharding
from dit_jax.runtime import files, images as pictures, process
from dit_jax.runtime.errors import UserError
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
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Loads the Model of a run's directory, a weights file, a diffusers folder, or a published name.

    Args:
      where: a run's directory; a .pt, .npz or .safetensors file of the published names; a diffusers folder; or
        DiT-XL/2-256, DiT-XL/2-512 (the authors' files), facebook/DiT-XL-2-256, facebook/DiT-XL-2-512 (on the hub).
      vae: the VAE that decodes latents: a file, a folder, or a published name such as stabilityai/sd-vae-ft-ema. None
        takes the VAE of the run or of the weights. "" takes none: samples are latents.
      which: "ema" or "raw" weights.
      step: which checkpoint of a run; None for the newest.
      num_heads: for a file with a width that is not in the paper.
      num_classes: for a file without a null class.
      mesh: from dit_jax.parallel.sharding.make_mesh; None for all devices, with the batch split over them.
    Raises: UserError. Its text is one line that says what is wrong and what to do.
    """
    mesh = mesh or sharding.make_mesh()
    loaded = weights.load(
        _path("where", where), mesh, which=which, step=step, num_heads=num_heads, num_classes=num_classes
    )
    vae = loaded.vae if vae is None else os.fspath(vae)
    return Model(loaded, mesh, load_vae(vae) if vae else None)


def _path(name, value):
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
) -> Model:
    """Trains a run, or resumes it from its newest checkpoint. Returns the Model of its EMA weights.

    Args:
      config: from dit_jax.paper_config() or a file of configs/, with fields changed.
      workdir: run directory; created, or resumed if it exists.
      data: None for the source that config.data names; or (images, labels), and then config.data.source is ignored.
        Images are uint8 pictures, or float32 that is used as it is: pictures in [-1, 1], or scaled latents.
    Raises: UserError. After a KeyboardInterrupt the same call resumes from the last checkpoint.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"config: a {type(config).__name__}: must be a ConfigDict, as dit_jax.paper_config() makes one")
    resolved, workdir = configs.resolve(config), _path("workdir", workdir)
    arrays = None
    if data is not None:
        resolved["data"]["source"] = "arrays"
        arrays = np.asarray(data[0]), np.asarray(data[1])
    try:
        os.makedirs(workdir, exist_ok=True)
        files.probe(workdir)
    except OSError as e:
        raise UserError(f"workdir={workdir}: cannot be written ({e.strerror}): name another") from None
    with files.hold(workdir, "workdir"), contextlib.ExitStack() as closing:
        if jax.default_backend() == "cpu" and len(jax.devices()) > 1:
            closing.callback(process.one_step_at_a_time())
        train(resolved, workdir, closing, data=arrays)
    return load(workdir)


def grid(images: Shaped[np.ndarray, "n h w c"], columns: int | None = None) -> Image.Image:
    """Arranges pictures or latents of Model.sample in rows. columns: by default about as many as rows."""
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else pictures.to_uint8(images)
    columns = columns or max(1, int(np.ceil(np.sqrt(len(images)))))
    return Image.fromarray(pictures.grid(images, columns))

"""The initial parameters of a run that starts from published weights or from another run.

The label table may be for another number of classes, and the frozen position embedding for another size. A head with
channels of the variance may lose them. All else must be the same. The objective may be another one: weights of the
paper's DiT and of SiT are of one network.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models import dit
from dit_jax.parallel import sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.weights import load, published

SAME = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "block")  # arguments that must not differ


def initial_params(
    weights: str, which: str, *, args: dict[str, Any], mesh: jax.sharding.Mesh, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Returns (the parameters of DiT(**args) on the mesh, their origin: a dict of plain values).

    Prints the origin, and a line for each of label table, position embedding and head that is not as it was.

    Args:
      weights: a .pt or .npz file of the published format, or the workdir of a run.
      which: "ema" or "raw", or an average of a run, as in "std0.1".
      seed: for new rows of the label table.
    Raises: UserError naming init.weights, the file and the field or array that does not fit.
    """
    try:
        read = _from_run if load.is_run(weights) else _from_source
        source_args, params, origin = read(weights, which, args, mesh)
    except UserError as e:
        reason = str(e).removeprefix(f"{weights}: ").removeprefix("weights: ")
        raise UserError(f"init.weights={weights}: {reason}") from None
    say("init: " + ", ".join(f"{key} {value}" for key, value in origin.items()))
    shardings = sharding.state_shardings(dit.abstract(**args)[1], mesh)
    params = _fit_labels(params, source_args, args, shardings, seed)
    params = _fit_head(params, source_args, args, shardings)
    return _fit_position_embedding(params, source_args, args, shardings), origin


def _from_run(workdir, which, args, mesh):
    loaded = load.from_run(workdir, mesh, which, check=lambda source_args: _check_same(source_args, args))
    return loaded.args, loaded.params, {key: loaded.origin[key] for key in ("workdir", "step", "which")}


def _from_source(where, which, args, mesh):
    source = load.open_source(where, which)
    source_args = published.infer_args(source.flat, num_heads=1, num_classes=source.num_classes)
    source_args["block"] = "adaln_zero"
    if not args["null_class"] and source_args["num_classes"] + 1 == args["num_classes"]:
        source_args |= {"num_classes": args["num_classes"], "null_class": False}
    width, heads = source_args["hidden_size"], args["num_heads"]
    source_args["num_heads"] = heads  # no array shows it
    _check_same(source_args, args)
    if published.HEADS.get(width, heads) != heads:
        raise UserError(
            f"model.num_heads={heads}: no array shows the heads of a file, and the paper's models of width "
            f"{width} have {published.HEADS[width]}; of a run with other heads name the workdir"
        )
    sha256 = hashlib.sha256()
    params = published.from_published(source.flat, source_args, sha256)
    digest = sha256.hexdigest()
    if hosts.share(digest)[0] != digest:
        raise UserError("the file is not the same as on the first host")
    origin = {
        "weights": source.name,
        "sha256": digest,
        "which": which,
    }
    return source_args, jax.tree.map(sharding.put, params, sharding.state_shardings(params, mesh)), origin


def _check_same(source_args, args):
    for field in SAME:
        if source_args[field] != args[field]:
            raise UserError(
                f"{field} is {source_args[field]} in these weights, but model.{field}={args[field]}; only "
                "model.num_classes and model.input_size may differ"
            )
    if source_args["second_time"] and not args.get("second_time", False):
        raise UserError(
            f"these weights have {published.SECOND_TIME}, the second time of MeanFlow, and this run's network has not: "
            "set objective=meanflow, or start from other weights"
        )
    if args.get("second_time", False) and not source_args["second_time"]:
        raise UserError(
            f"{published.SECOND_TIME} are missing, the second time of objective=meanflow: start from weights of a "
            "MeanFlow network, or from none (init.weights='')"
        )
    if args.get("learn_sigma", True) and not source_args["learn_sigma"]:
        raise UserError(
            "final_layer.linear has no channels of the variance in these weights, but model.learn_sigma=True; leave it "
            "unset with objective=flow or meanflow, or start from other weights"
        )


def _fit_labels(params, source_args, args, shardings, seed):
    """Fits the label table to another number of classes, or to another choice of having a null class.

    The null class's row is kept. The rows of the classes are kept if their number is the same. All others are drawn.
    """
    (old, old_null), (new, new_null) = ((a["num_classes"], a["null_class"]) for a in (source_args, args))
    if (old, old_null) == (new, new_null):
        return params
    drawn = np.random.default_rng(seed).normal(0, 0.02, (new + new_null, args["hidden_size"])).astype(np.float32)

    def fit(table, sharding):
        def concatenate(table, drawn):
            classes = table[:old] if old == new else drawn[:new]
            null = table[old:] if old_null else drawn[new:]
            return jnp.concatenate([classes, null[:new_null]])

        return jax.jit(concatenate, out_shardings=sharding)(table, drawn)

    if old_null and new_null:
        null = " (the null class's row is kept)"
    elif old_null:
        null = " (the null class's row is left out: diffusion.label_dropout=0)"
    else:
        null = " (these weights have no null class: its row is drawn anew)" if new_null else ""
    change = "kept" if old == new else f"re-made for {new or 'none'}"
    say(f"init: the label table of {old or 'no'} classes is {change}{null}")
    return params | {"y_embedder": jax.tree.map(fit, params["y_embedder"], shardings["y_embedder"])}


def _fit_head(params, source_args, args, shardings):
    """Leaves out the head's channels of the variance, the last C of 2C of each pixel, if the network has none."""
    if source_args["learn_sigma"] == args.get("learn_sigma", True):
        return params
    channels, layer = args["in_channels"], params["final_layer"]

    def fit(array, sharding):
        def keep(array):  # columns (p q c)
            pixels = array.reshape(*array.shape[:-1], -1, 2 * channels)
            return pixels[..., :channels].reshape(*array.shape[:-1], -1)

        return jax.jit(keep, out_shardings=sharding)(array)

    say(
        f"init: the head keeps the {channels} channels of the prediction (those of the variance are left out: "
        "model.learn_sigma=False)"
    )
    head = jax.tree.map(fit, layer["linear"], shardings["final_layer"]["linear"])
    return params | {"final_layer": layer | {"linear": head}}


def _fit_position_embedding(params, source_args, args, shardings):
    old, new = (a["input_size"] // a["patch_size"] for a in (source_args, args))
    if old == new:
        return params
    say(f"init: position embedding re-made for a {new} x {new} grid of tokens (was {old} x {old})")
    embedding = dit.position_embedding(args["hidden_size"], new)
    return params | {"pos_embed": sharding.put(embedding, shardings["pos_embed"])}

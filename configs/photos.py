"""A small DiT on latents of the photographs that `python -m dit_jax.example` and `encode` make ready: the path of
ImageNet, in a few minutes on a laptop."""

from dit_jax.config import paper


def get_config():
    c = paper("")
    c.steps = 1_000
    c.batch_size = 32
    c.model.patch_size = 1
    c.model.depth = 4
    c.model.hidden_size = 128
    c.model.num_heads = 4
    c.model.input_size = 8
    c.model.num_classes = 3
    c.optimizer.learning_rate = 1e-3
    c.ema_decay = 0.99
    c.data.path = "runs/photos/latents"
    c.vae.path = "runs/photos/vae"
    c.log_every = 100
    c.checkpoint.every = 250
    c.sample.every = 500
    c.sample.per_class = 8
    c.sample.cfg_scale = 1.5
    c.sample.cfg_channels = 0
    c.sample.steps = "50"
    return c

"""A small DiT on latents of the photographs that `python -m dit_jax.example` and `encode` make ready: the path of
ImageNet, in a few minutes on a laptop."""

from dit_jax.config import paper


def get_config():
    c = paper("")
    c.objective = "flow"  # the paper's needs more steps
    c.steps = 2_500
    c.batch_size = 32
    c.model.patch_size = 2
    c.model.depth = 4
    c.model.hidden_size = 128
    c.model.num_heads = 4
    c.model.input_size = 8
    c.model.num_classes = -1  # a photograph is a class
    c.optimizer.update(learning_rate=2e-3, b2=0.95, schedule="cosine")
    c.ema_decay = 0.99
    c.flow.time = "logit_normal"
    c.data.path = "runs/photos/latents"
    c.vae.path = "runs/photos/vae"
    c.log_every = 100
    c.checkpoint.every = 500
    c.sample.every = 1_000
    c.sample.per_class = 8
    c.sample.cfg_scale = 2.0
    c.sample.cfg_channels = 0
    c.sample.sampler = "heun"
    c.sample.steps = "20"
    return c

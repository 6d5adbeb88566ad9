"""The two-minute run with flow matching: the digits of configs/digits.py, sampled in 10 evaluations."""

from dit_jax.config import paper


def get_config():
    c = paper(model="")
    c.objective = "flow"
    c.steps = 1200
    c.batch_size = 64
    c.model.update(
        patch_size=2, depth=4, hidden_size=96, num_heads=4, input_size=8, in_channels=1, num_classes=10, remat="dots"
    )
    c.optimizer.learning_rate = 2e-3
    c.ema_decay = 0.99
    c.flow.time = "logit_normal"
    c.data.update(source="digits", flip=False)  # a mirrored digit is none
    c.log_every = 100
    c.checkpoint.update(every=600, keep=2, keep_every=0)
    c.sample.update(every=600, classes=10, per_class=8, cfg_scale=2.0, cfg_channels=0, sampler="heun", steps="10")
    c.judge.samples = 500
    return c

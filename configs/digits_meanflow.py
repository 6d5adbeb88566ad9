"""Digits in one evaluation of the network: MeanFlow, in five minutes on 2 cores."""

from dit_jax.config import paper


def get_config():
    c = paper(model="")
    c.objective = "meanflow"
    c.steps = 1500
    c.batch_size = 64
    c.model.update(
        patch_size=2, depth=4, hidden_size=96, num_heads=4, input_size=8, in_channels=1, num_classes=10, remat="none"
    )
    c.optimizer.update(learning_rate=2e-3, b2=0.95)
    c.ema_decay = 0.99
    c.meanflow.update(omega=1.0, kappa=0.5)
    c.data.update(source="digits", flip=False)  # a mirrored digit is none
    c.log_every = 100
    c.checkpoint.update(every=500, keep=2, keep_every=0)
    c.sample.update(every=500, classes=10, per_class=8, cfg_scale=1.0, cfg_channels=0, sampler="meanflow", steps="1")
    c.judge.samples = 500
    return c

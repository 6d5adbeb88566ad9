"""Pictures of your own, a folder a class: a few hundred of 32 x 32 pixels, in minutes on 2 cores. Copy this file.

python -m dit_jax.train --config=configs/own.py --config.data.path=pictures --workdir=runs/own
"""

from dit_jax.config import paper


def get_config():
    c = paper(model="")
    c.objective = "flow"  # ahead of the paper's "ddpm" after some hundred steps
    c.steps = 10_000
    c.batch_size = 16  # many small steps
    c.model.update(
        patch_size=8,  # 16 tokens a picture
        depth=4,
        hidden_size=256,
        num_heads=4,
        input_size=32,  # pixels; each picture is cropped to its middle square and scaled to this
        in_channels=3,
        num_classes=-1,  # the number of class folders
    )
    c.optimizer.update(learning_rate=2e-3, b2=0.95, schedule="cosine")
    c.ema_decay = 0.99  # the mean of the last hundred steps or so; the paper's 0.9999 needs ten thousands of steps
    c.flow.update(prediction="x_0", time="logit_normal", time_mean=-0.8)
    c.data.update(source="folder", flip=True)  # False where left and right matter, as in letters
    c.log_every = 100
    c.checkpoint.update(every=1000, keep=2, keep_every=0)
    c.sample.update(every=1000, classes=8, per_class=8, cfg_scale=4.0, cfg_channels=0, sampler="dpmpp_2m", steps="20")
    return c

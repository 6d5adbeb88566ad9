"""Trains a small DiT on your own arrays, and samples from it: python examples/own_data.py"""

import numpy as np

import dit_jax

# Any images (N, H, W, C) and labels (N,): here 512 pictures of a bright square in one of four corners.
rng = np.random.default_rng(0)
labels = rng.integers(4, size=512)
images = rng.integers(0, 60, (512, 8, 8, 1)).astype(np.uint8)
for image, label in zip(images, labels):
    top, left = 4 * (label // 2), 4 * (label % 2)
    image[top : top + 4, left : left + 4] += 180

config = dit_jax.paper_config(model="")
config.update(
    model=dict(patch_size=2, depth=2, hidden_size=64, num_heads=4, input_size=8, in_channels=1, num_classes=4),
    steps=300,
    batch_size=64,
    ema_decay=0.98,
    log_every=50,
    optimizer=dict(learning_rate=2e-3),
    data=dict(flip=False),  # a mirrored picture is of another class
    checkpoint=dict(every=100),
    sample=dict(every=0),
)

model = dit_jax.fit(config, "runs/squares", data=(images, labels))  # the same call resumes
samples = model.sample(classes=[0, 1, 2, 3], num=16, steps=20, sampler="ddim", cfg_scale=1.0)
dit_jax.grid(samples, columns=4).save("runs/squares/grid.png")
print(samples.shape, "in runs/squares/grid.png")

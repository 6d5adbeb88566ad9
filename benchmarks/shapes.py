"""How many samples of drawn shapes are what was asked for.

    python -m benchmarks.shapes --workdir=runs/own --steps=1000,2000

The run is that of docs/own_pictures.md, on the pictures of examples/shapes.py. The judge is a convolutional network in
PyTorch, fitted on shapes that are drawn anew and tried on others. Run it from the root of a checkout.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("workdir", None, "the run's directory, with its checkpoints", required=True)
    flags.DEFINE_list("steps", None, "the checkpoints, as in 1000,2000", required=True)
    flags.DEFINE_integer("num", 192, "samples of each checkpoint", lower_bound=3)
    flags.DEFINE_integer("drawn", 2000, "shapes of each class that the judge is fitted on", lower_bound=1)
    cli.define_path("out", None, "folder for grids own_STEP.png; none by default")
    cli.parse()  # above the imports that take time

import os

import numpy as np
import torch
from torch import nn

import dit_jax
from dit_jax.runtime.progress import say
from examples import shapes


def drawn(per_class, seed):
    """(pictures (N, 3, S, S) in [0, 1], labels) of shapes that no run has seen."""
    rng = np.random.default_rng(seed)
    pictures = [np.asarray(shapes.draw(corners, rng)) for corners in shapes.CORNERS.values() for _ in range(per_class)]
    return as_input(np.stack(pictures)), torch.arange(len(shapes.CORNERS)).repeat_interleave(per_class)


def as_input(pictures):
    return torch.from_numpy(pictures.astype(np.float32) / 255).permute(0, 3, 1, 2)


def fit(x, y, epochs=8):
    """A network of 4 convolutions, fitted on pictures with some noise, as samples have it."""
    torch.set_num_threads(1)  # so small a network gains nothing by more, which wait for each other on a busy machine
    torch.manual_seed(0)
    layers, width = [], 3
    for channels in (32, 64, 64, 64):
        layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, len(shapes.CORNERS)))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            noisy = x[batch] + 0.05 * torch.randn_like(x[batch])
            loss = nn.functional.cross_entropy(network(noisy), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def recognised(network, x, y):
    """The share of the pictures that the network takes for the class asked for."""
    with torch.no_grad():
        return (network(x).argmax(1) == y).float().mean().item()


def main():
    f = flags.FLAGS
    network = fit(*drawn(f.drawn, seed=1))
    say(f"of real shapes the judge recognises {recognised(network, *drawn(300, seed=2)):.1%}")
    classes = list(shapes.CORNERS)
    for step in map(int, f.steps):
        model = dit_jax.load(f.workdir, step=step)
        assert model.config  # that of a run
        settings = {name: model.config["sample"][name] for name in ("sampler", "steps", "cfg_scale", "cfg_channels")}
        samples = model.sample(classes, f.num, **settings, batch_size=min(f.num, 96))
        share = recognised(network, as_input(samples), torch.arange(f.num) % len(classes))
        say(f"step {step}: of {f.num} samples it recognises {share:.1%} as the class asked for")
        if f.out:
            os.makedirs(f.out, exist_ok=True)
            rows = np.concatenate([samples[label :: len(classes)][:8] for label in range(len(classes))])
            dit_jax.grid(rows, 8).save(os.path.join(f.out, f"own_{step}.png"))


if __name__ == "__main__":
    cli.run(main)

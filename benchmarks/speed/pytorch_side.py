"""The child that times PyTorch, on the diffusers package's DiT or on a plain one. Nothing of JAX is imported here.

The package's class is made the paper's network. The timesteps' frequencies divide by 128, not 127. The second norm's
eps is 1e-6, not 1e-5. The embeddings of timestep and label, of which it keeps a copy in every block, are computed once
for all blocks, as the paper has it. Labels are dropped outside. Otherwise it is what its user runs: eager, with scaled
dot product attention, fused AdamW, the EMA in one call for all arrays, inference mode while denoising.

The plain one is pytorch_dit's. What a call repeats is compiled: the loss with its gradient, or a whole denoising step.
On a GPU that has bfloat16 it runs under autocast.
"""

# What these libraries declare does not name the attributes of a submodule, nor all that they export.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false

import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.speed import pytorch_dit
from benchmarks.speed.child import Timed, peak_memory, serve
from dit_jax.diffusion.process import linear_schedule, respace


@dataclass(frozen=True)
class Way:
    """How PyTorch runs.

    plain: pytorch_dit's network, else diffusers'. device: "cpu" or "cuda". bfloat16: under autocast. compiled: by
    torch.compile.
    """

    plain: bool = False
    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False

    def network(self, args):
        """Returns model(x, t, y), float32. args: of dit_jax's DiT."""
        return (pytorch_dit.DiT if self.plain else DiT)(**args).to(self.device)

    def predict(self, model, x, t, y):
        """Returns what the model predicts, in float32."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            return model(x, t, y).float()

    def compile(self, function):
        return torch.compile(function) if self.compiled else function

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self):
        """Returns the most bytes that the GPU has held; on CPU, the process."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()

    def matrix_rate(self):
        """Returns FLOP/s of PyTorch's large matrix product, measured as parallel.chips.measured_flops does."""
        n, best = 1536 if self.device == "cpu" else 8192, math.inf
        a = torch.ones(n, n, device=self.device, dtype=torch.bfloat16 if self.bfloat16 else torch.float32)
        for _ in range(6):
            self.wait()
            start = time.perf_counter()
            torch.mm(a, a)
            self.wait()
            best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best


def way_of(against):
    """Returns the Way of "diffusers", or of "pytorch": on a GPU if there is one, unless JAX is told to use the CPU."""
    if against == "diffusers":
        return Way()
    gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    bfloat16 = gpu and torch.cuda.get_device_capability() >= (8, 0)
    return Way(plain=True, device="cuda" if gpu else "cpu", bfloat16=bfloat16, compiled=True)


class Condition(torch.nn.Module):
    """Stands where the blocks look for their embeddings, and returns what was computed for all of them."""

    def forward(self, *_, **__):
        return self.value


def network(*, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, **_):
    """Returns that package's DiT of these arguments, which are those of dit_jax's DiT."""
    from diffusers.models import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=hidden_size // num_heads,
        in_channels=in_channels,
        out_channels=2 * in_channels,
        num_layers=depth,
        sample_size=input_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
        norm_eps=1e-6,
    )


class DiT(torch.nn.Module):
    """model(x, t, y) of images (B, C, H, W) returns (B, 2C, H, W). args: of dit_jax's DiT."""

    def __init__(self, **args):
        super().__init__()
        self.net = network(**args)
        self.embed, self.condition = self.net.transformer_blocks[0].norm1.emb, Condition()
        self.embed.time_proj.downscale_freq_shift = 0
        self.embed.class_embedder.dropout_prob = 0
        for block in self.net.transformer_blocks:
            block.norm1.emb = self.condition

    def forward(self, x, t, y):
        self.condition.value = self.embed(t, y, hidden_dtype=x.dtype)
        return self.net(x, t, y, return_dict=False)[0]


class Diffusion:
    """dit_jax/diffusion/ddpm.py in PyTorch, for images (B, C, H, W). schedule: a diffusion.process.Schedule, of which
    training and sampling take float32 tables."""

    def __init__(self, schedule, device="cpu"):
        def table(values):
            return torch.tensor(np.asarray(values, np.float32), device=device)[:, None, None, None]

        s = schedule
        self.steps, self.told = len(s), torch.tensor(s.timestep_map, device=device)
        self.sqrt, self.sqrt_1m = table(np.sqrt(s.alphas_cumprod)), table(np.sqrt(1 - s.alphas_cumprod))
        self.recip, self.recip_m1 = table(np.sqrt(1 / s.alphas_cumprod)), table(np.sqrt(1 / s.alphas_cumprod - 1))
        self.of_start, self.of_t = table(s.posterior_mean_coef1), table(s.posterior_mean_coef2)
        self.log_beta, self.log_posterior = table(np.log(s.betas)), table(s.posterior_log_variance_clipped)

    def p(self, out, x_t, t):
        """Returns mean and log variance of p(x_{t-1} | x_t)."""
        eps, v = out.chunk(2, dim=1)
        f = (v + 1) / 2
        start = self.recip[t] * x_t - self.recip_m1[t] * eps
        return self.of_start[t] * start + self.of_t[t] * x_t, f * self.log_beta[t] + (1 - f) * self.log_posterior[t]

    def losses(self, model, x, t, noise, y):
        """Returns the hybrid loss of each image (B,)."""
        x_t = self.sqrt[t] * x + self.sqrt_1m[t] * noise
        out = model(x_t, self.told[t], y)
        eps, v = out.chunk(2, dim=1)
        mean, log_variance = self.p(torch.cat([eps.detach(), v], dim=1), x_t, t)
        true_mean, true_log_variance = self.of_start[t] * x + self.of_t[t] * x_t, self.log_posterior[t]
        kl = 0.5 * (
            -1
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        nll = -log_likelihood(x, mean, 0.5 * log_variance)
        vb = torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)
        return ((noise - eps) ** 2).mean((1, 2, 3)) + vb

    def guided_step(self, model, x, noise, y, t, scale, channels):
        """Returns x_{t-1} of x_t at the steps t (B,).

        y: labels, then as many of the null class. channels: how many are guided; None is all.
        """
        out = model(torch.cat([x, x]), self.told[torch.cat([t, t])], y)
        conditional, unconditional = out.chunk(2)
        eps = (unconditional + scale * (conditional - unconditional))[:, : min(channels or x.shape[1], x.shape[1])]
        mean, log_variance = self.p(torch.cat([eps, conditional[:, eps.shape[1] :]], dim=1), x, t)
        return mean + torch.exp(0.5 * log_variance) * noise * (t > 0)[:, None, None, None]


def log_likelihood(x, mean, log_scale):
    """Returns that of x under a Gaussian, discretised in bins of 2/255 (DDPM equation 13)."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def log(p):
        return torch.log(p.clamp(min=1e-12))

    upper, lower = (cdf(torch.exp(-log_scale) * (x - mean + d)) for d in (1 / 255, -1 / 255))
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


class Trainer:
    """step() is what dit_jax/training/step.py does: forward, backward, AdamW, EMA. It returns the mean loss.

    way: a Way.
    """

    def __init__(self, args, *, batch_size, timesteps, label_dropout, optimizer, ema_decay, way):
        self.way, self.loss = way, way.compile(self._loss)
        self.model, self.diffusion = way.network(args), Diffusion(linear_schedule(timesteps), way.device)
        self.params = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=optimizer["learning_rate"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            fused=True,
        )
        shape = batch_size, args["in_channels"], args["input_size"], args["input_size"]
        self.x = torch.randn(shape, device=way.device)
        self.y = torch.randint(args["num_classes"], (batch_size,), device=way.device)
        self.num_classes, self.label_dropout, self.ema_decay = args["num_classes"], label_dropout, ema_decay

    def _loss(self, x, t, noise, y):
        return self.diffusion.losses(lambda *inputs: self.way.predict(self.model, *inputs), x, t, noise, y).mean()

    def step(self):
        dropped = torch.rand(len(self.y), device=self.y.device) < self.label_dropout
        return self.update(
            self.x,
            torch.randint(self.diffusion.steps, (len(self.x),), device=self.x.device),
            torch.randn_like(self.x),
            torch.where(dropped, self.num_classes, self.y),
        )

    def update(self, x, t, noise, y):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x, t, noise, y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - self.ema_decay)
        value = loss.item()
        self.way.wait()  # the loss is there before the parameters are
        return {"value": value}


def train_step(config, way):
    """Returns a call that makes a training step on one batch of noise."""
    return Trainer(
        config["model"],
        batch_size=config["batch_size"],
        timesteps=config["diffusion"]["timesteps"],
        label_dropout=config["diffusion"]["label_dropout"],
        optimizer=config["optimizer"],
        ema_decay=config["ema_decay"],
        way=way,
    ).step


def denoise(config, images, way, steps=1):
    """Returns a call that makes guided denoising steps, one after the other."""
    args, s = config["model"], config["sample"]
    model = way.network(args).eval().requires_grad_(False)
    if way.bfloat16:  # the weights as well, as dit_jax's sampler has them
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(torch.bfloat16)
    diffusion = Diffusion(respace(linear_schedule(config["diffusion"]["timesteps"]), s["steps"]), way.device)
    shape = 2, images, args["in_channels"], args["input_size"], args["input_size"]
    x, noise = torch.randn(shape, device=way.device)
    y = torch.cat([torch.arange(images) % args["num_classes"], torch.full((images,), args["num_classes"])])
    y = y.to(way.device)

    @way.compile
    def step(x, t):
        predict = lambda *inputs: way.predict(model, *inputs)
        return diffusion.guided_step(predict, x, noise, y, t, s["cfg_scale"], s["cfg_channels"])

    order = [torch.full((images,), diffusion.steps - 1 - i, device=way.device) for i in range(steps)]

    # In inference mode torch.compile would compile for it alone, and it gains nothing there.
    @(torch.no_grad() if way.compiled else torch.inference_mode())
    def call():
        x_t = x
        for t in order:
            x_t = step(x_t, t)
        way.wait()

    return call


def decode(images, side, args, scale, way):
    """Returns a call that decodes latents. args: of dit_jax's VAE. way: that of diffusers."""
    from diffusers.models import AutoencoderKL

    assert not way.plain
    levels = len(args["block_out_channels"])
    vae = (
        AutoencoderKL(
            **args | {"in_channels": 3},
            out_channels=3,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
        )
        .eval()
        .requires_grad_(False)
    )
    vae.encoder = None
    latents = torch.randn(images, args["latent_channels"], side, side)

    @torch.inference_mode()
    def call():
        vae.decode(latents / scale, return_dict=False)

    return call


def make_weights(config, folder):
    """Writes weights of `network` into a folder, in that package's format."""
    network(**config["model"]).save_pretrained(f"{folder}.part")
    os.replace(f"{folder}.part", folder)


@torch.inference_mode()
def first_picture(folder, steps, threads):
    """Makes the latent of a picture of weights on disk, in so many guided steps, as a user of that package would."""
    from diffusers.models import DiTTransformer2DModel

    torch.set_num_threads(threads)
    net = DiTTransformer2DModel.from_pretrained(folder).eval()
    diffusion, c = Diffusion(respace(linear_schedule(1000), str(steps))), net.config
    x, y = torch.randn(1, c.in_channels, c.sample_size, c.sample_size), torch.tensor([0, c.num_embeds_ada_norm])
    for i in reversed(range(steps)):
        x = diffusion.guided_step(
            lambda x, t, y: net(x, t, y, return_dict=False)[0], x, torch.randn_like(x), y, torch.full((1,), i), 4.0, 3
        )
    assert x.isfinite().all()


def make(spec):
    """Returns a Timed.

    spec: what, "train", "denoise" or "decode"; against, "diffusers" or "pytorch"; threads; and the arguments of that
    function.
    """
    torch.set_num_threads(spec.pop("threads"))
    torch.manual_seed(0)
    way = way_of(spec.pop("against"))
    info = {
        "dtype": "bfloat16" if way.bfloat16 else "float32",
        "threads": torch.get_num_threads(),
        "platform": "gpu" if way.device == "cuda" else "cpu",
    }
    what = {"train": train_step, "denoise": denoise, "decode": decode}[spec.pop("what")]
    return Timed(what(**spec, way=way), info, rate=way.matrix_rate, memory=way.memory)


if __name__ == "__main__":
    serve(make)

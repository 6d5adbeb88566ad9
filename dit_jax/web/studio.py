"""What a click on the demo's page does: it makes pictures, shows them as they form, and says how to make them again."""

import os
import queue
import shlex
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dit_jax.diffusion import catalog
from dit_jax.diffusion.objectives import DDPM
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import Progress, duration, say
from dit_jax.sampling.generator import Generator, is_whole
from dit_jax.sampling.model import Model, choose_labels, settings_of

# What one click may ask for. More is made by the command.
MAX_NUM, MAX_STEPS = 64, 1000
BATCH_SIZE = 32  # of dit_jax.sample and Model.sample, by default
TICK = 0.5  # seconds after which the page hears that the work goes on


@dataclass(frozen=True)
class Request:
    """The values on the page, named like the flags of dit_jax.sample. steps: evaluations of the network."""

    classes: str
    num: int
    cfg_scale: float
    cfg_interval: str
    sampler: str
    steps: int
    seed: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of Model.sample that make the pictures of this request."""
        batch = {"batch_size": self.num} if self.num > BATCH_SIZE else {}
        return {key: value for key, value in asdict(self).items() if value != ""} | batch


@dataclass(frozen=True)
class View:
    """What is to be seen at a moment.

    text: a sentence that says what is being done. done, steps: evaluations of the network. images: (num, H, W, C) as
    they are now, as Model.watch yields them; None if they have not changed. labels: the class of each image.
    """

    text: str
    done: int
    steps: int
    images: Shaped[np.ndarray, "num h w c"] | None
    labels: list[int]

    @property
    def finished(self) -> bool:
        return self.images is not None and self.done == self.steps


class _Stopped(Exception):
    """Ends the sampling of a request that nobody waits for any more."""


class _Work:
    """A request while it is worked on. The thread of the page reads what the thread that samples writes.

    Attributes: frames, a queue of (evaluations, images), or of the exception that ended the work; done, the evaluations
    so far; begun and first, when its turn came and when its first step was done, or None; stopped, an event that ends
    the work after the step that it is in.
    """

    def __init__(self, request: Request, generator: Generator):
        self.request, self.generator, self.steps = request, generator, len(generator.sampler)
        self.frames: queue.SimpleQueue[tuple[int, np.ndarray] | Exception] = queue.SimpleQueue()
        self.done, self.stopped = 0, threading.Event()
        self.begun: float | None = None
        self.first: float | None = None


class Studio:
    """Makes the pictures that visitors ask for, one request at a time.

    model: the Model. source: {flag of dit_jax.sample: value} that loads it: workdir or weights, and what is not the
    default.
    """

    def __init__(self, model: Model, source: dict[str, Any]):
        self.model, self.source = model, source
        self._turn = threading.Lock()
        self._compiled: weakref.WeakSet[Generator] = weakref.WeakSet()
        # Each moment of a latent is decoded, which takes as long as some steps.
        self._moments = 6 if model.vae else 25

    @property
    def guided(self) -> bool:
        """Whether the model can be guided: by a null class, or by a second network."""
        args = self.model.args
        return bool(self.model.guide or (args["num_classes"] and args["null_class"]))

    def defaults(self) -> Request:
        """The request that the page begins with: as the run makes its own grids, else as dit_jax.sample does."""
        settings = settings_of(self.model.objective, 0, None, None, 0.0, None, 3, "")
        values = {key: getattr(settings, key) for key in ("sampler", "steps", "cfg_scale", "cfg_interval")}
        if self.model.config:
            values |= {key: self.model.config["sample"].get(key, value) for key, value in values.items()}
        steps = str(values["steps"])
        return Request(
            classes="balanced",
            num=16,
            cfg_scale=float(values["cfg_scale"]) if self.guided else 1.0,
            cfg_interval=values["cfg_interval"] if self.guided else "",
            sampler=values["sampler"],
            steps=int(steps) if steps.isdecimal() else 50,
            seed=0,
        )

    def samplers(self) -> list[str]:
        """The samplers that fit the model."""
        return catalog.fitting(self.model.objective)

    def about(self) -> str:
        """What the model is, in a line."""
        model, args = self.model, self.model.args
        height, width, channels = model.shape
        step = f", step {self.source['step']}" if "step" in self.source else ""
        kind = f"latents of {height} x {width} x {channels}" if model.latent else f"{height} x {width} pixels"
        classes = f"{args['num_classes']} classes" if args["num_classes"] else "no classes"
        return f"{model.objective.name}, {kind}, {classes}{step}"

    def times(self) -> str:
        """What the times of the network are, in words."""
        objective = self.model.objective
        return f"timesteps, 0 to {objective.timesteps - 1}" if isinstance(objective, DDPM) else "times in 0 to 1"

    def classes(self) -> list[tuple[str, str]]:
        """[(text, value of --classes)] to choose from; empty if the model has no classes."""
        count = self.model.args["num_classes"]
        values = [("all in turn", "balanced"), ("random", "random")] if count else []
        for label in range(count):
            name = self.name(label)
            try:
                means = choose_labels(name, 1, count, 0, self.model.class_names)[0]
            except UserError:  # a name with a comma in a word
                means = None
            # ImageNet has two classes "crane", and a folder may be called 7.
            values.append((name, name) if means == label else (f"{name} ({label})", str(label)))
        return values

    def name(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        names = self.model.class_names
        return names[label].split(",")[0].strip() if names else str(label)

    def command(self, request: Request) -> str:
        """The command that makes the pictures of this request, into a folder of their own."""
        flags = self.source | request.arguments
        folder = f"{zlib.crc32(repr(flags).encode()):08x}"  # other values, other folder: none is overwritten
        flags["out"] = os.path.join(self.source.get("workdir", ""), "demo", folder)
        return shlex.join(["python", "-m", "dit_jax.sample", *(f"--{key}={value}" for key, value in flags.items())])

    def python(self, request: Request) -> str:
        """The three lines of Python that make the pictures of this request."""
        where, *more = self.source.items()
        load = ", ".join([repr(where[1]), *(f"{key}={value!r}" for key, value in more)])
        sample = ", ".join(f"{key}={value!r}" for key, value in request.arguments.items())
        return f"import dit_jax\nmodel = dit_jax.load({load})\nimages = model.sample({sample})"

    def make(self, request: Request) -> Iterator[View]:
        """Yields what is to be seen, from noise to the samples, and at least every half second.

        The last images are those of Model.sample. The work ends after the step that it is in if this generator is
        closed. Raises UserError naming the value that is wrong, at the first step.
        """
        labels, generator = self._checked(request)
        work = _Work(request, generator)
        threading.Thread(target=self._sample, args=(work,), daemon=True).start()
        done, finished = 0, False
        try:
            while not finished:
                try:
                    item = work.frames.get(timeout=TICK)
                except queue.Empty:
                    done, images = min(work.done, work.steps - 1), None
                else:
                    if isinstance(item, Exception):
                        raise item
                    done, images = item
                finished = images is not None and done == work.steps
                yield View(self._text(work, done), done, work.steps, images, labels)
        finally:
            work.stopped.set()

    def _checked(self, request):
        """(labels, the Generator). Raises UserError if the request makes no pictures, or more than a page should."""
        for name, most in (("num", MAX_NUM), ("steps", MAX_STEPS)):
            value = getattr(request, name)
            if not is_whole(value) or not 1 <= value <= most:
                raise UserError(
                    f"{name}={value}: must be a whole number of 1 to {most}; python -m dit_jax.sample makes more"
                )
        labels, settings = self.model.request(**asdict(request), batch_size=request.num)
        return labels.tolist(), self.model.generator(settings, request.num)

    def _sample(self, work):
        """Samples in a thread of its own when its turn comes."""
        request = work.request
        what = f"{request.num} of {request.classes}, {request.sampler}, {work.steps} steps, seed {request.seed}"
        with self._turn:
            bar = Progress("sample", work.steps, "steps")

            def go_on():
                if work.stopped.is_set():
                    raise _Stopped

            def progress(done):
                go_on()
                work.done, work.first = done, work.first or time.perf_counter()
                self._compiled.add(work.generator)
                bar.update(done)

            try:
                go_on()
                work.begun = time.perf_counter()
                if work.generator not in self._compiled:
                    say(f"compiling for {what}")
                for frame in self.model.watch(**asdict(request), moments=self._moments, progress=progress):
                    work.frames.put(frame)
                say(f"{what}: {duration(time.perf_counter() - work.begun)}")
            except _Stopped:
                say(f"{what}: stopped after {work.done} steps")
            except Exception as e:
                work.frames.put(e)
            finally:
                bar.close()

    def _text(self, work, done):
        """The sentence for a moment with so many steps done."""
        if work.begun is None:
            return "Waiting for the step of the one before, which was stopped."
        seconds, num = time.perf_counter() - work.begun, work.request.num
        if done == work.steps:
            return f"{num} picture{'s' * (num > 1)} in {work.steps} steps: {duration(seconds)}"
        if done > 1:
            left = (time.perf_counter() - work.first) / (work.done - 1) * (work.steps - done)
            return f"Step {done} of {work.steps}, {duration(left)} left"
        if work.generator not in self._compiled:
            return f"Compiling, the first time with this sampler and so many steps and pictures: {duration(seconds)}"
        return f"Step {done} of {work.steps}"

"""A page to try a model on: python -m dit_jax.demo

    python -m dit_jax.demo --workdir=runs/digits
    python -m dit_jax.demo --weights=DiT-XL-2-256x256.pt --vae=stabilityai/sd-vae-ft-ema --port=8000

It needs Gradio: pip install -e '.[demo]'. The page shows how pictures of a class form from noise, with the sampler,
guidance and seed that one chooses, and the command and the Python that make the same pictures. The requests of all
visitors are worked on one at a time, in order. Only this machine can open the page unless --host says otherwise.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_model()
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    flags.DEFINE_integer("port", 7860, "port to listen on; 0: a free one", lower_bound=0, upper_bound=65535)
    cli.parse()  # above the imports that take time

import errno
import functools
import signal
import socket

from dit_jax.parallel import sharding
from dit_jax.runtime import ending, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say

# The flags that load a model, where they are not the default: for the command that the page shows.
SOURCE = ("workdir", "weights", "step", "num_heads", "num_classes", "objective", "which", "vae", "guide", "guide_step")


def main() -> None:
    f = flags.FLAGS
    process.quiet_gradio()
    try:
        from dit_jax.web import page
    except ModuleNotFoundError as e:
        raise UserError(f"{e.name} is missing: pip install -e '.[demo]'") from None
    from dit_jax.web.studio import Studio

    listener = bind(f.host, f.port)
    ending.on_signal(signal.SIGINT, functools.partial(ending.end, 1, "interrupted; the page is closed"))
    ending.on_signal(
        signal.SIGTERM, functools.partial(ending.end, ending.AGAIN, "stopped by SIGTERM; the page is closed")
    )
    process.one_step_at_a_time()
    process.keep_compiled()
    if f.workdir or f.weights:
        say(f"loading {f.workdir or f.weights}")
    model = cli.load_model(sharding.make_mesh())
    # Those that were the newest: a run may go on.
    steps = {"step": model.origin.get("step"), "guide_step": model.origin.get("guide", {}).get("step")}
    values = {name: f[name].value for name in SOURCE if f[name].value != f[name].default} | steps
    source = {name: values[name] for name in SOURCE if values.get(name) is not None}
    if f.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"--host={f.host}: anyone who reaches this port can use the page")
    page.serve(page.build(Studio(model, source), f.workdir or f.weights), listener)


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to this address. Raises UserError naming the flag."""
    here = "name an address of this machine, as 127.0.0.1"
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as e:
        raise UserError(f"--host={host}: {e.strerror}: {here}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as e:
        if e.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host={host}: {e.strerror}: {here}") from None
        raise UserError(f"--port={port}: {e.strerror} ({host}): name another, or 0 for a free one") from None
    return listener


if __name__ == "__main__":
    cli.run(main)

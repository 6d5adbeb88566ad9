"""The demo's page, and the server of it. Gradio is imported here only: it is an extra."""

import base64
import functools
import html
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import gradio.themes
import numpy as np
import uvicorn
from fastapi import FastAPI
from jaxtyping import Shaped

from dit_jax.runtime import images as pictures
from dit_jax.runtime.errors import line_of
from dit_jax.runtime.progress import say, waiting
from dit_jax.web.studio import MAX_NUM, Request, Studio

WAITING = 20  # requests that may wait for their turn
STRIP = 9  # moments of the first picture that stay to be seen

CSS = """
.tiles { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--tile)), 1fr)); }
.tiles figure { margin: 0; text-align: center; }
.tiles img { width: 100%; height: auto; margin: 0; border-radius: 4px; }
.tiles img.small { image-rendering: pixelated; }
.tiles figcaption { font-size: 13px; line-height: 1.6; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#status p { margin: 0 0 8px; }
#status .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); }
#status .bar div { height: 100%; border-radius: 4px; background: var(--color-accent); }
#status .error, #status .clear-status { display: none; } /* it would lie over the message */
.cm-scroller { min-height: 0 !important; }
"""


def tiles(images: Shaped[np.ndarray, "n h w c"], captions: list[str], size: int) -> str:
    """HTML of pictures, or of latents, with captions. Each is a PNG of its own in the page.

    size: the least width in pixels at which they are shown. Small pictures are enlarged without blur.
    """
    kind = "small" if images.shape[1] <= 64 else "large"
    images = images if images.dtype == np.uint8 else pictures.to_uint8(images)
    cells = [
        f'<figure><img class="{kind}" decoding="sync" alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(pictures.png(image)).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in zip(images, captions)
    ]
    return f'<div class="tiles" style="--tile: {size}px">{"".join(cells)}</div>'


def status(text: str, share: float) -> str:
    """HTML of a sentence and a bar. share: of the work, that is done; 1 is all."""
    bar = f'<div class="bar"><div style="width: {share:.1%}"></div></div>' if share < 1 else ""
    return f'<p role="status">{html.escape(text)}</p>{bar}'


def strip_of(moments: list[tuple[int, np.ndarray]]) -> str:
    """HTML of one picture on its way from noise. moments: of (steps done, the picture (h, w, c))."""
    chosen = np.linspace(0, len(moments) - 1, min(STRIP, len(moments))).round().astype(int)
    done, images = zip(*(moments[i] for i in chosen))
    return tiles(np.stack(images), [f"step {step}" if step else "noise" for step in done], 64)


def show(studio: Studio, *values: Any) -> Iterator[tuple]:
    """Yields the values of the page's outputs while the pictures of a click form. values: of Request, in its order.

    The outputs are the HTML of the status, of the samples and of the strip, the command, the Python. Raises gr.Error.
    """
    same, moments = gr.skip(), []
    try:
        request = Request(*values)
        for view in studio.make(request):
            shown, strip, command, python = same, "", same, same
            if view.images is not None:
                moments.append((view.done, view.images[0]))
                size = 80 if len(view.images) > 8 and view.images.shape[1] <= 64 else 140
                shown = tiles(view.images, [studio.name(label) for label in view.labels], size)
            if view.finished:
                strip, command, python = strip_of(moments), studio.command(request), studio.python(request)
            yield status(view.text, view.done / view.steps), shown, strip, command, python
    except Exception as e:
        line = line_of(e)
        say(line)
        yield status(line, 1), same, same, same, same
        # Gradio renders the text as HTML.
        raise gr.Error(html.escape(line), title="Not made", print_exception=False) from None


def build(studio: Studio, title: str) -> gr.Blocks:
    """The page. title: what its heading says, plain text."""
    first, classes = studio.defaults(), studio.classes()
    with gr.Blocks(title=f"{title} - dit_jax", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>{html.escape(studio.about())}</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                wanted = gr.Dropdown(
                    classes,
                    value=first.classes,
                    label="Class",
                    info="or several, as in 3,7: they are taken in turn",
                    allow_custom_value=True,
                    visible=bool(classes),
                )
                num = gr.Slider(1, MAX_NUM, first.num, step=1, label="Number of pictures")
                scale = gr.Slider(
                    1, max(10, first.cfg_scale), first.cfg_scale, step=0.1, label="Guidance", info="1 is none",
                    visible=studio.guided,
                )  # fmt: skip
                interval = gr.Textbox(
                    first.cfg_interval,
                    label="Guided between the times",
                    info=f"LOW,HIGH of {studio.times()}; empty: always",
                    visible=studio.guided,
                )
                with gr.Row():
                    sampler = gr.Dropdown(
                        studio.samplers(), value=first.sampler, label="Sampler", allow_custom_value=True, min_width=130
                    )
                    steps = gr.Number(first.steps, label="Steps", precision=0, min_width=90)
                    seed = gr.Number(first.seed, label="Seed", precision=0, min_width=90)
                with gr.Row():
                    make = gr.Button("Make pictures", variant="primary", elem_id="make")
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Column(scale=3, min_width=300):
                state = gr.HTML(
                    status("The first click compiles, which can take a minute or more.", 1), elem_id="status"
                )
                samples = gr.HTML(elem_id="samples")
                strip = gr.HTML(elem_id="strip")
        command = gr.Code(
            label="The command that makes these pictures",
            language="shell",
            wrap_lines=True,
            buttons=["copy"],
            show_line_numbers=False,
        )
        python = gr.Code(
            label="The same from Python", language="python", wrap_lines=True, buttons=["copy"], show_line_numbers=False
        )
        click = make.click(
            functools.partial(show, studio),
            [wanted, num, scale, interval, sampler, steps, seed],
            [state, samples, strip, command, python],
            concurrency_limit=1,
            show_progress_on=state,
            scroll_to_output=True,
            api_visibility="private",
        )
        stop.click(None, cancels=click).then(
            lambda: status("Stopped.", 1), None, state, queue=False, api_visibility="private"
        )
    page.queue(max_size=WAITING)
    return page


def serve(page: gr.Blocks, listener: socket.socket) -> None:
    """Serves the page on a bound socket until the process ends."""
    host, port = listener.getsockname()[:2]
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        "/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=1,  # nothing is uploaded
        # Fonts of the system: the page loads nothing from elsewhere.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    # In the main thread it would handle signals, which runtime/ending.py does.
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    name = f"[{host}]" if ":" in host else host
    say(f"http://{name}:{port}/ (Ctrl-C ends it)")
    with waiting(""):  # for visitors, as long as it takes
        thread.join()

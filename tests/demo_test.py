"""The demo: what its page shows is what the command and the Python that it shows make."""

import base64
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, one_error, start
from numpy.testing import assert_array_equal
from PIL import Image

import dit_jax
from dit_jax.demo import bind
from dit_jax.parallel import sharding
from dit_jax.runtime.images import to_uint8
from dit_jax.web.studio import Request, Studio
from dit_jax.weights import files

REQUEST = Request(classes="3,7", num=4, cfg_scale=2.0, cfg_interval="", sampler="ddim", steps=6, seed=3)
CHROMIUM = "/usr/bin/chromium"
# Of a run that is worth looking at; then docs/pictures/demo.png is made anew. See docs/demo.md.
PICTURED = os.environ.get("DIT_JAX_DEMO_RUN")


@pytest.fixture(scope="module")
def studio(network, tmp_path_factory):
    """Of a weights file, which makes latents."""
    path = tmp_path_factory.mktemp("weights") / "a.npz"
    files.write(str(path), network("a")[3])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    source = {"weights": str(path), "num_heads": 4}
    return Studio(dit_jax.load(source["weights"], num_heads=4, mesh=mesh), source)


def last(views):
    return list(views)[-1]


def test_a_click_shows_noise_turning_into_the_pictures_of_its_python(studio, compilations):
    views = list(studio.make(REQUEST))
    shown = [view for view in views if view.images is not None]
    assert [view.done for view in shown] == list(range(7)) and [view.finished for view in shown] == [False] * 6 + [True]
    assert views[0].text.startswith("Compiling") and views[-1].text.startswith("4 pictures in 6 steps")
    assert views[-1].labels == [3, 7, 3, 7] and shown[0].images.std() > 0.9
    scope = {}
    exec(studio.python(REQUEST), scope)
    np.testing.assert_allclose(scope["images"], shown[-1].images, atol=1e-3)  # on four devices
    assert_array_equal(studio.model.sample(**REQUEST.arguments, progress=False), shown[-1].images)
    compilations.clear()
    other = list(studio.make(replace(REQUEST, classes="balanced", num=3, cfg_scale=3.5, seed=5)))
    assert not compilations and not any(view.text.startswith("Compiling") for view in other)
    assert other[-1].labels == [0, 1, 2] and (other[-1].images != shown[-1].images[:3]).any()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(classes="99"), "99 is no class"),
        (dict(classes="cat"), "classes=cat"),
        (dict(num=65), "num=65: must be a whole number of 1 to 64"),
        (dict(steps=1001), "steps=1001"),
        (dict(steps=None), "steps=None"),
        (dict(seed=None), "seed=None"),
        (dict(cfg_scale=-1.0), "cfg_scale=-1"),
        (dict(cfg_interval="1"), "cfg_interval='1'"),
        (dict(sampler="heun"), "does not fit"),
        (dict(sampler="edm", steps=4), "3, 5"),
    ],
)
def test_bad_values_are_refused_in_a_line(studio, change, words):
    with pytest.raises(dit_jax.UserError, match=words) as e:
        next(studio.make(replace(REQUEST, **change)))
    assert "\n" not in str(e.value)


def test_closing_stops_the_work_and_the_next_one_begins(studio, capsys):
    """As when a visitor presses Stop, or closes the page."""
    views = studio.make(replace(REQUEST, steps=1000))
    while next(views).done < 2:
        pass
    views.close()
    assert last(studio.make(REQUEST)).finished
    assert "1000 steps, seed 3: stopped after" in capsys.readouterr().out


def test_an_error_while_sampling_is_raised_and_the_next_one_begins(studio, monkeypatch):
    monkeypatch.setattr("dit_jax.sampling.model._check_finite", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(studio.make(REQUEST))
    monkeypatch.undo()
    assert last(studio.make(REQUEST)).finished


def test_classes_are_named_where_the_model_has_names(studio, monkeypatch):
    names = ["circle", "tench, Tinca tinca", "crane", "crane", "7", *"fghij"]
    monkeypatch.setattr(studio.model, "class_names", names)
    choices = dict(studio.classes())
    assert choices == {
        **{"all in turn": "balanced", "random": "random", "circle": "circle", "tench": "tench", "crane": "crane"},
        **{"crane (3)": "3", "7 (4)": "4", **{name: name for name in "fghij"}},
    }
    for label, value in enumerate(list(choices.values())[2:]):
        assert next(studio.make(replace(REQUEST, classes=value))).labels == [label] * 4
    assert studio.name(1) == "tench"


@pytest.mark.parametrize("classes", ["balanced", "it's,a b"])
def test_the_command_is_one_of_the_flags_of_sample(studio, classes, monkeypatch):
    """With names that a shell would take apart. Only what is not the default is in it."""
    monkeypatch.setattr(studio, "source", {"workdir": "my runs/$HOME", "step": 24, "which": "raw"})
    request = replace(REQUEST, classes=classes, num=40, cfg_interval="100,800")
    command = shlex.split(studio.command(request))
    assert command[:3] == ["python", "-m", "dit_jax.sample"]
    code = (
        "import sys\nfrom absl import flags\nfrom dit_jax import cli\ncli.define_samples(1, '', 1)\n"
        "cli.define_path('out', None, '')\ncli._parse_flags(sys.argv)\n"
        "print({name: flags.FLAGS[name].value for name in flags.FLAGS if flags.FLAGS[name].present})"
    )
    done = subprocess.run([sys.executable, "-c", code, *command[3:]], cwd=ROOT, capture_output=True, text=True)
    given = eval(done.stdout)
    assert given.pop("out").startswith("my runs/$HOME/demo/")
    assert given == studio.source | request.arguments | {"steps": "6"} and given["batch_size"] == 40


@pytest.mark.slow
def test_the_command_makes_the_pictures(studio, command, tmp_path):
    images = last(studio.make(REQUEST)).images
    words = shlex.split(studio.command(REQUEST))
    assert words[-1].startswith("--out=demo/")
    status, _, err = command("sample", *words[3:-1], f"--out={tmp_path}")
    assert status == 0, err
    assert_array_equal(np.load(tmp_path / "samples.npz")["latents"], images)


def test_addresses_that_cannot_be_listened_on():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(dit_jax.UserError, match=f"--port={port}: .*name another, or 0 for a free one"):
            bind("127.0.0.1", port)
    for host in ("nowhere.invalid", "192.0.2.1"):  # names nothing; an address that no machine has
        with pytest.raises(dit_jax.UserError, match=f"--host={host}: .*name an address of this machine"):
            bind(host, 0)


def test_without_gradio_the_command_says_what_to_install(command):
    without = "import sys\nsys.modules['gradio'] = None"
    one_error(command("demo", "--workdir=none", code=without), "gradio is missing: pip install -e '.[demo]'")


def pictures(html_or_urls):
    """The pixels of the PNGs in a text, or of data URLs."""
    urls = html_or_urls if isinstance(html_or_urls, list) else html_or_urls.split('src="')[1:]
    data = [base64.b64decode(url.partition("base64,")[2].partition('"')[0]) for url in urls]
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in data])


def test_the_outputs_of_the_page(studio, monkeypatch):
    """Without a browser: pictures with captions; a class that is HTML is shown as text, in the message as well."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    from dit_jax.web import page

    values = ("3,7", 4, 2.0, "", "ddim", 6, 3)
    *_, (status, samples, strip, command, python) = page.show(studio, *values)
    assert_array_equal(pictures(samples), to_uint8(last(studio.make(REQUEST)).images))
    assert samples.count("<figcaption>7</figcaption>") == 2 and "noise" in strip and "step 6" in strip
    assert "4 pictures" in status and command == studio.command(REQUEST) and python == studio.python(REQUEST)
    with pytest.raises(gradio.Error) as e:
        list(page.show(studio, "<b>", *values[1:]))
    assert "--classes=&lt;b&gt;" in e.value.message and not e.value.print_exception
    monkeypatch.setattr(studio.model, "config", {"sample": {"sampler": "unipc", "steps": "20", "cfg_interval": "1,2"}})
    assert studio.defaults() == Request("balanced", 16, 4.0, "1,2", "unipc", 20, 0)
    built = page.build(studio, "<runs>")
    text = str(built.get_config_file())
    assert "&lt;runs&gt;" in text and "ddpm, latents of 8 x 8 x 4, 10 classes" in text and not built.analytics_enabled


@contextmanager
def served(workdir, *flags):
    """python -m dit_jax.demo of a run, on a free port: its address. It is to end with one line."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = start("demo", f"--workdir={workdir}", f"--port={port}", *flags)
    try:
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 75 and err == "error: stopped by SIGTERM; the page is closed\n", err
        assert f"http://127.0.0.1:{port}/ (Ctrl-C ends it)" in out
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    for package in ("playwright", "gradio"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[test]'")
    from playwright.sync_api import sync_playwright

    args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    args += ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(str(profile), executable_path=CHROMIUM, args=args)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context
        context.close()


class Page:
    """A page of the demo in a browser. outside: the addresses elsewhere that it asked for, and did not get."""

    def __init__(self, chromium, url, width=1280, height=800):
        self.outside, self.errors, self.page = [], [], chromium.new_page()
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.route("**/*", lambda route: self._route(route, url))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url, timeout=90_000)
        self.page.wait_for_selector("#make")

    def _route(self, route, url):
        if route.request.url.startswith((url, "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def fill(self, label, value):
        field = (
            self.page.get_by_label(label, exact=True)
            if label == "Class"
            else self.page.get_by_role("spinbutton", name=label)
        )
        field.click()
        field.fill(value)
        field.press("Enter")

    def click(self, name="make"):
        self.page.click(f"#{name}")

    def wait(self, words):
        """Until the status has these words. Returns it."""
        self.page.wait_for_function(f"document.querySelector('#status').innerText.includes({words!r})", timeout=60_000)
        return self.page.inner_text("#status")

    def images(self):
        urls = self.page.eval_on_selector_all("#samples img", "images => images.map(image => image.src)")
        return pictures(urls)

    def made(self):
        """(the pictures that are shown, those that the command that is shown makes)."""
        words = shlex.split(self.page.locator(".cm-content").nth(0).inner_text())
        process = start("sample", *words[3:])
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        return self.images(), np.load(f"{words[-1].partition('=')[2]}/samples.npz")["arr_0"]


@pytest.mark.slow
def test_in_a_browser(uninterrupted, chromium, tmp_path):
    """Load, choose, click: the pictures of the command that is shown. Then other values, wrong ones, Stop, a queue."""
    run = shutil.copytree(uninterrupted, tmp_path / "my run")
    with served(run) as url:
        page = Page(chromium, url)
        page.fill("Number of pictures", "4")
        page.fill("Class", "3")
        page.fill("Steps", "6")
        page.click()
        page.wait("4 pictures in 6 steps")
        page.page.wait_for_selector("#strip img")
        assert page.page.locator("#strip img").count() == 7
        for i, words in enumerate(("python -m dit_jax.sample ", "import dit_jax\nmodel = dit_jax.load(")):
            page.page.get_by_label("Copy").nth(i).click()
            assert page.page.evaluate("navigator.clipboard.readText()").startswith(words)
        first, expected = page.made()
        assert first.shape == (4, 8, 8, 3) and first.std() > 0
        assert_array_equal(first, expected)

        page.fill("Class", "99")
        page.click()
        page.wait("99 is no class of this model, which has 0 to 9")
        assert "99 is no class" in page.page.inner_text("[data-testid=toast-body]")
        page.fill("Class", "8,5")
        page.fill("Seed", "9")
        page.click()
        page.wait("4 pictures in 6 steps")
        second, expected = page.made()
        assert_array_equal(second, expected)
        assert (second != first).any()

        other = Page(chromium, url)
        other.fill("Number of pictures", "2")
        other.fill("Steps", "6")
        page.fill("Number of pictures", "64")
        page.fill("Steps", "1000")
        page.click()
        other.click()
        assert "1/1" in other.wait("queue")
        page.wait("Step ")
        page.click("stop")
        page.wait("Stopped.")
        other.wait("2 pictures in 6 steps")
        page.fill("Steps", "500")
        other.fill("Number of pictures", "1")
        page.click()
        other.click()
        other.wait("queue")
        other.wait("1 picture in 6 steps")
        assert "64 pictures in 500 steps" in page.page.inner_text("#status")
        assert page.errors == other.errors == []
        assert page.page.goto(f"{url}docs").status == 404  # where FastAPI would load scripts from elsewhere
        assert page.outside == other.outside == []


@pytest.mark.slow
def test_the_page_fits_a_desk_and_a_phone(uninterrupted, chromium, tmp_path):
    """Makes docs/pictures/demo.png if a run is named."""
    with served(PICTURED or uninterrupted) as url:
        for width, height in ((390, 844), (1280, 800)):
            page = Page(chromium, url, width, height)
            page.fill("Number of pictures", "24")
            page.click()
            page.wait("24 pictures in ")
            page.page.wait_for_selector("#strip img")
            page.page.wait_for_timeout(500)
            assert page.page.evaluate("document.documentElement.scrollWidth") <= width
            page.page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    if PICTURED:
        shutil.copy(tmp_path / "1280.png", ROOT / "docs/pictures/demo.png")
        shutil.copy(tmp_path / "390.png", "/tmp/demo_phone.png")

"""Fetching published files: what a kill, another process and a lost network leave behind."""

import threading

import fake_hub
import pytest

from dit_jax.runtime import files
from dit_jax.runtime.errors import UserError
from dit_jax.weights import diffusers, hub

BODY = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = {name.replace(".*", ".safetensors"): BODY for name in diffusers.NEEDED}
    server = fake_hub.Hub({"files": {"w.pt": BODY}, "me/dit": folder})
    server.use(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "AUTHORS", f"{server.url}/")
    yield server
    server.close()


@pytest.mark.parametrize("part, requests", [(BODY[:5000], 1), (BODY, 1), (BODY + b"more", 2)])
def test_what_an_earlier_fetch_left_is_resumed_or_dropped(part, requests, server, tmp_path):
    """A part that is complete, as after a kill before the renaming, and one that is longer than the file."""
    weights = tmp_path / "dit_jax/weights"
    weights.mkdir(parents=True)
    (weights / "w.pt.part").write_bytes(part)
    with open(hub.fetch_authors("w.pt"), "rb") as f:
        assert f.read() == BODY
    assert [path.name for path in weights.iterdir()] == ["w.pt"] and len(server.served) == requests


@pytest.mark.parametrize("ends", ["with the file", "without it"])
def test_a_file_that_another_process_fetches_is_waited_for(ends, server, tmp_path, capsys):
    (tmp_path / "dit_jax/weights").mkdir(parents=True)
    path = tmp_path / "dit_jax/weights/w.pt"
    other = files.open_locked(f"{path}.part")
    waiting = threading.Thread(target=hub.fetch_authors, args=("w.pt",))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and "w.pt: another process is fetching it" in capsys.readouterr().out
    with other:
        part = tmp_path / "dit_jax/weights/w.pt.part"
        if ends == "with the file":
            other.write(BODY)
            part.rename(path)
        else:
            part.unlink()
    waiting.join(30)
    assert not waiting.is_alive() and path.read_bytes() == BODY and not part.exists()
    assert len(server.served) == (0 if ends == "with the file" else 1)


def test_without_a_network_only_a_complete_folder_is_used(server, monkeypatch):
    def fetch():
        return hub.fetch("me/dit", diffusers.PATTERNS, needed=diffusers.NEEDED)

    hub.fetch("me/dit", ["model_index.json", "transformer/config.json"])
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    with pytest.raises(UserError, match="me/dit: cannot be fetched .*(refused|connect).*name their folder") as e:
        fetch()
    assert "\n" not in str(e.value)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    folder = fetch()
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    assert fetch() == folder

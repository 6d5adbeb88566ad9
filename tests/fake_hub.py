"""A Hugging Face hub on this machine: what huggingface_hub asks of one, with faults that can be injected."""

import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: {name: {file: bytes}}. served: the paths that were asked for with GET. fault: None, or "cut" (the
    connection breaks 1,000 bytes before the end) or "changed" (the last bytes of a file are others)."""

    def __init__(self, repositories):
        self.repositories, self.served, self.fault = repositories, [], None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                hub.served.append(self.path)
                self.answer(body=True)

            def answer(self, body):
                path = self.path.partition("?")[0]
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/.*)?", path):
                    files = hub.repositories.get(match[1])
                    if files is None:
                        return self.error()
                    listing = [
                        {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data),
                         "lfs": {"oid": digest(data), "size": len(data), "pointerSize": 1}} for name, data in files.items()
                    ]  # fmt: skip
                    info = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    return self.send(json.dumps(listing if match[2] == "tree" else info).encode(), body, {})
                match = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path)
                data = hub.repositories.get(match[1] if match else "files", {}).get(match[2] if match else path[1:])
                if data is None:
                    return self.error()
                self.send(data, body, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": len(data),
                                       "X-Linked-Etag": f'"{digest(data)}"', "Accept-Ranges": "bytes"})  # fmt: skip

            def error(self, status=404, headers={"X-Error-Code": "EntryNotFound"}):
                self.send_response(status)
                for name, value in (headers | {"Content-Length": "0"}).items():
                    self.send_header(name, value)
                self.end_headers()

            def send(self, data, body, headers):
                start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                whole, data = len(data), data[int(start[1]) if start else 0 :]
                if start and not data:
                    return self.error(416, {"Content-Range": f"bytes */{whole}"})
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start[1]}-{whole - 1}/{whole}")
                for name, value in (headers | {"Content-Length": len(data)}).items():
                    self.send_header(name, str(value))
                self.end_headers()
                if hub.fault == "changed" and headers:
                    data = data[:-4] + b"1234"
                cut = hub.fault == "cut" and headers
                if body:
                    self.wfile.write(data[: len(data) - 1000] if cut else data)
                if body and cut:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://localhost:{self.server.server_port}"

    def use(self, monkeypatch, cache):
        """Makes this process take this hub for the hub, and `cache` for the home of caches."""
        import huggingface_hub.constants as constants

        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def digest(data):
    return hashlib.sha256(data).hexdigest()

"""Weights pass through the hub's own client; the hub here is a folder behind a small server."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from art_denoised import load_denoiser, save_denoiser
from art_denoised.demo import digits_denoiser

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """What the client asks of a hub, for repositories that are folders."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.split("?")[0].split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'you')}/{asked['name']}"
            self._reply({"url": f"{self.server.url}/{name}", "id": name})
        elif "preupload" in parts:
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._reply({"files": [{"path": path, **mode} for path in files]})
        elif "commit" in parts:
            repo = self.server.folder / parts[3] / parts[4]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = repo / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.url}/{parts[3]}/{parts[4]}/commit/{COMMIT}"
            self._reply({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._reply({"files": [], "type": "model"})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        if parts[1] == "api":
            repo = self.server.folder / parts[3] / parts[4]
            files = [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]
            if "tree" in parts:
                entries = [{"type": "file", "path": f, "size": 1, "oid": COMMIT} for f in files]
                self._reply(entries)
                return
            siblings = [{"rfilename": file} for file in files]
            self._reply({"id": "/".join(parts[3:5]), "sha": COMMIT, "siblings": siblings})
            return
        content = self.server.folder.joinpath(*parts[1:3], *parts[5:]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(content, headers)

    do_HEAD = do_GET  # noqa: N815

    def _reply(self, answer: object) -> None:
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def push(hub: Hub, name: str, folder: Path) -> None:
    api = HfApi(endpoint=hub.url, token="hf_none")
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)


def test_weights_are_pushed_and_loaded(hub, tmp_path):
    (tmp_path / "upload").mkdir()
    save_denoiser(digits_denoiser(), tmp_path / "upload" / "denoiser.safetensors", sigma=0.25)
    push(hub, "you/denoiser", tmp_path / "upload")
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    file = hf_hub_download("you/denoiser", "denoiser.safetensors", **options)
    folder = snapshot_download("you/denoiser", **options)
    assert Path(file).parent == Path(folder)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = digits_denoiser()(x, 0.25)
        torch.testing.assert_close(load_denoiser(file, sigma=0.25)(x, 0.25), expected)

"""A small image-classification service with the failures of real ones, on this machine.

    python -m tests.api_server [--port 8765] [--failures 0.2]

POST /classify with {"image": PNG in base64} answers {"predictions": [{"label": "seven"}]}. Every
image that is classified is charged, unless its Idempotency-Key was charged before. GET /ledger
tells what was charged and asked. Failures are drawn per request: errors of the server, too many
requests, connections that break before or after the image was charged, and empty answers.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from art_denoised.demo import digits_classifier

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_KINDS = ("500", "429", "break before", "break after", "empty")


class Service(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, port: int = 0, failures: float = 0.0, seed: int = 0, latency: float = 0.0
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.classifier = digits_classifier()
        self.failures, self.random = failures, np.random.default_rng(seed)
        self.latency = latency
        self.lock = threading.Lock()
        self.answers: dict[str, str] = {}  # what was charged: key -> label
        self.requests: list[str] = []  # keys of all requests that were charged or answered again
        self.failed: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/classify"

    def fate(self) -> str:
        with self.lock:
            if self.random.random() >= self.failures:
                return "answer"
            kind = str(self.random.choice(_KINDS))
            self.failed[kind] = self.failed.get(kind, 0) + 1
            return kind

    def classify(self, key: str, png: bytes) -> str:
        pixels = np.asarray(Image.open(io.BytesIO(png)), np.float32) / 255
        with self.lock, torch.no_grad():
            self.requests.append(key)
            if key not in self.answers:
                logits = self.classifier(torch.from_numpy(pixels)[None, None])
                self.answers[key] = NAMES[int(logits.argmax())]
            return self.answers[key]


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        with self.server.lock:
            ledger = {
                "charged": len(self.server.answers),
                "requests": len(self.server.requests),
                "failed": self.server.failed,
            }
        self._reply(200, ledger)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.latency)
        fate = self.server.fate()
        if fate == "500":
            return self._reply(500, {"error": "internal"})
        if fate == "429":
            return self._reply(429, {"error": "slow down"}, {"Retry-After": "0.01"})
        if fate == "break before":
            return self._break()
        if self.headers.get("Authorization") == "wrong":
            return self._reply(403, {"error": "who are you"})
        png = base64.b64decode(json.loads(body)["image"])
        key = self.headers.get("Idempotency-Key") or hashlib.sha256(png).hexdigest()
        label = self.server.classify(key, png)
        if fate == "break after":
            return self._break()
        return self._reply(200, {"predictions": [] if fate == "empty" else [{"label": label}]})

    def _reply(self, code: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client was killed

    def _break(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--failures", type=float, default=0.2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Service(arguments.port, arguments.failures) as service:
        print(service.url, flush=True)
        service.serve_forever()


if __name__ == "__main__":
    main()

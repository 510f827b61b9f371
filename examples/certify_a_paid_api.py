r"""Certify a classifier that can only be queried, through an API that charges and fails.

    python examples/certify_a_paid_api.py [--out DIR]

The API is a small server on this machine that classifies handwritten digits and fails a tenth of
the requests. Each image is certified from 120 queries, as Salman et al. did with vision APIs. Every
answer is written to a file when it comes. If you stop the program and start it again with the same
--out, it sends only queries without an answer.

The same for a service of your own, on the command line:

    art-denoised certify --api URL --answer predictions.0.label --classes classes.txt \
        --price .0015 --budget 5 --data imagefolder:photos --resize 224 --crop 224 \
        --sigma 0.25 --n 100 --n0 20 --out runs/api
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import art_denoised as ad
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation import preview_queries
from art_denoised.smoothing import Retry

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSIFIER = digits_classifier()
REQUESTS = count()


class Service(BaseHTTPRequestHandler):
    """Takes {"image": PNG in base64} and answers {"predictions": [{"label": "seven"}]}."""

    def do_POST(self) -> None:
        """Classify an image; every tenth request fails."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if next(REQUESTS) % 10 == 9:
            self.reply(500, {"error": "internal"})
            return
        png = Image.open(io.BytesIO(base64.b64decode(body["image"])))
        x = torch.from_numpy(np.asarray(png, np.float32) / 255)[None, None]
        with torch.no_grad():
            label = NAMES[int(CLASSIFIER(x).argmax())]
        self.reply(200, {"predictions": [{"label": label}]})

    def reply(self, code: int, answer: object) -> None:
        """Answer in JSON."""
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--images", type=int, default=10)
    arguments = parser.parse_args()
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        box = ad.BlackBox(
            ad.HttpClassifier(
                f"http://127.0.0.1:{server.server_address[1]}", answer="predictions.0.label"
            ),
            classes=NAMES,
            retry=Retry(backoff=0.01),
            budget=ad.Budget(cost=5.0, cost_per_query=0.0015),
        )
        smoother = ad.Smoother(box, sigma=0.25, denoiser=digits_denoiser())
        data, stop = ad.load_data("digits"), ad.FixedN(100, n0=20)
        run, indices = arguments.out, range(arguments.images)
        print(preview_queries(smoother, data, stop, run=run, indices=indices))
        log = ad.certify(
            smoother,
            data,
            stop,
            run=run,
            indices=indices,
            # The default is the URL, whose port changes from run to run.
            identity={"classifier": "digits on this machine"},
            resume=True,
        )
        server.shutdown()
    for row in log.rows:
        answer = "abstained"
        if row.prediction >= 0:
            answer = f"{NAMES[row.prediction]}, radius {row.radius:.3f}"
        print(f"image {row.index} ({NAMES[row.label]}): {answer}")
    print(f"{box.spent} queries, {box.spent * box.budget.cost_per_query:.2f} paid")

    offline = ad.recertify(arguments.out / "answers.jsonl", alpha=0.05)
    gain = sum(b.radius - a.radius for a, b in zip(log.rows, offline.rows, strict=True))
    print(f"from the same answers at alpha = 0.05: mean radius +{gain / len(log.rows):.3f}")


if __name__ == "__main__":
    main()

"""Certify a classifier that can only be queried, through an API that charges and fails.

    python examples/certify_a_paid_api.py [--out DIR]

The API is a small server on this machine (tests/api_server.py) that classifies handwritten digits,
fails a fifth of the requests and loses some answers. Each image is certified from 120 queries, as
Salman et al. did with vision APIs. Every answer is written to a file when it comes. If you stop the
program and start it again with the same --out, it sends only queries without an answer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path

import art_denoised as ad
from art_denoised.demo import digits_denoiser
from art_denoised.smoothing import Retry

sys.path.append(str(Path(__file__).parent.parent))
from tests.api_server import NAMES, Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--images", type=int, default=10)
    arguments = parser.parse_args()
    with Service(failures=0.2) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        box = ad.BlackBox(
            ad.HttpClassifier(service.url, answer="predictions.0.label"),
            classes=NAMES,
            retry=Retry(backoff=0.01),
            budget=ad.Budget(cost=5.0, cost_per_query=0.0015),
        )
        smoother = ad.Smoother(box, sigma=0.25, denoiser=digits_denoiser())
        log = ad.certify(
            smoother,
            ad.load_data("digits"),
            ad.FixedN(100, n0=20),
            run=arguments.out,
            indices=range(arguments.images),
            # The default is the URL, whose port changes from run to run.
            identity={"classifier": "api_server"},
            resume=True,
        )
        service.shutdown()
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

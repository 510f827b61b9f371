"""Certify a classifier that can only be queried, through an API that charges and fails.

    python examples/certify_a_paid_api.py [--out DIR]

The "public API" is a small server on this machine (tests/api_server.py) that classifies handwritten
digits, fails a fifth of the requests and forgets some answers. Each image is certified from 120
queries, as Salman et al. did with vision APIs. Every answer is journalled as it comes: kill the
program and start it again with the same --out, and it asks only what has no answer yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path

from art_denoised.data import load_data
from art_denoised.demo import digits_denoiser
from art_denoised.evaluation.queries import certify_queries, recertify
from art_denoised.smoothing.blackbox import BlackBox, Budget
from art_denoised.smoothing.http import HttpClassifier

sys.path.append(str(Path(__file__).parent.parent))
from tests.api_server import NAMES, Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--images", type=int, default=10)
    arguments = parser.parse_args()
    with Service(failures=0.2) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        box = BlackBox(
            HttpClassifier(service.url, answer="predictions.0.label"),
            workers=4,
            backoff=0.01,
            budget=Budget(cost=5.0, cost_per_query=0.0015),
        )
        log = certify_queries(
            box,
            load_data("digits"),
            arguments.out,
            classes=NAMES,
            sigma=0.25,
            denoiser=digits_denoiser(),
            indices=range(arguments.images),
            identity={
                "classifier": "api_server"
            },  # by default the URL, whose port is new each time
            resume=True,
        )
        service.shutdown()
    for row in log.rows:
        said = "abstained" if row.predict < 0 else f"{NAMES[row.predict]}, radius {row.radius:.3f}"
        print(f"image {row.idx} ({NAMES[row.label]}): {said}")
    print(f"{box.spent} queries, {box.spent * box.budget.cost_per_query:.2f} paid")

    offline = recertify(arguments.out / "answers.jsonl", alpha=0.05)
    gain = sum(b.radius - a.radius for a, b in zip(log.rows, offline.rows, strict=True))
    print(f"at alpha = 0.05, without a query: radii {gain / len(log.rows):.3f} larger on average")


if __name__ == "__main__":
    main()

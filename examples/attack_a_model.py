"""Attack two models with the same attacks, check the results, and write one report on both.

    python examples/attack_a_model.py [--out DIR]

Budgets are small: 10 images, PGD with 10 steps, Square with 50 queries. For results to publish, use
hundreds of images, all of ``AutoAttack(eps)``, and the default `Probes`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import art_denoised as ad
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation import Probes

ATTACKS = [
    ad.PGD(0.05, steps=10),
    ad.PGD(0.1, steps=10),
    ad.AutoAttack(0.1, parts=("square",), queries=50),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    out = parser.parse_args().out
    plain = digits_classifier()
    denoised = ad.DenoisedClassifier(plain, digits_denoiser(), sigma=0.25).eval()
    for name, model in {"plain": plain, "denoised": denoised}.items():
        ad.evaluate(
            model,
            ad.load_data("digits"),
            ATTACKS,
            run=out / name,
            undefended=None if model is plain else plain,  # for the transfer check
            indices=range(10),
            probes=Probes(images=8, steps=8, queries=50),
            resume=True,  # continues an interrupted run
        )
    found = ad.report([out / "plain", out / "denoised"])
    print(found.comparison())
    found.write_page(out / "report.html")
    print(f"\nThe whole report is in {out / 'report.html'}")


if __name__ == "__main__":
    main()

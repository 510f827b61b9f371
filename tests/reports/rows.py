"""Rows and logs of attack runs, made by hand for the tests of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from art_denoised.evaluation import (
    ATTACK,
    CERTIFY,
    CHECKS,
    CLEAN,
    AttackRow,
    CertifyRow,
    CheckRow,
    ImageRow,
)
from art_denoised.runs import Run


def row(index: int, fresh: Any, counted: bool | None = None, **changes: Any) -> AttackRow:
    """A row under PGD in the l2 ball of 0.5; ``fresh`` is a bool or a tuple of them."""
    draws = fresh if isinstance(fresh, tuple) else (bool(fresh),)
    values: dict[str, Any] = {
        "label": 1,
        "attack": "pgd",
        "gradient": "exact",
        "norm": "l2",
        "eps": 0.5,
        "clean": True,
        "distance_linf": 0.1,
        "distance_l2": 0.5,
        "seconds": 0.5,
    }
    values |= {"counted": draws[0] if counted is None else counted, "fresh": draws}
    return AttackRow(index, **(values | changes))


def clean_row(index: int, right: bool = True, **changes: Any) -> AttackRow:
    values = {"attack": CLEAN, "gradient": "none", "eps": 0.0, "clean": right, "seconds": 0.0}
    return row(index, right, **(values | changes))


def certificate(index: int, radius: float, right: bool = True, label: int = 1) -> CertifyRow:
    prediction, proved = (label, radius) if right else (-1, 0.0)
    return CertifyRow(index=index, label=label, prediction=prediction, radius=proved, seconds=0.1)


def write_run(
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    failed: bool = False,
    certified: float | None = None,
    radii: tuple[float, ...] = (),
    name: str = "net",
    images: int = 12,
) -> Path:
    """A whole run: two attacks at two eps, checks, pictures; with certificates if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    base = {"weights": name, "structure": "net", "sigma": 0.25}
    known: dict[str, Any] = {"model": name, "data": "digits", "weights": f"noisy {name}"}
    known |= {"structure": "noisy net", "smoothed": base, "noise": "fresh", "repeats": 4}
    known |= {"attacks": [{"name": "pgd", "eps": 0.5, "steps": 20}], "versions": {"torch": "2"}}
    with Run(folder, ATTACK, known | (settings or {})) as log:
        for index in range(images):
            log.append([clean_row(index)])
        for eps in (0.25, 0.5):
            for attack, gradient in (("pgd", "exact"), ("square", "none")):
                for index in range(images):
                    draws = tuple(bool(right) for right in rng.random(4) < 1 - eps)
                    rows = row(index, draws, attack=attack, gradient=gradient, eps=eps)
                    log.append([rows])
        for check in CHECKS:
            log.append([CheckRow(check, None if check == "transfer" else True, f"about {check}")])
        if failed:
            log.append([CheckRow("gradient-free attacks", False, f"{name}: Square", {"gap": 0.5})])
        x = rng.random((1, 8, 8))
        for stage, attack, eps, said in (("clean", CLEAN, 0.0, 1), ("attacked", "pgd", 0.5, 7)):
            known = {"attack": attack, "gradient": "none" if attack == CLEAN else "exact"}
            log.append([ImageRow.of(x, index=0, eps=eps, stage=stage, prediction=said, **known)])
    if certified is not None:
        of_certify = {"model": name, "data": "digits", "noise": "gaussian", **base}
        with Run(folder, CERTIFY, of_certify | ({"radii": list(radii)} if radii else {})) as log:
            log.append([certificate(index, certified) for index in range(images)])
    return folder

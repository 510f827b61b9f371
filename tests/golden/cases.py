"""What the commands write at fixed seeds, as figures that do not depend on the format of a log.

    python -m tests.golden.cases [NAME ...]   # runs cases (all) and writes tests/golden/NAME.json

The figures were frozen at commit d691b95, before the redesign of the package (those of tables of
radii and of answers when the tests of radii became exact), and
`tests/test_golden.py` runs the same commands and compares. A change that is meant to change them
says so in CHANGELOG.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from art_denoised.cli import main

HERE = Path(__file__).parent
CLASSIFIER = "art_denoised.demo:digits_classifier"
DENOISER = "art_denoised.demo:digits_denoiser"
SEEN = ["--model", CLASSIFIER, "--sigma", "0.25", "--quiet", "--seed", "3", "--batch-size", "50"]


@contextmanager
def images(number: int = 12) -> Iterator[tuple[str, str]]:
    """Lend a data set of digits with 8 bits a pixel, as an option, and an empty folder."""
    from art_denoised.data import load_data

    data = load_data("digits")
    pairs = [data[i] for i in range(0, 7 * number, 7)]
    x = np.stack([np.rint(x.numpy() * 255) / 255 for x, _ in pairs]).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "digits.npz"), x=x, y=np.array([label for _, label in pairs]))
        yield f"npz:{folder}/digits.npz", f"{folder}/run"


def command(*arguments: str) -> None:
    """Run a command, which must succeed."""
    assert main([*arguments]) in (0, None), arguments


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, without its header."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def first(record: dict[str, Any], *names: str) -> Any:
    """Return a value under the first of its names that is there: logs of two versions are read."""
    return next(record[name] for name in names if name in record)


def certified(path: Path) -> dict[str, Any]:
    """Return what a certify log says of each image."""
    rows = {}
    for row in lines(path):
        rows[first(row, "index", "idx")] = {
            "label": row["label"],
            "prediction": first(row, "prediction", "predict"),
            "radius": round(row["radius"], 6),
            **{name: row[name] for name in ("n0", "n", "drawn", "mode", "selection_counts")},
            "counts": row["counts"],
            **({"proofs": row["proofs"]} if row.get("proofs") else {}),
        }
    return {str(index): rows[index] for index in sorted(rows)}


def certify(*options: str) -> dict[str, Any]:
    with images() as (data, out):
        command("certify", *SEEN, "--data", data, *options, "--out", out)
        return certified(Path(out, "certify.jsonl"))


def predict() -> dict[str, Any]:
    with images() as (data, out):
        options = ["--data", data, "--denoiser", DENOISER, "--n", "150"]
        command("predict", *SEEN, *options, "--out", out)
        rows = lines(Path(out, "predict.jsonl"))
    return {
        str(first(row, "index", "idx")): [
            row["label"],
            first(row, "prediction", "predict"),
            row["counts"],
            round(row["p_value"], 9),
        ]
        for row in sorted(rows, key=lambda row: first(row, "index", "idx"))
    }


def attack(model: str, number: int, *options: str) -> dict[str, Any]:
    """Return which images each attack left right, and what the masking checks found."""
    with images(number) as (data, out):
        command("attack", "--model", model, "--data", data, "--quiet", *options, "--out", out)
        rows = lines(Path(out, "attack.jsonl"))
    outcomes: dict[str, Any] = {}
    for row in rows:
        if row["kind"] == "attack":
            column = f"{row['attack']} {row['gradient']} {row['eps']:g}"
            outcomes.setdefault(column, {})[str(row["index"])] = [
                int(row["counted"]),
                sum(row["fresh"]),
                round(row["distance_linf"], 4),
            ]
    checks = {row["name"]: row["passed"] for row in rows if row["kind"] == "check"}
    return {"outcomes": outcomes, "checks": checks}


def rdc_digits() -> torch.nn.Module:
    """A defence with two ways of taking gradients."""
    from art_denoised import RobustDiffusionClassifier
    from art_denoised.demo import digits_diffusion
    from art_denoised.diffusion import noise_levels

    return RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), steps=2, eta=0.1, levels=noise_levels(4), seed=0,
        device_type="cpu",
    ).model  # fmt: skip


def attacked_classifier() -> dict[str, Any]:
    attacks = "pgd:steps=10,square:queries=50,apgd-ce:steps=5"
    return attack(CLASSIFIER, 10, "--eps", "0.05,0.15", "--attacks", attacks)


def attacked_rdc() -> dict[str, Any]:
    model = "tests.golden.cases:rdc_digits"
    return attack(model, 5, "--eps", "0.1", "--attacks", "pgd:steps=3")


def answers() -> dict[str, Any]:
    """Certificates of a classifier that can only be asked, and every answer that was paid for."""
    with tempfile.TemporaryDirectory() as out:
        ask_about_digits(Path(out))
        found = {
            f"{first(row, 'index', 'idx')} {row['stage']} {row['sample']}": row["answer"]
            for row in lines(Path(out, "answers.jsonl"))
            if "answer" in row
        }
        return {"certificates": certified(Path(out, "certify.jsonl")), "answers": found}


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def ask_about_digits(out: Path) -> None:
    import art_denoised as ad
    from art_denoised.demo import digits_classifier, digits_denoiser

    net = digits_classifier()

    @torch.no_grad()
    def ask(images: np.ndarray) -> list[str]:
        return [NAMES[c] for c in net(torch.from_numpy(images)).argmax(1).tolist()]

    box = ad.BlackBox(ask, classes=NAMES, batch_size=8, workers=1)
    smoother = ad.Smoother(box, sigma=0.25, denoiser=digits_denoiser(), seed=1)
    stop = ad.AtRadii([0.1], n=120, n0=10)
    data = ad.load_data("digits")
    ad.certify(smoother, data, stop, run=out, indices=range(4), progress=False)


def weights(folder: Path) -> dict[str, list[float]]:
    """Return a few figures of each tensor that a training wrote."""
    from safetensors.torch import load_file

    (file,) = [*folder.rglob("*.safetensors")]
    return {
        name: [round(float(f(value.double())), 7) for f in (torch.sum, torch.norm)]
        for name, value in sorted(load_file(file).items())
    }


TRAINING = ["--quiet", "--epochs", "1", "--batch-size", "256", "--seed", "5", "--bf16", "off"]


def train(name: str, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command(name, "--data", "digits", *TRAINING, *options, "--out", out)
        losses = [round(row["loss"], 5) for row in lines(Path(out, "train.jsonl"))]
        return {"loss": losses, "weights": weights(Path(out))}


def trained_denoiser() -> dict[str, Any]:
    return train(
        "train-denoiser", "--objective", "stability", "--classifier", CLASSIFIER, "--sigma", "0.25",
        "--architecture", "dncnn:3:4", "--augment", "crop", "--weight-decay", "0",
    )  # fmt: skip


def trained_diffusion() -> dict[str, Any]:
    options = ["--classes", "10", "--widths", "32", "--augment", "none", "--weight-decay", "0"]
    return train("train-diffusion", *options)


def trained_network() -> dict[str, Any]:
    options = ["--model", "art_denoised.demo:digits_network", "--recipe", "sat", "--eps", "0.1"]
    options += ["--augment", "none", "--lr", "0.1", "--weight-decay", "0", "--steps", "1"]
    return train("train-robust", *options, "--activation", "silu", "--feature-denoising", "mean",
                 "--where", "1")  # fmt: skip


def modules() -> dict[str, Any]:
    """Return outputs and gradients of the defences as plain modules."""
    from art_denoised import DenoisedClassifier, SmoothedClassifier
    from art_denoised.data import load_data
    from art_denoised.demo import digits_classifier, digits_denoiser

    data = load_data("digits")
    x = torch.stack([data[i][0] for i in range(3)])
    base = DenoisedClassifier(digits_classifier(), digits_denoiser(), sigma=0.25)
    figures = {}
    for name, model in {
        "smoothed": SmoothedClassifier(base, sigma=0.25, samples=8, seed=4),
        "rdc": rdc_digits(),
    }.items():
        images = x.clone().requires_grad_()
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits[:, 3].sum(), images)
        figures[name] = {
            "logits": [[round(v, 4) for v in row] for row in logits.tolist()],
            "gradient": [round(float(g.norm()), 4) for g in gradient],
        }
    return figures


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "certify-fixed": lambda: certify("--n", "200"),
    "certify-denoised": lambda: certify("--n", "200", "--denoiser", DENOISER),
    "certify-radii": lambda: certify("--radii", "0,0.25,0.5", "--n", "3000"),
    "certify-all-images": lambda: certify("--radii", "0.25", "--n", "1000", "--all-images"),
    "certify-true-class": lambda: certify("--radii", "0.25", "--n", "1000", "--true-class"),
    "certify-deadline": lambda: certify("--deadline", "10m", "--n", "450"),
    "certify-quantised": lambda: certify("--n", "200", "--noise", "quantised"),
    "predict": predict,
    "attack-classifier": attacked_classifier,
    "attack-rdc": attacked_rdc,
    "answers": answers,
    "train-denoiser": trained_denoiser,
    "train-diffusion": trained_diffusion,
    "train-robust": trained_network,
    "modules": modules,
}


def freeze(*names: str) -> None:
    """Run cases, by default all, and write their figures."""
    for name in names or CASES:
        text = json.dumps(CASES[name](), indent=None, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    freeze(*sys.argv[1:])

"""The main job on real input: certify held-out digits with and without a denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation.certify import certify
from art_denoised.evaluation.logs import write_tsv
from art_denoised.reports.certified import CertifiedTable, certified_table
from art_denoised.reports.plots import Look, accuracy_figure, save_figure
from art_denoised.reports.results import Model
from art_denoised.smoothing.smoother import DenoisedClassifier, Smoother
from art_denoised.smoothing.stops import FixedN

SIGMAS = (0.25, 0.5)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def run_demo(
    out: Path | str, *, images: int = 200, n: int = 1000, seed: int = 0, resume: bool = False
) -> CertifiedTable:
    """Certify digits at two noise levels with and without the denoiser; print, log and plot.

    Args:
        out: Folder for the four logs, ``table.txt`` and ``certified_accuracy.png``.
        images: Number of images, of the 500 that are held out.
        n: Number of samples that bound the probability of a class.
        seed: Seed of the noise.
        resume: Continue an interrupted demo.

    Returns:
        The table that was printed.

    Raises:
        InputError: A value out of range, or ``out`` holds another run.
    """
    out = Path(out)
    data = load_data("digits")
    if checks.count("images", images) > len(data):
        raise InputError(f"images is {images}; give at most the {len(data)} held-out digits")
    indices = range(images)
    classifier, denoiser = digits_classifier(), digits_denoiser()
    print(
        f"Certifying {len(indices)} held-out handwritten digits with {n:,} samples each.\n"
        "The classifier has never seen noise; the denoiser in front of it is a small DnCNN."
    )
    named = {}
    for sigma in SIGMAS:
        bases = {
            "without denoiser": classifier,
            "with denoiser": DenoisedClassifier(classifier, denoiser, sigma=sigma),
        }
        for how, base in bases.items():
            name, run = f"sigma {sigma:g}, {how}", out / f"sigma-{sigma:g}-{how.replace(' ', '-')}"
            print(name)
            smoother = Smoother(base, sigma=sigma, seed=seed, batch_size=100)
            with _one_thread():
                log = certify(
                    smoother,
                    data,
                    FixedN(n),
                    run=run,
                    indices=indices,
                    identity={"data": "digits"},
                    resume=resume,
                )
            write_tsv(log, run / "certify.tsv")
            named[name] = log
    table = certified_table(named, RADII)
    print(f"\n{table}\n")
    (out / "table.txt").write_text(f"{table}\n", encoding="utf-8")
    plot = out / "certified_accuracy.png"
    models = [Model(name, certified=log.rows) for name, log in named.items()]
    save_figure(accuracy_figure(models, look=Look(title="Handwritten digits, 8x8")), plot)
    print(f"table: {out / 'table.txt'}\nplot:  {plot}\nlogs:  {out}/*/certify.jsonl and .tsv")
    return table


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: images of 8x8 are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

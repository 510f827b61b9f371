"""Certify a data set within a given time, and go on later."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.data import ImageData
from art_denoised.evaluation.records import Log
from art_denoised.evaluation.run import certify_row
from art_denoised.evaluation.runner import Runner, open_log
from art_denoised.evaluation.tsv import TsvWriter
from art_denoised.smoothing.bounds import Anytime
from art_denoised.smoothing.certify import FIRST_LOOK
from art_denoised.smoothing.procedures import Procedure, tightening
from art_denoised.smoothing.statistics import Certificate, top_class


def certify_data_until(
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    *,
    seconds: float,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    use_labels: bool = True,
    noise: str = "gaussian",
    seed: int = 0,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    tsv: bool = False,
    progress: bool = True,
) -> Log:
    """Certify images of a data set as far as the time allows, into ``out/certify.jsonl``.

    All images are sampled in turns, each turn doubling what they have, until the time is up. Each
    turn of an image is a row; the last one counts. With ``resume=True`` a later run tightens the
    radii from where this one stopped. That is sound, and so is killing it: the bound holds at all
    sample counts at once (docs/sequential.md).

    Args:
        base: As for `certify_data`.
        data: As for `certify_data`.
        out: As for `certify_data`.
        seconds: Time for this run, from the first sample on.
        sigma: As for `certify_data`.
        n0: As for `certify_data`.
        n: Most samples an image gets, over all runs.
        alpha: Failure probability of each certificate, over all runs together.
        use_labels: As for `certify_data`.
        noise: As for `certify_data`.
        seed: As for `certify_data`.
        batch_size: As for `certify_data`.
        indices: As for `certify_data`.
        identity: As for `certify_data`.
        resume: Go on from the run in ``out`` if there is one.
        tsv: As for `certify_data`; written at the end.
        progress: As for `certify_data`.

    Returns:
        The log so far. Images that were not reached have no row.

    Raises:
        InputError: As for `certify_data`.
        OSError: As for `certify_data`.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> options = {"sigma": 0.1, "indices": range(3), "progress": False, "batch_size": 64}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = certify_data_until(
        ...         digits_classifier(), load_data("digits"), out, seconds=60, n=500, **options
        ...     )
        >>> [row.certificate.n for row in log.rows]
        [500, 500, 500]
    """
    seconds = checks.positive("seconds", seconds)
    plan: dict[str, Any] = {"alpha": checks.alpha(alpha), "n0": checks.count("n0", n0)}
    bound, n = Anytime(), checks.sample_count(n, plan["alpha"])
    run = Runner(base, data, sigma, noise, seed, batch_size, indices)
    options = {**plan, "prior": [bound.a, bound.b], "use_labels": use_labels}
    with open_log("certify", out, run.settings(options, identity), resume) as log:
        turns = _Turns(run.indices, n, use_labels)
        for row in log.rows.values():
            turns.add(row)
        end = time.monotonic() + seconds

        def is_over() -> bool:
            return time.monotonic() >= end

        def procedure(index: int, label: int, record: dict[str, Any]) -> Procedure[Certificate]:
            return tightening(
                bound,
                n=turns.target,
                earlier=turns.certificates.get(index),
                label=label if use_labels else None,
                **plan,
                **record,
            )

        with tqdm(desc="certify", unit="row", disable=not progress) as bar:
            while not is_over() and (turn := turns.next_turn()):
                bar.set_postfix_str(f"{turns.target} samples an image")
                for answer in run.answers(turn, procedure, stop=is_over):
                    log.append(row := certify_row(*answer))
                    turns.add(row)
                    bar.update()
        rows = tuple(log.rows[index] for index in sorted(log.rows))
        with TsvWriter(log.path.with_suffix(".tsv"), "certify", rows, enabled=tsv):
            return Log("certify", log.settings, rows)


class _Turns:
    """What each image has so far, and which are next."""

    def __init__(self, indices: Sequence[int], n: int, use_labels: bool) -> None:
        self._indices, self._n, self._use_labels = indices, n, use_labels
        self._finished: set[int] = set()
        self.certificates: dict[int, Certificate] = {}
        self.target = 0

    def add(self, row: Any) -> None:
        certificate = self.certificates[row.idx] = row.certificate
        wrong = top_class(certificate.selection_counts) != row.label
        if certificate.n >= self._n or (self._use_labels and wrong):
            self._finished.add(row.idx)

    def next_turn(self) -> list[int]:
        """Set the next sample count to reach, and return the images that have fewer."""
        samples = {
            i: self.certificates[i].n if i in self.certificates else 0
            for i in self._indices
            if i not in self._finished
        }
        self.target = min(max(FIRST_LOOK, 2 * min(samples.values(), default=0)), self._n)
        return [i for i, have in samples.items() if have < self.target]

"""Runs against the clock: sound wherever they stop, and the same however often they did."""

from __future__ import annotations

import time

import torch
from torch import nn

from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.deadline import certify_data_until
from art_denoised.evaluation.logs import read_log

COMMON = {"sigma": 0.25, "indices": range(8), "progress": False, "batch_size": 64}


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return self.net(x)


def test_interrupted_and_resumed_runs_end_in_the_same_rows(tmp_path):
    """Interrupted wherever the clock will have it, inside turns and parts of noise streams."""
    base, data = Slow().eval(), load_data("digits")
    whole = certify_data_until(base, data, tmp_path / "whole", seconds=120, n=700, **COMMON)
    runs = 0
    log = None
    while log is None or len(log.rows) < 8 or any(unfinished(row, 700) for row in log.rows):
        log = certify_data_until(
            base, data, tmp_path / "parts", seconds=0.25, n=700, resume=runs > 0, **COMMON
        )
        runs += 1
        assert runs < 60
    assert runs > 3
    assert log.rows == whole.rows
    assert read_log(tmp_path / "parts" / "certify.jsonl").rows == whole.rows


def unfinished(row, n: int) -> bool:
    return row.certificate.n < n and bool(row.certificate.counts)


def test_more_time_tightens(tmp_path):
    base, data = digits_classifier(), load_data("digits")
    few = certify_data_until(base, data, tmp_path, seconds=60, n=200, **COMMON)
    more = certify_data_until(base, data, tmp_path, seconds=60, n=2000, resume=True, **COMMON)
    certified = [(a, b) for a, b in zip(few.rows, more.rows, strict=True) if a.predict != -1]
    assert len(certified) > 4
    assert all(b.certificate.n == 2000 for _, b in certified)
    assert sum(b.radius > a.radius for a, b in certified) >= len(certified) - 1
    log = (tmp_path / "certify.jsonl").read_text().splitlines()
    assert len(log) > 1 + 2 * len(more.rows)  # every turn is a row: a killed run keeps them


def test_the_deadline_is_kept(tmp_path):
    start = time.monotonic()
    log = certify_data_until(
        Slow().eval(), load_data("digits"), tmp_path, seconds=0.5, n=100_000, **COMMON
    )
    assert time.monotonic() - start < 5
    assert all(0 <= row.certificate.n < 100_000 for row in log.rows)


def test_images_that_are_wrong_cost_nothing_more(tmp_path):
    log = certify_data_until(
        digits_classifier(), load_data("digits"), tmp_path, seconds=60, n=200,
        **{**COMMON, "indices": range(60), "sigma": 0.5},
    )  # fmt: skip
    skipped = [row for row in log.rows if row.certificate.n == 0]
    assert skipped
    assert all(not row.correct for row in skipped)
    assert all(row.certificate.n == 200 for row in log.rows if row not in skipped)

"""Processes that sample: the answers of one process, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.runs import Workers
from art_denoised.smoothing import AtRadii, FixedN, Smoother, Voting
from tests.forked import forked  # whose server has imported torch: processes start at once


class Mortal(nn.Module):
    """Kills its process as often as there are files in a folder; not that of the driver."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net, self.folder, self.driver = digits_classifier(), str(folder), os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.driver:
            for name in os.listdir(self.folder):
                try:
                    os.unlink(os.path.join(self.folder, name))
                except FileNotFoundError:  # another worker died of it
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)


class Broken(nn.Module):
    """Fails in workers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.driver:
            raise RuntimeError("out of\nmemory")
        return x.flatten(1)


class Slow(nn.Module):
    """Takes long in workers, which it names by a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.driver = str(folder), os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.driver:
            Path(self.folder, str(os.getpid())).touch()
            time.sleep(0.2)
        return x.flatten(1)


def certify_slowly(folder: Path) -> int:
    """A program that uses a worker."""
    try:
        smoother(Workers(1), Slow(folder).eval()).certify(torch.rand(9, 1, 8, 8), FixedN(10_000))
    except KeyboardInterrupt:
        return 130
    return 0


def other_classifier() -> nn.Module:
    net = digits_classifier()
    with torch.no_grad():
        next(net.parameters()).add_(1)
    return net


def smoother(workers: Workers | None = None, base: nn.Module | None = None) -> Smoother:
    return Smoother(digits_classifier() if base is None else base, sigma=0.25, workers=workers)


def test_answers_are_those_of_one_process(digits):
    x, stops = digits[0][:6], (FixedN(700), AtRadii([0.25, 0.5], n=1000))
    many = smoother(Workers(2, build=digits_classifier))
    assert [many.certify(x, stop) for stop in stops] == [
        smoother().certify(x, stop) for stop in stops
    ]
    assert many.vote(x, Voting(300)) == smoother().vote(x, Voting(300))
    assert not multiprocessing.active_children()


def test_processes_that_are_killed_are_replaced(digits, tmp_path):
    for death in range(6):
        (tmp_path / str(death)).touch()
    found = smoother(Workers(2), Mortal(tmp_path).eval()).certify(digits[0][:6], FixedN(1000))
    assert not list(tmp_path.iterdir())
    assert found == smoother().certify(digits[0][:6], FixedN(1000))


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_worker_outlives_its_driver(tmp_path, name):
    driver = forked(certify_slowly, tmp_path, errors=tmp_path.with_suffix(".errors"))
    wait(lambda: bool(pids(tmp_path)))
    os.kill(driver.pid, getattr(signal, name))
    driver.join(timeout=30)
    assert driver.exitcode == (130 if name == "SIGINT" else -signal.SIGKILL)
    wait(lambda: not any(map(alive, pids(tmp_path))))
    assert "Traceback" not in tmp_path.with_suffix(".errors").read_text()


def pids(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_fails_in_a_worker_is_one_line(digits):
    with pytest.raises(InputError, match="a worker failed: RuntimeError: out of memory"):
        smoother(Workers(1), Broken().eval()).certify(digits[0][:1], FixedN(100))
    assert not multiprocessing.active_children()


def test_another_network_is_refused(digits):
    with pytest.raises(InputError, match="weights differs"):
        smoother(Workers(1, build=other_classifier)).certify(digits[0][:1], FixedN(100))


def test_a_network_that_cannot_be_sent_is_refused(digits):
    net = digits_classifier()
    local = smoother(Workers(1))
    local.network = lambda x: net(x)
    with pytest.raises(InputError, match="give `build`"):
        local.certify(digits[0][:1], FixedN(100))


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_there_is_at_least_one_process(count):
    with pytest.raises(InputError):
        Workers(count)

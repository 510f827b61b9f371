"""Processes that sample and attack: the answers of one process, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from art_denoised import PGD, certify, evaluate, read_log
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.runs import Cluster, Workers
from art_denoised.smoothing import Anytime, AtRadii, FixedN, Smoother, Voting
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


def certify_slowly(folder: Path, place: Workers | Cluster) -> int:
    """A program that uses workers."""
    try:
        smoother(place, Slow(folder).eval()).certify(torch.rand(9, 1, 8, 8), FixedN(10_000))
    except KeyboardInterrupt:
        return 130
    return 0


class Drawn(nn.Module):
    """Draws where it is built what is neither a weight nor a public attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self._shift = digits_classifier(), torch.rand(1, 1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + self._shift)


def drawn() -> nn.Module:
    return Drawn().eval()


def other_classifier() -> nn.Module:
    net = digits_classifier()
    with torch.no_grad():
        next(net.parameters()).add_(1)
    return net


def smoother(workers: Workers | Cluster | None = None, base: nn.Module | None = None) -> Smoother:
    return Smoother(digits_classifier() if base is None else base, sigma=0.25, workers=workers)


def lines(log: Path) -> list[str]:
    """The lines of a log without its times."""
    return re.sub(r'"(seconds|begun)": [^,}]+', "", log.read_text(encoding="utf-8")).splitlines()


def test_answers_are_those_of_one_process(digits):
    x, stop = digits[0][:6], AtRadii([0.25, 0.5], n=1000)
    many = smoother(Workers(2, build=digits_classifier))
    assert many.certify(x, stop) == smoother().certify(x, stop)
    assert many.vote(x, Voting(300)) == smoother().vote(x, Voting(300))
    assert not multiprocessing.active_children()


def test_a_log_holds_the_same_rows_when_workers_are_killed(digits, tmp_path):
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    for death in range(5):
        (deaths / str(death)).touch()
    x, y = digits
    data, net = TensorDataset(x[:6], y[:6]), Mortal(deaths).eval()
    for name, workers in (("one", None), ("many", Workers(4, allow_mixed=True))):
        certify(smoother(workers, net), data, FixedN(1000), run=tmp_path / name, progress=False)
    assert not list(deaths.iterdir())
    one, many = (lines(tmp_path / name / "certify.jsonl") for name in ("one", "many"))
    assert sorted(many[1:]) == sorted(one[1:])
    settings = [read_log(tmp_path / name).settings for name in ("one", "many")]
    assert settings[1] == {**settings[0], "allow_mixed": True}


def test_an_attack_writes_the_same_log_when_workers_are_killed(digits, tmp_path):
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    x, y = digits
    data, net = TensorDataset(x[:12], y[:12]), Mortal(deaths).eval()
    attacks = [PGD(0.05, steps=2), PGD(0.1, steps=2)]
    options = {"batch_size": 2, "masking_checks": False, "pictures": 2, "progress": False}
    evaluate(net, data, attacks, run=tmp_path / "one", **options)
    for death in range(3):
        (deaths / str(death)).touch()
    evaluate(net, data, attacks, run=tmp_path / "many", workers=Workers(2), **options)
    assert not list(deaths.iterdir())
    one, many = (lines(tmp_path / name / "attack.jsonl") for name in ("one", "many"))
    assert many == one
    assert not multiprocessing.active_children()


def test_a_deadline_ends_all_workers(tmp_path):
    slow = smoother(Workers(2), Slow(tmp_path).eval())
    with pytest.raises(InputError, match="there was no time"):
        slow.certify(torch.rand(9, 1, 8, 8), Anytime(10_000, seconds=0.01))
    assert not multiprocessing.active_children()


def test_no_worker_outlives_its_driver(tmp_path):
    """Which is killed; test_shards.py interrupts one."""
    driver = forked(certify_slowly, tmp_path, Workers(1))
    try:
        wait(lambda: bool(pids(tmp_path)))
    finally:
        driver.kill()
    wait(lambda: not any(map(alive, pids(tmp_path))))


def pids(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
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


def test_a_network_that_each_process_draws_anew_is_refused(digits):
    place = Workers(1, build=drawn)
    with pytest.raises(InputError, match="buffer"):
        smoother(place, drawn()).certify(digits[0][:1], FixedN(100))
    data = [(x, int(y)) for x, y in zip(*digits, strict=True)][:4]
    with pytest.raises(InputError, match="buffer"):
        evaluate(drawn(), data, [PGD(0.1, steps=1)], workers=place, progress=False)
    # Sent itself, it is the same in all processes.
    assert smoother(Workers(1), drawn()).certify(digits[0][:1], FixedN(100))[0].n == 100


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

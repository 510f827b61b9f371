"""Votes of a query-only classifier: nothing paid for is lost or asked twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from art_denoised import AtRadii, BlackBox, Budget, FixedN, InputError, Smoother, Voting
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.smoothing import BudgetError, Retry
from art_denoised.smoothing.queries import MemoryLedger
from tests.api_server import NAMES
from tests.forked import forked

FEW = FixedN(100, n0=20)


CLASSIFIER = digits_classifier()


def local(images):
    with torch.no_grad():
        labels = CLASSIFIER(torch.from_numpy(images)).argmax(1)
    return [NAMES[c] for c in labels.tolist()]


def ledger_of(box: BlackBox) -> MemoryLedger:
    return MemoryLedger(box.label)


def certified(smoother: Smoother, x: torch.Tensor, stop: FixedN, ledger: MemoryLedger):
    """Certify as a data set does: with a ledger."""
    from art_denoised.smoothing import Task, drive

    record = smoother.record(x.shape[1:])
    tasks = (Task(i, image, stop.procedure(None, record)) for i, image in enumerate(x))
    voter = smoother.voter(ledger)
    try:
        return [answer for _, answer in sorted(drive(tasks, voter))]
    finally:
        voter.close()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_it_certifies_what_a_network_does(digits, batch_size):
    """The very samples: same streams, same votes, same certificates."""
    x, options = digits[0][:3], {"sigma": 0.25, "seed": 3, "denoiser": digits_denoiser()}
    box = BlackBox(local, NAMES, batch_size=batch_size)
    queried = Smoother(box, **options)
    network = Smoother(digits_classifier(), **options)
    assert queried.check(x) == 10
    assert queried.certify(x, FEW) == network.certify(x, FEW)
    assert box.spent == 3 * 120
    assert queried.vote(x, Voting(30)) == network.vote(x, Voting(30))


def test_radii_save_queries(digits):
    box = BlackBox(local, NAMES)
    found = Smoother(box, sigma=0.25).certify(digits[0][:4], AtRadii([0.1], n=2000, n0=20))
    assert box.spent == sum(20 + c.drawn for c in found) < 4 * 2020 / 2


def test_calls_run_at_once_and_are_batched(digits):
    sizes, together = [], threading.Barrier(4, timeout=30)

    def ask(images):
        sizes.append(len(images))
        if len(sizes) <= 4:
            together.wait()
        return local(images)

    box = BlackBox(ask, NAMES, batch_size=3, workers=4)
    Smoother(box, sigma=0.25).certify(digits[0][:1], FEW)
    assert sum(sizes) == 120
    assert max(sizes) == 3


def test_what_the_ledger_holds_is_not_asked(digits):
    x, box = digits[0][:2], BlackBox(local, NAMES)
    ledger = ledger_of(box)
    first = certified(Smoother(box, sigma=0.25), x, FEW, ledger)
    silent = BlackBox(lambda images: 1 / 0, NAMES)
    assert certified(Smoother(silent, sigma=0.25), x, FEW, ledger) == first
    assert silent.spent == 240  # of both runs


@pytest.mark.parametrize("workers", [1, 4])
def test_a_budget_that_runs_out_keeps_what_was_paid(digits, workers):
    box = BlackBox(local, NAMES, budget=Budget(queries=130), workers=workers)
    ledger = ledger_of(box)
    with pytest.raises(BudgetError):
        certified(Smoother(box, sigma=0.25), digits[0][:2], FEW, ledger)
    assert ledger.spent == box.spent == 130
    more = BlackBox(local, NAMES)
    whole = certified(Smoother(more, sigma=0.25), digits[0][:2], FEW, ledger)
    assert more.spent == 240
    assert whole == Smoother(BlackBox(local, NAMES), sigma=0.25).certify(digits[0][:2], FEW)


def test_a_failure_for_good_keeps_what_came(digits):
    calls = iter(range(10**6))

    def ask(images):
        if next(calls) == 50:
            raise KeyError("label")
        return local(images)

    box = BlackBox(ask, NAMES, workers=1)
    ledger = ledger_of(box)
    with pytest.raises(InputError, match="KeyError"):
        certified(Smoother(box, sigma=0.25), digits[0][:1], FEW, ledger)
    assert ledger.spent == 51  # the attempt that failed, too


def test_empty_answers_are_never_certified(digits):
    turn = iter(range(10**6))

    def sometimes(images):  # wins the selection, but not a majority
        return ["three" if next(turn) % 5 == 0 else "" for _ in images]

    box = BlackBox(sometimes, NAMES, workers=1)
    (c,) = Smoother(box, sigma=0.25).certify(digits[0][:1], FEW)
    assert (c.label, c.radius, c.counts[-1]) == (-1, 0.0, 80)


def test_answers_of_other_words_end_the_run_at_once(digits):
    """An API that says "Digit two" would be certified as one class, "none of these"."""

    def ask(images):
        return [f"Digit {name}" for name in local(images)]

    box = BlackBox(ask, NAMES, workers=1)
    ledger = ledger_of(box)
    with pytest.raises(InputError, match=r"'Digit two'.* 'two'"):
        certified(Smoother(box, sigma=0.25), digits[0][:2], FEW, ledger)
    assert box.spent == ledger.spent == 20
    resumed = certified(Smoother(box, sigma=0.25), digits[0][:2], FEW, ledger)
    assert [c.label for c in resumed] == [10, 10]
    synonyms = {f"Digit {name}": name for name in NAMES}
    named = Smoother(BlackBox(ask, NAMES, synonyms), sigma=0.25).certify(digits[0][:2], FEW)
    assert named == Smoother(BlackBox(local, NAMES), sigma=0.25).certify(digits[0][:2], FEW)


@pytest.mark.parametrize("earlier", ["failures", "answers"])
def test_a_run_that_ended_before_it_was_told_is_told_of_other_words(digits, earlier):
    box = BlackBox(lambda images: ["Digit two"] * len(images), NAMES, workers=1)
    ledger = ledger_of(box)
    if earlier == "failures":
        ledger.fail("the server was down", 6)
    else:
        ledger.keep({(0, 0, sample): "Digit two" for sample in range(19)})
    with pytest.raises(InputError, match="'Digit two'"):
        certified(Smoother(box, sigma=0.25), digits[0][:1], FEW, ledger)
    assert ledger.answered < 60


def test_a_bad_answer_among_good_ones_keeps_these(digits):
    box = BlackBox(lambda images: [True, *["two"] * (len(images) - 1)], NAMES, batch_size=5)
    ledger = ledger_of(box)
    with pytest.raises(InputError, match="True"):
        certified(Smoother(box, sigma=0.25), digits[0][:1], FEW, ledger)
    assert ledger.get((0, 0, 0)) is None
    assert ledger.get((0, 0, 1)) == 2


def test_a_denoiser_is_tried_before_anything_is_asked(digits):
    box = BlackBox(local, NAMES)
    for misfit in (lambda x, sigma: x[..., 1:], lambda x, sigma: None):
        with pytest.raises(InputError, match="the denoiser"):
            Smoother(box, sigma=0.25, denoiser=misfit).certify(digits[0][:1], FEW)
    assert box.spent == 0


def test_retries_are_paid(digits):
    calls = iter(range(10**6))

    def flaky(images):
        if next(calls) % 10 == 3:
            raise TimeoutError
        return local(images)

    box = BlackBox(flaky, NAMES, workers=1, retry=Retry(backoff=0))
    Smoother(box, sigma=0.25).certify(digits[0][:1], FEW)
    assert box.spent == 120 + 13


def test_an_interrupt_is_obeyed_while_the_server_is_waited_for(tmp_path):
    """The server answers after an hour; the process ends all the same."""
    asked = tmp_path / "asked"
    process = forked(wait_for_the_server, asked)
    try:
        while not asked.exists():
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode not in (None, 0)
    finally:
        process.kill()
        process.join()


def wait_for_the_server(asked: Path) -> None:
    def ask(images):
        asked.touch()
        time.sleep(3600)

    box = BlackBox(ask, ["a", "b"], workers=2)
    Smoother(box, sigma=0.25).certify(torch.zeros(1, 1, 8, 8), FixedN(10))


def test_images_are_sent_as_float32(digits):
    seen = []

    def ask(images):
        seen.append((images.dtype, images.shape))
        return local(images)

    half = digits_denoiser().bfloat16()
    Smoother(BlackBox(ask, NAMES), sigma=0.25, denoiser=half).certify(digits[0][:1], FEW)
    assert set(seen) == {(np.dtype(np.float32), (1, 1, 8, 8))}

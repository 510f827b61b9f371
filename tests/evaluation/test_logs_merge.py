"""Shards, killed and resumed, join into the log that one machine writes."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.data import Shard, load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation import certify, evaluate, merge, predict, read_log, verify
from art_denoised.evaluation.masking import Probes
from art_denoised.smoothing import Anytime, AtRadii, FixedN, Smoother, Voting
from tests.forked import forked

DATA = load_data("digits")
CHOSEN = [3, 7, 8, 11, 20, 21, 40]


def smoother(**changes: object) -> Smoother:
    return Smoother(digits_classifier(), **{"sigma": 0.25, **changes})


def untimed(path: Path) -> bytes:
    """The bytes of a log, without times."""
    return re.sub(rb'"seconds": [0-9.e-]+|"begun": "[^"]*"', b"", path.read_bytes())


def shards(folder: Path, stop=None, parts: int = 3, only=None, **changes: object) -> list[Path]:
    runs = []
    for part in only or range(1, parts + 1):
        runs.append(folder / str(part))
        some = Shard(CHOSEN, part, parts)
        certify(
            smoother(**changes),
            DATA,
            stop or FixedN(200),
            run=runs[-1],
            indices=some,
            progress=False,
        )
    return runs


def test_merged_shards_are_the_log_of_one_machine(tmp_path):
    certify(smoother(), DATA, FixedN(200), run=tmp_path / "one", indices=CHOSEN, progress=False)
    runs = shards(tmp_path / "parts")
    log = merge(tmp_path / "all", runs[::-1])[tmp_path / "all" / "certify.jsonl"]
    assert untimed(tmp_path / "all/certify.jsonl") == untimed(tmp_path / "one/certify.jsonl")
    assert verify(log) == []
    assert read_log(tmp_path / "all").rows == log.rows
    assert log.notices == ()


class Mortal(torch.nn.Module):
    """The digits classifier; its process is killed after so many passes."""

    def __init__(self, passes: float) -> None:
        super().__init__()
        self.net, self._left = digits_classifier(), passes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)


def one_of_eight(run: Path, part: int, passes: float = math.inf) -> None:
    """Write or resume a shard of 24 images."""
    mortal, some = Smoother(Mortal(passes).eval(), sigma=0.25), Shard(range(24), part, 8)
    certify(mortal, DATA, FixedN(200), run=run, indices=some, resume=True, progress=False)


def test_eight_shards_of_which_two_are_killed(tmp_path):
    whole = Smoother(Mortal(math.inf).eval(), sigma=0.25)
    run, chosen = tmp_path / "one", range(24)
    certify(whole, DATA, FixedN(200), run=run, indices=chosen, progress=False)
    runs = [tmp_path / str(part) for part in range(1, 9)]
    for part, passes in ((3, 13), (6, 17)):
        process = forked(one_of_eight, runs[part - 1], part, passes)
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        assert 0 < len(read_log(runs[part - 1]).rows) < 3
    for part, run in enumerate(runs, start=1):
        one_of_eight(run, part)
    merge(tmp_path / "all", runs)
    assert untimed(tmp_path / "all/certify.jsonl") == untimed(tmp_path / "one/certify.jsonl")


def test_a_torn_shard_is_resumed(tmp_path):
    runs = shards(tmp_path / "parts")
    log = runs[1] / "certify.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    with pytest.raises(InputError, match="lacks 1 of its 2 rows") as refusal:
        merge(tmp_path / "all", runs)
    assert refusal.value.remedy == {"partial": True}
    certify(
        smoother(),
        DATA,
        FixedN(200),
        run=runs[1],
        indices=Shard(CHOSEN, 2, 3),
        resume=True,
        progress=False,
    )
    (merged,) = merge(tmp_path / "all", runs).values()
    assert [row.index for row in merged.rows] == CHOSEN


@pytest.mark.parametrize("stop", [AtRadii([0.25, 0.5], n=2000), Anytime(400)], ids=["radii", "any"])
def test_rules_that_stop_early_have_the_same_rows(tmp_path, stop):
    one = certify(smoother(), DATA, stop, run=tmp_path / "one", indices=CHOSEN, progress=False)
    (log,) = merge(tmp_path / "all", shards(tmp_path / "parts", stop)).values()
    assert log.rows == one.rows
    assert log.settings == one.settings


def test_predictions_are_merged(tmp_path):
    common = {"progress": False}
    predict(smoother(), DATA, Voting(100), run=tmp_path / "one", indices=CHOSEN, **common)
    runs = [tmp_path / "a", tmp_path / "b"]
    for part, run in enumerate(runs, 1):
        some = Shard(CHOSEN, part, 2)
        predict(smoother(), DATA, Voting(100), run=run, indices=some, **common)
    merge(tmp_path / "all", runs)
    assert untimed(tmp_path / "all/predict.jsonl") == untimed(tmp_path / "one/predict.jsonl")


def test_a_missing_shard_is_named_or_filled_in(tmp_path):
    runs = shards(tmp_path / "parts", only=[1, 3])
    with pytest.raises(InputError, match="shard 2/3 of certify is missing"):
        merge(tmp_path / "all", runs)
    assert not (tmp_path / "all").exists()
    (log,) = merge(tmp_path / "all", runs, partial=True).values()
    assert log.notices == ("shard 2/3 of certify is missing",)
    assert [row.index for row in log.rows] == [3, 8, 11, 21, 40]
    whole = certify(
        smoother(),
        DATA,
        FixedN(200),
        run=tmp_path / "all",
        indices=CHOSEN,
        resume=True,
        progress=False,
    )
    assert [row.index for row in whole.rows] == CHOSEN


def test_shards_of_another_run_are_refused(tmp_path):
    first = shards(tmp_path / "parts", only=[1])
    others = {
        "seed is 0, not 1": shards(tmp_path / "seed", only=[2], seed=1),
        "n is 200, not 300": shards(tmp_path / "n", FixedN(300), only=[2]),
        "shards is 3, not 4": shards(tmp_path / "four", parts=4, only=[2]),
        "are both shard 1/3": first,
    }
    for problem, runs in others.items():
        with pytest.raises(InputError, match=problem):
            merge(tmp_path / "all", first + runs, partial=True)


def test_what_is_no_shard_is_refused(tmp_path):
    run = tmp_path / "one"
    certify(smoother(), DATA, FixedN(200), run=run, indices=CHOSEN, progress=False)
    with pytest.raises(InputError, match="is not a log of a shard"):
        merge(tmp_path / "all", [run])
    with pytest.raises(InputError, match="does not exist"):
        merge(tmp_path / "all", [tmp_path / "none"])
    with pytest.raises(InputError, match="nothing to merge"):
        merge(tmp_path / "all", [])
    runs = shards(tmp_path / "parts")
    with pytest.raises(InputError, match="exists"):
        merge(run, runs)


def test_a_foreign_image_is_refused(tmp_path):
    runs = shards(tmp_path / "parts")
    log = runs[0] / "certify.jsonl"
    log.write_text(log.read_text().replace('"index": 11', '"index": 7'))
    with pytest.raises(InputError, match="image 7, which is not in shard 1/3"):
        merge(tmp_path / "all", runs)


class Timid(PGD):
    """PGD under another name, with two ways of taking gradients in no model of ours."""


def attack(run: Path, indices, **changes: object):
    """Batches of three: the last one of seven images is not full."""
    options = {
        "batch_size": 3,
        "pictures": 5,
        "probes": Probes(images=4, steps=2, queries=10),
        "progress": False,
    }
    attacks = {"few": PGD(0.1, steps=2), "more": Timid(0.1, steps=3)}
    net, data = digits_classifier(), DATA
    return evaluate(net, data, attacks, run=run, indices=indices, **options | changes)


def test_attacks_are_merged_and_then_checked(tmp_path):
    attack(tmp_path / "one", CHOSEN)
    runs = [tmp_path / str(part) for part in (1, 2, 3, 4)]
    for part, run in enumerate(runs, 1):
        log = attack(run, Shard(CHOSEN, part, 4))
        assert log.checks == ()
    assert not log.rows  # there are three batches
    (merged,) = merge(tmp_path / "all", runs).values()
    assert merged.checks == ()
    assert verify(merged) == []
    checked = attack(tmp_path / "all", CHOSEN, resume=True)
    assert len(checked.checks) >= 10
    assert untimed(tmp_path / "all/attack.jsonl") == untimed(tmp_path / "one/attack.jsonl")


def test_warnings_of_autoattack_are_joined(tmp_path):
    class Dynamic(torch.nn.Module):
        """Takes gradients in its forward pass, of which AutoAttack warns."""

        def __init__(self) -> None:
            super().__init__()
            self.net = digits_classifier()

        def forward(self, x):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                torch.autograd.grad(self.net(z).sum(), z)
            return self.net(x)

    from art_denoised.attacks import AutoAttack

    def run(folder: Path, indices):
        attacks = [AutoAttack(0.1, parts=("apgd-ce",), steps=2)]
        return evaluate(
            Dynamic().eval(),
            DATA,
            attacks,
            run=folder,
            indices=indices,
            batch_size=3,
            masking_checks=False,
            progress=False,
        )

    one = run(tmp_path / "one", CHOSEN)
    assert one.checks
    for part in (1, 2):
        run(tmp_path / str(part), Shard(CHOSEN, part, 2))
    (log,) = merge(tmp_path / "all", [tmp_path / "1", tmp_path / "2"]).values()
    assert log.checks == one.checks
    assert log.rows == one.rows


def test_more_shards_than_images_leave_some_empty(tmp_path):
    data = TensorDataset(torch.stack([DATA[0][0]] * 2), torch.tensor([1, 2]))
    runs = [tmp_path / str(part) for part in (1, 2, 3)]
    for part, run in enumerate(runs, 1):
        some = Shard(range(2), part, 3)
        certify(smoother(), data, FixedN(100), run=run, indices=some, progress=False)
    (log,) = merge(tmp_path / "all", runs).values()
    assert len(log.rows) == 2


@pytest.mark.parametrize(("part", "parts"), [(0, 3), (4, 3), (1, 0)])
def test_there_is_no_such_shard(part, parts):
    with pytest.raises(InputError):
        Shard(range(9), part, parts)

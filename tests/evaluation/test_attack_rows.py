"""Rows of attack runs: what they may hold, and which of them are equal."""

from __future__ import annotations

import base64

import msgspec
import numpy as np
import pytest

from art_denoised.evaluation import ATTACK, CHECKS, AttackRow, CheckRow, read_attack_log
from art_denoised.evaluation.attack_rows import AttackLog, ImageRow
from art_denoised.runs import Run

CLEAN = {
    "index": 0, "label": 0, "attack": "clean", "gradient": "none", "norm": "linf", "eps": 0.0,
    "clean": False, "counted": False, "fresh": [False], "distance_linf": 0.0, "distance_l2": 0.0,
    "seconds": 0.0,
}  # fmt: skip


def read(**changes: object) -> AttackRow:
    return msgspec.convert(CLEAN | {"kind": "attack"} | changes, AttackRow)


def test_rows_without_attack_have_an_eps_of_zero():
    row = read()
    assert (row.eps, row.seconds, row.queries, row.mean, row.worst) == (0.0, 0.0, 0.0, 0.0, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": -0.1},
        {"seconds": -1.0},
        {"norm": "l1"},
        {"fresh": []},
        {"counted": True},
        {"fresh": [False, True]},
    ],
    ids=str,
)
def test_values_that_none_can_be_are_refused(changes):
    with pytest.raises(msgspec.ValidationError):
        read(**changes)


def test_rows_that_differ_in_their_cost_alone_are_equal():
    row = read(clean=True, fresh=[True, False], counted=True)
    assert (row.mean, row.worst) == (0.5, False)
    costly = msgspec.structs.replace(row, seconds=2.0, queries=9.0)
    assert costly == row
    assert len({costly, row}) == 1
    assert row != msgspec.structs.replace(row, eps=0.1)
    assert row != CheckRow("logits", True, "fine")


def test_rows_cannot_be_changed():
    image = ImageRow.of(np.zeros((1, 1, 2)), index=0, attack="a", gradient="exact", eps=0.1,
                        stage="clean")  # fmt: skip
    for row, name in (
        (read(), "counted"),
        (CheckRow("logits", True, ""), "passed"),
        (image, "eps"),
    ):
        with pytest.raises(AttributeError):
            setattr(row, name, True)


def test_a_picture_is_rounded_to_bytes():
    pixels = [-0.1, 0.0, 0.49 / 255, 0.51 / 255, 254.4 / 255, 1.0, 1.1]
    row = ImageRow.of(np.reshape(pixels, (1, 1, 7)), index=0, attack="clean", gradient="none",
                      eps=0.0, stage="clean")  # fmt: skip
    assert row.array.tolist() == [[[0, 0, 0, 1, 254, 255, 255]]]
    record = msgspec.to_builtins(row)
    assert base64.b64decode(record["pixels"]) == bytes([0, 0, 0, 1, 254, 255, 255])
    assert ImageRow.of(np.ones((1, 1, 1)), index=0, attack="clean", gradient="none", eps=0.0,
                       stage="clean").pixels == b"\xff"  # fmt: skip
    for changes in ({"pixels": "", "shape": [0, 1, 7]}, {"shape": [1, 2, 7]}):
        with pytest.raises(msgspec.ValidationError, match="a picture of shape"):
            msgspec.convert(record | changes, ImageRow)


def test_checks_and_pictures_are_made_again_on_resuming(tmp_path):
    picture = {"index": 0, "attack": "clean", "gradient": "none", "eps": 0.0, "stage": "clean"}
    old, new = (ImageRow.of(np.full((1, 1, 2), value), **picture) for value in (0, 1))
    with Run(tmp_path, ATTACK, {}) as run:
        run.append([old, new, CheckRow("logits", True, "old"), CheckRow("logits", None, "new")])
    log = read_attack_log(tmp_path)
    assert log.images == (new,)
    assert [check.finding for check in log.checks] == ["new"]
    assert log == AttackLog({}, (), log.checks, log.images, begun="at another time")


def test_trust_needs_every_check(tmp_path):
    """A flag, half of the checks, or checks that an error prevented are not enough."""

    def trusted(*rows):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with Run(folder, ATTACK, {}) as run:
            run.append(rows)
        return read_attack_log(folder).trusted

    whole = [CheckRow(name, name != "transfer" or None, "fine") for name in CHECKS]
    flag = CheckRow("flags of autoattack (exact, eps 0.1)", True, "dynamic defense")
    assert trusted(*whole) is True
    assert trusted(*whole, flag) is True
    assert trusted(*whole, CheckRow("flags of autoattack (exact, eps 0.1)", False, "")) is False
    assert trusted(flag) is None
    assert trusted(*whole[:5], flag) is None
    assert trusted(*whole[:-1], CheckRow("global seed", None, "", {"error": "no"})) is None
    assert trusted(CheckRow("logits", False, "bad")) is False

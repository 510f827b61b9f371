"""Previews: near what the run then costs, and without influence on it."""

from __future__ import annotations

import pytest

from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.certify import certify
from art_denoised.evaluation.preview import Preview, preview
from art_denoised.models.cost import forward_cost
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN, Voting

RADII = [0.0, 0.25, 0.5]


def test_a_preview_is_near_the_cost_of_the_run(tmp_path):
    smoother, data = Smoother(digits_classifier(), sigma=0.25), load_data("digits")
    stop, indices = AtRadii(RADII, 5_000), range(0, 500, 10)
    expected = preview(smoother, data, stop, indices=indices, pilot=25)
    log = certify(smoother, data, stop, run=tmp_path, indices=indices, progress=False)
    drawn = sum(row.n0 + row.drawn for row in log.rows)
    assert expected.low < expected.samples < expected.high <= expected.fixed == 50 * 5_100
    assert drawn / 2.5 < expected.samples < drawn * 2.5
    assert expected.seconds > 0


def test_a_fixed_number_is_known_exactly():
    smoother = Smoother(digits_classifier(), sigma=0.25)
    options = {"indices": range(40), "pilot": 3, "cost_per_sample": 0.001}
    cost = preview(smoother, load_data("digits"), FixedN(1000), **options)
    assert cost.samples == cost.low == cost.high == cost.fixed == 40 * 1100
    assert round(cost.cost, 2) == 44.0
    assert "44,000 samples" in str(cost)
    one = forward_cost(smoother.network, load_data("digits")[0][0][None])
    assert "cost 44.00" in str(cost)
    assert (cost.flop, cost.memory) == (44_000 * one.flop, one.memory(smoother.batch_size))


def test_votes_of_a_prediction_are_counted():
    smoother = Smoother(digits_classifier(), sigma=0.25)
    cost = preview(smoother, load_data("digits"), Voting(500), indices=range(4), pilot=2)
    assert cost.samples == cost.fixed == 2000


@pytest.mark.parametrize(
    "bad", [{"cost_per_sample": float("nan")}, {"indices": []}, {"stop": Anytime()}, {"pilot": 0}]
)
def test_what_has_no_cost_is_refused(bad):
    smoother = Smoother(digits_classifier(), sigma=0.25)
    with pytest.raises(InputError):
        preview(smoother, load_data("digits"), **{"stop": FixedN(100), **bad})


def test_durations_in_words():
    words = [str(Preview(1, 1, 1, 1, 1, seconds, 0.0)).split(", ")[-1] for seconds in (9, 600, 9e4)]
    assert words == ["9 seconds", "10.0 minutes", "25.0 hours"]

"""Previews: near what the run then costs, and without influence on it."""

from __future__ import annotations

from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.preview import Preview, preview
from art_denoised.evaluation.run import certify_data, certifying_procedure
from art_denoised.evaluation.runner import Runner

RADII = [0.0, 0.25, 0.5]


def test_a_preview_is_near_the_cost_of_the_run(tmp_path):
    base, data, indices = digits_classifier(), load_data("digits"), range(0, 500, 10)
    run = Runner(base, data, 0.25, "gaussian", 0, 64, indices)
    procedure = certifying_procedure(n0=100, n=20_000, alpha=0.001, radii=RADII)
    expected = preview(run, procedure, most=20_100, pilot=25)
    log = certify_data(
        base, data, tmp_path, sigma=0.25, n=20_000, radii=RADII, indices=indices, batch_size=64,
        progress=False,
    )  # fmt: skip
    drawn = sum(row.certificate.n0 + row.certificate.drawn for row in log.rows)
    assert expected.low < expected.samples < expected.high <= expected.fixed == 50 * 20_100
    assert drawn / 2.5 < expected.samples < drawn * 2.5
    assert expected.seconds > 0


def test_a_fixed_number_is_known_exactly():
    run = Runner(digits_classifier(), load_data("digits"), 0.25, "gaussian", 0, 64, range(40))
    procedure = certifying_procedure(n0=100, n=1000, alpha=0.001)
    cost = preview(run, procedure, most=1100, pilot=3, cost_per_sample=0.001)
    assert cost.samples == cost.low == cost.high == cost.fixed == 40 * 1100
    assert round(cost.cost, 2) == 44.0
    assert "44,000 samples" in str(cost)
    assert "cost 44.00" in str(cost)


def test_durations_in_words():
    words = [str(Preview(1, 1, 1, 1, 1, seconds, 0.0)).split(", ")[-1] for seconds in (9, 600, 9e4)]
    assert words == ["9 seconds", "10.0 minutes", "25.0 hours"]

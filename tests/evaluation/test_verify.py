"""Offline verification: sound logs pass, and every kind of tampering is named."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.attack import evaluate
from art_denoised.evaluation.attack_rows import read_attack_log
from art_denoised.evaluation.certify import certify, predict
from art_denoised.evaluation.logs import CertifyRow, Log, read_log
from art_denoised.evaluation.verify import family_wise, verify
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.statistics import Certificate, Looks
from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN, Voting

COMMON = {"indices": np.arange(6), "progress": False}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    smoother, data = Smoother(digits_classifier(), sigma=0.25), load_data("digits")
    out = tmp_path_factory.mktemp("logs")
    stops = {
        "fixed": FixedN(300),
        "looks": AtRadii([0.0, 0.25], 5000),
        "class": AtRadii([0.0, 0.25], 5000, labels="class"),
        "anytime": Anytime(400),
    }
    for name, stop in stops.items():
        certify(smoother, data, stop, run=out / name, **COMMON)
    predict(smoother, data, Voting(200), run=out / "predict", **COMMON)
    return {path.parent.name: path for path in out.glob("*/*.jsonl")}


@pytest.mark.parametrize("name", ["fixed", "looks", "class", "anytime", "predict"])
def test_logs_of_all_modes_follow_from_their_votes(logs, name, capsys):
    assert verify(read_log(logs[name])) == []
    assert main(["verify", str(logs[name])]) == 0
    assert "6 of 6 rows" in capsys.readouterr().out


def tampered(path, tmp_path, change):
    """The log with its row of image 0 changed, as a forger would: the votes too, if he likes."""
    lines = path.read_text().splitlines()
    kept = [line for line in lines[1:] if json.loads(line)["index"] != 0]
    record = json.loads(
        next(line for line in reversed(lines) if json.loads(line).get("index") == 0)
    )
    change(record)
    forged = tmp_path / "forged.jsonl"
    forged.write_text("\n".join([lines[0], *kept, json.dumps(record)]) + "\n")
    return forged


def fewer_samples(record):
    """A run that was stopped where it suited: honest votes, honest bound, no look planned there."""
    record["counts"] = {c: k - 1 for c, k in record["counts"].items() if k > 1}
    record["n"] = sum(record["counts"].values())


def as_skipped(record):
    """An image that was certified wrongly, left out as if its class had been known to be wrong."""
    record.update(counts={}, n=0, drawn=0, p_lower=0.0, prediction=-1, radius=0.0, proofs=[])


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("fixed", lambda r: r.update(radius=r["radius"] + 1e-5), "radius"),
        ("looks", lambda r: r.update(radius=r["radius"] + 1e-5), "radius"),
        ("anytime", lambda r: r.update(radius=r["radius"] + 1e-5), "radius"),
        ("fixed", lambda r: r.update(p_lower=r["p_lower"] + 1e-7), "p_lower"),
        ("fixed", lambda r: r.update(prediction=r["prediction"] + 1), "label"),
        ("fixed", lambda r: r.update(alpha=0.01), "alpha"),
        ("fixed", lambda r: r.update(sigma=0.5), "sigma"),
        ("fixed", lambda r: r.update(seed=1), "seed"),
        ("fixed", lambda r: r.update(dtype="bfloat16"), "dtype"),
        ("fixed", lambda r: r.update(noise="quantised"), "noise"),
        ("fixed", lambda r: r.update(mode="anytime", prior=[2.0, 0.3]), "no look was planned"),
        ("looks", lambda r: r.update(mode="fixed"), "no look was planned"),
        ("looks", lambda r: r.update(looks=[r["n"], r["n"]]), "no look was planned"),
        ("looks", fewer_samples, "no look was planned"),
        ("fixed", fewer_samples, "no look was planned"),
        ("anytime", lambda r: r.update(prior=[9.0, 0.1]), "no look was planned"),
        ("looks", lambda r: r["proofs"][-1].__setitem__(2, 30), "the votes give"),
        ("looks", lambda r: r["proofs"][-1].__setitem__(1, 41), "no look was planned"),
        ("looks", lambda r: r["proofs"].pop(0), "radii"),
        ("looks", lambda r: r["proofs"][0].__setitem__(2, r["proofs"][0][1] + 1), "votes"),
        ("looks", lambda r: r["proofs"].append([0.5, r["n"], r["n"]]), "radii"),
        ("looks", lambda r: r["proofs"][0].__setitem__(2, 10**6), "votes"),
        ("looks", lambda r: r.update(proofs=r["proofs"][:1], radius=0.0, p_lower=0.5), "prove it"),
        ("class", lambda r: r.update(prediction=r["label"] + 1), "true class"),
        ("class", as_skipped, "no look was planned"),
        ("looks", lambda r: r.update(drawn=r["n"] - 1), "drawn"),
        ("looks", lambda r: r.update(drawn=10**9), "drawn"),
        ("fixed", lambda r: r.update(drawn=10**9), "drawn"),
        ("anytime", lambda r: r.update(drawn=10**9), "drawn"),
        ("fixed", lambda r: r.update(tv=1e-9), "tv"),
        ("predict", lambda r: r.update(p_value=r["p_value"] / 2), "p_value"),
        ("predict", fewer_samples, "votes"),
    ],
)
def test_tampering_is_found(logs, tmp_path, capsys, name, change, word):
    forged = tampered(logs[name], tmp_path, change)
    findings = verify(read_log(forged))
    assert {finding.index for finding in findings} == {0}
    assert any(word in finding.problem for finding in findings), findings
    for more in ([], ["--family-alpha", "0.05"]):
        assert main(["verify", str(forged), *more]) == 1
        printed = capsys.readouterr().out
        assert "5 of 6 rows" in printed
        assert "all together" not in printed  # nothing is stated from rows that do not follow


def test_only_images_whose_selected_class_is_wrong_may_be_left_out(logs, tmp_path):
    findings = verify(read_log(tampered(logs["looks"], tmp_path, as_skipped)))
    assert any("selected class is its label" in finding.problem for finding in findings)


def test_the_radius_of_a_row_is_that_of_its_certificate(logs):
    log = read_log(logs["fixed"])
    rows = (msgspec.structs.replace(log.rows[0], radius=9.9), *log.rows[1:])
    assert [f.index for f in verify(replace(log, rows=rows))] == [0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("anytime", {"alpha": 0}),
        ("anytime", {"prior": [-0.5, 1.0]}),
        ("fixed", {"index": 2.7}),
        ("fixed", {"alpha": "x"}),
        ("fixed", {"p_lower": "x"}),
        ("fixed", {"sigma": None}),
        ("fixed", {"sigma": -1}),
        ("fixed", {"tv": "much"}),
        ("fixed", {"counts": {"1": 1001, "2": -1}, "n": 1000}),
        ("predict", {"p_value": []}),
    ],
)
def test_values_that_none_can_be_are_damage(logs, tmp_path, capsys, name, changes):
    forged = tampered(logs[name], tmp_path, lambda r: r.update(changes))
    assert main(["verify", str(forged)]) == 2
    assert "forged.jsonl:" in capsys.readouterr().err


def test_totals_that_are_not_those_of_the_votes_are_damage(logs, tmp_path, capsys):
    forged = tampered(logs["fixed"], tmp_path, lambda r: r.update(n=10**6))
    assert main(["verify", str(forged)]) == 2
    assert "n is 1000000" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fixed", "looks", "anytime"])
def test_family_wise_certificates_are_those_of_a_smaller_alpha(logs, name, capsys):
    log = read_log(logs[name])
    together = family_wise(log, 0.006)
    for ours, each in zip(together.rows, log.rows, strict=True):
        assert ours.certificate.alpha == pytest.approx(0.001)
        assert ours.radius == pytest.approx(each.radius, abs=1e-6)
    stricter = family_wise(log, 1e-4)
    assert all(s.radius <= e.radius for s, e in zip(stricter.rows, log.rows, strict=True))
    assert any(s.radius < e.radius for s, e in zip(stricter.rows, log.rows, strict=True))
    assert main(["verify", str(logs[name]), "--family-alpha", "0.05"]) == 0
    capsys.readouterr()
    assert main(["verify", str(logs[name]), "--family-alpha", "2"]) == 2
    assert capsys.readouterr().out == ""
    assert main(["verify", str(logs[name]), "--family-alpha", "0.05"]) == 0
    assert "all together, 0.95" in capsys.readouterr().out
    planned = family_wise(log, 0.05, images=500)
    assert all(row.certificate.alpha == 0.0001 for row in planned.rows)
    with pytest.raises(InputError, match="images is 5, but the log has 6"):
        family_wise(log, 0.05, images=5)
    assert main(["verify", str(logs[name]), "--family-alpha", "0.5", "--family-images", "5"]) == 2


def test_what_cannot_be_verified_is_refused(logs, tmp_path):
    with pytest.raises(InputError, match="TSV"):
        verify(Log("certify", None, ()))
    with pytest.raises(InputError, match="votes of certify"):
        family_wise(read_log(logs["predict"]), 0.05)
    with pytest.raises(InputError, match=r"alpha is 0\.7"):
        family_wise(read_log(logs["fixed"]), 0.7)
    log = read_log(logs["fixed"])
    names = ("index", "label", "prediction", "radius", "seconds")
    bare = [CertifyRow(**{name: getattr(row, name) for name in names}) for row in log.rows]
    assert len(verify(replace(log, rows=tuple(bare)))) == 6


@pytest.mark.parametrize("first", [700, 3000, 9000])
def test_looks_chosen_after_the_fact_are_found(logs, first):
    """The looks of a run are those of its settings, whatever a row says of itself."""
    log = read_log(logs["looks"])
    row = next(row for row in log.rows if row.n)
    bound = Looks(first, max(first, 5000))
    forged = Certificate.from_counts(
        row.certificate.selection_counts, {row.label: first}, alpha=0.001, sigma=0.25, bound=bound
    )
    row = CertifyRow.of(row.index, row.label, forged)
    assert any("no look was planned" in f.problem for f in verify(replace(log, rows=(row,))))


def with_rows(path, tmp_path, change):
    """The log with its rows changed as a list of records."""
    header, *lines = path.read_text().splitlines()
    records = change([json.loads(line) for line in lines])
    forged = tmp_path / "rows.jsonl"
    forged.write_text("\n".join([header, *map(json.dumps, records)]) + "\n")
    return read_log(forged)


def relabelled(records):
    """A label changed into what was certified: a wrong answer becomes a right one."""
    return [{**r, "label": (r["label"] + 1) % 10} if r["index"] == 3 else r for r in records]


def renumbered(records):
    return [{**r, "index": 9999} if r["index"] == 3 else r for r in records]


@pytest.mark.parametrize("name", ["fixed", "predict"])
@pytest.mark.parametrize(("change", "word"), [(relabelled, "labels"), (renumbered, "9999")])
def test_images_and_labels_are_those_of_the_header(logs, tmp_path, name, change, word):
    problems = [finding.problem for finding in verify(with_rows(logs[name], tmp_path, change))]
    assert any(word in problem for problem in problems), problems


def test_rows_that_were_left_out_are_seen(logs, tmp_path, capsys):
    log = with_rows(logs["fixed"], tmp_path, lambda records: records[:-1])
    assert verify(log) == []  # an interrupted run is sound
    assert main(["verify", str(tmp_path / "rows.jsonl")]) == 0  # and says what it lacks
    assert "5 of 6 images" in capsys.readouterr().err
    short = replace(log, settings={**log.settings, "images": 5})
    assert ["says 5 images" in finding.problem for finding in verify(short)] == [True]


def test_all_together_are_never_certified_further_than_each(logs):
    """At alpha 0.05 six images would have 0.0083 each, more than the 0.001 of the run."""
    log = read_log(logs["fixed"])
    together = family_wise(log, 0.05)
    assert [row.radius for row in together.rows] == [row.radius for row in log.rows]


@pytest.mark.parametrize("name", ["alpha", "sigma", "seed"])
def test_a_header_without_what_rows_are_compared_with_is_a_finding(logs, name):
    log = read_log(logs["fixed"])
    settings = {key: value for key, value in log.settings.items() if key != name}
    findings = verify(replace(log, settings=settings))
    assert [(f.index, name in f.problem) for f in findings] == [(None, True)]


def test_what_was_subtracted_for_the_noise_is_the_same_in_all_rows(tmp_path):
    """It depends on the shape of the images alone: a forger of one tv gains radius."""
    digits = load_data("digits")
    data = [((digits[i][0] * 255).round() / 255, digits[i][1]) for i in range(3)]
    smoother = Smoother(digits_classifier(), sigma=0.25, noise="quantised")
    log = certify(smoother, data, FixedN(100), run=tmp_path, progress=False)
    assert verify(log) == []
    row = log.rows[1]
    given = {"alpha": row.alpha, "sigma": row.sigma, "noise": row.noise, "tv": row.tv / 2}
    forged = Certificate.from_counts(row.selection_counts, row.counts, **given)
    rows = (log.rows[0], CertifyRow.of(row.index, row.label, forged), log.rows[2])
    (finding,) = verify(replace(log, rows=rows))
    assert finding.index == row.index
    assert f"{row.tv:g}" in finding.problem
    assert f"{row.tv / 2:g}" in finding.problem


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A folder with a certificate and an attack of the same images."""
    folder, options = tmp_path_factory.mktemp("both"), {"indices": [3, 17], "progress": False}
    net, data = digits_classifier(), load_data("digits")
    certify(Smoother(net, sigma=0.25), data, FixedN(100), run=folder, **options)
    evaluate(net, data, [PGD(0.1, steps=3)], run=folder, masking_checks=False, **options)
    return folder


def test_all_logs_of_a_folder_are_verified(attacked, capsys):
    assert main(["verify", str(attacked)]) == 0
    printed = capsys.readouterr().out
    assert "certify.jsonl: 2 of 2 rows" in printed
    assert "attack.jsonl: 4 of 4 rows" in printed
    assert main(["verify", str(attacked / "attack.jsonl"), "--family-alpha", "0.05"]) == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"distance_linf": 0.11}, "0.11"),
        ({"distance_linf": float("nan")}, "nan"),
        ({"eps": 0.2}, "0.2"),
        ({"norm": "l2"}, "l2"),
        ({"attack": "other"}, "other"),
        ({"gradient": "bpda"}, "bpda"),
        ({"label": 0}, "label"),
        ({"index": 5}, "image 5"),
    ],
)
def test_attack_rows_that_the_run_cannot_have_written_are_found(attacked, changes, word):
    log = read_attack_log(attacked)
    assert verify(log) == []
    rows = [
        row if row.attack == "clean" else msgspec.structs.replace(row, **changes)
        for row in log.rows
    ]
    if "index" in changes:
        rows = [msgspec.structs.replace(row, **changes) for row in log.rows]
    findings = verify(replace(log, rows=tuple(rows)))
    assert any(word in finding.problem for finding in findings), findings


@pytest.mark.parametrize("attacks", [None, 3, [{"name": "pgd"}]])
def test_an_attack_log_without_a_plan_is_a_finding(attacked, attacks):
    log = read_attack_log(attacked)
    settings = {**log.settings, "attacks": attacks}
    assert [finding.index for finding in verify(replace(log, settings=settings))] == [None]


@pytest.mark.parametrize(
    "change",
    [{"indices": "a:b"}, {"indices": "0:6:0"}, {"indices": 6}, {"n": "many"}, {"labels": None}],
)
def test_a_header_that_says_nothing_of_use_is_a_finding(logs, change):
    log = read_log(logs["looks"])
    settings = {k: v for k, v in {**log.settings, **change}.items() if v is not None}
    assert verify(replace(log, settings=settings))


def test_a_run_without_selection_certified_true_classes(logs):
    """Else the class could be chosen by the votes that prove its radii."""
    log = read_log(logs["looks"])
    rows = tuple(replaced(row, n0=0, selection_counts={}) for row in log.rows)
    settings = {**log.settings, "n0": 0, "use_labels": False}
    findings = verify(replace(log, rows=rows, settings=settings))
    assert sum("no class was selected" in finding.problem for finding in findings) == len(rows)


def replaced(row: CertifyRow, **changes: object) -> CertifyRow:
    return msgspec.structs.replace(row, **changes)

"""Results of attacked models, recomputed by hand from rows; runs merged or refused; the command."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised.attacks import AutoAttack
from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.evaluation import ATTACK, CERTIFY, CHECKS, CheckRow, read_attack_log
from art_denoised.evaluation.attack import attack_settings
from art_denoised.evaluation.target import columns
from art_denoised.reports import (
    Model,
    Report,
    Share,
    agreement_words,
    model_differences,
    report,
    sign_test,
)
from art_denoised.reports.report import COLUMNS
from art_denoised.reports.results import ALL, eps_name, share, survival
from art_denoised.reports.tables import conflicts
from art_denoised.runs import Run
from art_denoised.smoothing.statistics import proportion_interval
from tests.reports.rows import certificate, clean_row, row, write_run

T, F = True, False


def robustbench(model):
    return Report((model,)).to_json()["models"][0]["robustbench"]


def verdict(model):
    return Report((model,)).to_json()["models"][0]["verdict"]


def test_figures_are_those_counted_by_hand():
    rows = [
        *(clean_row(i, right=i != 3) for i in range(4)),
        row(0, (T, T, F, T), counted=T),
        row(1, (F, F, F, F), counted=F),
        row(2, (T, T, T, T), counted=T, seconds=1.5),
        row(3, (F, F, F, F), counted=F, clean=F, seconds=0.0),
        row(0, (T, F, F, F), counted=F, attack="square", gradient="none"),
        *(row(i, (i == 2,) * 4, attack="square", gradient="none") for i in (1, 2, 3)),
    ]
    pgd, square, together = Model("ours", tuple(rows)).results
    assert (pgd.attack, square.attack, together.attack) == ("pgd", "square", ALL)
    assert pgd.clean == Share(0.75, *proportion_interval(3, 4))
    assert pgd.counted == Share(0.5, *proportion_interval(2, 4))
    assert pgd.worst == Share(0.25, *proportion_interval(1, 4))
    low, high = proportion_interval(1, 4).low, proportion_interval(2, 4).high
    assert pgd.fresh == Share(1.75 / 4, low, high)
    assert pgd.majority == Share(0.5, *proportion_interval(2, 4))  # images 0 and 2
    assert square.majority == Share(0.25, *proportion_interval(1, 4))
    assert pgd.seconds == 2.5 / 4
    assert (pgd.images, pgd.draws) == (4, 4)
    assert together.counted.value == together.worst.value == 0.25  # image 2 alone
    assert together.fresh.value == square.fresh.value == 1.25 / 4
    assert together.seconds == (2.5 + 2.0) / 4


OUTCOMES = st.lists(
    st.tuples(st.booleans(), st.lists(st.booleans(), min_size=4, max_size=4).map(tuple)),
    min_size=6,
    max_size=6,
)


@settings(max_examples=50)
@given(st.lists(OUTCOMES, min_size=1, max_size=3))
def test_all_attacks_leave_no_more_than_any_one(attacks):
    rows = [
        row(index, fresh, counted=counted, attack=f"a{number}")
        for number, outcomes in enumerate(attacks)
        for index, (counted, fresh) in enumerate(outcomes)
    ]
    *singles, together = Model("ours", tuple(rows)).results
    for name in ("counted", "fresh", "worst"):
        lowest = min(getattr(single, name).value for single in singles)
        figure = getattr(together, name)
        assert figure.value <= lowest + 1e-12
        assert 0 <= figure.low <= figure.value + 1e-12
        assert figure.value - 1e-12 <= figure.high <= 1
    if len(singles) == 1:
        assert together.fresh == singles[0].fresh


def test_a_model_of_coins_is_judged_fairly():
    """Right with probability 0.85, whatever the attack: every bias of choosing by luck shows."""
    rng = np.random.default_rng(0)
    flips = rng.random((300, 5, 11)) < 0.85
    rows = [
        row(i, tuple(map(bool, flips[i, j, 1:])), counted=bool(flips[i, j, 0]), attack=f"a{j}")
        for i in range(300)
        for j in range(5)
    ]
    together = Model("coins", tuple(rows)).headlines[0]
    # Standard error of the fresh mean of one attack: 0.0065; six of them.
    assert abs(together.fresh.value - 0.85) < 0.04
    assert together.counted.value < 0.55
    lucky = np.mean(flips[:, :, 1:].mean(axis=2).min(axis=1))
    assert lucky < 0.75  # what the lowest average of each image would have said


def test_one_evaluation_or_a_deterministic_model_needs_no_halves():
    assert survival([row(0, (T,)), row(0, (F,))]) == (F, 0.0, F)
    assert survival([row(0, (T,) * 4), row(0, (F,) * 4)]) == (F, 0.0, F)
    assert survival([row(0, (T,) * 5, counted=F)]) == (F, 1.0, F)


@pytest.mark.parametrize("draws", [1, 5])
def test_interval_of_averages_covers(draws):
    """Images of different difficulty, fixed draws: at least 95% minus three standard errors."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        chances = rng.beta(0.5, 0.5, size=50)  # mean 0.5
        values = rng.binomial(draws, chances) / draws
        interval = share(values.tolist())
        covered += interval.low <= 0.5 <= interval.high
    assert covered >= 400 * 0.95 - 3 * math.sqrt(400 * 0.95 * 0.05)


def certified_model(broken: int, spared: int, both: int = 4, **changes):
    """Images certified and broken; not certified and kept; certified and kept."""
    n = broken + spared + both
    rows = tuple(row(i, i >= broken) for i in range(n))
    held = [i < broken or i >= broken + spared for i in range(n)]
    certificates = tuple(certificate(i, 0.5 if held[i] else 0.49) for i in range(n))
    return Model("ours", rows, certified=certificates, **changes)


def test_certified_above_robust_is_shouted_beyond_chance():
    agreement = certified_model(broken=6, spared=0, both=4).agreements[0]
    assert (agreement.certified.value, agreement.robust.value) == (1.0, 0.4)
    assert agreement.broken == (0, 1, 2, 3, 4, 5)
    assert agreement.p_value == pytest.approx(0.5**6)
    assert agreement.inverted
    assert "cannot be" in agreement_words(agreement)
    by_chance = certified_model(broken=5, spared=0).agreements[0]
    assert not by_chance.inverted
    assert "chance" in agreement_words(by_chance)
    assert "5 of 9 images are certified there and yet broken" in agreement_words(by_chance)
    right = certified_model(broken=0, spared=3).agreements[0]
    assert not right.inverted
    assert "as it must be" in agreement_words(right)


def test_an_inversion_is_at_the_top_and_takes_the_trust_away():
    model = certified_model(broken=6, spared=0, checks=(CheckRow("c", True, "fine"),))
    assert model.trusted is False
    text = str(Report((model,)))
    assert text.startswith("INVERSION in ours")
    assert text.count("not reliable") == len(model.results)
    assert robustbench(model)[0]["unreliable"] is True


def test_certificates_of_other_images_are_not_paired():
    other_data = certified_model(broken=6, spared=0, same_images=False)
    agreement = other_data.agreements[0]
    assert (agreement.paired, agreement.broken, agreement.p_value) == (0, (), None)
    assert "nothing is paired" in conflicts([other_data])[0]
    other_label = certified_model(broken=6, spared=0)
    relabelled = tuple(certificate(c.index, c.radius, label=7) for c in other_label.certified)
    model = Model("ours", other_label.rows, certified=relabelled)
    assert model.agreements[0].paired == 0
    # Enough images, and the intervals alone tell.
    many = certified_model(broken=30, spared=0, same_images=False)
    assert many.agreements[0].inverted


def test_images_are_told_by_their_pixels_where_no_data_is_named(tmp_path):
    def header(pixels, **more):
        return {"indices": "0:2:1", "pixels": pixels, **more}

    base = {"weights": "w", "structure": "s", "sigma": 0.5}

    def write(name, pixels, certified=None, label=1, attack="pgd"):
        attacked = header(pixels, weights=name[0], smoothed=base)
        with Run(tmp_path / name, ATTACK, attacked) as run:
            run.append([row(i, True, attack=attack) for i in range(2)])
        if certified:
            with Run(tmp_path / name, CERTIFY, header(certified, noise="gaussian", **base)) as run:
                run.append([certificate(i, 1.0, label=label) for i in range(2)])
        return str(tmp_path / name)

    def paired(path):
        return report([path]).models[0].agreements[0].paired

    assert paired(write("a1", "p", certified="p")) == 2
    assert paired(write("a2", "p", certified="q")) == 0
    assert paired(write("a3", "p", certified="p", label=7)) == 0
    other, same = write("b1", "q"), write("b2", "p")
    assert any("pixels" in text for text in conflicts(report([other, same]).models))
    assert not any("pixels" in text for text in conflicts(report([same, write("c", "p")]).models))
    with Run(tmp_path / "d", CERTIFY, header("q", noise="gaussian", **base)) as run:
        run.append([certificate(i, 1.0) for i in range(2)])
    beside = report([same, str(tmp_path / "d")]).models  # attacks beside certificates
    assert any("other pixels" in text for text in conflicts(beside))
    with pytest.raises(InputError, match="pixels 'q' and 'p'"):
        report([f"b={other}", f"b={write('b3', 'p', attack='apgd')}"])


@pytest.mark.parametrize(
    ("change", "compared"),
    [({}, 1), ({"device": "cuda"}, 1), ({"noise": "quantised"}, 0), ({"sigma": 0.5}, 0)],
    ids=str,
)
def test_an_attack_is_joined_with_a_certificate_of_the_same_function_alone(
    tmp_path, change, compared
):
    base = {"weights": "w", "structure": "s", "device": "cpu", "sigma": 0.25}
    attacked = {"weights": "whole", "structure": "noisy", "device": "cpu", "smoothed": base}
    with Run(tmp_path, ATTACK, attacked) as run:
        run.append([row(0, True)])
    with Run(tmp_path, CERTIFY, {**base, "noise": "gaussian", **change}) as run:
        run.append([certificate(0, 1.0)])
    found = report([f"ours={tmp_path}"])
    assert len(found.models[0].agreements) == compared
    if not compared:
        assert [model.name for model in found.models] == ["ours (attacked)", "ours (certified)"]
        (name, value), *_ = change.items()
        assert any(f"{name} is {value!r}" in notice for notice in found.notices)


@pytest.mark.parametrize(
    "attacked",
    [{"weights": "w", "structure": "s"}, {"weights": "other", "structure": "t"}, {}],
    ids=["without its noise", "another model", "a log that does not tell"],
)
def test_an_attack_on_anything_else_is_a_model_of_its_own(tmp_path, attacked):
    """The attack on the undefended classifier in the folder of the denoised one's certificate."""
    with Run(tmp_path, ATTACK, attacked) as run:
        run.append([row(0, True)])
    with Run(tmp_path, CERTIFY, {"weights": "w", "structure": "s", "noise": "gaussian"}) as run:
        run.append([certificate(0, 1.0)])
    attack, certified = report([tmp_path]).models
    assert (len(attack.rows), attack.certified) == (1, ())
    assert (len(certified.certified), certified.rows) == (1, ())


def test_linf_figures_are_not_set_beside_l2_certificates():
    rows = tuple(row(i, F, norm="linf") for i in range(9))
    assert Model("ours", rows, certified=(certificate(0, 0.5),)).agreements == ()


def test_sign_test_is_the_binomial_tail():
    assert sign_test(6, 0, "greater") == pytest.approx(0.5**6)
    assert sign_test(3, 5) == pytest.approx(2 * stats.binom.cdf(3, 8, 0.5))


def test_models_are_compared_on_common_images_and_conflicts_named():
    first = Model("first", tuple(row(i, i < 2) for i in range(6)))
    second = Model(
        "second",
        (
            *(row(i, i < 5) for i in range(1, 8)),
            *(row(i, T, attack="square", gradient="none") for i in range(1, 8)),
            row(1, T, eps=0.9),
        ),
    )
    difference = model_differences([first, second])[0]
    assert (difference.images, difference.only_first, difference.only_second) == (5, 0, 3)
    assert difference.gain == 3 / 5
    said = "\n".join(conflicts([first, second]))
    assert "other images were attacked (6 and 7, 5 in common) in l2 eps 0.5" in said
    assert "only second was attacked with square (none) in l2 eps 0.5" in said
    assert "only second was attacked in l2 eps 0.9" in said
    assert conflicts([first, Model("again", first.rows)]) == []


def test_the_legend_says_what_the_evaluations_were():
    once, often = Model("a", (row(0, (T,)),)), Model("b", (row(0, (T, F)),))
    assert "fresh noise" not in str(Report((once,)))
    assert "one more evaluation" in str(Report((once,)))
    assert "fresh noise" in str(Report((once, often)))


def interrupted(folder, done, attacks=("pgd", "square"), images=8, **changes):
    """A run of pgd (exact) and square (none) on some images that was stopped."""
    listed = [
        {"name": "pgd", "eps": 0.5, "norm": "l2", "gradients": ["exact"]},
        {"name": "square", "eps": 0.5, "norm": "l2", "gradients": ["none"]},
    ]
    settings = {"images": images, "attacks": listed} | changes
    with Run(folder, ATTACK, settings) as run:
        run.append([clean_row(i) for i in range(images)])
        for attack in attacks:
            gradient = "exact" if attack == "pgd" else "none"
            run.append([row(i, T, attack=attack, gradient=gradient) for i in range(done)])
    return folder


@pytest.mark.parametrize(
    ("done", "attacks", "said"),
    [
        (5, ("pgd",), "5 of 8 images; square eps 0.5 not run"),
        (5, ("pgd", "square"), "5 of 8 images"),
        (8, ("pgd",), "square eps 0.5 not run"),
        (8, ("pgd", "square"), None),
    ],
)
def test_an_interrupted_run_is_incomplete(tmp_path, capsys, done, attacks, said):
    folder = interrupted(tmp_path / "run", done, attacks)
    found = report([folder])
    assert found.to_json()["models"][0]["incomplete"] == said
    whole = f"incomplete: {said}"
    page = found.page()
    assert (whole in str(found)) == (whole in page) == (said is not None)
    assert main(["report", str(folder), "--compare"]) == 0
    assert ("incomplete" in capsys.readouterr().out) == (said is not None)
    if said:
        assert "<span>incomplete</span>" in page  # beside each result
        assert str(found).count("  incomplete") == len(found.models[0].results)
    for table in ("--markdown", "--latex"):
        assert main(["report", str(folder), table]) == 0
        assert ("? " in capsys.readouterr().out) == (said is not None)
    assert {line.split("\t")[-1] for line in found.to_tsv().splitlines()[1:]} == {said or ""}


def test_a_run_that_was_interrupted_before_its_first_attack_is_incomplete(tmp_path):
    found = report([interrupted(tmp_path / "run", 0, ())])
    said = "incomplete: pgd eps 0.5, square eps 0.5 not run"
    assert said in str(found)
    assert "incomplete" in found.comparison()


def test_an_attack_that_fell_behind_is_named(tmp_path):
    folder = interrupted(tmp_path / "run", 8, ("pgd",))
    with Run(folder, ATTACK, read_attack_log(folder).settings, resume=True) as run:
        run.append([row(i, T, attack="square", gradient="none") for i in range(3)])
    assert report([folder]).models[0].incomplete == "3 of 8 images under square eps 0.5"


def test_certified_radii_are_those_that_the_run_stopped_at(tmp_path):
    """A run made for r = 0.7 says nothing exact of r = 0.25, where the attack was."""
    ours = write_run(tmp_path / "ours", certified=0.7, radii=(0.7,))
    whole = write_run(tmp_path / "whole", certified=0.7, name="w")
    found = report([ours])
    json = found.to_json()["models"][0]
    assert [(c["radius"], c["at_least"]) for c in json["certified"]] == [(0.7, False)]
    assert [a["at_least"] for a in json["certified_against_robust"]] == [True, True]
    assert "at least" in json["certified_against_robust"][0]["words"]
    assert "r=0.7" in str(found)
    assert "r=0.25" not in str(found)
    assert "ours was certified at radii 0.7" in found.page()
    assert report([whole]).to_json()["models"][0]["certified_against_robust"][0]["at_least"] is F
    stopped = write_run(tmp_path / "stopped", certified=0.7, name="s", radii=(0.5,))
    beside = report([ours, stopped]).comparison()
    assert beside.count(">=100.0") == beside.count("certified, l2") == 2
    assert ">=: a lower bound" in beside


def test_an_attack_on_some_images_only_is_named():
    rows = (*(row(i, T) for i in range(4)), row(2, F, attack="square", gradient="none"))
    model = Model("ours", rows)
    assert model.headlines[0].images == 1
    assert "pgd 4, square 1" in conflicts([model])[0]


def test_trust_follows_the_checks():
    rows = (row(0, T),)
    good, bad, open_ = (CheckRow("logits", passed, "words") for passed in (True, False, None))
    assert Model("m", rows).trusted is None
    assert Model("m", rows, (open_,)).trusted is None
    assert Model("m", rows, (good, open_)).trusted is True
    assert Model("m", rows, (good, bad)).trusted is False
    assert Model("m", rows, (good,), unmade=("transfer",)).trusted is None
    prevented = CheckRow("logits", None, "not made: no such package", {"error": "no such package"})
    words = verdict(Model("m", rows, (prevented,), unmade=("logits", "transfer", "global seed")))
    assert "; not made of every run: logits (no such package), transfer and 1 more" in words
    assert Model("m", rows, (bad,), unmade=("transfer",)).trusted is False


def test_a_run_that_has_not_come_to_its_checks_is_not_checked(tmp_path):
    with Run(tmp_path, ATTACK, {}) as run:
        flag = CheckRow("flags of autoattack (exact, eps 0.5)", True, "dynamic defense")
        run.append([row(0, T), flag])
    model = report([str(tmp_path)]).models[0]
    assert model.trusted is None
    assert "not checked for masking" in str(Report((model,)))


def test_checks_of_one_run_do_not_vouch_for_another(tmp_path):
    checked = write_run(tmp_path / "checked")
    settings = read_attack_log(checked).settings
    with Run(tmp_path / "unchecked", ATTACK, settings) as run:
        run.append([row(0, T, eps=0.9)])
    model = report([f"ours={checked}", f"ours={tmp_path / 'unchecked'}"]).models[0]
    assert model.unmade == CHECKS
    assert model.trusted is None
    words = "; not made of every run: gradient-free attacks, stronger attack and 8 more"
    assert words in verdict(model)
    assert words[:30] in str(Report((model,)))


def test_a_failed_check_is_beside_every_figure(tmp_path):
    models = report([str(write_run(tmp_path / "bad", failed=True))]).models
    count = len(models[0].results)
    assert str(Report(models)).count("  not reliable") == count == 6
    beside = [Model("good", models[0].rows), *models]
    lines = Report(tuple(beside)).comparison().splitlines()
    marked = [line.count("! ") for line in lines if line.startswith("l2 eps")]
    assert marked == [1, 1]
    assert [entry.trusted for entry in model_differences(beside)] == [False, False]
    assert sum(line.endswith("  not reliable") for line in lines) == 2
    table = Report(models).to_tsv().splitlines()[1:]
    assert [line.split("\t")[-2] for line in table] == ["False"] * 6


def test_json_and_tsv_hold_the_figures(tmp_path):
    folder = write_run(tmp_path / "ours", certified=0.3)
    found = report([str(folder)])
    ours = json.loads(json.dumps(found.to_json(), allow_nan=False))["models"][0]
    headline = found.models[0].headlines[1]
    assert ours["figures"][5]["fresh"]["value"] == headline.fresh.value
    assert [entry["eps"] for entry in ours["robustbench"]] == ["0.25", "0.5"]
    entry = ours["robustbench"][1]
    assert entry["dataset"] == "digits"
    assert entry["threat_model"] == "L2"
    assert entry["clean_acc"] == "100.00"
    assert entry["reported"] == f"{100 * headline.fresh.value:.2f}"
    assert entry["unreliable"] is False
    assert "autoattack_acc" not in entry  # no AutoAttack was run
    lines = list(csv.DictReader(io.StringIO(found.to_tsv()), delimiter="\t"))
    assert tuple(lines[0]) == COLUMNS
    assert [float(line["fresh"]) for line in lines] == [
        f.fresh.value for f in found.models[0].results
    ]


@pytest.mark.parametrize(
    ("change", "whole"),
    [({}, T), ({"steps": 5}, F), ({"parts": ["square"]}, F), ({"version": "rand"}, F)],
)
def test_only_the_whole_autoattack_has_robustbench_s_key(change, whole):
    rows = (clean_row(0), row(0, F, attack="autoattack"), row(0, T))
    attack = (
        attack_settings(columns([AutoAttack(0.5, norm="l2")], ("exact",)))[0]
        | {"name": "autoattack"}
        | change
    )
    model = Model("ours", rows, settings=(("log", {"attacks": [attack]}),))
    assert robustbench(model)[0].get("autoattack_acc") == ("0.00" if whole else None)


def test_eps_as_people_write_it():
    assert [eps_name(eps) for eps in (8 / 255, 0.1, 0.5, 1.0, 128 / 255)] == [
        "8/255",
        "0.1",
        "0.5",
        "1",
        "0.501961",
    ]


def test_runs_of_one_name_are_one_model_or_refused(tmp_path):
    def run(folder, rows, **settings):
        known = {"model": "net", "data": "digits", "weights": "w", "attacks": []}
        with Run(tmp_path / folder, ATTACK, known | settings) as journal:
            journal.append(rows)
        return f"ours={tmp_path / folder}"

    first = run("a", [clean_row(0), row(0, T)])
    square = run("b", [clean_row(0), row(0, F, attack="square", gradient="none")])
    found = report([first, square])
    merged = found.models[0]
    assert [result.attack for result in merged.results] == ["pgd", "square", ALL]
    assert merged.headlines[0].counted.value == 0
    assert merged.headlines[0].clean.value == 1
    assert "made of 2 runs" in found.notices[0]
    with pytest.raises(InputError, match="differ in weights 'w' and 'other'"):
        report([first, run("c", [row(1, T)], weights="other")])
    with pytest.raises(InputError, match="differ in options"):
        report([first, run("g", [row(1, T)], options="sigma 0.5")])
    with pytest.raises(InputError, match="both hold image 0 under pgd"):
        report([first, run("d", [row(0, F)])])
    with pytest.raises(InputError, match="labels 1 and 2"):
        report([first, run("e", [row(0, F, eps=0.1, label=2)])])
    attacks = [{"name": "pgd", "eps": 0.5, "steps": steps} for steps in (10, 100)]
    shards = [run(f"f{i}", [row(i, T)], attacks=[one]) for i, one in enumerate(attacks)]
    for others in (shards, [first, *shards]):  # each with each, not with the first alone
        with pytest.raises(InputError, match=r"attack pgd eps 0\.5"):
            report(others)
    found = report([first.partition("=")[2], square.partition("=")[2]])
    assert [model.name for model in found.models] == ["a", "b"]
    assert "a and b have the same weights (w)" in found.notices[0]


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [str(write_run(tmp_path / part / "run")) for part in ("a", "b")]
    models = report(folders).models
    assert [model.name for model in models] == folders
    with pytest.raises(InputError, match="given twice"):
        report([folders[0], folders[0]])


def test_command_prints_each_form(tmp_path, capsys):
    plain = str(write_run(tmp_path / "plain", name="p", failed=True))
    ours = str(write_run(tmp_path / "denoised", name="d", certified=0.3))
    assert main(["report", plain, ours]) == 0
    assert capsys.readouterr().out.startswith("NOT RELIABLE: plain")
    assert main(["report", plain, ours, "--compare"]) == 0
    out = capsys.readouterr().out
    assert "denoised against plain, l2 eps 0.25: +0.0 points" in out
    assert main(["report", f"{ours}/certify.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["certified"][0]["certified_accuracy"]
    page = tmp_path / "a.html"
    assert main(["report", ours, "--tsv", "--html", str(page)]) == 0
    assert capsys.readouterr().out.startswith("model\tnorm\teps")
    assert page.read_text().startswith("<!doctype html>")


def test_comparison_shows_what_a_model_lacks():
    first = Model("first", (row(0, T),))
    second = Model("second", (row(0, T, norm="linf", eps=8 / 255),))
    lines = Report((first, second)).comparison().splitlines()
    cells = {line[:24].strip(): line[24:].split() for line in lines}
    assert cells["l2 eps 0.5"] == ["100.0", "-"]
    assert cells["linf eps 8/255"] == ["-", "100.0"]


def damage(folder, text):
    path = write_run(folder) / "attack.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], text, *lines[1:]]) + "\n")
    return str(folder)


@pytest.mark.parametrize("text", ["{", '{"kind": "attack"}', "[]", '{"kind": "image"}'])
def test_damaged_logs_end_in_one_line(tmp_path, capsys, text):
    assert main(["report", damage(tmp_path / "run", text)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "attack.jsonl:2 is damaged" in error


@pytest.mark.parametrize(
    "change",
    [
        {"eps": "0.5"},
        {"eps": math.inf},
        {"eps": [0.5]},
        {"clean": "yes"},
        {"index": 0.5},
        {"index": [1]},
        {"attack": 3},
        {"norm": "$x^^$"},
    ],
)
def test_values_of_another_type_end_in_one_line(tmp_path, capsys, change):
    record = msgspec.to_builtins(row(99, T)) | change
    folder = damage(tmp_path / "run", json.dumps(record))
    assert main(["report", folder]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is damaged" in error


def test_refusals(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text("hello\n")
    Run(tmp_path / "none", ATTACK, {}).close()
    ours = write_run(tmp_path / "ours")
    picture = '{"kind": "image", "index": 7, "attack": "pgd", "gradient": "exact", "eps": 0.5, '
    picture += '"stage": "attacked", "shape": [1, 9, 9], "pixels": "AAAA"}'
    for run, reason in {
        "missing": "does not exist",
        "empty": "holds none of its logs",
        "other.jsonl": "is not a log",
        "none": "no rows yet",
    }.items():
        assert main(["report", str(tmp_path / run)]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert main(["report", f"={ours}"]) == main(["report", "ours="]) == 2
    assert main(["report", damage(tmp_path / "picture", picture)]) == 2
    assert "(1, 9, 9)" in capsys.readouterr().err
    assert main(["report", damage(tmp_path / "list", picture.replace('"pgd"', "[1]"))]) == 2
    assert "damaged" in capsys.readouterr().err
    check = '{"kind": "check", "name": "logits", "passed": true, "finding": "", "numbers": {"a": '
    assert main(["report", damage(tmp_path / "inf", check + "Infinity}}"), "--json"]) == 2
    assert "damaged" in capsys.readouterr().err
    for name, attacks in (("numbers", "[1]"), ("text", '"x"')):
        folder = Path(damage(tmp_path / name, check + "1}}"))
        text = (folder / "attack.jsonl").read_text()
        header = json.loads(text.splitlines()[0])
        header["settings"]["attacks"] = json.loads(attacks)
        rest = text.partition("\n")[2]
        (folder / "attack.jsonl").write_text(json.dumps(header) + "\n" + rest)
        assert main(["report", str(folder), "--json"]) == 2
        assert "attacks in its settings are damaged" in capsys.readouterr().err
    assert main(["report", str(ours), "--html", str(tmp_path / "no" / "a.html")]) == 2
    assert main(["report", str(ours), "--json", "--tsv"]) == 2


def test_a_clean_run_alone_says_so():
    text = str(Report((Model("ours", (clean_row(0),)),)))
    assert "no attack" in text
    assert Model("ours", (clean_row(0),)).columns == {}

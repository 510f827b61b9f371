"""Procedures that stop early: sound on known probabilities, and thrifty on stored logs."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from art_denoised.smoothing.statistics import Certificate, Sequential
from art_denoised.smoothing.stops import Anytime, AtRadii, Draw, FixedN, Stage, Voting, simulate

ROOT = Path(__file__).parent.parent.parent
ALPHA, TRIALS = 0.05, 2_000  # three times for each mode
# A sound procedure exceeds this with probability below 1e-6 a case; the streams are seeded.
LIMIT = int(stats.binom.ppf(1 - 1e-6, TRIALS, ALPHA))
RADII = (0.0, 0.5, 1.0)


def multinomial(probabilities, rng):
    def votes(draw: Draw) -> dict[int, int]:
        drawn = rng.multinomial(draw.size, probabilities)
        return {c: int(k) for c, k in enumerate(drawn) if k}

    return votes


def violations(make, probabilities, trials=TRIALS) -> int:
    """How often a certificate says more than is true: sigma = 1, so the truth is Phi^-1(p)."""
    rng, wrong = np.random.default_rng(1), 0
    radii = stats.norm.ppf(probabilities).tolist()
    for _ in range(trials):
        certificate = make(multinomial(probabilities, rng))
        if certificate.label != -1:
            true = radii[certificate.label]
            wrong += true <= 0 or certificate.radius > true
    return wrong


def run(stop, votes, label=None, earlier=None, sigma=1.0):
    return simulate(stop.procedure(label, {"sigma": sigma}, earlier), votes)


def fixed(votes):
    return run(FixedN(60, 10, ALPHA), votes)[0]


def one_radius(votes):
    return run(AtRadii((0.5,), 300, 10, ALPHA), votes)[0]


def table(votes):
    return run(AtRadii(RADII, 300, 10, ALPHA), votes, label=0)[0]


def table_of_true_class(votes):
    return run(AtRadii(RADII, 300, alpha=ALPHA, labels="class"), votes, label=0)[0]


def deadline(votes):
    """Tighten again and again, and stop when the radius is largest: as an optimist would."""
    best = None
    certificate = None
    for n in (20, 35, 70, 140):
        certificate = run(Anytime(n, 10, ALPHA), votes, earlier=certificate)[0]
        best = max(best or certificate, certificate, key=lambda c: c.radius)
    return best


def above(radius: float, by: float) -> list[float]:
    p = float(stats.norm.cdf(radius)) + by
    return [p, 1 - p]


@pytest.mark.parametrize("make", [fixed, one_radius, table, table_of_true_class, deadline])
@pytest.mark.parametrize(
    "probabilities",
    [above(0.5, -1e-6), above(0.0, -1e-6), above(1.0, -1e-6)],
    ids=["just below r = 0.5", "just below 1/2", "just below r = 1"],
)
def test_violations_stay_within_alpha(make, probabilities):
    assert violations(make, probabilities) <= LIMIT


def test_many_equal_classes_stay_within_alpha():
    assert violations(table, [0.5, *[0.5 / 9] * 9], 2000) <= stats.binom.ppf(1 - 1e-6, 2000, ALPHA)


def reused(votes):
    """Unsound: the samples that select the class are counted once more."""
    seen = votes(Draw(Stage.ESTIMATION, 0, 100))
    return Certificate.from_counts(seen, seen, alpha=ALPHA, sigma=1.0)


def peeking(votes):
    """Unsound: a plain bound, looked at until it suits."""
    counts = {0: 0, 1: 0}
    for _ in range(20):
        for c, k in votes(Draw(Stage.ESTIMATION, 0, 15)).items():
            counts[c] += k
        certificate = Certificate.from_counts({0: 1}, counts, alpha=ALPHA, sigma=1.0)
        if certificate.proves(0.5):
            break
    return certificate


def test_the_simulation_sees_unsound_procedures():
    limit = stats.binom.ppf(1 - 1e-6, 2000, ALPHA)
    assert violations(reused, [0.5, 0.5], 2000) > limit
    assert violations(peeking, above(0.5, -1e-6), 2000) > limit


def test_the_simulation_sees_alpha_spent_at_every_look(monkeypatch):
    @cache
    def each(self, p0, alpha):
        return {n: int(stats.binom.isf(alpha, n, p0)) + 1 for n in self.counts}

    monkeypatch.setattr(Sequential, "boundary", each)
    assert violations(one_radius, above(0.5, -1e-6), 2000) > stats.binom.ppf(1 - 1e-6, 2000, ALPHA)


def answer(share: float):
    """Votes of class 0 in this share of all samples, without chance; 1 and 2 share the rest."""

    def votes(draw: Draw) -> dict[int, int]:
        shares = share, (1 - share) / 2
        first, second = (round(s * draw.stop) - round(s * draw.start) for s in shares)
        counts = {0: first, 1: second, 2: draw.size - first - second}
        return {c: k for c, k in counts.items() if k}

    return votes


def test_sampling_stops_when_all_radii_are_proved_or_out_of_reach():
    steps = [run(AtRadii((0.5, 1.0)), answer(share)) for share in (0.999, 0.7, 0.4, 0.8413)]
    (clear, few), (partial, some), (lost, least), (close, most) = steps
    assert [proof.radius for proof in clear.proofs] == [0.5, 1.0]
    assert few <= 100 + 200
    assert partial.radius == 0.5  # 0.7 is Phi(0.524): undecided for long
    assert some > 10_000
    assert (lost.label, least) == (-1, 140)
    assert close.radius == 0.5
    assert 10_000 < most <= 100_100  # given up, though late


def test_labels_save_the_images_that_are_wrong_anyway():
    certificate, samples = run(AtRadii((0.5,), 1000), answer(0.9), label=1)
    assert (certificate.label, certificate.n, samples) == (-1, 0, 100)


def test_what_a_look_proved_stays_proved():
    """A run of luck first: the certificate names the look, though all votes say less."""

    def votes(draw: Draw) -> dict[int, int]:
        return {int(draw.stop > 131): draw.size}

    certificate, _ = run(AtRadii((0.5, 2.0), 1000, n0=10), votes)
    ((radius, n, k),) = certificate.proofs
    assert (certificate.label, certificate.radius) == (0, radius) == (0, 0.5)
    assert n == k <= 131 < certificate.n == certificate.drawn
    assert certificate.at(0.001) == certificate


def test_giving_up_never_gives_up_what_is_certain(monkeypatch):
    """Without the rule of futility, the table of sure images is the same."""
    stop = AtRadii((0.0, 1.0, 2.0, 3.0), 10_000)
    with_rule, _ = run(stop, answer(0.9999))
    monkeypatch.setattr(Sequential, "is_futile", lambda *_, **__: False)
    assert run(stop, answer(0.9999))[0].proofs == with_rule.proofs


def test_tightening_goes_on_where_it_stopped():
    seen = []

    def votes(draw: Draw) -> dict[int, int]:
        seen.append(draw)
        return answer(0.95)(draw)

    first, _ = run(Anytime(300), votes)
    second, _ = run(Anytime(1000), votes, earlier=first)
    assert seen == [
        Draw(Stage.SELECTION, 0, 100),
        Draw(Stage.ESTIMATION, 0, 300),
        Draw(Stage.ESTIMATION, 300, 1000),
    ]
    whole, _ = run(Anytime(1000), answer(0.95))
    assert second == whole


def test_voting_asks_once():
    answered, samples = run(Voting(200), answer(0.9))
    assert (answered.label, samples) == (0, 200)


def load_replay():
    spec = importlib.util.spec_from_file_location("replay", ROOT / "benchmarks" / "replay.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # where its imports are
        spec.loader.exec_module(module)
    return module


def replayed(tmp_path, capsys, log, *options):
    path = tmp_path / "log.tsv"
    path.write_text(log)
    load_replay().main([str(path), *options, "--json"])
    return json.loads(capsys.readouterr().out)


def published(sigma: float, every: int = 1) -> str:
    """A log of Cohen et al. in their layout; of wrong images the class is not known."""
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    radii = np.loadtxt(ROOT / "tests" / "golden" / f"cohen_cifar10_sigma{sigma:.2f}.txt").ravel()
    for i, radius in enumerate(radii[::every]):
        predict = -1 if radius == 0 else 3 if radius > 0 else 5
        correct = int(radius > 0)
        lines.append(f"{20 * i}\t3\t{predict}\t{abs(radius):.3}\t{correct}\t0:02:35.760262")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("sigma", "radii", "seeds", "options", "saving"),
    [
        (0.25, "0,0.25,0.5,0.75", 1, ["--labels"], 13),
        (0.5, "0,0.25,0.5,0.75,1,1.25,1.5", 1, ["--labels"], 13),
        (0.5, "0,0.25,0.5,0.75,1,1.25,1.5", 1, [], 11),
        (0.25, "0", 3, ["--labels"], 60),
        (0.5, "1", 3, ["--labels"], 60),
    ],
)
def test_replayed_tables_of_the_field_cost_a_fraction(
    tmp_path, capsys, sigma, radii, seeds, options, saving
):
    """From 100,000 samples; half a point lost at most."""
    options = ["--sigma", str(sigma), "--radii", radii, "--seeds", str(seeds), *options]
    found = replayed(tmp_path, capsys, published(sigma), *options)
    assert found["images"] == 500
    assert found["saving"] >= saving
    assert found["lost"] <= 0.5


def test_a_log_of_known_probabilities_is_replayed(tmp_path, capsys):
    """Sure images are proved by few samples, hopeless ones given up by few, and nothing is lost."""
    largest = Certificate.from_counts({3: 1}, {3: 1000}, alpha=0.001, sigma=0.5).radius
    rows = [f"{i}\t3\t3\t{largest:.3}\t1\t15.4" for i in range(8)]
    rows += [f"{i}\t3\t5\t{largest:.3}\t0\t15.4" for i in range(8, 10)]
    log = "\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows]) + "\n"
    options = ["--sigma", "0.5", "--radii", "0.25", "--n", "1000", "--seeds", "2", "--labels"]
    found = replayed(tmp_path, capsys, log, *options)
    assert (found["images"], found["lost"]) == (10, 0.0)
    assert found["saving"] == 1100 / 40  # each image is decided at its first look


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_a_deadline_keeps_the_average_radius(sigma):
    bench = load_replay()
    radii = bench.signed_radii(ROOT / "tests" / "golden" / f"cohen_cifar10_sigma{sigma:.2f}.txt")
    images = bench.recover(radii, sigma, 100_000, 0.001)
    done = bench.replay(images, Anytime(100_000, labels=False), [0.0], sigma=sigma)
    assert 0.97 <= done.acr <= 1


def test_settings_name_what_determines_the_rows():
    assert FixedN(50).settings == {"alpha": 0.001, "n0": 100, "n": 50}
    assert AtRadii([0.5], 50).settings == {
        "alpha": 0.001,
        "n0": 100,
        "n": 50,
        "radii": [0.5],
        "use_labels": True,
        "rule": "sequential",
    }
    assert Anytime(50, seconds=3).settings == {
        "alpha": 0.001,
        "n0": 100,
        "prior": [2.0, 0.3],
        "use_labels": True,
    }
    assert Voting(50).settings == {"alpha": 0.001, "n": 50}
    assert Anytime(1000).upto(400).n == 400
    assert Anytime(1000).upto(5000).n == 1000
    assert Anytime(1000, alpha=1e-40).upto(100).n == 133


def test_defaults_are_the_documented_ones():
    """Of the paper 100 selection samples and alpha = 0.001 (Cohen et al., 2019, section 4)."""
    assert FixedN() == FixedN(n=10_000, n0=100, alpha=0.001)
    table = AtRadii((0.5,))
    assert table == AtRadii((0.5,), n=100_000, n0=100, alpha=0.001, labels=True)
    assert table.looks[0] == 40
    assert table.looks[-1] == 100_000
    stated = Anytime(n=100_000, n0=100, alpha=0.001, seconds=None, labels=True)
    assert Anytime() == stated
    assert Voting() == Voting(n=1000, alpha=0.001)
    assert FixedN(n0=1).n0 == 1

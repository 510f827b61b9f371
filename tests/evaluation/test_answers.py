"""Certificates from a paid service: nothing paid is lost, nothing is asked twice."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from art_denoised import DnCNN
from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation.answers import recertify
from art_denoised.evaluation.certify import certify
from art_denoised.evaluation.logs import read_log
from art_denoised.evaluation.verify import verify
from art_denoised.smoothing import BlackBox, Budget, BudgetError, Retry, TransientError
from art_denoised.smoothing.http import HttpClassifier
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import AtRadii, FixedN
from tests.api_server import NAMES, Service
from tests.forked import forked

KILLS, WORKERS, IMAGES, N0, N = 20, 4, 8, 20, 100

CLASSIFIER = digits_classifier()


def local(images):
    with torch.no_grad():
        labels = CLASSIFIER(torch.from_numpy(images)).argmax(1)
    return [NAMES[c] for c in labels.tolist()]


def asking(ask=local, classes=NAMES, **options) -> BlackBox:
    return BlackBox(ask, classes=classes, **options)


def run(out, box=None, *, data=None, denoiser=None, sigma=0.25, **options):
    """Certify three digits by questions; ``n``, ``n0``, ``radii`` and ``labels`` make the stop."""
    plan = {"n": N, "n0": N0} | {k: options.pop(k) for k in ("n", "n0") if k in options}
    if "radii" in options:
        stop = AtRadii(options.pop("radii"), labels=options.pop("labels", True), **plan)
    else:
        stop = FixedN(**plan)
    box = asking(batch_size=50, workers=1) if box is None else box
    smoother = Smoother(box, sigma=sigma, denoiser=denoiser)
    data = load_data("digits") if data is None else data
    return certify(
        smoother, data, stop, run=out, **{"indices": range(3), "progress": False, **options}
    )


def journal(out) -> list[dict]:
    lines = (Path(out) / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def answered(out) -> int:
    text = (
        (Path(out) / "answers.jsonl").read_text() if (Path(out) / "answers.jsonl").exists() else ""
    )
    return text.count('"sample"')


def client(url: str, out: str) -> None:
    box = asking(
        HttpClassifier(url, answer="predictions.0.label"),
        workers=WORKERS,
        retry=Retry(backoff=0.01),
    )
    run(out, box, indices=range(IMAGES), resume=True)


def test_twenty_kills_lose_nothing_and_ask_nothing_twice(tmp_path):
    """Killed at random moments, the run is charged for each query once and ends in the same rows.

    What is on the wire when the process dies, at most a query a worker, is asked again; the
    service knows it by its key.
    """
    random = np.random.default_rng(0)
    with Service(latency=0.005) as service:  # so that no process is done before it is killed
        thread = threading.Thread(
            target=service.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        kills = lost = 0
        while kills < KILLS:
            before = answered(tmp_path)
            process = forked(client, service.url, str(tmp_path))
            while answered(tmp_path) == before and process.is_alive():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.03))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, "it was over before it was killed"
            kills += 1
            time.sleep(0.02)  # what was on the wire arrives
            # Several images are open at once, so a process may die before it comes to what an
            # earlier one lost; each kill adds at most what was on the wire at that moment.
            left = len(service.answers) - answered(tmp_path)
            assert left - lost <= WORKERS
            lost = left
        client(service.url, str(tmp_path))
        service.shutdown()
        thread.join()
    assert len(service.answers) == IMAGES * (N0 + N)  # each query charged, once
    assert len(service.requests) - len(service.answers) <= KILLS * WORKERS
    keys = [(r["index"], r["stage"], r["sample"]) for r in journal(tmp_path) if "answer" in r]
    assert len(keys) == len(set(keys)) == IMAGES * (N0 + N)
    gone = asking(HttpClassifier(service.url, answer="predictions.0.label"))
    log = run(tmp_path, gone, indices=range(IMAGES), resume=True)

    def rounded(images):  # what the service sees
        return local(np.clip(np.rint(images * 255), 0, 255).astype(np.float32) / 255)

    again = run(tmp_path / "whole", asking(rounded), indices=range(IMAGES))
    assert log.rows == again.rows
    assert verify(log) == []


def test_it_certifies_what_certify_does(tmp_path):
    """The very samples of `certify`: same streams, same votes, same certificate."""
    log = run(tmp_path, denoiser=digits_denoiser())
    smoother = Smoother(digits_classifier(), sigma=0.25, denoiser=digits_denoiser())
    for row in log.rows:
        x, _ = load_data("digits")[row.index]
        assert row.certificate == smoother.certify(x[None], FixedN(N, N0), first_index=row.index)[0]


def test_radii_save_queries(tmp_path):
    box = asking(local, workers=1)
    log = run(tmp_path, box, n=2000, radii=[0.1], indices=range(6))
    assert box.spent == sum(N0 + row.drawn for row in log.rows)
    assert box.spent < 6 * 2020 / 4
    assert verify(log) == []


def test_empty_answers_are_never_certified(tmp_path):
    def nothing(images):
        return [None] * len(images)

    with pytest.raises(InputError, match="None"):  # it would have been paid for nothing
        run(tmp_path / "silent", asking(nothing))
    silent = run(tmp_path / "silent", asking(nothing), resume=True)
    assert [(row.prediction, row.radius) for row in silent.rows] == [(-1, 0.0)] * 3
    assert silent.rows[0].certificate.counts == {-1: N}
    assert verify(silent) == []

    def sometimes(images):  # wins the selection, but not a majority
        return ["three" if next(turn) % 5 == 0 else "" for _ in images]

    turn = iter(range(10**6))
    mostly = run(tmp_path / "mostly", asking(sometimes, workers=1))
    assert [row.prediction for row in mostly.rows] == [-1] * 3


def test_synonyms_and_other_words(tmp_path):
    def french(images):
        return ["sept"] * len(images)

    log = run(tmp_path / "merged", asking(french, synonyms={"Sept": "seven"}))
    assert [row.prediction for row in log.rows] == [7, 7, 7]
    with pytest.raises(InputError, match=r"'sept'.*'seven'"):  # before the rest is paid for
        run(tmp_path / "other", asking(french))
    assert 20 <= answered(tmp_path / "other") < 50
    log = run(tmp_path / "other", asking(french), resume=True)
    assert [row.prediction for row in log.rows] == [10, 10, 10]  # a class of its own: none of these
    again = recertify(tmp_path / "other", synonyms={"sept": "seven"}, alpha=0.001)
    assert [row.prediction for row in again.rows] == [7, 7, 7]


def test_a_budget_that_cannot_suffice_is_refused_before_anything_is_asked(tmp_path):
    box = asking(local, budget=Budget(cost=3.5, cost_per_query=0.01), workers=1)
    with pytest.raises(BudgetError, match=r"360 more queries \(3\.60\).* only 350"):
        run(tmp_path, box)
    assert box.spent == 0
    run(tmp_path, box, indices=range(2), resume=True)
    assert box.spent == 240
    fresh = asking(local, budget=Budget(queries=300), workers=1)
    with pytest.raises(BudgetError, match="only 60"):  # of both runs together
        run(tmp_path, fresh, resume=True)


def test_a_refused_budget_leaves_the_log(tmp_path):
    done = run(tmp_path, indices=range(2))
    before = (tmp_path / "certify.jsonl").read_bytes()
    with pytest.raises(BudgetError):
        run(tmp_path, asking(budget=Budget(queries=250)), indices=range(4), resume=True)
    assert (tmp_path / "certify.jsonl").read_bytes() == before
    assert len(done.rows) == 2


def test_a_budget_that_runs_out_keeps_what_was_paid(tmp_path):
    box = asking(local, budget=Budget(queries=600), workers=1)
    with pytest.raises(BudgetError):
        run(tmp_path, box, n=2000, radii=[0.4], indices=range(4))
    assert answered(tmp_path) == box.spent == 600
    more = asking(local, workers=1)
    log = run(tmp_path, more, n=2000, radii=[0.4], indices=range(4), resume=True)
    assert more.spent == answered(tmp_path) == 80 + sum(r.drawn for r in log.rows)


def test_a_finished_run_takes_more_images_but_not_more_samples(tmp_path):
    """More samples once the votes are known would be a look that alpha was not spent on."""
    run(tmp_path, indices=range(2))
    for change in ({"n": 150}, {"n0": 30}, {"radii": [0.1]}, {"n": 2000, "radii": [0.1]}):
        with pytest.raises(InputError, match="different settings"):
            run(tmp_path, resume=True, **change)
    box = asking(local, workers=1)
    log = run(tmp_path, box, indices=range(3), resume=True)
    assert box.spent == 3 * (N0 + N)
    assert log.rows == run(tmp_path / "whole").rows
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "certify.jsonl").write_text("the log of another kind of run")
    for resume in (False, True, True):
        with pytest.raises(InputError, match="already holds a run of another kind"):
            run(tmp_path / "other", resume=resume)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["certify.jsonl"]
    tight = asking(local, budget=Budget(queries=box.spent), workers=1)
    run(tmp_path, tight, indices=range(3), resume=True)  # needs nothing, so it suffices
    skipped = asking(local, workers=1)
    options = {"n": 150, "radii": [0.6], "sigma": 0.5, "indices": range(10)}
    run(tmp_path / "labels", skipped, **options)
    again = asking(local, budget=Budget(queries=skipped.spent), workers=1)
    assert len(run(tmp_path / "labels", again, **options, resume=True).rows) == 10


def test_a_run_that_is_resumed_with_fewer_images_keeps_the_rows_of_the_others(tmp_path):
    whole = run(tmp_path, indices=range(3))
    box = asking(local, workers=1)
    again = run(tmp_path, box, indices=[1], resume=True)
    assert again.rows == read_log(tmp_path).rows == whole.rows
    assert box.spent == answered(tmp_path) == 3 * (N0 + N)
    assert verify(read_log(tmp_path)) == []
    more = run(tmp_path, box, indices=[3, 1], resume=True)  # and with others
    assert [row.index for row in more.rows] == [0, 1, 2, 3]
    assert box.spent == 4 * (N0 + N)


def test_fewer_images_of_an_unfinished_run_cost_no_more_than_these(tmp_path):
    def asked() -> dict[int, int]:
        return Counter(
            row["index"] for row in journal(tmp_path) if "answer" in row and row["index"]
        )

    options = {"n": 2000, "radii": [0.4]}
    with pytest.raises(BudgetError):
        run(tmp_path, asking(budget=Budget(queries=600), workers=1), indices=range(4), **options)
    before = asked()
    log = run(tmp_path, asking(local, workers=1), indices=[0], resume=True, **options)
    assert asked() == before  # of the other images
    assert log.rows[0].index == 0
    assert all(row.drawn == before[row.index] - N0 for row in log.rows[1:])


class Changed:
    """The digits, an image or a label of them another one."""

    def __init__(self, image: int | None = None, label: int | None = None) -> None:
        self._digits, self._image, self._label = load_data("digits"), image, label

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int):
        x, label = self._digits[index]
        return 1 - x if index == self._image else x, 9 - label if index == self._label else label


def test_answers_are_about_the_images_and_the_classifier_that_were_asked(tmp_path):
    class Named:
        def __init__(self, name: str) -> None:
            self.identity = name

        def __call__(self, images):
            return local(images)

    run(tmp_path, asking(Named("a")), data=Changed())
    for data, value in ((Changed(image=1), "pixels"), (Changed(label=1), "label is 8, not 1")):
        with pytest.raises(InputError, match=f"image 1 .*{value}"):
            run(tmp_path, asking(Named("a")), data=data, indices=range(4), resume=True)
        assert answered(tmp_path) == 3 * (N0 + N)
    with pytest.raises(InputError, match="classifier is 'a', not 'b'"):
        run(tmp_path, asking(Named("b")), data=Changed(), resume=True)
    moved = {"identity": {"classifier": "a"}}
    run(tmp_path, asking(Named("b")), data=Changed(image=3), resume=True, **moved)


def test_answers_keep_the_noise_that_they_were_asked_with(tmp_path):
    digits = load_data("digits")
    data = [((digits[i][0] * 255).round() / 255, digits[i][1]) for i in range(2)]

    def certified(noise):
        smoother = Smoother(asking(batch_size=50, workers=1), sigma=0.25, noise=noise)
        return certify(smoother, data, FixedN(N, N0), run=tmp_path, resume=True, progress=False)

    log = certified("quantised")
    again = recertify(tmp_path, alpha=0.001)
    assert again.rows == log.rows
    assert log.rows[0].tv > 0
    assert verify(again) == []
    with pytest.raises(InputError, match="noise is 'quantised', not 'gaussian'"):
        certified("gaussian")


def test_none_of_these_is_no_label(tmp_path):
    """An answer that is no class would be right, and certified, for images labelled so."""
    few = asking(classes=NAMES[:7])
    for bad in ({"box": few, "indices": range(30)}, {"indices": [10**6]}, {"indices": [-1]}):
        with pytest.raises(InputError):
            run(tmp_path / "bad", **bad)
    assert answered(tmp_path / "bad") == 0
    run(tmp_path / "good", indices=range(2))  # labels 2 and 8


def test_answers_keep_the_classes_that_they_were_asked_for(tmp_path):
    """Labels are indices of them: in another order each would be another class."""
    log = run(tmp_path)
    path = tmp_path / "answers.jsonl"
    assert recertify(path, alpha=0.001).rows == log.rows
    for other in (NAMES[::-1], [*NAMES, "ten"]):
        with pytest.raises(InputError, match="classes is"):
            run(tmp_path, asking(classes=other), resume=True)


class Blur(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = torch.nn.AvgPool2d(size, 1, size // 2)

    def forward(self, x_noisy, sigma):
        return self.pool(x_noisy)


def black(x_noisy, sigma):
    return 0 * x_noisy


@pytest.mark.parametrize(
    ("first", "second"), [(Blur(3).eval(), Blur(5).eval()), (None, black), (black, Blur(3).forward)]
)
def test_another_denoiser_is_refused(tmp_path, first, second):
    """Votes of two functions would be counted for one certificate."""
    run(tmp_path, denoiser=first, indices=range(1))
    with pytest.raises(InputError, match="denoiser"):
        run(tmp_path, denoiser=second, indices=range(2), resume=True)


def test_a_denoiser_is_tried_before_the_journal_is_begun(tmp_path):
    half = DnCNN(1, 3, 4).half().eval()
    assert len(run(tmp_path / "half", denoiser=half, indices=range(1)).rows) == 1
    for misfit in (DnCNN(3, 3, 4).eval(), lambda x, sigma: x[..., 1:], lambda x, sigma: None):
        with pytest.raises(InputError, match="the denoiser"):
            run(tmp_path / "misfit", denoiser=misfit)
    assert not (tmp_path / "misfit").exists()


def test_a_budget_for_the_selections_suffices_where_all_images_are_wrong(tmp_path):
    box = asking(lambda images: ["six"] * len(images), budget=Budget(queries=2 * N0), workers=1)
    run(tmp_path, box, indices=range(2), n=2000, radii=[0.1])
    assert box.spent == 2 * N0
    blind = {"labels": False, "indices": range(1), "n": 2000, "radii": [0.1]}
    with pytest.raises(BudgetError, match="60 more"):
        run(tmp_path / "blind", asking(local, budget=Budget(queries=50)), **blind)


def test_unfinished_images_are_left_out_and_told(tmp_path):
    box = asking(local, budget=Budget(queries=10**6), workers=1)
    run(tmp_path, box, indices=range(3))
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: -N // 2]))
    log = recertify(path, alpha=0.001)
    assert [row.index for row in log.rows] == [0, 1]
    assert "images 2" in log.notices[0]
    fewer = recertify(path, alpha=0.001, n=N // 2)
    assert [row.index for row in fewer.rows] == [0, 1, 2]
    with pytest.raises(InputError, match="holds 100 of the 101 samples of image 0"):
        recertify(path, alpha=0.001, n=N + 1)
    path.write_text("".join(lines[:10]))
    with pytest.raises(InputError, match="holds no finished image"):
        recertify(path, alpha=0.001)


def test_failed_attempts_count_across_runs(tmp_path):
    calls = iter(range(10**6))

    def flaky(images):
        if next(calls) == 50:
            raise TransientError("busy")
        return local(images)

    box = asking(flaky, workers=1, retry=Retry(times=0))
    with pytest.raises(InputError, match="busy"):
        run(tmp_path, box)
    assert {"kind": "failed", "reason": "busy", "queries": 1} in journal(tmp_path)
    box = asking(local, workers=1)
    run(tmp_path, box, resume=True)
    assert box.spent == 3 * (N0 + N) + 1


def test_recertification_asks_nothing_and_refuses_what_the_journal_does_not_hold(tmp_path):
    log = run(tmp_path)
    path = tmp_path / "answers.jsonl"
    options = {"n0": N0}
    same = recertify(path, alpha=0.001, n=N, **options)
    assert same.rows == log.rows
    assert verify(same) == []
    wider = recertify(path, alpha=0.05, n=N, **options)
    assert all(a.radius >= b.radius for a, b in zip(wider.rows, log.rows, strict=True))
    fewer = recertify(path, alpha=0.001, n=60, **options)
    assert [row.certificate.n for row in fewer.rows] == [60] * 3
    for change, message in (
        ({"n": N + 1}, "holds 100 of the 101 samples of image 0"),
        ({"n": N, "n0": N0 + 1}, "selection"),
        ({"n": N, "alpha": 0.7}, "alpha is 0.7"),
    ):
        with pytest.raises(InputError, match=message):
            recertify(path, **{"alpha": 0.001, **options, **change})
    with pytest.raises(InputError, match="does not exist"):
        recertify(tmp_path / "none", alpha=0.001, **options)
    with pytest.raises(InputError, match="certify log"):
        recertify(tmp_path / "certify.jsonl", alpha=0.001, **options)


def test_runs_of_other_settings_and_damaged_journals_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        run(tmp_path)
    with pytest.raises(InputError, match=r"sigma is 0\.25, not 0\.3"):
        run(tmp_path, sigma=0.3, resume=True)
    with pytest.raises(InputError, match="denoiser differs"):
        run(tmp_path, denoiser=digits_denoiser(), resume=True)
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines()
    for bad in ('{"kind": "answer"', '{"kind": "answer", "index": 0, "answer": "one"}', "7"):
        path.write_text("\n".join([*lines[:5], bad, *lines[5:]]) + "\n")
        with pytest.raises(InputError, match=r"answers\.jsonl:6 is damaged"):
            run(tmp_path, resume=True)
    path.write_text("\n".join(lines)[:-9])  # torn in the last line
    assert len(run(tmp_path, resume=True).rows) == 3


def test_a_run_that_stopped_early_is_restated_at_its_own_looks(tmp_path):
    """The number of answers depends on the votes: a bound for a fixed number would be unsound."""
    options = {"n": 2000, "radii": [0.1], "indices": range(6)}
    log = run(tmp_path, asking(local, batch_size=50), **options)
    path = tmp_path / "answers.jsonl"
    same = recertify(path, alpha=0.001)
    assert same.rows == log.rows
    assert verify(same) == []
    stopped = [row.drawn for row in log.rows if 0 < row.drawn < 2000]
    assert stopped
    for change in ({"n": min(stopped)}, {"n0": N0}, {"n": 100, "n0": N0}):
        with pytest.raises(InputError, match="depends on the votes"):
            recertify(path, alpha=0.001, **change)
    stricter = recertify(path, alpha=1e-6)
    assert all(a.radius <= b.radius for a, b in zip(stricter.rows, log.rows, strict=True))
    assert verify(stricter) == []


def test_one_answer_that_is_none_does_not_spoil_the_journal(tmp_path):
    calls = iter(range(10**6))

    def mostly(images):
        return [-1 if next(calls) == 30 else "seven" for _ in images]

    with pytest.raises(InputError, match="answered -1"):
        run(tmp_path, asking(mostly, batch_size=8, workers=1))
    assert answered(tmp_path) == 35  # its batch too, but for that one
    box = asking(local, workers=1)
    assert len(run(tmp_path, box, resume=True).rows) == 3
    assert box.spent == 3 * (N0 + N) + 1


def test_attempts_that_fail_for_good_count_across_runs(tmp_path):
    sent = []

    def refuses(images):
        sent.append(len(images))
        raise InputError("403")

    for _ in range(20):
        box = asking(refuses, workers=2, budget=Budget(queries=370))
        with pytest.raises(InputError):
            run(tmp_path, box, resume=True)
    assert sum(sent) <= 370 - 360 + 1 + 2  # then what is left cannot suffice any more


def test_a_denoiser_in_training_mode_is_refused(tmp_path):
    with pytest.raises(InputError, match="training mode"):
        run(tmp_path, denoiser=torch.nn.Sequential(torch.nn.Dropout()).train())


def test_images_without_any_answer_are_given_up(tmp_path):
    box = asking(lambda images: [None] * len(images), workers=1)
    options = {"n": 2000, "radii": [0.1], "labels": False, "indices": range(2)}
    with pytest.raises(InputError, match="None"):
        run(tmp_path, box, **options)
    run(tmp_path, box, resume=True, **options)
    assert box.spent == 2 * (N0 + 40)  # the first look was enough

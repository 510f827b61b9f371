"""Querying classifiers that cost money and fail."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from art.estimators.classification import BlackBoxClassifier

from art_denoised.checks import InputError
from art_denoised.estimators.defended import ask_estimator
from art_denoised.smoothing import (
    BlackBox,
    Budget,
    BudgetError,
    Retry,
    TransientError,
)
from art_denoised.smoothing.queries import StoppedError, Vocabulary

IMAGE = np.zeros((1, 8, 8), np.float32)
CLASSES = ("cat", "dog")


def cats(images):
    return ["cat"] * len(images)


def test_failures_that_pass_are_tried_again_and_paid():
    errors = [ConnectionResetError(), TimeoutError("slow"), TransientError("busy")]

    def ask(images):
        if errors:
            raise errors.pop(0)
        return cats(images)

    failed = []
    box = BlackBox(ask, CLASSES, retry=Retry(backoff=0.001))
    assert box.query(IMAGE[None], lambda reason, n: failed.append((reason, n))) == ["cat"]
    assert failed == [("ConnectionResetError", 1), ("slow", 1), ("busy", 1)]
    assert box.spent == 4


def test_waits_are_doubled_unless_the_server_says_how_long():
    retry = Retry(backoff=0.5)
    assert [retry.wait(k, TimeoutError()) for k in (0, 1, 2, 10)] == [0.5, 1.0, 2.0, 60.0]
    assert retry.wait(5, TransientError("busy", retry_after=0.05)) == 0.05
    assert retry.wait(0, TransientError("busy", retry_after=3600)) == 60.0
    for bad in ({"times": -1}, {"backoff": -1}, {"backoff": float("nan")}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Retry(**bad)


def test_failures_that_stay_end_it():
    def late(images):
        raise TimeoutError("gone")

    def broken(images):
        raise KeyError("label")

    box = BlackBox(late, CLASSES, retry=Retry(times=2, backoff=0))
    with pytest.raises(InputError, match=r"3 times .*gone"):
        box.query(IMAGE[None])
    assert box.spent == 3
    box = BlackBox(broken, CLASSES)
    with pytest.raises(InputError, match="KeyError"):
        box.query(IMAGE[None])
    assert box.spent == 1


def test_the_budget_is_never_exceeded():
    def fails(images):
        raise TimeoutError

    box = BlackBox(fails, CLASSES, budget=Budget(queries=3), retry=Retry(backoff=0))
    with pytest.raises(BudgetError, match="only 0 left"):
        box.query(IMAGE[None])
    assert box.spent == 3  # attempts in vain are paid, too


def test_a_stop_ends_the_wait_for_a_retry():
    stopped, calls = threading.Event(), []

    def ask(images):
        calls.append(1)
        stopped.set()
        raise TimeoutError

    with pytest.raises(StoppedError):
        BlackBox(ask, CLASSES, retry=Retry(backoff=1000)).query(IMAGE[None], stopped=stopped)
    assert len(calls) == 1


def test_budgets():
    assert Budget(cost=0.3, cost_per_query=0.1).limit == 3
    assert Budget(queries=2, cost=1.0, cost_per_query=0.1).limit == 2
    assert Budget().limit == float("inf")
    with pytest.raises(BudgetError, match=r"60 more queries \(0\.60\).* 50 left"):
        Budget(cost=1.0, cost_per_query=0.01).check(50, 60)
    endless = {"cost": float("inf"), "cost_per_query": 0.1}
    for bad in ({"queries": -1}, {"cost": 1.0}, {"cost": -1, "cost_per_query": 1}, endless):
        with pytest.raises(InputError):
            Budget(**bad)


def test_what_cannot_be_called_is_refused():
    estimator = BlackBoxClassifier(lambda x: x, (1, 8, 8), 10)
    with pytest.raises(InputError, match=r"BlackBoxClassifier.*ask_estimator"):
        BlackBox(estimator, CLASSES)


def test_an_answer_for_each_image_is_expected():
    with pytest.raises(InputError, match="0 answers for 1"):
        BlackBox(lambda images: [], CLASSES).query(IMAGE[None])


def test_long_answers_are_cut():
    box = BlackBox(lambda images: ["x" * 5_000_000], CLASSES)
    assert box.query(IMAGE[None]) == ["x" * 200]
    with pytest.raises(InputError, match="200"):
        Vocabulary(("x" * 201, "dog"))


@pytest.mark.parametrize("yes", [True, np.bool_(True), np.array(True)])
def test_booleans_are_no_classes(yes):
    with pytest.raises(InputError, match="True"):
        Vocabulary(CLASSES).index(yes)


def test_words_are_merged_and_emptiness_is_no_class():
    words = Vocabulary(("cat", "Dog"), {"Tabby": "cat", "hound": "Dog"})
    assert [words.index(w) for w in ("CAT", "tabby ", "HOUND", "dog", 1)] == [0, 0, 1, 1, 1]
    assert [words.index(w) for w in ("tree", "cats")] == [2, 2]
    assert [words.index(w) for w in (None, "", "  ")] == [-1, -1, -1]
    for bad in (2, -1, 1.5, ["cat"]):
        with pytest.raises(InputError, match="answered"):
            words.index(bad)  # type: ignore[arg-type]
    for classes, synonyms in (
        (("cat", "Cat"), {}),
        (("cat", " cat"), {}),
        (("cat", " "), {}),
        (("cat", "dog"), {"Tabby": "cat", "tabby": "dog"}),
        (("cat", "dog"), {"": "cat"}),
    ):
        with pytest.raises(InputError, match="once, and none empty"):
            Vocabulary(classes, synonyms)
    lines = Vocabulary(("cat\n", "dog\n"), {"hound\n": "dog"})  # as readlines() gives them
    assert [lines.index(w) for w in ("cat", "dog", "hound", "tree")] == [0, 1, 1, 2]
    with pytest.raises(InputError, match="none of the classes"):
        Vocabulary(("cat",), {"hound": "dog"})


def test_black_box_classifiers_of_art_can_be_asked():
    def predict(x):
        scores = np.eye(10)[(x.mean((1, 2, 3)) > 0.5).astype(int)]
        scores[0] = 0  # an abstention, as ART writes it
        return scores

    estimator = BlackBoxClassifier(predict, (1, 8, 8), 10, clip_values=(0, 1))
    images = np.stack([IMAGE, IMAGE, IMAGE + 1])
    assert ask_estimator(estimator)(images) == [None, 0, 1]

    def log_probabilities(x):
        rows = [[-np.inf, -0.7, -0.7], [np.nan, 0, 1], [-np.inf] * 3, [np.inf, 0, 1]]
        return np.array(rows)[: len(x)]

    impossible = BlackBoxClassifier(log_probabilities, (1, 8, 8), 3, clip_values=(0, 1))
    answers = ask_estimator(impossible)(np.stack([IMAGE] * 4))
    assert answers == [1, None, None, None]
    with pytest.raises(InputError, match="function"):
        ask_estimator(predict)

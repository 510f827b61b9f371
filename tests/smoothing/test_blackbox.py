"""Asking classifiers that cost money and fail."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from art.estimators.classification import BlackBoxClassifier

from art_denoised.checks import InputError
from art_denoised.estimators.asking import ask_estimator
from art_denoised.smoothing.blackbox import (
    BlackBox,
    Budget,
    BudgetError,
    TransientError,
    Vocabulary,
)
from art_denoised.smoothing.http import HttpClassifier, encode_png
from tests.api_server import NAMES, Service

IMAGE = np.zeros((1, 8, 8), np.float32)


def ask_many(box: BlackBox, count: int, image: np.ndarray = IMAGE):
    answers, reasons = {}, []
    box.ask_all(
        ((i, image) for i in range(count)), answers.update, lambda why, n: reasons.append(why)
    )
    return answers, reasons


def cats(images):
    return ["cat"] * len(images)


def test_calls_are_batched_and_run_at_once():
    sizes, at_once, most, lock = [], 0, 0, threading.Lock()

    def ask(images):
        nonlocal at_once, most
        with lock:
            sizes.append(len(images))
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return cats(images)

    answers, _ = ask_many(BlackBox(ask, batch_size=3, workers=4), 22)
    assert len(answers) == 22
    assert sorted(sizes) == [1, *[3] * 7]
    assert most == 4


def test_failures_that_pass_are_tried_again_and_paid():
    calls = []

    def ask(images):
        calls.append(time.monotonic())
        if len(calls) <= 3:
            raise [ConnectionResetError(), TimeoutError("slow"), TransientError("busy")][
                len(calls) - 1
            ]
        return cats(images)

    box = BlackBox(ask, workers=1, backoff=0.02)
    answers, reasons = ask_many(box, 1)
    assert answers == {0: "cat"}
    assert reasons == ["ConnectionResetError", "slow", "busy"]
    assert box.spent == 4
    waits = np.diff(calls)
    assert waits[0] >= 0.02
    assert waits[1] >= 0.04
    assert waits[2] >= 0.08


def test_the_server_says_how_long_to_wait():
    calls = []

    def ask(images):
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise TransientError("busy", retry_after=0.05)
        return cats(images)

    ask_many(BlackBox(ask, workers=1, backoff=30), 1)
    assert 0.05 <= calls[1] - calls[0] < 5


def test_failures_that_stay_end_it_and_keep_what_came():
    def ask(images):
        if images[0, 0, 0, 0]:
            raise TimeoutError("gone")
        return cats(images)

    answers: dict[int, str] = {}
    queries = ((i, IMAGE + (i == 5)) for i in range(10))
    with pytest.raises(InputError, match=r"failed 3 times in a row \(gone\).*kept"):
        BlackBox(ask, workers=1, retries=2, backoff=0).ask_all(queries, answers.update)
    assert sorted(answers) == [0, 1, 2, 3, 4]

    def broken(images):
        raise KeyError("label")

    with pytest.raises(InputError, match="KeyError"):
        ask_many(BlackBox(broken), 1)


def test_the_budget_is_never_exceeded():
    for workers in (1, 4):
        box = BlackBox(cats, budget=Budget(queries=10), workers=workers)
        answers: dict[int, str] = {}
        with pytest.raises(BudgetError, match="only 0 of the budget"):
            box.ask_all(((i, IMAGE) for i in range(30)), answers.update)
        assert box.spent == len(answers) == 10

    def fails(images):
        raise TimeoutError

    box = BlackBox(fails, budget=Budget(queries=3), backoff=0, workers=1)
    with pytest.raises(BudgetError):
        ask_many(box, 1)
    assert box.spent == 3  # attempts in vain are paid too


def test_budgets():
    assert Budget(cost=0.3, cost_per_query=0.1).limit == 3
    assert Budget(queries=2, cost=1.0, cost_per_query=0.1).limit == 2
    assert Budget().limit == float("inf")
    with pytest.raises(BudgetError, match=r"60 more queries \(0\.60\) are needed, but only 50"):
        Budget(cost=1.0, cost_per_query=0.01).check(50, 60)
    endless = {"cost": float("inf"), "cost_per_query": 0.1}
    for bad in ({"queries": -1}, {"cost": 1.0}, {"cost": -1, "cost_per_query": 1}, endless):
        with pytest.raises(InputError):
            Budget(**bad)


def test_what_cannot_be_called_is_refused():
    estimator = BlackBoxClassifier(lambda x: x, (1, 8, 8), 10)
    with pytest.raises(InputError, match=r"ask is a BlackBoxClassifier.*ask_estimator"):
        BlackBox(estimator)


def test_an_answer_an_image_is_expected():
    with pytest.raises(InputError, match="0 answers for 1"):
        ask_many(BlackBox(lambda images: []), 1)


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


@pytest.fixture(scope="module")
def service():
    with Service(failures=0.3) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_http_service_with_every_failure(service):
    ask = HttpClassifier(service.url, answer="predictions.0.label", timeout=5)
    rng = np.random.default_rng(0)
    box, answers = BlackBox(ask, workers=4, retries=10, backoff=0.001), {}
    images = [(i, rng.random((1, 8, 8), np.float32)) for i in range(150)]
    box.ask_all(images, answers.update)
    assert len(answers) == 150
    assert set(service.failed) == {"500", "429", "break before", "break after", "empty"}
    assert {answer for answer in answers.values() if answer} <= set(NAMES)
    assert None in answers.values()
    assert len(service.answers) == 150  # asked again, but charged once
    assert len(service.requests) > 150
    assert box.spent >= len(service.requests)


class Canned(BaseHTTPRequestHandler):
    """Answers with the server's ``status``, ``headers`` and ``content``, and counts."""

    def do_POST(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def canned():
    with HTTPServer(("127.0.0.1", 0), Canned) as server:
        server.status, server.headers, server.content, server.asked = 200, {}, b"{}", 0
        server.url = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (200, b'{"predictions": [{"label": "cat", "score": 1}]}', "no 'lable' of .* label, score"),
        (200, b'{"error": "no credit"}', "no 'predictions' of .* keys error"),
        (200, b'{"predictions": "cat"}', "no '0' of .*, but 'cat'"),
        (200, b'{"predictions": [{"lable": ["cat"]}]}', r"answered \"\['cat'\]\" at"),
        (302, b"", "redirects to http://127.0.0.1:9/elsewhere; .* give that url"),
        (308, b"", "redirects to http://127.0.0.1:9/elsewhere"),
    ],
)
def test_a_wrong_reply_is_paid_for_once(canned, status, content, message):
    canned.status, canned.content = status, content
    canned.headers = {"Location": "http://127.0.0.1:9/elsewhere"} if status >= 300 else {}
    ask = HttpClassifier(canned.url, answer="predictions.0.lable")
    with pytest.raises(InputError, match=message):
        ask_many(BlackBox(ask, backoff=0, workers=1), 1)
    assert canned.asked == 1


def test_replies_without_a_label_are_empty_answers(canned):
    ask = HttpClassifier(canned.url, answer="a.1.b")
    for empty in ("{}", '{"a": []}', '{"a": [1]}', '{"a": null}', '{"a": [0, {}]}', "null"):
        canned.content = empty.encode()
        assert ask(IMAGE[None]) == [None]
    for path, empty in (("a", '{"a": []}'), ("a", '{"a": {}}'), ("a.0", '{"a": [[]]}')):
        canned.content = empty.encode()
        assert HttpClassifier(canned.url, answer=path)(IMAGE[None]) == [None]


@pytest.mark.parametrize(
    ("status", "content"), [(408, b""), (200, b"<html>"), (200, b"\xff\xfe\xff")]
)
def test_replies_that_may_pass_are_asked_for_again(canned, status, content):
    canned.status, canned.content = status, content
    with pytest.raises(InputError, match="failed 3 times in a row"):
        ask_many(BlackBox(HttpClassifier(canned.url), retries=2, backoff=0, workers=1), 1)
    assert canned.asked == 3


def test_requests_that_cannot_be_made_are_not_tried_again(canned):
    for url in (
        "localhost", "http://", "http:///path", "http://host:port/", "http://[::1/", "http://a b/",
        "http://me:secret@host/", "http://host/\u00e9", "ftp://host/",
    ):  # fmt: skip
        with pytest.raises(InputError, match="http://"):
            HttpClassifier(url)
    for name, value in (
        ("X", "secret\n"),
        ("X", "sec\rret"),
        ("X", "secret\u20ac"),
        ("X:", "a"),
        ("\u00e9", "a"),
    ):
        with pytest.raises(InputError, match=f"header '{name}' cannot be sent") as caught:
            HttpClassifier(canned.url, headers={name: value})
        assert "sec" not in str(caught.value)  # messages and journals are no place for keys
    several = BlackBox(HttpClassifier(canned.url), batch_size=3, backoff=0, workers=1)
    with pytest.raises(InputError, match="give BlackBox batch_size=1"):
        ask_many(several, 3)
    assert canned.asked == 0


def test_a_service_is_known_by_its_url_without_keys():
    box = BlackBox(HttpClassifier("http://host:80/classify?key=secret", answer="a"))
    assert box.identity == {"url": "http://host:80/classify", "answer": "a", "image_field": "image"}
    assert BlackBox(cats).identity is None


def test_http_refusals_are_final(service):
    rude = HttpClassifier(service.url, headers={"Authorization": "wrong"})
    box = BlackBox(rude, retries=50, backoff=0)  # until no other failure comes first
    with pytest.raises(InputError, match="403"):
        ask_many(box, 1)
    nobody = HttpClassifier("http://127.0.0.1:9/", timeout=0.5)
    with pytest.raises(TransientError):
        nobody(IMAGE[None])


def test_images_are_clipped_and_rounded_into_a_png():
    import io

    from PIL import Image

    image = np.linspace(-0.5, 1.5, 192, dtype=np.float32).reshape(3, 8, 8)
    pixels = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    expected = np.clip(np.rint(image * 255), 0, 255).transpose(1, 2, 0)
    assert np.array_equal(pixels, expected)
    with pytest.raises(InputError, match="4 channels"):
        encode_png(np.zeros((4, 8, 8)))


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

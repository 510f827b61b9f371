"""Classifiers behind HTTP, with the failures of real ones."""

from __future__ import annotations

import asyncio
import io
import pickle
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from art_denoised.checks import InputError
from art_denoised.smoothing import BlackBox, HttpClassifier, Retry, TransientError
from art_denoised.smoothing.http import encode_png
from tests.api_server import NAMES, Service

IMAGE = np.zeros((1, 8, 8), np.float32)


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
    box = BlackBox(ask, NAMES, retry=Retry(times=10, backoff=0.001))
    images = rng.random((150, 1, 1, 8, 8), np.float32)
    with ThreadPoolExecutor(4) as pool:
        answers = [answer for (answer,) in pool.map(box.query, images)]
    assert set(service.failed) == {"500", "429", "break before", "break after", "empty"}
    assert {answer for answer in answers if answer} <= set(NAMES)
    assert None in answers
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
        (
            200,
            b'{"predictions": [{"label": "cat", "score": 1}]}',
            "no 'lable' of .* keys 'label, score'",
        ),
        (200, b'{"error": "no credit"}', "no 'predictions' of .* keys 'error'"),
        (200, b'{"predictions": "cat"}', "no '0' of .*, but 'cat'"),
        (200, b'{"predictions": [{"lable": ["cat"]}]}', r"answered \"\['cat'\]\" at"),
        (200, b'{"predictions": [{"lable": true}]}', r"answered 'True' at"),
        (200, b"[" * 2_000_000, "1,000,000 bytes"),
        (302, b"?", r"redirects to http://\*\*\*@127.0.0.1:9/elsewhere;"),
        (302, b"", "redirects to http://127.0.0.1:9/elsewhere; .* give that url"),
        (308, b"", "redirects to http://127.0.0.1:9/elsewhere"),
    ],
)
def test_a_wrong_reply_is_paid_for_once(canned, status, content, message):
    canned.status, canned.content = status, content
    canned.headers = {"Location": "http://127.0.0.1:9/elsewhere"} if status >= 300 else {}
    if content == b"?":
        canned.headers = {"Location": "http://me:word@127.0.0.1:9/elsewhere?api_key=secret#word"}
    ask = HttpClassifier(canned.url, answer="predictions.0.lable")
    with pytest.raises(InputError, match=message) as caught:
        BlackBox(ask, NAMES, retry=Retry(backoff=0)).query(IMAGE[None])
    assert not re.search("secret|word", str(caught.value))
    assert canned.asked == 1


def test_replies_without_a_label_are_empty_answers(canned):
    ask = HttpClassifier(canned.url, answer="a.1.b")
    for empty in ("{}", '{"a": []}', '{"a": [1]}', '{"a": null}', '{"a": [0, {}]}', "null"):
        canned.content = empty.encode()
        assert ask(IMAGE[None]) == [None]
    for path, empty in (("a", '{"a": []}'), ("a", '{"a": {}}'), ("a.0", '{"a": [[]]}')):
        canned.content = empty.encode()
        assert HttpClassifier(canned.url, answer=path)(IMAGE[None]) == [None]


def test_it_answers_where_an_event_loop_runs(canned):
    """As in a notebook; a reply that may pass stays one."""
    ask = HttpClassifier(canned.url)

    async def cell() -> list[object]:
        return ask(IMAGE[None])

    canned.content = b'{"label": "cat"}'
    assert asyncio.run(cell()) == ["cat"]
    canned.status = 408
    with pytest.raises(TransientError):
        asyncio.run(cell())


@pytest.mark.parametrize(
    ("status", "content"), [(408, b""), (200, b"<html>"), (200, b"\xff\xfe\xff")]
)
def test_replies_that_may_pass_are_asked_for_again(canned, status, content):
    canned.status, canned.content = status, content
    box = BlackBox(HttpClassifier(canned.url), NAMES, retry=Retry(times=2, backoff=0))
    with pytest.raises(InputError, match="3 times"):
        box.query(IMAGE[None])
    assert canned.asked == 3


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_server_that_drips_has_no_more_time_than_another(part):
    """It sends a byte each 20 ms, for ever."""
    start = b"" if part == "status" else b"HTTP/1.1 200 OK\r\n"
    start += b"\r\n" if part == "body" else b""
    done = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(start)
            while not done.wait(0.02):
                try:
                    connection.sendall(b"H")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        ask = HttpClassifier(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.3)
        with pytest.raises(TransientError, match=r"0\.3 seconds"):
            ask(IMAGE[None])
        done.set()
        thread.join()


def test_requests_that_cannot_be_made_are_not_tried_again(canned):
    for url in (
        "localhost", "http://", "http:///path", "http://host:port/", "http://[::1/", "http://a b/",
        "http://me:secret@host/", "http://host/\u00e9", "ftp://host/",
    ):  # fmt: skip
        with pytest.raises(InputError, match="http://") as caught:
            HttpClassifier(url)
        assert "secret" not in str(caught.value)
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
    with pytest.raises(InputError, match="batch_size=1"):
        BlackBox(HttpClassifier(canned.url), NAMES).query(np.stack([IMAGE] * 3))
    assert canned.asked == 0


def test_a_service_is_known_by_its_url_without_keys():
    box = BlackBox(HttpClassifier("http://host:80/classify?key=secret", answer="a"), NAMES)
    assert box.identity == {"url": "http://host:80/classify", "answer": "a", "image_field": "image"}
    assert BlackBox(lambda images: [], NAMES).identity is None


def test_http_refusals_are_final(service):
    rude = HttpClassifier(service.url, headers={"Authorization": "wrong"})
    box = BlackBox(rude, NAMES, retry=Retry(times=50, backoff=0))  # other failures may come first
    with pytest.raises(InputError, match="403"):
        box.query(IMAGE[None])
    nobody = HttpClassifier("http://127.0.0.1:9/", timeout=0.5)
    with pytest.raises(TransientError):
        nobody(IMAGE[None])


def test_it_can_be_pickled():
    ask = pickle.loads(pickle.dumps(HttpClassifier("http://host/", timeout=3)))
    assert (ask.url, ask.timeout) == ("http://host/", 3)


def test_images_are_clipped_and_rounded_into_a_png():
    image = np.linspace(-0.5, 1.5, 192, dtype=np.float32).reshape(3, 8, 8)
    pixels = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    expected = np.clip(np.rint(image * 255), 0, 255).transpose(1, 2, 0)
    assert np.array_equal(pixels, expected)
    with pytest.raises(InputError, match="4 channels"):
        encode_png(np.zeros((4, 8, 8)))

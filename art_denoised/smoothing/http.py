"""Classifiers behind HTTP: an image in, JSON out."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from art_denoised.checks import InputError
from art_denoised.smoothing.blackbox import Answer, TransientError


class HttpClassifier:
    """Asks an HTTP service that takes an image and answers in JSON.

    Posts ``{image_field: PNG in base64}``, the image clipped to [0, 1] and rounded to 8 bits: that
    is part of the function that is certified. A hash of the image goes along as Idempotency-Key,
    by which a service can tell a repeated question from a new one, and need not charge for it.
    Redirects are not followed: they would take the headers to another host and lose the image.

    Args:
        url: Of the service, http or https; credentials go into ``headers``.
        answer: Where the answer stands in the reply: keys and positions joined by dots, as in
            "predictions.0.label". Where the way ends at null, an empty object or a list that is too
            short, the answer is empty.
        headers: Sent along, such as an authorization; no message names their values.
        image_field: Name of the field with the image.
        timeout: Seconds to wait for a reply.

    Attributes:
        identity: What tells this service from others, for journals: not what stands after ? in the
            URL, where keys stand.

    Raises:
        InputError: ``url`` is none, or a header cannot be sent. When called: more than one image,
            of whose answers those that came would be lost if another failed; or the service
            refuses, redirects, or replies without an answer.

    Example:
        >>> ask = HttpClassifier("http://localhost:8000/classify", answer="predictions.0.label")
        >>> ask.url
        'http://localhost:8000/classify'
    """

    def __init__(
        self,
        url: str,
        *,
        answer: str = "label",
        headers: Mapping[str, str] | None = None,
        image_field: str = "image",
        timeout: float = 30.0,
    ) -> None:
        self.url, self.answer, self.image_field = _checked(url), answer, image_field
        self.headers, self.timeout = _sendable(headers or {}), timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    @property
    def identity(self) -> dict[str, str]:
        """What tells this service from others."""
        url = re.split(r"[?#]", self.url)[0]
        return {"url": url, "answer": self.answer, "image_field": self.image_field}

    def __call__(self, images: np.ndarray) -> list[Answer]:
        """Return the answer for the one image of a batch."""
        if len(images) != 1:
            raise InputError(
                f"the service takes one image a call, not {len(images)}; give BlackBox batch_size=1"
            )
        return [self._ask(images[0])]

    def _ask(self, image: np.ndarray) -> Answer:
        png = encode_png(image)
        request = urllib.request.Request(
            self.url,
            data=json.dumps({self.image_field: base64.b64encode(png).decode()}).encode(),
            headers={
                "Content-Type": "application/json",
                "Idempotency-Key": hashlib.sha256(png).hexdigest(),
                **self.headers,
            },
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as stream:
                reply = json.load(stream)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (408, 429) or error.code >= 500:
                    raise TransientError(
                        f"HTTP {error.code} {error.reason}", _seconds(error.headers)
                    ) from None
                if 300 <= error.code < 400:
                    raise InputError(
                        f"the service redirects to {error.headers.get('Location')}; if you trust "
                        "it with images and headers, give that url"
                    ) from None
                raise InputError(
                    f"the service refused with HTTP {error.code} {error.reason}; check url, "
                    "credentials and image size"
                ) from None
        # A reply that is no JSON was cut off, or is of a gateway that is overloaded.
        except (
            OSError,
            http.client.HTTPException,
            json.JSONDecodeError,
            UnicodeDecodeError,
        ) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from None
        return _find(reply, self.answer)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Leave the redirect to be raised as an HTTPError."""


def encode_png(image: np.ndarray) -> bytes:
    """Return an image (channels, height, width) in [0, 1] as PNG, clipped and rounded to 8 bits.

    Raises:
        InputError: Neither one nor three channels.

    Example:
        >>> encode_png(np.zeros((3, 8, 8)))[1:4]
        b'PNG'
    """
    from PIL import Image

    if len(image) not in (1, 3):
        raise InputError(f"the image has {len(image)} channels; a PNG takes 1 or 3")
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _checked(url: str) -> str:
    """Return a URL that requests can be made of."""
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  raises where it is no number
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:
        good = False
    if not good or re.search(r"[^!-~]", url):
        raise InputError(
            f"url is {url!r}; give one that begins http:// or https:// and a host, without "
            "credentials, and percent-encoded"
        )
    return url


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers that HTTP takes; their values are secrets and stay out of messages."""
    for name, value in headers.items():
        if not (
            re.fullmatch(r"[\w!#-'*+.^`|~-]+", name, re.ASCII) and re.fullmatch(r"[\t -~]*", value)
        ):
            raise InputError(
                f"header {name!r} cannot be sent: its name or value holds a line break or another "
                "character that HTTP does not take; a key that was read from a file, strip()"
            )
    return dict(headers)


def _find(reply: Any, path: str) -> Answer:
    for step in path.split("."):
        if _is_empty(reply):
            return None
        if isinstance(reply, list) and step.isdecimal():
            reply = reply[int(step)] if int(step) < len(reply) else None
        elif isinstance(reply, dict) and step in reply:
            reply = reply[step]
        else:
            held = f"keys {', '.join(reply)}" if isinstance(reply, dict) else f"{str(reply)[:80]!r}"
            raise InputError(f"the reply has no {step!r} of answer={path!r}, but {held}")
    if _is_empty(reply):
        return None
    if isinstance(reply, (str, int)):
        return reply
    raise InputError(f"the service answered {str(reply)[:80]!r} at {path!r}; name a text or index")


def _is_empty(reply: Any) -> bool:
    return reply is None or reply in ({}, [])


def _seconds(headers: Any) -> float | None:
    try:
        return float(headers.get("Retry-After"))
    except (TypeError, ValueError):
        return None

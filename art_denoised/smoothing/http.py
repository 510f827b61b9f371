"""Classifiers behind HTTP: an image in, JSON out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import ssl
import urllib.parse
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.queries import Answer, TransientError

if TYPE_CHECKING:
    import httpx

_T = TypeVar("_T")
_LARGEST_REPLY = 10**6  # bytes


class HttpClassifier:
    """Queries an HTTP service that takes an image and answers in JSON.

    It posts ``{image_field: PNG in base64}``, the image clipped to [0, 1] and rounded to 8 bits:
    that is part of the function that is certified. A hash of the image goes along as
    Idempotency-Key, by which a service can tell a repeated query from a new one, and need not
    charge for it. Redirects are not followed: they would take the headers to another host and lose
    the image. It needs the extra "api" (``pip install 'art-denoised[api]'``).

    Args:
        url: URL of the service, http or https; credentials go into ``headers``.
        answer: Place of the answer in the reply: keys and positions joined by dots, as in
            "predictions.0.label". Where the way ends at null, an empty object or a list that is too
            short, the answer is empty.
        headers: Headers to send, such as an authorization; no message shows their values.
        image_field: Name of the field with the image.
        timeout: Seconds until the whole reply must have come.

    Attributes:
        identity: What tells this service from others, for journals; without the part of the URL
            after ``?``, where keys may stand.

    Raises:
        InputError: The URL, a header or the timeout cannot be used. When called: there is more
            than one image, of whose answers those that came would be lost if another failed; or
            the service refuses, redirects, or replies without an answer or with more than 1 MB.

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
        for name, word in (("url", url), ("answer", answer), ("image_field", image_field)):
            if not isinstance(word, str) or not word:
                raise InputError(f"{name} is {word!r}; give a word")
        self.url, self.answer, self.image_field = _checked(url), answer, image_field
        self.headers = _sendable(headers or {})
        self.timeout = checks.positive("timeout", timeout)

    @property
    def identity(self) -> dict[str, str]:
        """What tells this service from others."""
        return {"url": _shown(self.url), "answer": self.answer, "image_field": self.image_field}

    def __call__(self, images: np.ndarray) -> list[Answer]:
        """Return the answer for the one image of a batch."""
        if len(images) != 1:
            raise InputError(
                f"the service takes one image a call, not {len(images)}; give BlackBox batch_size=1"
            )
        png = encode_png(images[0])
        body = json.dumps({self.image_field: base64.b64encode(png).decode()})
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",  # so that the size of a reply is what was received
            "Idempotency-Key": hashlib.sha256(png).hexdigest(),
            **self.headers,
        }
        return [_find(_parsed(*self._reply(body, headers)), self.answer)]

    def _reply(self, body: str, headers: Mapping[str, str]) -> tuple[httpx.Response, bytes]:
        import httpx

        try:
            # httpx limits the time between bytes; a server may send one now and then for ever.
            return _awaited(asyncio.wait_for(self._post(body, headers), self.timeout))
        except TimeoutError:
            raise TransientError(f"no reply within {self.timeout:g} seconds") from None
        except (httpx.HTTPError, OSError) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from None

    async def _post(self, body: str, headers: Mapping[str, str]) -> tuple[httpx.Response, bytes]:
        import httpx

        content = b""
        async with (
            httpx.AsyncClient(timeout=None, verify=self._certificates) as client,
            client.stream("POST", self.url, content=body, headers=headers) as response,
        ):
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > _LARGEST_REPLY:
                    raise InputError(
                        f"the service replied with more than {_LARGEST_REPLY:,} bytes; give the "
                        "URL of a classifier"
                    )
        return response, content

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # costs more than a query, so it is made once

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the certificates, which cannot be pickled."""
        return {k: v for k, v in self.__dict__.items() if k != "_certificates"}


def _awaited(work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine, also where an event loop runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:  # a thread has one loop at a time
        return thread.submit(asyncio.run, work).result()


def _parsed(response: httpx.Response, content: bytes) -> Any:
    """Return the JSON of a reply, or raise what its status means."""
    status = f"HTTP {response.status_code} {response.reason_phrase[:80]!a}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        after = response.headers.get("Retry-After", "")
        seconds = float(after) if re.fullmatch(r"\d+(\.\d*)?", after) else None
        raise TransientError(status, seconds)
    if 300 <= response.status_code < 400:
        raise InputError(
            f"the service redirects to {_shown(response.headers.get('Location', ''))}; if you "
            "trust it with images and headers, give that url"
        )
    if response.status_code >= 400:
        raise InputError(
            f"the service refused with {status}; check url, credentials and image size"
        )
    try:
        return json.loads(content)
    # A reply that is no JSON was cut off, or is of a gateway that is overloaded.
    except (ValueError, RecursionError) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from None


def encode_png(image: np.ndarray) -> bytes:
    """Return an image of one or three channels as PNG, clipped to [0, 1], rounded to 8 bits."""
    from PIL import Image

    if len(image) not in (1, 3):
        raise InputError(f"the image has {len(image)} channels; a PNG takes 1 or 3")
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _shown(url: str) -> str:
    """Return a URL as messages and journals may show it: without keys and passwords."""
    bare = re.split(r"[?#]", url)[0]
    return ascii(re.sub(r"(?<=//)[^/]*@", "***@", bare))[1:-1][:300]


def _checked(url: str) -> str:
    """Return a URL that requests can be made of."""
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  raises where it is not a number
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:
        good = False
    if not good or re.search(r"[^!-~]", url):
        raise InputError(
            f"url is '{_shown(url)}'; give one that begins http:// or https:// and a host, without "
            "credentials, and percent-encoded"
        )
    return url


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers that HTTP takes; values are secrets, and stay out of messages."""
    if not isinstance(headers, Mapping):
        raise InputError(f"headers is a {type(headers).__name__}; give a dictionary: name -> value")
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise InputError(f"header {name!r} is no text or has a value that is none; give text")
        if not (
            re.fullmatch(r"[\w!#-'*+.^`|~-]+", name, re.ASCII) and re.fullmatch(r"[\t -~]*", value)
        ):
            raise InputError(
                f"header {name!r} cannot be sent: its name or value holds a line break or another "
                "character that HTTP does not take; a key that was read from a file, strip()"
            )
    return dict(headers)


def _find(reply: Any, path: str) -> Answer:
    """Return the answer at a place of a reply."""
    for step in path.split("."):
        if _is_empty(reply):
            return None
        if isinstance(reply, list) and step.isdecimal():
            reply = reply[int(step)] if int(step) < len(reply) else None
        elif isinstance(reply, dict) and step in reply:
            reply = reply[step]
        else:
            held = f"{str(reply)[:80]!r}"
            if isinstance(reply, dict):
                held = f"keys {', '.join(reply)[:200]!a}"
            raise InputError(f"the reply has no {step!r} of answer={path!r}, but {held}")
    if _is_empty(reply):
        return None
    if isinstance(reply, (str, int)) and not isinstance(reply, bool):
        return reply
    raise InputError(
        f"the service answered {str(reply)[:80]!r} at answer={path!r}; give the place of a class "
        "name or index"
    )


def _is_empty(reply: Any) -> bool:
    return reply is None or reply in ({}, [])

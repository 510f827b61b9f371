"""Classifiers behind HTTP: an image in, JSON out."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import urllib.error
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

    Args:
        url: Of the service, http or https.
        answer: Where the answer stands in the reply: keys and positions joined by dots, as in
            "predictions.0.label". Where there is none, or null, the answer is empty.
        headers: Sent along, such as an authorization.
        image_field: Name of the field with the image.
        timeout: Seconds to wait for a reply.

    Raises:
        InputError: ``url`` is none.

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
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url is {url!r}; give one that begins http:// or https://")
        self.url, self.answer, self.image_field = url, answer, image_field
        self.headers, self.timeout = dict(headers or {}), timeout

    def __call__(self, images: np.ndarray) -> list[Answer]:
        """Return an answer an image, asking one after the other."""
        return [self._ask(image) for image in images]

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
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return _find(json.load(reply), self.answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 429 or error.code >= 500:
                    raise TransientError(
                        f"HTTP {error.code} {error.reason}", _seconds(error.headers)
                    ) from None
                raise InputError(
                    f"the service refused with HTTP {error.code} {error.reason}; check url, "
                    "credentials and image size"
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from None


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


def _find(reply: Any, path: str) -> Answer:
    for step in path.split("."):
        try:
            reply = reply[int(step)] if isinstance(reply, list) else reply[step]
        except (LookupError, TypeError, ValueError):
            return None
    if reply is None or isinstance(reply, (str, int)):
        return reply
    raise InputError(f"the service answered {str(reply)[:80]!r} at {path!r}; name a text or index")


def _seconds(headers: Any) -> float | None:
    try:
        return float(headers.get("Retry-After"))
    except (TypeError, ValueError):
        return None

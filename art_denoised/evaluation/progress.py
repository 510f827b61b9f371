"""A progress bar that also moves within a batch."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar that moves with each forward pass, with the time left.

    Within a batch it shows the NFE (number of function evaluations: forward passes of one image)
    and, if the number to expect is known, moves by the share of it that is done.

    Args:
        total: Number of images of the whole run, or of other units.
        done: Number of units that were done before.
        visible: Show the bar, on standard error.
        unit: Name of a unit.
        interval: Smallest time between two refreshes, seconds.

    Example:
        >>> with Progress(8, done=0, visible=False) as progress:
        ...     progress.begin("pgd", images=4, expected=10)
        ...     progress.tick(4)
        ...     progress.end()
        >>> progress.nfe
        4
    """

    def __init__(
        self, total: int, done: int, *, visible: bool, unit: str = "image", interval: float = 0.5
    ) -> None:
        self.nfe = 0
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=not visible)
        self._interval, self._shown = interval, 0.0
        self._done, self._images, self._expected = float(done), 0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def begin(self, name: str, images: int, expected: float | None) -> None:
        """Begin a batch of ``images``, each of which is expected to take ``expected`` NFE."""
        self.nfe, self._images = 0, images
        self._expected = round(images * (expected or 0))
        self._bar.set_description(name, refresh=False)
        self._show()

    def tick(self, images: int) -> None:
        """Count a forward pass of ``images``."""
        self.nfe += images
        if time.monotonic() - self._shown >= self._interval:
            self._show()

    def end(self) -> None:
        """End the batch."""
        self._done += self._images
        self._images = 0
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        share = min(self.nfe / self._expected, 1.0) if self._expected else 0.0
        self._bar.n = round(self._done + share * self._images, 1)
        of: Any = f" of {self._expected:,}" if self._expected else ""
        self._bar.set_postfix_str(f"NFE {self.nfe:,}{of}", refresh=False)
        self._bar.refresh()

"""What a person sees while a run works: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

PATIENCE = 2.0  # seconds that a wait may last without a word
_BETWEEN_LINES = 30.0  # seconds
T = TypeVar("T")


class Progress:
    """Progress of a run on standard error: what is done, units a second, time left and a note.

    A terminal shows a bar that moves. A file or a pipe gets a line at the start, one every
    ``interval`` seconds, and a last one: a bar would fill it with control characters.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        *,
        done: float = 0,
        unit: str = "image",
        visible: bool = True,
        interval: float = _BETWEEN_LINES,
    ) -> None:
        self.n, self.total, self.what = float(done), total, what
        self._done, self._unit = done, unit
        self._note: Callable[[], str] = str
        self._begin = self._shown = time.monotonic()
        self._interval = interval
        self._bar = _bar(self) if visible and sys.stderr.isatty() else None
        self._lines = visible and self._bar is None
        if self._bar is not None:
            self._bar.start()
        self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: float = 1, note: Callable[[], str] | None = None) -> None:
        """Count ``n`` units. The note is called when it is shown."""
        self.move(self.n + n, note)

    def move(
        self, n: float, note: Callable[[], str] | None = None, *, what: str | None = None
    ) -> None:
        """Set the number of units done, the note and the name of what is done now."""
        self.n = n
        self._note = self._note if note is None else note
        self.what = self.what if what is None else what
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=n, description=self.what)
        elif time.monotonic() - self._shown >= self._interval:
            self._print()

    def close(self) -> None:
        """Show the last state and stop."""
        if self._bar is not None:
            self._bar.stop()
        self._print()
        self._bar, self._lines = None, False

    def words(self) -> str:
        """Return what is done, the speed, the time left and the note."""
        seconds, made = time.monotonic() - self._begin, self.n - self._done
        of = "" if self.total is None else f"/{self.total:,.0f}"
        digits = 0 if self.n >= 100 or self.n == int(self.n) else 1 if self.n >= 1 else 2
        done = f"{self.n:,.{digits}f}"
        words = [f"{done}{of} {self._unit}s"]
        if made > 0 and seconds > 0:
            words.append(f"{made / seconds:.3g} {self._unit}s/s")
            if self.total is not None and self.n < self.total:
                left = round((self.total - self.n) * seconds / made)
                words.append(f"{timedelta(seconds=left)} left")
        return ", ".join(filter(None, [*words, self._note()]))

    def _print(self) -> None:
        if self._lines:
            print(f"{self.what}: {self.words()}", file=sys.stderr, flush=True)
            self._shown = time.monotonic()


def _bar(progress: Progress) -> Any:
    """Return a bar of rich on standard error; the words are made anew with each refresh."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Words(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(progress.words())

    name = TextColumn("{task.description}", markup=False)
    bar = Bar(name, BarColumn(20), Words(), console=Console(stderr=True), refresh_per_second=4)
    bar.add_task(progress.what, total=progress.total, completed=round(progress.n))
    return bar


def watched(items: Collection[T], what: str, *, visible: bool = True) -> Iterator[T]:
    """Yield items, with `Progress` once it has taken two seconds."""
    begin, progress = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if progress is None and visible and time.monotonic() - begin >= PATIENCE:
                progress = Progress(what, len(items), done=done)
            yield item
            if progress is not None:
                progress.update()
    finally:
        if progress is not None:
            progress.close()


@contextmanager
def waiting(what: str, *, visible: bool = True) -> Iterator[None]:
    """Say on standard error what is done, once it has taken two seconds."""

    def tell() -> None:
        print(f"notice: {what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    if visible:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""Hand draws out to many workers, whatever they are: processes, actors of Ray, a simulation.

A worker answers a bundle of pieces of draws at a time. Bundles take about a quarter of a second, so
that messages cost little and no worker waits for another one at the end; each worker has one more
bundle ahead. They are made of whole passes of the network, because a worker pads the last one.
Where all that was asked for is under way, idle workers sample ahead: an image asks for a few
samples after the other, and most likely asks for the next ones, too. What a worker took with it
when it died is handed out again. What workers are built from, and what they answer, stands at the
end.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch

from art_denoised import checks
from art_denoised.runs.workers import AHEAD, Crew, Finished, Place, SentNetwork, Team, agreed, built
from art_denoised.smoothing.stops import Counts, Draw, Procedure, Stage
from art_denoised.smoothing.voters import Passes, Task, Voter

if TYPE_CHECKING:
    from art_denoised.smoothing.smoother import Smoother
    from art_denoised.types import Classifier

_SECONDS = 0.25  # that a bundle should take: an image that stops early waits for each look
_LARGEST = 10_000  # samples of a bundle
_FARTHEST = 2  # times the samples of an image: that far it is sampled ahead
# Times: so far it most likely goes on, and workers that are not idle are given it, too.
_LIKELY = 1.1
_Bundle: TypeAlias = "list[_Part]"
_Tried: TypeAlias = tuple[tuple[int, ...], Passes]  # shape of an image, and how it is passed


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A part of a draw, as it is sent: index of the image, its pixels, and the samples."""

    index: int
    x: np.ndarray
    draw: Draw


class _Image:
    """What is known of a task's image; the task itself is held by the driver alone.

    Attributes:
        asked: Samples of its present stage that were asked for.
        sent: Samples that are under way or answered; those above ``asked`` are ahead.
        answered: Votes of samples ahead, by the first one.
        turn: Number of its turn to be sampled ahead, in the order in which turns were given.
    """

    __slots__ = ("answered", "asked", "index", "looks", "sent", "stage", "task", "turn", "x")

    def __init__(self, task: Task[Any]) -> None:
        self.task, self.index, self.looks = ref(task), task.index, task.looks
        self.x = task.x.cpu().numpy()
        self.turn = 0
        self.begin(Draw(Stage.PILOT, 0, 0))

    def begin(self, draw: Draw) -> None:
        """Forget samples ahead."""
        self.stage, self.asked, self.sent = draw.stage, draw.start, draw.start
        self.answered: dict[int, tuple[Draw, Counts]] = {}

    def ahead(self, most: int) -> Draw | None:
        """Return samples of the next look that are not under way; None: that is far, or none."""
        place = bisect_right(self.looks, self.sent)
        if self.stage is not Stage.ESTIMATION or place == len(self.looks):
            return None
        stop = self.looks[place]
        if stop > _FARTHEST * self.asked or self.task() is None:
            return None
        return _cut(Draw(self.stage, self.sent, stop), most)[0]


class _Part:
    """A part of a draw of an image, asked for or ahead; out of date once the image began anew."""

    __slots__ = ("answers", "draw", "image")

    def __init__(self, image: _Image, draw: Draw) -> None:
        self.image, self.draw = image, draw
        self.answers = image.answered  # replaced where the image begins anew

    @property
    def size(self) -> int:
        return self.draw.size

    @property
    def wanted(self) -> bool:
        """Whether its task lives, and has not gone another way."""
        return self.image.task() is not None and self.answers is self.image.answered

    @property
    def asked(self) -> bool:
        """Whether it was asked for."""
        return self.draw.stop <= self.image.asked


class Dispatcher:
    """A `Voter` that hands draws out to a crew, and asks again for what was lost.

    Its own cost of a bundle does not depend on the number of workers.

    Args:
        crew: The workers; closed with the voter.
        identity: What every worker must say of itself, as JSON values.
        batch_size: Number of samples in every pass of a worker.
        allow_mixed: Whether the ``processor`` of workers may differ.

    Attributes:
        pending: Number of samples submitted and not yet returned.

    Raises:
        InputError: When results are taken: a worker failed or differs, or workers only die.

    Example:
        >>> from art_denoised.runs import Answered, Ready
        >>> class Alone:
        ...     size, reports = 1, [Ready({})]
        ...     def send(self, worker, bundle):
        ...         votes = [{3: piece.draw.size} for piece in bundle]
        ...         self.reports.append(Answered(votes, seconds=0.1))
        ...     def receive(self):
        ...         return 0, self.reports.pop(0)
        >>> import torch
        >>> from art_denoised.smoothing import Voting, drive
        >>> record = {"sigma": 0.25, "seed": 0, "dtype": "float32", "noise": "gaussian"}
        >>> task = Task(7, torch.zeros(1, 2, 2), Voting(150).procedure(None, record))
        >>> [(i, vote.counts) for i, vote in drive([task], Dispatcher(Alone(), {}))]
        [(7, {3: 150})]
    """

    def __init__(
        self,
        crew: Crew,
        identity: Mapping[str, Any],
        *,
        batch_size: int = 64,
        allow_mixed: bool = False,
    ) -> None:
        self._team: Team[_Bundle] = Team(crew, identity, allow_mixed=allow_mixed)
        self._images: WeakKeyDictionary[Task[Any], _Image] = WeakKeyDictionary()
        # Images to sample ahead, first those with the smallest share ahead. The chance that an
        # image stops depends on that share, whatever its samples.
        self._turns: list[tuple[float, int, _Image]] = []
        self._turn = 0
        self._queue: deque[_Part] = deque()
        self._done: deque[tuple[Task[Any], Draw, Counts]] = deque()
        self._queued = 0  # samples in the queue
        self._pass = batch_size
        self._grains = [batch_size] * crew.size  # samples of the next bundle of each worker
        self._appetite = AHEAD * batch_size * crew.size
        self._begin, self._answered = time.monotonic(), 0
        self.pending = 0

    @property
    def appetite(self) -> int:
        """Number of samples that keeps all workers busy."""
        return self._appetite

    def note(self) -> str:
        """Return how many workers are ready, and their speed, in words."""
        speed = self._answered / max(time.monotonic() - self._begin, 1e-9)
        return f"{self._team}, {speed:,.0f} samples/s"

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw; a part of it may have been sampled ahead."""
        self.pending += draw.size
        image = self._images.get(task)
        if image is None:
            image = self._images[task] = _Image(task)
        known = (image.stage, image.asked) == (draw.stage, draw.start)
        if not known or (image.sent > draw.stop and draw.stop not in image.looks):
            image.begin(draw)
        image.asked = draw.stop
        for start in [start for start in image.answered if start < draw.stop]:
            self._done.append((task, *image.answered.pop(start)))
        if image.sent < draw.stop:
            self._queue.append(_Part(image, Draw(draw.stage, image.sent, draw.stop)))
            self._queued += draw.stop - image.sent
            image.sent = draw.stop
        self._line_up(image)

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return a part of a submitted draw with its votes."""
        while not self._done:
            self._hand_out()
            finished = self._team.receive()
            if finished is not None:
                self._count(finished)
            while self._team.lost:
                lost = self._team.lost.pop()
                self._queue.extendleft(reversed(lost))
                self._queued += sum(part.size for part in lost)
        task, draw, votes = self._done.popleft()
        self.pending -= draw.size
        return task, draw, votes

    def close(self) -> None:
        """End all workers; what they are computing is dropped."""
        self._team.close()

    def _hand_out(self) -> None:
        """Fill up the workers, first those that have nothing to do."""
        while self._queue and (worker := self._team.free()) is not None:
            share = -(-self._queued // len(self._team.held))
            bundle = self._bundle(min(self._grains[worker], self._padded(share)))
            size = sum(part.size for part in bundle)
            self._give(worker, bundle + self._guess(self._padded(size) - size))  # instead of zeros
        while self._turns and (worker := self._team.free(self._spare())) is not None:
            if not (bundle := self._guess(self._pass)):
                return
            self._give(worker, bundle)

    def _spare(self) -> int:
        """Return the most works that a worker holds which is given samples ahead."""
        share, _, _ = self._turns[0]
        return AHEAD - 1 if share < _LIKELY else 0

    def _give(self, worker: int, bundle: _Bundle) -> None:
        if bundle:  # it is empty if nobody waits for the queue any more
            pieces = [Piece(part.image.index, part.image.x, part.draw) for part in bundle]
            self._team.give(worker, bundle, pieces)

    def _bundle(self, room: int) -> _Bundle:
        """Take work from the queue."""
        bundle: _Bundle = []
        while room > 0 and self._queue:
            part = self._queue.popleft()
            self._queued -= part.size
            if not part.wanted:
                self._drop(part)
                continue
            draw, rest = _cut(part.draw, room)
            if rest.start < rest.stop:
                self._queue.appendleft(_Part(part.image, rest))
                self._queued += rest.size
            bundle.append(_Part(part.image, draw))
            room -= draw.size
        return bundle

    def _guess(self, room: int) -> _Bundle:
        """Sample images ahead, in turn up to the next look of each."""
        bundle: _Bundle = []
        while room > 0 and self._turns:
            _, turn, image = heappop(self._turns)
            if turn == image.turn and (draw := image.ahead(room)):
                image.sent = draw.stop
                bundle.append(_Part(image, draw))
                room -= draw.size
                self._line_up(image)
        return bundle

    def _line_up(self, image: _Image) -> None:
        """Let an image wait for its turn to be sampled ahead."""
        if image.looks and image.stage is Stage.ESTIMATION:
            self._turn += 1
            image.turn = self._turn
            heappush(self._turns, (image.sent / image.asked, image.turn, image))
            if len(self._turns) > 2 * len(self._images) + 100:  # drop turns that are out of date
                self._turns = [turn for turn in self._turns if turn[1] == turn[2].turn]
                heapify(self._turns)

    def _count(self, finished: Finished[_Bundle]) -> None:
        samples = sum(part.size for part in finished.work)
        self._answered += samples
        was = self._grains[finished.worker]
        passes = self._padded(samples) / self._pass
        wanted = self._pass * round(_SECONDS * passes / max(finished.seconds, 1e-6))
        grain = max(self._pass, min(wanted, 2 * was, _LARGEST - _LARGEST % self._pass))
        self._grains[finished.worker] = grain
        self._appetite += AHEAD * (grain - was)
        for part, votes in zip(finished.work, finished.answer, strict=True):
            task = part.image.task()
            if task is None or not part.wanted:
                self._drop(part)
            elif part.asked:
                self._done.append((task, part.draw, votes))
            else:
                part.answers[part.draw.start] = (part.draw, votes)

    def _padded(self, samples: int) -> int:
        """Return the number of samples that a worker computes for so many."""
        return -(-samples // self._pass) * self._pass

    def _drop(self, part: _Part) -> None:
        """Forget a part that nobody waits for any more."""
        if part.asked and part.answers is part.image.answered:
            self.pending -= part.size


def _cut(draw: Draw, most: int) -> tuple[Draw, Draw]:
    """Return the first samples of a draw, and the rest."""
    stage, start, stop = draw
    cut = min(start + most, stop)
    return Draw(stage, start, cut), Draw(stage, cut, stop)


def dispatched(smoother: Smoother, place: Place) -> Voter:
    """Return a voter that hands the draws of a smoother out to workers, which it starts."""
    network = smoother.network
    assert network is not None  # refused by the smoother
    names = ("sigma", "noise", "seed", "batch_size", "clip_values")
    settings = {name: getattr(smoother, name) for name in names}
    shapes = {size[1:]: passes for size, passes in smoother.tried.items()}
    tried = next(iter(shapes.items()), None)
    plan = _Plan(place.build or SentNetwork(network), settings, tried)
    crew = place.start(plan, gpu=checks.model_device(network).type == "cuda")
    return Dispatcher(
        crew,
        _identity(smoother, tried),
        batch_size=smoother.batch_size,
        allow_mixed=place.allow_mixed,
    )


@torch.no_grad()
def _identity(smoother: Smoother, tried: _Tried | None) -> dict[str, Any]:
    """Return what all workers and the driver must agree in."""
    network, size, answers = smoother.network, smoother.batch_size, list[float]()
    assert network is not None
    if tried is not None:
        shape, passes = tried
        x = torch.rand((size, *shape), generator=torch.Generator().manual_seed(0))
        batch = checks.placed(x, network).to(checks.model_dtype(network))
        rows = checks.logit_rows(network(batch.contiguous(memory_format=passes.order)), size)
        answers = rows[:2].flatten().tolist()
    return agreed(network, checks.model_device(network), size, answers)


@dataclass(frozen=True)
class _Plan:
    """What a worker is built from: a function that returns the network, and its `Smoother`.

    All workers decide near ties as the driver does.
    """

    build: Callable[[], Classifier]
    settings: Mapping[str, Any]
    tried: _Tried | None

    def __call__(self, device: str | None) -> _Server:
        from art_denoised.smoothing.smoother import Smoother

        smoother = Smoother(built(self.build, device), **self.settings)
        smoother.near_ties = None if self.tried is None else self.tried[1].near_ties
        return _Server(smoother, self.tried)


class _Server:
    """Answers bundles of pieces with their votes."""

    def __init__(self, smoother: Smoother, tried: _Tried | None) -> None:
        self.identity = _identity(smoother, tried)
        self._device = checks.model_device(smoother.network)
        self._voter = smoother.voter()

    def answer(self, bundle: Sequence[Piece]) -> list[Counts]:
        """Return the votes of each piece."""
        tasks = {}
        for place, piece in enumerate(bundle):
            x = torch.from_numpy(piece.x).to(self._device)
            task: Task[None] = Task(piece.index, x, _unused())
            tasks[task] = place
            self._voter.submit(task, piece.draw)
        counts: list[Counter[int]] = [Counter() for _ in bundle]
        while self._voter.pending:
            task, _, votes = self._voter.next()
            counts[tasks[task]].update(votes)
        return [dict(each) for each in counts]


def _unused() -> Procedure[None]:
    """Return a procedure that nobody runs: the driver holds the real one."""
    yield from ()

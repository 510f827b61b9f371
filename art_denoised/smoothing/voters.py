"""Voters answer draws with votes; one driver holds the procedures, whatever the voter.

Counts add. So a draw may be answered in parts, by a network that packs samples of many images
into batches, by a paid service or by other processes, and no result depends on it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.noise import Noise, Stream, StreamKey
from art_denoised.smoothing.stops import Counts, Draw, Procedure, Stage

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image, Images, Labels

T = TypeVar("T")

_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_LIMIT = 6.0  # seconds for all of them
_TRIAL = 0.1  # seconds for each, at least


@dataclass(frozen=True, eq=False)
class Task(Generic[T]):
    """One image and what is to be found out about it.

    Attributes:
        index: Index of the image in its data set; selects its noise.
        x: The image (channels, height, width), float32, on the device of the network.
        procedure: Generator that asks for votes and returns the answer.
        looks: Sample counts at which it may stop, ascending, as far as they are known. Workers that
            would be idle sample ahead up to them.
    """

    index: int
    x: Image
    procedure: Procedure[T]
    looks: Sequence[int] = ()


class Voter(Protocol):
    """Answers draws: in this process, through a service, or elsewhere."""

    @property
    def pending(self) -> int:
        """Number of samples submitted and not yet returned."""
        ...

    @property
    def appetite(self) -> int:
        """Number of samples that the driver should keep pending."""
        ...

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw, which need not be answered at once.

        A task has one draw at a time. Draws of a task that the caller no longer holds are dropped.
        """
        ...

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return a submitted draw or a part of one, whichever is done first, with its votes."""
        ...

    def close(self) -> None:
        """Stop work that is under way."""
        ...


def drive(
    tasks: Iterable[Task[T]], voter: Voter, *, until: float | None = None
) -> Iterator[tuple[int, T]]:
    """Run procedures on images until all are finished or the time is up.

    A new image is begun only when those under way leave the voter idle. So memory does not grow
    with the number of images, and a procedure that stops early saves time at once.

    Args:
        tasks: Images and procedures, consumed as needed.
        voter: Answers the draws; the caller closes it.
        until: Time, on the clock of `time.monotonic`, at which to stop. Procedures in the
            estimation stage are then sent the votes that have come in, as if they had asked for no
            more, which those of `Anytime` allow. Other images are dropped.

    Yields:
        (index, answer) of each task, as it is finished.

    Raises:
        InputError: The voter failed.

    Example:
        >>> import torch
        >>> from art_denoised.smoothing import Smoother, Voting
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), 0.5 - x.mean((1, 2, 3))], dim=1)
        >>> smoother, x = Smoother(base, sigma=0.25), torch.ones(1, 8, 8)
        >>> votes = Voting(50).procedure(None, smoother.record(x.shape))
        >>> [(i, vote.counts) for i, vote in drive([Task(7, x, votes)], smoother.voter())]
        [(7, {0: 50})]
    """
    waiting, jobs = iter(tasks), dict[Task[T], _Job[T]]()
    while until is None or time.monotonic() < until:
        while voter.pending < voter.appetite and (task := next(waiting, None)) is not None:
            job = _Job(task)
            if job.advance(None):  # an earlier certificate may leave nothing to do
                yield task.index, job.answer
                continue
            jobs[task] = job
            voter.submit(task, job.draw)
        if not jobs:
            return
        task, part, votes = voter.next()
        job = jobs[task]
        job.add(part, votes)
        if job.reached < job.draw.stop:
            continue
        if job.advance(job.votes):
            del jobs[task]
            yield task.index, job.answer
        else:
            voter.submit(task, job.draw)
    for job in jobs.values():
        if job.draw.stage is Stage.ESTIMATION and job.votes and job.advance(job.votes):
            yield job.task.index, job.answer


class _Job(Generic[T]):
    """A task under way.

    Attributes:
        draw: What its procedure asks for at present.
        reached: First sample of the draw whose vote is missing.
        votes: Votes of the samples before that one.
        answer: What the procedure returned.
    """

    draw: Draw
    answer: T

    def __init__(self, task: Task[T]) -> None:
        self.task = task
        self.reached = 0
        self.votes: Counter[int] = Counter()
        self._ahead: dict[int, tuple[int, Counts]] = {}  # parts that came before their turn

    def advance(self, votes: Counts | None) -> bool:
        """Send votes to the procedure, and return whether that finished it."""
        ordered = None if votes is None else {c: votes[c] for c in sorted(votes)}
        try:
            self.draw = self.task.procedure.send(ordered)  # type: ignore[arg-type]  # None starts it
        except StopIteration as end:
            self.answer = end.value
            return True
        self.reached, self.votes = self.draw.start, Counter()
        return False

    def add(self, part: Draw, votes: Counts) -> None:
        """Count the votes of a part. A later run enters a stream where all before has come in."""
        self._ahead[part.start] = (part.stop, votes)
        while self.reached in self._ahead:
            self.reached, found = self._ahead.pop(self.reached)
            self.votes.update(found)


class NetworkVoter:
    """Packs samples of many images into batches for a network in this process.

    The noise of a sample does not depend on its batch. Its logits do, in their last bits, as
    libraries choose other kernels for other batch sizes. A sample whose two leading logits are
    that close is decided by a pass of its own, so the votes are those of the network applied to
    one image at a time (docs/decisions/0001-near-ties.md).
    """

    def __init__(
        self, network: Classifier, *, noise: Noise, seed: int, batch_size: int = 64
    ) -> None:
        self._network, self._noise, self._seed = network, noise, seed
        self.appetite = batch_size
        self._dtype = checks.model_dtype(network)
        self._order: torch.memory_format | None = None
        # Oldest first. A task that the driver has dropped is dropped here, too.
        self._samplers: WeakKeyDictionary[Task[Any], _Sampler] = WeakKeyDictionary()
        self._done: deque[tuple[Task[Any], Draw, Counts]] = deque()

    @property
    def pending(self) -> int:
        """Number of samples submitted and not yet returned."""
        done = sum(draw.stop - draw.start for _, draw, _ in self._done)
        return done + sum(sampler.wanted for sampler in self._samplers.values())

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw."""
        if self._order is None:
            self._order = memory_order(self._network, task.x)
        if task not in self._samplers:
            self._samplers[task] = _Sampler(task, self._noise, self._seed)
        self._samplers[task].ask(draw)

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return a submitted draw or a part of one with its votes."""
        if not self._done:
            self._classify()
        return self._done.popleft()

    def close(self) -> None:
        """Forget what was submitted."""
        self._samplers.clear()
        self._done.clear()

    def _classify(self) -> None:
        """Fill a batch with samples of the oldest tasks, classify it, and count the votes."""
        pieces: list[Images] = []
        parts: list[tuple[Task[Any], Draw]] = []
        room = self.appetite
        for task, sampler in self._samplers.items():
            if sampler.wanted and room:
                part, images = sampler.take(room)
                parts.append((task, part))
                pieces += images
                room -= part.stop - part.start
        assert self._order is not None
        batch = torch.cat(pieces).to(self._dtype).contiguous(memory_format=self._order)
        labels = _decide(self._network, batch).cpu()
        shares = torch.split(labels, [part.stop - part.start for _, part in parts])
        for (task, part), share in zip(parts, shares, strict=True):
            classes, votes = torch.unique(share, return_counts=True)
            counts = dict(zip(classes.tolist(), votes.tolist(), strict=True))
            self._done.append((task, part, counts))


class _Sampler:
    """Noisy copies of one image, as its present draw wants them."""

    wanted = 0  # samples of the draw that are in no batch yet

    def __init__(self, task: Task[Any], noise: Noise, seed: int) -> None:
        self._index, self._noise, self._seed = task.index, noise, seed
        self._shape, self._device = task.x.shape, task.x.device
        # Channels-last in memory, as the noise is: their sum is three times faster so.
        centre = noise.centre(task.x).permute(1, 2, 0).contiguous()
        self._centre = centre.permute(2, 0, 1)
        self._streams: dict[Stage, Stream] = {}

    def ask(self, draw: Draw) -> None:
        """Begin a draw, where the last one of its stage ended if it goes on from there."""
        stream = self._streams.get(draw.stage)
        if stream is None or stream.position != draw.start:
            key = StreamKey(self._seed, self._index, draw.stage)
            stream = Stream(self._noise, key, self._shape, self._device, draw.start)
        self._stream = self._streams[draw.stage] = stream
        self._stage, self.wanted = draw.stage, draw.stop - draw.start

    def take(self, n: int) -> tuple[Draw, list[Images]]:
        """Return up to ``n`` of the noisy copies that are wanted, and which these are."""
        start, n = self._stream.position, min(n, self.wanted)
        self.wanted -= n
        pieces = [self._noise.add(self._centre, piece) for piece in self._stream.pieces(n)]
        return Draw(self._stage, start, start + n), pieces


@torch.no_grad()
def _decide(network: Classifier, batch: Images) -> Labels:
    """Return the class of each sample as a pass over it alone would.

    Only samples whose leading logits are near each other take that second pass, with the noise
    that they had: so the network gets a copy of the batch, into which it may write.
    """
    logits = checks.logits(network(batch.clone()), len(batch))
    (first, second), labels = logits.topk(2, dim=1).values.unbind(1), logits.argmax(1)
    clear = first - second > logits.abs().amax(1) * checks.near(logits, batch)
    for i in (~clear).nonzero().flatten().tolist():
        alone = checks.logits(network(batch[i : i + 1].contiguous()), 1)
        labels[i] = alone.argmax(1)[0]
    return labels


@torch.no_grad()
def memory_order(network: Classifier, x: Image) -> torch.memory_format:
    """Return the memory order of images for a network: channels-last if it can take that.

    Networks that flatten with ``view`` cannot.
    """
    two = torch.stack([x, x]).to(checks.model_dtype(network))
    try:
        network(two.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


@torch.no_grad()
def best_batch_size(network: Classifier, x: Image) -> int:
    """Return the batch size with the most images in a second, measured in a few seconds.

    No vote depends on the batch size; a wrong one costs a factor of time on a CPU.

    Args:
        network: Module or function from images to logits, in eval mode.
        x: An image (channels, height, width).

    Raises:
        InputError: Not even the smallest batch that is tried fits into memory.

    Example:
        >>> best_batch_size(torch.nn.Flatten(), torch.zeros(1, 8, 8)) >= 16
        True
    """
    x = x.to(checks.model_device(network), checks.model_dtype(network))
    order = memory_order(network, x)
    start, best, fastest = time.perf_counter(), 0, 0.0
    for size in _BATCH_SIZES:
        try:
            batch = x.expand(size, *x.shape).contiguous(memory_format=order)
            speed = _speed(network, batch)
        except torch.OutOfMemoryError:
            if best:
                break
            raise InputError(
                f"a batch of {size} images does not fit into memory; give a smaller batch size"
            ) from None
        if speed > 1.02 * fastest:  # of equals the smaller batch
            best, fastest = size, speed
        elif speed < 0.9 * fastest:
            break
        if time.perf_counter() - start > _LIMIT:
            break
    return best


def _speed(network: Classifier, batch: Images) -> float:
    """Return images in a second, the best of several passes."""
    network(batch)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < _TRIAL or best == 0.0:
        before = time.perf_counter()
        network(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        best = max(best, len(batch) / (time.perf_counter() - before))
    return best

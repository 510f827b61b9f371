"""Voters answer draws with votes; one driver holds the procedures, whatever the voter.

Counts add. So a draw may be answered in parts, by a network that packs samples of many images
into batches, by a paid service or by other processes, and no result depends on it. A network sees
passes of one fixed shape, by which it is one function of each noisy image; they stand at the end.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.noise import Noise, Stream, StreamKey
from art_denoised.smoothing.stops import Counts, Draw, Procedure, Stage

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image, Images, Labels, Logits

NearTies = Literal["in_batch", "alone"]
_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_LIMIT = 6.0  # seconds for all of them, and for a last round
_ROUNDS = 10
T = TypeVar("T")
_TICK = 0.25  # seconds after which votes are read in any case, for deadlines


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
    tasks: Iterable[Task[T]],
    voter: Voter,
    *,
    until: float | None = None,
    tell: Callable[[int, int], None] | None = None,
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
        tell: Called with an index and a number of samples whenever votes come in, for progress.

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
        if tell is not None:
            tell(task.index, part.size)
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
    """A task under way."""

    draw: Draw  # what its procedure asks for at present
    reached: int  # first sample of the draw whose vote is missing
    votes: Counter[int]  # of the samples before that one
    answer: T  # what the procedure returned

    def __init__(self, task: Task[T]) -> None:
        self.task = task
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

    The noise of a sample does not depend on its batch, and passes have one fixed shape (`Passes`),
    so no vote depends on how samples are packed. Votes are counted on the device, and read when a
    draw is done or a quarter of a second has passed. On a GPU the next batch is launched before
    they are read; on a CPU that has a processor to spare, a thread draws its noise meanwhile.
    ``passes`` returns the passes of an image; it is asked once.
    """

    def __init__(
        self,
        network: Classifier,
        noise: Noise,
        seed: int,
        *,
        passes: Callable[[Image], Passes],
        batch_size: int,
    ) -> None:
        self._network, self._noise, self._seed = network, noise, seed
        self._find_passes, self._passes = passes, None  # type: tuple[Any, Passes | None]
        self._ahead = checks.model_device(network).type == "cuda"
        # Where torch computes on every processor, the thread would only take turns with it.
        spare = not self._ahead and torch.get_num_threads() < (os.cpu_count() or 1)
        self._thread = ThreadPoolExecutor(1) if spare else None  # ends with this voter
        self._batch_size = batch_size
        # Oldest first. A task that the driver has dropped is dropped here, too.
        self._samplers: WeakKeyDictionary[Task[Any], _Sampler] = WeakKeyDictionary()
        self._done: deque[tuple[Task[Any], Draw, Counts]] = deque()
        self._read = time.monotonic()

    @property
    def pending(self) -> int:
        """Number of samples submitted and not yet returned."""
        done = sum(draw.size for _, draw, _ in self._done)
        return done + self._wanted + self._unread

    @property
    def appetite(self) -> int:
        """Number of samples that fills the next batch, and on a GPU the one after it."""
        return self._unread + self._batch_size * (2 if self._ahead else 1)

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw."""
        if self._passes is None:
            self._passes = self._find_passes(task.x)
        if task not in self._samplers:
            self._samplers[task] = _Sampler(task, self._noise, self._seed, self._thread)
        self._samplers[task].ask(draw)

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return a submitted draw or a part of one with its votes."""
        while not self._done:
            held = self._countable()
            if not held:
                self._launch()
                held = self._countable()
            reading = _Reading(held)
            if self._ahead and self._wanted >= self._batch_size:
                self._launch()
            self._done.extend(reading.votes())
        return self._done.popleft()

    def close(self) -> None:
        """Forget what was submitted."""
        self._samplers.clear()
        self._done.clear()

    @property
    def _wanted(self) -> int:
        return sum(sampler.wanted for sampler in self._samplers.values())

    @property
    def _unread(self) -> int:
        return sum(sampler.unread for sampler in self._samplers.values())

    def _launch(self) -> None:
        """Fill a batch with samples of the oldest tasks, classify it, and count the votes."""
        pieces: list[Images] = []
        parts: list[tuple[_Sampler, int]] = []
        room = self._batch_size
        for sampler in self._samplers.values():
            if size := min(sampler.wanted, room):
                parts.append((sampler, size))
                pieces += sampler.take(size)
                room -= size
                sampler.draw_ahead(self._batch_size)
        assert self._passes is not None
        labels, classes = self._passes(self._network, torch.cat(pieces))
        shares = torch.split(labels, [size for _, size in parts])
        for (sampler, _), share in zip(parts, shares, strict=True):
            sampler.count(share, classes)

    def _countable(self) -> list[tuple[Task[Any], _Sampler]]:
        """Return whose votes are to be read now: of draws that are done, at times of all."""
        late = time.monotonic() - self._read > _TICK
        held = [(t, s) for t, s in self._samplers.items() if s.unread and (late or not s.wanted)]
        if held:
            self._read = time.monotonic()
        return held


class _Sampler:
    """Noisy copies of one image, as its present draw wants them, and the votes on them."""

    wanted = 0  # samples of the draw that are in no batch yet
    unread = 0  # samples whose votes are counted on the device and not read yet

    def __init__(
        self, task: Task[Any], noise: Noise, seed: int, thread: ThreadPoolExecutor | None
    ) -> None:
        self._index, self._noise, self._seed = task.index, noise, seed
        self._shape, self._device = task.x.shape, task.x.device
        # Channels-last in memory, as the noise is: their sum is three times faster so.
        centre = noise.centre(task.x).permute(1, 2, 0).contiguous()
        self._centre = centre.permute(2, 0, 1)
        self._streams: dict[Stage, Stream] = {}
        self._thread, self._drawing = thread, None  # type: tuple[Any, Any]
        self._drawn: deque[Images] = deque()  # noise for what is wanted
        self.tally: torch.Tensor | None = None  # votes by class; the last is for NaN

    def ask(self, draw: Draw) -> None:
        """Begin a draw, where the last one of its stage ended if it goes on from there."""
        stream = self._streams.get(draw.stage)
        if stream is None or stream.position != draw.start:
            key = StreamKey(self._seed, self._index, draw.stage)
            stream = Stream(self._noise, key, self._shape, self._device, draw.start)
        self._stream = self._streams[draw.stage] = stream
        self._stage, self.wanted, self._position = draw.stage, draw.size, draw.start

    def take(self, n: int) -> list[Images]:
        """Return the next ``n`` of the noisy copies that are wanted."""
        self.wanted -= n
        self.unread += n
        self._position += n
        return [self._noise.add(self._centre, piece) for piece in self._pieces(n)]

    def draw_ahead(self, n: int) -> None:
        """Draw the noise of up to ``n`` samples that are still wanted, in the thread."""
        size, stream = min(n, self.wanted), self._stream
        if size and self._thread is not None and not self._drawn:
            self._drawing = self._thread.submit(lambda: list(stream.pieces(size)))

    def _pieces(self, n: int) -> Iterator[Images]:
        if self._drawing is not None:
            self._drawn.extend(self._drawing.result())
            self._drawing = None
        while n and self._drawn:
            piece = self._drawn.popleft()
            if len(piece) > n:
                self._drawn.appendleft(piece[n:])
            yield piece[:n]
            n -= min(n, len(piece))
        yield from self._stream.pieces(n)

    def count(self, labels: Labels, classes: int) -> None:
        """Count votes on the device. Sums of integers do not depend on their order."""
        if self.tally is None:
            self.tally = labels.new_zeros(classes + 1)
        self.tally.scatter_add_(0, labels, torch.ones_like(labels))

    def read(self) -> tuple[Draw, torch.Tensor]:
        """Return the part of the draw that is counted and its votes, and begin a new count."""
        assert self.tally is not None
        stop, tally = self._position, self.tally
        part = Draw(self._stage, stop - self.unread, stop)
        self.unread, self.tally = 0, None
        return part, tally


class _Reading:
    """Votes on their way from the device; launched work does not wait for them, nor they for it."""

    def __init__(self, held: Sequence[tuple[Task[Any], _Sampler]]) -> None:
        read = [(task, *sampler.read()) for task, sampler in held]
        self._parts = [(task, part) for task, part, _ in read]
        self._copied: torch.cuda.Event | None = None
        if read:
            tallies = torch.stack([tally for _, _, tally in read])
            self._tallies = tallies.to("cpu", non_blocking=True)
            if tallies.is_cuda:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()

    def votes(self) -> Iterator[tuple[Task[Any], Draw, Counts]]:
        """Yield each task with its part of a draw and the votes, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        for place, (task, part) in enumerate(self._parts):
            *votes, failed = self._tallies[place].tolist()
            if failed:
                raise checks.nan_logits()
            yield task, part, {label: number for label, number in enumerate(votes) if number}


@dataclass(frozen=True)
class Passes:
    """How noisy images are passed to a network (docs/decisions/0011-fixed-shapes.md).

    Attributes:
        batch_size: Number of images in every pass. The last pass is padded.
        order: Memory order of the images.
        near_ties: "in_batch" if the answer to an image was bitwise the same in every place of a
            batch and beside other images. "alone" if not: a sample whose leading logits are near
            each other is then decided by a pass over it alone.
    """

    batch_size: int
    order: torch.memory_format
    near_ties: NearTies

    @classmethod
    def tried(
        cls, network: Classifier, x: Image, batch_size: int, near_ties: NearTies | None = None
    ) -> Passes:
        """Return the passes of a network, after a trial on noisy copies of an image.

        ``near_ties`` is the rule of a run that this is a part of; None: what the trial finds.
        """
        order = memory_order(network, x)
        try:
            holds = near_ties != "alone" and _answers_each_alike(network, x, batch_size, order)
        except torch.OutOfMemoryError:
            raise _too_large(batch_size) from None
        if near_ties == "in_batch" and not holds:
            raise InputError(
                "here the network's answer depends on the place in a batch, but not where the run "
                "was begun; compute on machines of one kind"
            )
        return cls(batch_size, order, "in_batch" if holds else "alone")

    @torch.no_grad()
    def __call__(self, network: Classifier, x: Images) -> tuple[Labels, int]:
        """Classify up to ``batch_size`` images, without waiting for the device.

        Returns:
            The class of each image, or the number of classes where it has none (`unreadable`); and
            the number of classes.
        """
        n, missing = len(x), self.batch_size - len(x)
        padded = functional.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        batch = padded.to(checks.model_dtype(network)).contiguous(memory_format=self.order)
        given = batch if self.near_ties == "in_batch" else batch.clone()  # may be written into
        logits = checks.logit_rows(network(given), self.batch_size)[:n]
        labels = logits.argmax(1)
        if self.near_ties == "alone":
            for i in _near_ties(logits, batch):
                labels[i] = checks.logits(network(batch[i : i + 1].contiguous()), 1).argmax(1)[0]
        classes = logits.shape[1]
        return labels.masked_fill(checks.unreadable(logits), classes), classes


def _near_ties(logits: Logits, batch: Images) -> list[int]:
    """Return the samples whose two leading logits rounding may part. It waits for the device."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    clear = first - second > logits.abs().amax(1) * checks.near(logits, batch)
    return (~clear & ~checks.unreadable(logits)).nonzero().flatten().tolist()


@torch.no_grad()
def _answers_each_alike(
    network: Classifier, x: Image, batch_size: int, order: torch.memory_format
) -> bool:
    """Return whether logits are bitwise equal in other places and beside other images."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn((batch_size, *x.shape), generator=draw)
    places = torch.randperm(batch_size, generator=draw)
    batch = (x + 0.25 * noise.to(x)).to(checks.model_dtype(network))
    mixed, kept = batch[places], batch_size // 2 + 1
    mixed[kept:] = torch.rand(mixed[kept:].shape, generator=draw).to(mixed)
    mixed[(kept + batch_size) // 2 :] = 0  # as the last pass is padded

    def answers(images: Images) -> Logits:
        return checks.logits(network(images.contiguous(memory_format=order)), batch_size)

    return torch.equal(answers(mixed)[:kept], answers(batch)[places[:kept]])


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

    A wrong one costs a factor of time on a CPU. Votes of near ties depend on the batch size, so a
    run keeps the one that it was begun with.

    Args:
        network: Module or function from images to logits, in eval mode.
        x: An image (channels, height, width).

    Raises:
        InputError: Not even the smallest batch that is tried fits into memory.

    Example:
        >>> best_batch_size(torch.nn.Flatten(), torch.zeros(1, 8, 8)) >= 16
        True
    """
    x = checks.placed(x, network)
    order = memory_order(network, x)
    start, rates = time.perf_counter(), dict[int, float]()
    for size in _BATCH_SIZES:
        try:
            _rate(network, x, size, order)  # warms up
            rates[size] = _rate(network, x, size, order)
        except torch.OutOfMemoryError:
            if rates:
                break
            raise _too_large(size) from None
        if rates[size] < 0.8 * max(rates.values()) or time.perf_counter() - start > _LIMIT:
            break
    # Other programs disturb a pass, so that the sizes take turns and each has its best one.
    for _ in range(_ROUNDS):
        for size in [size for size, rate in rates.items() if rate > 0.5 * max(rates.values())]:
            rates[size] = max(rates[size], _rate(network, x, size, order))
        if time.perf_counter() - start > _LIMIT:
            break
    near = 0.98 * max(rates.values())
    return next(size for size, rate in rates.items() if rate >= near)  # of equals the smallest


def _too_large(batch_size: int) -> InputError:
    return InputError(
        f"a batch of {batch_size} images does not fit into memory; give a smaller batch size"
    )


def _rate(network: Classifier, x: Image, size: int, order: torch.memory_format) -> float:
    """Return images in a second, in one pass."""
    batch = x.expand(size, *x.shape).contiguous(memory_format=order)
    before = time.perf_counter()
    network(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return size / max(time.perf_counter() - before, 1e-9)
